"""A coordinate check in words: a table of slopes, and where to look for what is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mbtrain.coord_check.slopes import Slope

MOST = 10  # complaints that are written out


def table(slopes: Sequence[Slope]) -> list[str]:
    """A Markdown table with a row for each tensor and weight: of its layers the slope furthest off, `!` outside."""
    steps = sorted({one.step for one in slopes})
    columns = [("size", step) for step in steps] + [("change", step) for step in steps[1:]]
    head = [*(f"size, step {step}" for step in steps), *(f"change, step {step}" for step in steps[1:])]
    lines = [_row(["tensor", *head]), _row(["---", *(["--:"] * len(columns))])]
    for row in dict.fromkeys(one.place[:2] for one in slopes if one.what != "update"):
        of = [one for one in slopes if one.place[:2] == row]
        cells = [_cell([one for one in of if (one.what, one.step) == column]) for column in columns]
        lines.append(_row([" ".join(row), *cells]))
    lines += ["", _row(["weight", "role", f"update, step {steps[-1]}", "band"]), _row(["---", "---", "--:", "---"])]
    for row in dict.fromkeys(one.place[:2] for one in slopes if one.what == "update"):
        of = [one for one in slopes if one.place[:2] == row and one.what == "update"]
        band = f"{of[0].low:+.2f} to {of[0].high:+.2f}"
        lines.append(_row([" ".join(row), of[0].role, _cell(of), band]))
    return lines


def complaints(slopes: Sequence[Slope], which: str) -> list[str]:
    """What is outside its band, of each tensor the worst layer and step, with where to look.

    Causes come first: updates of weights, and sizes before training. What grows in training follows from them.
    """
    worst: dict[tuple[str, ...], Slope] = {}
    for one in sorted(slopes, key=lambda one: one.outside):
        if one.outside:
            worst[one.what, *one.place[:2]] = one
    ordered = sorted(worst.values(), key=lambda one: (one.what != "update" and one.step != 0, -one.outside))
    lines = [f"{described(one)}: {look_at(one, which)}" for one in ordered[:MOST]]
    return lines + ([f"and {len(ordered) - MOST} more"] if len(ordered) > MOST else [])


def described(one: Slope) -> str:
    """One slope: what of which tensor, when, how much, and the band it left."""
    slope = f"{one.slope:+.2f}" if math.isfinite(one.slope) else "not a finite number, or 0"
    return f"{one.what} of {one.place}, step {one.step}: slope {slope}, expected {one.low:+.2f} to {one.high:+.2f}"


def look_at(one: Slope, which: str) -> str:
    """What a slope outside its band points to (model/mup.py has the rules, engine.parameter_groups uses them)."""
    grows = not one.slope < one.low
    if which == "depth":
        return "the branches' multiplier and the LRs in blocks (model.mup.depth_power)"
    if one.what == "update":
        if one.role in ("hidden", "project"):
            return (
                "its LR falls too slowly: 1 / fan-in, of its own stage"
                if grows
                else "its LR falls too fast, or with the width of another stage"
            )
        if one.role == "readout":
            return f"multiplier and LR of the readout: a + c {'below' if grows else 'above'} 1 (model.mup.readout)"
        return "its LR: constant in width, but for model.mup.embedding_lr_power"
    if one.place.part == "scores":
        return "the multiplier of queries (model.mup.attention_power), and attn.qkv"
    if one.step == 0:
        if one.place.part == "logits":
            return f"init and multiplier of the readout: a + b {'too small' if grows else 'too large'}"
        return f"the init of what comes before it: std falls too {'slowly' if grows else 'fast'} with fan-in"
    if one.place.part == "logits":
        return "the readout's multiplier and LR, and the updates of what comes before it"
    return (
        f"the updates of the weights before it are too {'large' if grows else 'small'} in wide models; the first such"
    )


def _cell(of: Sequence[Slope]) -> str:
    if not of:
        return ""
    one = max(of, key=lambda one: (one.outside, abs(one.slope)))
    text = f"{one.slope:+.2f}" if math.isfinite(one.slope) else "nan"
    return text + (" !" if one.outside else "")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
