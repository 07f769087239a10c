"""What a person reads: a row a check, remedies below what is wrong, memory by ZeRO stage, and the verdict last."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mbtrain.doctor.checks import Status
from mbtrain.doctor.examine import Report

_COLORS = {"ok": "32", "warning": "33", "problem": "31", "skipped": "2"}
_PARTS = ("weights", "gradients", "optimizer", "exchange", "activations")


def lines(report: Report, *, width: int | None = None, color: bool | None = None) -> Iterator[str]:
    """The table; as wide as the terminal (at most 120) and with color on one, unless told otherwise."""
    width = min(shutil.get_terminal_size().columns, 120) if width is None else width
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    names = max((len(check.name) for check in report.checks), default=0)
    indent = " " * (len("problem") + 2 + names + 2)
    for check in report.checks:
        head = f"{_painted(check.status, color)}{' ' * (len('problem') - len(check.status))}  {check.name:{names}}  "
        rows = textwrap.wrap(check.found, width - len(indent), break_on_hyphens=False) or [""]
        yield head + rows[0]
        yield from (indent + row for row in rows[1:])
        if check.remedy and check.status in ("warning", "problem"):
            rows = textwrap.wrap(check.remedy, width - len(indent) - 3, break_on_hyphens=False)
            yield from (indent + ("-> " if i == 0 else "   ") + row for i, row in enumerate(rows))
    if report.predicted:
        yield ""
        yield from _memory(report)
    yield ""
    status: Status = "problem" if not report.ready else "warning" if "warning" in report.verdict else "ok"
    yield _painted(status, color, report.verdict)


def _memory(report: Report) -> Iterator[str]:
    largest = max(need.total for need in report.predicted.values())
    unit, divisor = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)

    def row(label: str, *counts: float) -> str:
        return f"{label:{70 - 8 * len(counts)}}" + "".join(f"{count / divisor:8.2f}" for count in counts)

    heads = ("weights", "grads", "optim.", "exch.", "activ.", "peak")
    yield f"{f'memory of a rank, {unit}':22}" + "".join(f"{head:>8}" for head in heads)
    for stage, need in report.predicted.items():
        label = f"ZeRO-{stage}{', as configured' if stage == report.stage else ''}"
        yield row(label, *(getattr(need, part) for part in _PARTS), need.total)
    of_ranks = report.step.get("ranks", [])
    if of_ranks and "peak_bytes" in of_ranks[0]:
        on_cpu = of_ranks[0]["device"] == "cpu"
        yield row("measured" + (", libraries of some 130 MB included" if on_cpu else ""), _most(of_ranks, "peak_bytes"))
        if on_cpu:
            yield row("resident: freed memory is kept, as in training", _most(of_ranks, "resident_bytes"))


def _most(of_ranks: list[dict[str, Any]], key: str) -> float:
    return float(max(of[key] for of in of_ranks))


def figures(report: Report) -> dict[str, Any]:
    """The report for --json; bytes, seconds and operations a second."""
    return {
        "verdict": report.verdict,
        "ready": report.ready,
        "checks": [asdict(check) for check in report.checks],
        "hosts": {host.name: host.slots for host in report.hosts},
        "memory": {str(stage): {**asdict(need), "total": need.total} for stage, need in report.predicted.items()},
        "sums": report.step.get("sums"),
        "ranks": report.step.get("ranks", []),
    }


def _painted(status: Status, color: bool, text: str | None = None) -> str:
    text = text or status
    return f"\x1b[{_COLORS[status]}m{text}\x1b[0m" if color else text
