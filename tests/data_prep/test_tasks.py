"""Small tasks: every line keeps the rules as a second, naive reading of them has it, and is as likely as it should be.

pytest tests/data_prep/test_tasks.py
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.tasks import make_task, text_of
from mbtrain.errors import ConfigError, DataError
from mbtrain.shards import open_split
from mbtrain.tasks.rules import floor_nats_per_byte

LINES = 20_000


def run(args: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(args)
    return int(end.value.code or 0)


def lines_of(task: str, lines: int = LINES, seed: int = 0) -> list[str]:
    text = text_of(task, "train", lines, seed).decode("ascii")
    assert text.endswith(";\n")
    return text[:-1].split("\n")


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---- a naive reading of the rules, with the probability of each line ------------------------------------------------


def probability_of_word(line: str, before: list[str]) -> float:
    """Of a line given those before it, letter by letter; 0 where a rule is broken."""
    if line[-1:] != ";":
        return 0.0
    word, p = line[:-1], 1.0
    for i, letter in enumerate(word):
        allowed = set("bcdfghjk" if i % 2 == 0 else "aeiou") - set(word[:i])
        if i == 0:
            allowed -= {other[0] for other in before[-3:]}
        if letter not in allowed:
            return 0.0
        p /= len(allowed)
        if i == 4:  # it could have stopped
            p /= 2
    if len(word) == 4:
        return p / 2
    return p if len(word) == 6 else 0.0


def probability_of_addition(line: str) -> float:
    """A and B, each one of 101; the rest follows."""
    a, plus, b, equals, c = line.split(" ")
    assert (plus, equals) == ("+", "=")
    assert line == f"{int(a)} + {int(b)} = {int(a) + int(b)};"
    return 101.0**-2 if 0 <= int(a) <= 100 and 0 <= int(b) <= 100 and c == f"{int(a) + int(b)};" else 0.0


def probability_of_action(line: str, before: str | None) -> float:
    """Length, letters, digit; the rest follows."""
    at = next(i for i, letter in enumerate(line) if letter in "0123456789")
    data, action, rest = line[:at], line[at], line[at + 1 :]
    old = "" if before is None else "".join(letter for letter in before.split(next(filter(str.isdigit, before)))[0])
    moved = dict(zip("abcdef", "ghijkl", strict=True))
    table = {
        "0": "",
        "1": data[0:3],
        "2": data[len(data) - 3 :],
        "3": "".join(moved[x] for x in data[0:3]),
        "4": "".join(moved[x] for x in data[len(data) - 3 :]),
        "5": old[0:3],
        "6": old[len(old) - 3 :],
        "7": "".join(moved[x] for x in old[0:3]),
        "8": "".join(moved[x] for x in old[len(old) - 3 :]),
        "9": "z",
    }
    fits = 4 <= len(data) <= 8 and set(data) <= set("abcdef") and rest == f"{table[action]};"
    return (1 / 5) * (1 / 6) ** len(data) * (1 / 10) if fits else 0.0


def test_the_reader_of_actions_agrees_with_the_definitions_example() -> None:
    assert probability_of_action("acbafbe3gih;", None) == (1 / 5) * (1 / 6) ** 7 * (1 / 10)
    assert probability_of_action("acbafbe3ghi;", None) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_every_word_keeps_the_rules_and_the_floor_is_their_entropy(seed: int) -> None:
    lines = lines_of("words", seed=seed)
    p = [probability_of_word(line, lines[max(0, i - 3) : i]) for i, line in enumerate(lines)]
    assert min(p) > 0
    assert -sum(map(math.log, p)) / sum(len(line) + 1 for line in lines) == pytest.approx(1.2413, rel=3e-3)
    assert floor_nats_per_byte("words") == pytest.approx(1.2413, abs=5e-5)
    assert Counter(len(line) for line in lines)[5] / len(lines) == pytest.approx(0.5, abs=0.015)
    assert all(n == pytest.approx(LINES / 8, rel=0.1) for n in Counter(line[0] for line in lines).values())
    assert all(n == pytest.approx(LINES / 5, rel=0.1) for n in Counter(line[1] for line in lines).values())


def test_every_sum_is_right_and_the_floor_is_their_entropy() -> None:
    lines = lines_of("addition")
    p = [probability_of_addition(line) for line in lines]
    assert min(p) > 0
    assert -sum(map(math.log, p)) / sum(len(line) + 1 for line in lines) == pytest.approx(0.6445, rel=3e-3)
    assert floor_nats_per_byte("addition") == pytest.approx(0.6445, abs=5e-5)
    first, second = (Counter(line.split(" ")[i] for line in lines) for i in (0, 2))
    assert len(first) == len(second) == 101
    assert max(first.values()) < 2 * LINES / 101
    assert len(set(lines)) > 8000, "A and B are drawn apart"


def test_every_action_gives_its_result_and_the_floor_is_their_entropy() -> None:
    lines = lines_of("actions")
    p = [probability_of_action(line, lines[i - 1] if i else None) for i, line in enumerate(lines)]
    assert min(p) > 0
    assert -sum(map(math.log, p)) / sum(len(line) + 1 for line in lines) == pytest.approx(1.2750, rel=3e-3)
    assert floor_nats_per_byte("actions") == pytest.approx(1.2750, abs=5e-5)
    digits = Counter(next(filter(str.isdigit, line)) for line in lines)
    assert len(digits) == 10
    assert all(n == pytest.approx(LINES / 10, rel=0.1) for n in digits.values())
    lengths = Counter(
        len(line.rstrip("ghijklz;").rstrip("0123456789")) for line in lines if line[-2:-1] in "0123456789"
    )
    assert set(lengths) == {4, 5, 6, 7, 8}


def test_the_first_line_of_actions_needs_none_before_it() -> None:
    firsts = {next(filter(str.isdigit, lines_of("actions", 1, seed)[0])) for seed in range(200)}
    assert firsts == set("012349")


def test_seeds_and_splits_differ_and_more_lines_begin_as_fewer() -> None:
    for task in ("words", "addition", "actions"):
        one = text_of(task, "train", 50, 0)
        assert text_of(task, "train", 50, 0) == one
        assert text_of(task, "train", 60, 0).startswith(one)
        assert len({one, text_of(task, "val", 50, 0), text_of(task, "train", 50, 1)}) == 3


# ---- the data set ---------------------------------------------------------------------------------------------------


def test_the_shards_hold_the_lines_of_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    assert run(["task", "words", f"--out={out}", "--seed=3", "--lines=300", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = {split: open_split(out, split, "full").read(0) for split in ("train", "val")}
    assert text == {"train": text_of("words", "train", 300, 3), "val": text_of("words", "val", 1000, 3)}
    assert (out / "words.txt").read_bytes() == text["train"] + text["val"]
    assert figures["bytes"] == len(text["train"] + text["val"])
    prep = json.loads((out / "manifest.json").read_text())["prep"]
    assert {key: prep[key] for key in ("task", "seed", "lines")} == {"task": "words", "seed": 3, "lines": 300}
    assert run(["verify", str(out)]) == 0


@pytest.mark.parametrize(("task", "lines"), [("words", 8000), ("addition", 8000), ("actions", 50_000)])
def test_by_itself_it_makes_as_many_lines_as_the_definition_says(tmp_path: Path, task: str, lines: int) -> None:
    make_task(task, tmp_path)
    assert open_split(tmp_path, "train").read(0).count(b"\n") == lines
    assert open_split(tmp_path, "val").read(0).count(b"\n") == max(1000, lines // 10)


def test_the_same_options_give_the_same_files_and_nothing_is_done_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_task("actions", tmp_path / name, seed=5, lines=100)
    there = files(tmp_path / "a")
    assert there == files(tmp_path / "b")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    make_task("actions", tmp_path / "a", seed=5, lines=100)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    (tmp_path / "a" / "manifest.json").unlink()  # killed before the end: goes on
    make_task("actions", tmp_path / "a", seed=5, lines=100, overwrite=True)
    assert files(tmp_path / "a") == there


@pytest.mark.parametrize("changed", [{"seed": 1}, {"lines": 11}, {"task": "addition"}])
def test_another_data_set_is_not_replaced_unasked(tmp_path: Path, changed: dict[str, object]) -> None:
    first: dict[str, object] = {"task": "words", "seed": 0, "lines": 10}
    make_task("words", tmp_path, seed=0, lines=10)
    there = files(tmp_path)
    wanted = {**first, **changed}
    arguments = [str(wanted["task"]), f"--out={tmp_path}", f"--seed={wanted['seed']}", f"--lines={wanted['lines']}"]
    with pytest.raises(DataError, match="--overwrite") as error:
        make_task(str(wanted["task"]), tmp_path, seed=int(str(wanted["seed"])), lines=int(str(wanted["lines"])))
    assert "\n" not in str(error.value)
    assert files(tmp_path) == there
    assert run(["task", *arguments, "--overwrite"]) == 0
    assert open_split(tmp_path, "train").read(0) == text_of(
        str(wanted["task"]), "train", int(str(wanted["lines"])), int(str(wanted["seed"]))
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["task"], "TASK: expected one of words, addition, actions"),
        (["task", "wards", "--out={}"], "got 'wards'"),
        (["task", "words"], "--out"),
        (["task", "words", "--out={}", "--lines=0"], "--lines"),
        (["task", "words", "--out={}", "--sed=1"], "--sed"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([arg.format(tmp_path / "out") for arg in args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_has_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of words, addition, actions"):
        make_task("code", tmp_path)
