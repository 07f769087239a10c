"""Data sets of small tasks whose rules are known exactly (`mbtrain.tasks.rules`): their lines, drawn at random.

A data set is DIR/<task>.txt, for people, and ordinary shards of it: the lines of `train`, then those of `val`, each
split one document. Lines follow one another in a split, and a split begins anew: its first line knows of none before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from data_prep.build import build
from data_prep.recipe import Recipe
from data_prep.text import text_modality
from mbtrain.errors import ConfigError, DataError
from mbtrain.shards import MANIFEST_NAME, Manifest, load_manifest, whole_file
from mbtrain.tasks.rules import CONSONANTS, DIGITS, LARGEST_TERM, LETTERS, VOWELS, WORDS_APART, result

LEAST_VALIDATION_LINES = 1000


def words(rng: random.Random) -> Iterator[str]:
    """Words without end, each `word;` and a newline.

    The first letter is a consonant that is not the first letter of any of the last three words; then vowels and
    consonants alternate, each uniform among the letters that are not yet in the word. At length 4 the word stops with
    chance 1/2, else at 6.
    """
    firsts: list[str] = []
    while True:
        word = _one([letter for letter in CONSONANTS if letter not in firsts], rng)
        firsts = [*firsts, word][-WORDS_APART:]
        while len(word) < 4 or (len(word) == 4 and rng.random() < 0.5) or len(word) == 5:
            word += _one([letter for letter in (VOWELS, CONSONANTS)[len(word) % 2 == 0] if letter not in word], rng)
        yield f"{word};\n"


def additions(rng: random.Random) -> Iterator[str]:
    """Lines `A + B = C;` without end, A and B uniform in 0..100."""
    while True:
        a, b = _below(LARGEST_TERM + 1, rng), _below(LARGEST_TERM + 1, rng)
        yield f"{a} + {b} = {a + b};\n"


def actions(rng: random.Random) -> Iterator[str]:
    """Lines DATA ACTION RESULT `;` without end and without blanks; see `rules.result`.

    The data are 4 to 8 letters of a..f, length and letters uniform, the action is a uniform digit. The first line has
    none before it, and so none of the actions 5 to 8.
    """
    before: str | None = None
    while True:
        data = "".join(_one(LETTERS, rng) for _ in range(4 + _below(5, rng)))
        action = _one(DIGITS if before is not None else "012349", rng)
        yield f"{data}{action}{result(action, data, before or '')};\n"
        before = data


# Of each task the lines without end, and how many are trained on by default.
GENERATORS: dict[str, tuple[Callable[[random.Random], Iterator[str]], int]] = {
    "words": (words, 8_000),
    "addition": (additions, 8_000),
    "actions": (actions, 50_000),
}


def text_of(task: str, split: str, lines: int, seed: int) -> bytes:
    """The lines of one split: the same on every machine, and others for every seed and split."""
    rng = random.Random(f"{task}/{split}/{seed}")
    return "".join(islice(GENERATORS[task][0](rng), lines)).encode()


def make_task(task: str, out: Path, *, seed: int = 0, lines: int | None = None, overwrite: bool = False) -> Manifest:
    """Make the data set of a task in `out`, or find that it is made already.

    Args:
        task: of `GENERATORS`.
        out: the data set's folder; the lines are written to `out`/<task>.txt, too.
        seed: other lines for every seed.
        lines: of the split `train`; None: as many as the task's definition says. `val` has a tenth of them, and
            LEAST_VALIDATION_LINES at least.
        overwrite: replace what another job made in `out`.

    Raises:
        ConfigError: there is no such task. DataError: `out` holds something else, or cannot be written.
    """
    if task not in GENERATORS:
        raise ConfigError(f"TASK: got {task!r}, expected one of {', '.join(GENERATORS)}")
    n = GENERATORS[task][1] if lines is None else lines
    train = text_of(task, "train", n, seed)
    val = text_of(task, "val", max(n // 10, LEAST_VALIDATION_LINES), seed)
    modality = text_modality("text")
    modality = replace(modality, options={**modality.options, "task": task, "seed": seed, "lines": n})
    source = out / f"{task}.txt"
    if not overwrite:
        _check_other(out, source, train + val, modality.options)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # What is there already is not written again: its time is compared with the data set's.
        if not source.is_file() or source.read_bytes() != train + val:
            with whole_file(source) as file:
                file.write(train + val)
    except OSError as error:
        raise DataError(f"{source}: cannot be written: {error.strerror}; choose another --out") from None
    sizes = {"train": len(train), "val": len(val)}
    recipe = Recipe(splits=None, split_bytes=tuple(sizes.items()), sample_bytes=max(sizes.values()))
    return build(modality, [str(source)], out, recipe, workers=1, overwrite=overwrite)


def _check_other(out: Path, source: Path, content: bytes, options: dict[str, object]) -> None:
    """Raise DataError where `out` holds another data set, or other lines, before anything in it is touched."""
    what = ""
    if (out / MANIFEST_NAME).is_file():
        there = load_manifest(out).prep
        keys = ("task", "seed", "lines")
        what = next((f"{k} = {there.get(k)!r}, not {options[k]!r}" for k in keys if there.get(k) != options[k]), "")
    elif source.is_file() and source.read_bytes() != content:
        what = f"other lines in {source.name}"
    if what:
        raise DataError(f"{out}: holds a data set with {what}; choose another --out, or --overwrite this one")


def _below(n: int, rng: random.Random) -> int:
    """Uniform in 0..n-1. Of Python's draws `random` alone is promised to stay as it is in all versions."""
    return int(rng.random() * n)


def _one(letters: str | list[str], rng: random.Random) -> str:
    return letters[_below(len(letters), rng)]
