"""The rules of the small tasks, as predicates on lines; knows no model. `mbtrain-prep task` makes lines by them.

words      words of alternating consonants and vowels, each followed by `;` and a newline
addition   `A + B = C;`
actions    DATA ACTION RESULT `;`: the action says which letters of this line's data, or of the line before, come again

The least that any model can need, in nats per byte with newlines counted, is each task's floor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

TASKS = ("words", "addition", "actions")
CONSONANTS, VOWELS = "bcdfghjk", "aeiou"
WORDS_APART = 3  # a word's first letter is not that of so many words before it
LARGEST_TERM = 100
LETTERS, MOVED = "abcdef", "ghijkl"
DIGITS = "0123456789"
SLICE = 3  # letters of a result

_ADDITION = re.compile(r"(0|[1-9]\d*) \+ (0|[1-9]\d*) = (0|[1-9]\d*);")


def word_fits(line: str, before: Sequence[str]) -> bool:
    """Whether a line, without its newline, is a word that keeps all rules; before: the lines before it.

    4 or 6 letters and `;`. Consonants and vowels alternate, a consonant comes first, no letter comes twice, and the
    first letter is not the first letter of any of the last three lines.
    """
    word = line[:-1]
    return (
        line.endswith(";")
        and len(word) in (4, 6)
        and all(letter in (CONSONANTS, VOWELS)[i % 2] for i, letter in enumerate(word))
        and len(set(word)) == len(word)
        and word[0] not in [other[:1] for other in before[-WORDS_APART:]]
    )


def addends(line: str) -> tuple[int, int, int] | None:
    """A, B and C of a line `A + B = C;`, numbers as they are written, A and B in 0..100; None of another form."""
    match = _ADDITION.fullmatch(line)
    if match is None or max(int(match[1]), int(match[2])) > LARGEST_TERM:
        return None
    return int(match[1]), int(match[2]), int(match[3])


def result(action: str, data: str, before: str) -> str:
    """What an action, a digit, makes of its line's data and of those of the line before.

    0 nothing; 1 the first 3 letters; 2 the last 3; 3 and 4 as 1 and 2 with a..f moved to g..l; 5 to 8 as 1 to 4 on the
    line before; 9 the letter z.
    """
    if action in "09":
        return "" if action == "0" else "z"
    kind = (int(action) - 1) % 4
    source = data if action in "1234" else before
    letters = source[:SLICE] if kind % 2 == 0 else source[-SLICE:]
    return letters.translate(str.maketrans(LETTERS, MOVED)) if kind >= 2 else letters


def data_of(line: str) -> str:
    """The data of a line of actions: its letters before the digit."""
    return re.split(r"\d", line, maxsplit=1)[0]


def floor_nats_per_byte(task: str) -> float:
    """The entropy of a task's lines, in nats per byte.

    words     a word has ln 5 (three of 8 consonants are taken) + ln 5 + ln 7 + ln 4, ln 2 to stop or not, and in half
              of the cases ln 6 + ln 3 more; it takes 5 letters in the mean, and 2 bytes: 1.2413
    addition  a line has 2 ln 101; its length is the mean over all pairs: 0.6445
    actions   a line has ln 5 for its length, 6 ln 6 for its letters, ln 10 for its action; 11.5 bytes: 1.2750
    """
    if task == "words":
        nats = 2 * math.log(5) + math.log(7) + math.log(4) + math.log(2) + (math.log(6) + math.log(3)) / 2
        return nats / (5 + 2)
    if task == "addition":
        terms = range(LARGEST_TERM + 1)
        length = sum(len(f"{a} + {b} = {a + b};\n") for a in terms for b in terms) / len(terms) ** 2
        return 2 * math.log(len(terms)) / length
    return (math.log(5) + 6 * math.log(6) + math.log(10)) / (6 + 1 + (8 * SLICE + 1) / 10 + 2)
