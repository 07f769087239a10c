"""What a model makes of a task, marked by the task's rules. Prompts are lines of the validation split.

words      text goes on after a few lines, at temperature 1; score: the share of words that keep all the rules
addition   the same; the share of lines of the form, and of those that are also right. Besides, sums are asked for that
           were never trained on: `A + B =` after a few lines, answered by the likeliest bytes
actions    up to ten lines before, and a line through its digit; right where the likeliest continuation begins with the
           result, `;` and a newline. Each action is asked for equally often: the digit of the line is replaced by it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mbtrain.errors import DataError
from mbtrain.tasks.rules import DIGITS, LARGEST_TERM, SLICE, addends, data_of, result, word_fits

# Prompts, bytes to make of each -> their continuations, which may be shorter.
Continue = Callable[[Sequence[bytes], int, float], list[bytes]]

LINES_BEFORE = {"words": 4, "addition": 2, "actions": 10}
LINES_EACH = 20  # made of each prompt, of words and sums
ASKED_SUMS = 500
BATCH = 100


@dataclass(frozen=True)
class Marks:
    """What came of a task.

    samples    lines that were marked
    score      the share of them that is right (words: keeps all the rules)
    scores     by kind: of addition `form`, `right`, `right_seen` and `right_unseen` (of the lines whose pair was, or
               was not, trained on) and `asked_unseen`; of actions each digit. None: there was nothing to mark
    counts     of what each of the scores is the share
    wrong      some lines that are not right, as they came
    """

    samples: int
    score: float
    scores: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()


def mark(
    task: str, go_on: Continue, lines: Sequence[str], samples: int, seed: int, trained: str, temperature: float | None
) -> Marks:
    """Mark `samples` lines of a task (of actions: of each action).

    Args:
        task: of `rules.TASKS`.
        go_on: the model.
        lines: whole lines of the validation split, in their order.
        samples: how many lines are made and marked, at least.
        seed: of the choice of prompts.
        trained: the text of the training split; addition alone looks at it.
        temperature: of what is marked; None: 1 of words and addition, 0 of actions.

    Raises:
        DataError: there are too few lines for a prompt, or they are not of this task.
    """
    if len(lines) <= LINES_BEFORE[task] + 1:
        raise DataError(f"{task}: expected more than {LINES_BEFORE[task] + 1} lines for validation, got {len(lines)}")
    draw = np.random.Generator(np.random.Philox(key=[seed, 1]))
    if task == "actions":
        return _actions(go_on, lines, samples, draw, temperature or 0.0)
    heat = 1.0 if temperature is None else temperature
    made = _made_lines(task, go_on, lines, samples, draw, heat)
    return _words(made) if task == "words" else _addition(made, go_on, lines, trained, draw)


def _made_lines(
    task: str, go_on: Continue, lines: Sequence[str], samples: int, draw: np.random.Generator, temperature: float
) -> list[tuple[str, list[str]]]:
    """(line, the lines before it) of what the model goes on with after some lines, at places drawn at random."""
    before = LINES_BEFORE[task]
    longest = {"words": len("abcdef;\n"), "addition": len("100 + 100 = 200;\n")}[task]
    made: list[tuple[str, list[str]]] = []
    while len(made) < samples:
        number = min(BATCH, -(-(samples - len(made)) // LINES_EACH))
        starts = draw.integers(0, len(lines) - before, number)
        prompts = [list(lines[start : start + before]) for start in starts]
        texts = go_on(["".join(f"{line}\n" for line in p).encode() for p in prompts], LINES_EACH * longest, temperature)
        for prompt, text in zip(prompts, texts, strict=True):
            # What follows the last newline is cut off, not wrong; without any newline all of it is one wrong line.
            whole = _text(text).split("\n")
            whole = whole[:-1][:LINES_EACH] if len(whole) > 1 else whole
            made += [(line, [*prompt, *whole[:i]]) for i, line in enumerate(whole)]
    return made[:samples]


def _words(made: list[tuple[str, list[str]]]) -> Marks:
    fits = [word_fits(line, before) for line, before in made]
    wrong = [line for (line, _), fit in zip(made, fits, strict=True) if not fit]
    return Marks(len(made), sum(fits) / len(made), wrong=tuple(wrong[:5]))


def _addition(
    made: list[tuple[str, list[str]]], go_on: Continue, lines: Sequence[str], trained: str, draw: np.random.Generator
) -> Marks:
    seen = {parts[:2] for line in trained.splitlines() if (parts := addends(line)) is not None}
    sums = [(line, addends(line)) for line, _ in made]
    of_form = [parts for _, parts in sums if parts is not None]
    right = [(a, b) in seen for a, b, c in of_form if a + b == c]
    known = [(a, b) in seen for a, b, _ in of_form]
    asked = _asked_sums(go_on, lines, seen, draw)
    hits_of = {
        "form": (len(of_form), len(made)),
        "right": (len(right), len(made)),
        "right_seen": (sum(right), sum(known)),
        "right_unseen": (len(right) - sum(right), len(known) - sum(known)),
        "asked_unseen": (sum(asked), len(asked)),
    }
    counts = {name: of for name, (_, of) in hits_of.items()}
    scores = {name: hits / of if of else None for name, (hits, of) in hits_of.items()}
    wrong = [line for line, parts in sums if parts is None or parts[0] + parts[1] != parts[2]]
    return Marks(len(made), len(right) / len(made), scores, counts, tuple(wrong[:5]))


def _asked_sums(
    go_on: Continue, lines: Sequence[str], seen: set[tuple[int, int]], draw: np.random.Generator
) -> list[bool]:
    """Whether sums of pairs that were never trained on are right; such pairs are drawn at random."""
    terms = range(LARGEST_TERM + 1)
    unseen = [(a, b) for a in terms for b in terms if (a, b) not in seen]
    pairs = [unseen[i] for i in draw.permutation(len(unseen))[:ASKED_SUMS]]
    before = LINES_BEFORE["addition"]
    prompts = []
    for a, b in pairs:
        start = int(draw.integers(0, len(lines) - before))
        prompts.append("".join(f"{line}\n" for line in lines[start : start + before]) + f"{a} + {b} =")
    # The blank belongs to the answer: tokens of words begin with it.
    answers = [f" {a + b};\n" for a, b in pairs]
    return _answered(go_on, prompts, answers, len(" 200;\n"), 0.0)[0]


def _actions(
    go_on: Continue, lines: Sequence[str], samples: int, draw: np.random.Generator, temperature: float
) -> Marks:
    prompts, answers = [], []
    for action in DIGITS:
        # Lines are taken again only where there are fewer of them than samples.
        places = np.concatenate([draw.permutation(len(lines) - 1) + 1 for _ in range(-(-samples // (len(lines) - 1)))])
        for place in places[:samples].tolist():
            data, before = data_of(lines[place]), data_of(lines[place - 1])
            given = lines[max(0, place - LINES_BEFORE["actions"]) : place]
            prompts.append("".join(f"{line}\n" for line in given) + data + action)
            answers.append(f"{result(action, data, before)};\n")
    fits, texts = _answered(go_on, prompts, answers, SLICE + len(";\n"), temperature)
    of = {action: fits[i * samples : (i + 1) * samples] for i, action in enumerate(DIGITS)}
    scores: dict[str, float | None] = {action: sum(right) / samples for action, right in of.items()}
    wrong = [
        f"{prompt.rpartition(chr(10))[2]} -> {text!r}, expected {answer!r}"
        for prompt, text, answer, fit in zip(prompts, texts, answers, fits, strict=True)
        if not fit
    ]
    shown = tuple(wrong[:: max(1, len(wrong) // 5)][:5])
    return Marks(len(fits), sum(fits) / len(fits), scores, dict.fromkeys(DIGITS, samples), shown)


def _answered(
    go_on: Continue, prompts: Sequence[str], answers: Sequence[str], longest: int, temperature: float
) -> tuple[list[bool], list[str]]:
    """Whether each prompt's continuation begins with its answer, and the continuations."""
    texts: list[str] = []
    for first in range(0, len(prompts), BATCH):
        batch = [prompt.encode() for prompt in prompts[first : first + BATCH]]
        texts += [_text(text) for text in go_on(batch, longest, temperature)]
    return [text.startswith(answer) for text, answer in zip(texts, answers, strict=True)], texts


def _text(made: bytes) -> str:
    return made.decode("latin-1")
