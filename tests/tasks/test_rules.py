"""The rules of the small tasks, against lists of what is right and what is wrong.

pytest tests/tasks/test_rules.py
"""

from __future__ import annotations

import itertools

import pytest

from mbtrain.tasks.rules import addends, data_of, result, word_fits

NONE: list[str] = []


@pytest.mark.parametrize("word", ["bade;", "kujodi;", "bafe;", "hogeca;"])
def test_words_that_fit(word: str) -> None:
    assert word_fits(word, NONE)
    assert word_fits(word, ["cade;", "dafe;", "fage;"])


@pytest.mark.parametrize(
    "word",
    [
        "bade",  # no end
        "bade;;",
        "bade ;",
        ";",
        "",
        "bad;",  # lengths other than 4 and 6
        "badec;",
        "badecofi;",
        "abed;",  # a vowel first
        "bdae;",  # two consonants
        "baed;",
        "babe;",  # a letter twice
        "bacada;",
        "bale;",  # letters that there are none of
        "Bade;",
        "bady;",
    ],
)
def test_words_that_break_a_rule(word: str) -> None:
    assert not word_fits(word, NONE)


def test_a_first_letter_waits_for_three_words() -> None:
    before = ["bade;", "cafe;", "dago;", "fuho;"]
    fits = {first for first in "bcdfghjk" if word_fits(f"{first}iko;", before) or word_fits(f"{first}oja;", before)}
    assert fits == set("bghjk"), "b stands four words before"
    assert word_fits("bade;", ["", ";", "x"])


def test_as_many_words_fit_as_there_are() -> None:
    """8 x 5 x 7 x 4 of four letters: no rule is too strict, none too loose."""
    letters = "bcdfghjkaeiou"
    assert sum(word_fits("".join(word) + ";", NONE) for word in itertools.product(letters, repeat=4)) == 8 * 5 * 7 * 4


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("2 + 86 = 88;", (2, 86, 88)),
        ("100 + 100 = 200;", (100, 100, 200)),
        ("0 + 0 = 7;", (0, 0, 7)),
        ("101 + 0 = 101;", None),
        ("02 + 0 = 2;", None),
        ("2 + 2 = 04;", None),
        ("2 + 2 = 4", None),
        ("2 + 2 =4;", None),
        ("2  + 2 = 4;", None),
        (" 2 + 2 = 4;", None),
        ("2 - 2 = 0;", None),
        ("2 + 2 = ;", None),
        ("2 + 2 = 4;\n", None),
        ("٢ + 2 = 4;", None),
        ("", None),
    ],
)
def test_lines_of_the_form(line: str, parts: tuple[int, int, int] | None) -> None:
    assert addends(line) == parts


def test_results_of_actions() -> None:
    """The definition's example, and each action on data whose letters differ."""
    assert f"acbafbe3{result('3', 'acbafbe', '')};" == "acbafbe3gih;"
    made = [result(action, "abcdef", "fedcbaf") for action in "0123456789"]
    assert made == ["", "abc", "def", "ghi", "jkl", "fed", "baf", "lkj", "hgl", "z"]
    assert [data_of(line) for line in ("abcdef0;", "aaaa9z;", "", "abc")] == ["abcdef", "aaaa", "", "abc"]
