"""Marks of makers whose faults are known: one that makes every line right, and ones that break a rule now and then.

pytest tests/tasks/test_marking.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from data_prep.tasks import text_of
from mbtrain.errors import DataError
from mbtrain.tasks.marking import LINES_BEFORE, mark
from mbtrain.tasks.rules import DIGITS, data_of, result


def lines_of(task: str, lines: int = 60) -> list[str]:
    return text_of(task, "val", lines, 0).decode().split("\n")[:-1]


class Maker:
    """Goes on as the task wants it; every `wrong`-th line is spoilt. Keeps what it was asked."""

    def __init__(self, task: str, wrong: int | None = None, spoilt: str = "oo;"):
        self.task, self.wrong, self.spoilt, self.made = task, wrong, spoilt, 0
        self.prompts: list[str] = []
        self.temperatures: set[float] = set()

    def __call__(self, prompts: Sequence[bytes], n_bytes: int, temperature: float) -> list[bytes]:
        self.prompts += [prompt.decode() for prompt in prompts]
        self.temperatures.add(temperature)
        return [self.go_on(prompt.decode(), n_bytes).encode()[:n_bytes] for prompt in prompts]

    def line(self, right: str) -> str:
        self.made += 1
        return self.spoilt if self.wrong is not None and self.made % self.wrong == 0 else right

    def go_on(self, prompt: str, n_bytes: int) -> str:
        if self.task == "words":
            # four words whose first letters differ, over and over; the prompt's are others, or far enough behind
            firsts = [line[0] for line in prompt.splitlines()[-3:]]
            free = [first for first in "bcdfghjk" if first not in firsts][:4]
            tails = {first: "ako;" if first != "k" else "aho;" for first in free}
            return "".join(self.line(free[i % 4] + tails[free[i % 4]]) + "\n" for i in range(n_bytes // 5))
        if self.task == "addition":
            if (asked := re.search(r"(\d+) \+ (\d+) =$", prompt)) is not None:
                return self.line(f" {int(asked[1]) + int(asked[2])};") + "\n"
            return "".join(self.line(f"{i} + 100 = {i + 100};") + "\n" for i in range(n_bytes // 13))
        *before, line = prompt.split("\n")
        return self.line(f"{result(line[-1], line[:-1], data_of(before[-1]))};") + "\nabc"


@pytest.mark.parametrize("task", ["words", "addition", "actions"])
def test_who_makes_no_mistake_has_all_marks(task: str) -> None:
    maker = Maker(task)
    marks = mark(task, maker, lines_of(task), 37, 0, "0 + 100 = 100;\n", None)
    assert marks.score == 1
    assert marks.samples == (370 if task == "actions" else 37)
    assert all(share in (1, None) for share in marks.scores.values())
    assert marks.wrong == ()
    # words and sums are drawn as the model says; of actions and of sums that are asked for the likeliest is taken
    assert maker.temperatures == {"words": {1.0}, "addition": {1.0, 0.0}, "actions": {0.0}}[task]


def test_the_share_of_spoilt_words_is_found() -> None:
    marks = mark("words", Maker("words", wrong=10), lines_of("words"), 200, 0, "", None)
    assert marks.score == pytest.approx(0.9, abs=0.01)
    assert set(marks.wrong) == {"oo;"}


def test_a_first_letter_that_came_in_the_prompt_is_wrong() -> None:
    def again(prompts: Sequence[bytes], n_bytes: int, temperature: float) -> list[bytes]:
        return [prompt.splitlines()[-1] + b"\n" for prompt in prompts]

    assert mark("words", again, lines_of("words"), 20, 0, "", None).score == 0


def test_a_line_that_is_cut_off_is_not_marked_and_one_without_end_is_wrong() -> None:
    def cut(prompts: Sequence[bytes], n_bytes: int, temperature: float) -> list[bytes]:
        free = [next(f for f in b"bcdfghjk" if f not in [w[0] for w in p.splitlines()[-3:]]) for p in prompts]
        return [bytes([first]) + b"ako;\nxx" if first != ord("k") else b"kaho;\nxx" for first in free]

    assert mark("words", cut, lines_of("words"), 20, 0, "", None).score == 1
    assert mark("words", lambda prompts, n, heat: [b"ba"] * len(prompts), lines_of("words"), 20, 0, "", None).score == 0


def test_sums_are_marked_by_form_by_right_and_by_what_was_trained_on() -> None:
    trained = "".join(f"{i} + 100 = {i + 100};\n" for i in range(0, 101, 2))
    maker = Maker("addition", wrong=4, spoilt="3 + 100 = 104;")  # of the form, wrong, and of a pair that is not known
    marks = mark("addition", maker, lines_of("addition"), 200, 0, trained, None)
    assert marks.scores["form"] == 1
    assert marks.score == marks.scores["right"] == pytest.approx(0.75, abs=0.01)
    assert marks.scores["right_seen"] == 1
    assert marks.scores["right_unseen"] is not None
    assert marks.scores["right_unseen"] < 0.75
    assert marks.counts["right_seen"] + marks.counts["right_unseen"] == marks.counts["form"] == 200
    assert marks.scores["asked_unseen"] == pytest.approx(0.75, abs=0.01)
    asked = [prompt.rpartition("\n")[2] for prompt in maker.prompts if prompt.endswith(" =")]
    assert len(set(asked)) == len(asked) == marks.counts["asked_unseen"] == 500
    assert not {f"{line}\n"[: len(prompt)] for line in trained.splitlines() for prompt in asked} & set(asked)
    formless = mark(
        "addition", Maker("addition", wrong=4, spoilt="3+5=8;"), lines_of("addition"), 200, 0, trained, None
    )
    assert formless.scores["form"] == formless.score == pytest.approx(0.75, abs=0.01)


def test_each_action_is_asked_for_equally_often_after_lines_that_follow_one_another() -> None:
    lines, maker = lines_of("actions"), Maker("actions")
    mark("actions", maker, lines, 100, 0, "", None)
    text = "\n".join(lines)
    asked = [prompt.rpartition("\n") for prompt in maker.prompts]
    assert [sum(line[-1] == action for *_, line in asked) for action in DIGITS] == [100] * 10
    for before, _, line in asked:
        assert 1 <= len(before.splitlines()) <= LINES_BEFORE["actions"]
        assert f"{before}\n{line[:-1]}" in text
    assert max(len(before.splitlines()) for before, *_ in asked) == LINES_BEFORE["actions"]


def test_one_action_that_goes_wrong_is_named() -> None:
    class Forgetful(Maker):
        def line(self, right: str) -> str:
            return right

        def go_on(self, prompt: str, n_bytes: int) -> str:
            made = super().go_on(prompt, n_bytes)
            return made.replace(";", "") if prompt[-1] == "7" else made

    marks = mark("actions", Forgetful("actions"), lines_of("actions"), 30, 0, "", None)
    assert marks.scores == {action: float(action != "7") for action in DIGITS}
    assert marks.score == pytest.approx(0.9)
    assert all("expected" in line and "7 ->" in line for line in marks.wrong)


def test_seeds_ask_for_other_lines_and_the_same_seed_for_the_same() -> None:
    makers = [Maker("actions") for _ in range(3)]
    for maker, seed in zip(makers, (0, 0, 1), strict=True):
        mark("actions", maker, lines_of("actions"), 5, seed, "", None)
    assert makers[0].prompts == makers[1].prompts != makers[2].prompts


def test_too_few_lines_are_refused() -> None:
    for task, before in LINES_BEFORE.items():
        with pytest.raises(DataError, match=f"more than {before + 1} lines"):
            mark(task, Maker(task), lines_of(task, before + 1), 5, 0, "", None)


def test_a_temperature_that_is_given_holds() -> None:
    maker = Maker("actions")
    mark("actions", maker, lines_of("actions"), 5, 0, "", 1.0)
    assert maker.temperatures == {1.0}
    assert np.isfinite(maker.made)
