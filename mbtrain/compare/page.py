"""The page: one HTML file that loads nothing, neither from the network nor from beside itself.

Its policy (Content-Security-Policy) lets a browser run and draw only what is in it and was made here, by hashes of the
style and the script: a name or a sample that broke out of its place would still load and run nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mbtrain import __version__
from mbtrain.compare.curves import TITLES, Panel, amount
from mbtrain.compare.groups import Group, Section, Spread, differences, equal_costs, spread, unlike
from mbtrain.compare.look import SCRIPT, STYLE
from mbtrain.compare.markup import Markup, element, joined, shown
from mbtrain.compare.reading import AXES, Evaluated, Run, Sample
from mbtrain.compare.vectors import bar, chart, colour

NONE = "—"
MOST_SAMPLE_GROUPS = 24
MOST_SAMPLE_BYTES = 24 << 20  # of all samples of a page: beyond, the rest are named
_MIME = {".png": "image/png", ".wav": "audio/wav"}
_ON = {"whole split": "", "first part": "first part of the split", "training": "training, smoothed", "nothing": ""}


def render(sections: Sequence[tuple[Section, Sequence[Panel]]], command: str) -> str:
    """The whole page of the sections with their panels; `command` is what made it."""
    runs = [run for section, _ in sections for group in section.groups for run in group.runs]
    groups = sum(len(section.groups) for section, _ in sections)
    policy = (
        "default-src 'none'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}"
    )
    title = f"{_number(len(runs), 'run')} compared"
    budget = [MOST_SAMPLE_BYTES]
    head = (
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"mbtrain: {title}"),
        element("style", Markup(STYLE)),
    )
    body = (
        element("h1", title),
        element("p", _opening(sections, len(runs), groups), _class="muted"),
        [_section(number, section, panels, budget) for number, (section, panels) in enumerate(sections)],
        _closing(command),
        element("script", Markup(SCRIPT)),
    )
    return f"<!doctype html>\n{element('html', element('head', *head), element('body', *body), lang='en')}\n"


def _opening(sections: Sequence[tuple[Section, Sequence[Panel]]], runs: int, groups: int) -> str:
    text = f"{_number(groups, 'group')} of seeds. " if groups < runs else ""
    if len(sections) > 1:
        text += f"{len(sections)} data sets: scores can be compared within each, not between them. "
    return text + "Lower is better everywhere. Pointing at a curve, a name or a row shows it alone."


def _section(number: int, section: Section, panels: Sequence[Panel], budget: list[int]) -> Markup:
    groups = section.groups
    content = [element("h2", section.title), element("p", _lead(section), _class="lead")]
    if panels:
        content += [
            _legend(groups),
            _key(),
            element("div", [_figure(p, groups, number) for p in panels], _class="panels"),
        ]
    content += [element("h3", "Scores and costs"), _scores(groups), *_every_run(groups), *_at_equal_cost(groups)]
    content += [*_differences(groups), *_samples(groups, budget), *_notes(groups)]
    return element("section", content)


def _lead(section: Section) -> str:
    """The outcome in a sentence."""
    modality = f"{section.modality[:1].upper()}{section.modality[1:]}. " if section.modality != "unknown" else ""
    scored = [group for group in section.groups if math.isfinite(group.score.mean) and group.scored_on == "whole split"]
    if not scored:
        return f"{modality}No run has scored its whole validation split yet."
    best = scored[0]
    text = f"{modality}Best: {best.name} with {best.score.mean:.4f} bits per byte of the whole validation split"
    if len(best.runs) > 1:
        text += f" (mean of {len(best.runs)} runs, {best.score.low:.4f} to {best.score.high:.4f})"
    if len(scored) > 1:
        second = scored[1]
        text += f", {second.score.mean - best.score.mean:.4f} below {second.name}"
        if second.score.low <= best.score.high and len(best.runs) > 1:
            text += "; their ranges overlap"
    return text + "."


def _legend(groups: Sequence[Group]) -> Markup:
    items = [element("li", _named(group, i), data_g=i, _class=colour(i)) for i, group in enumerate(groups)]
    if len(items) > 30:
        summary = element("summary", f"{len(items)} names; the ten best have colours")
        return element("details", summary, element("ul", items, _class="legend"))
    return element("ul", items, _class="legend")


def _named(group: Group, index: int) -> Markup:
    count = element("small", f" ×{len(group.runs)}") if len(group.runs) > 1 else ""
    swatch = element("span", "", _class=f"swatch {colour(index)}")
    return joined([swatch, element("span", group.name, _class="name"), count])


def _key() -> Markup:
    """What lines and points mean."""

    def drawn(*shapes: Markup) -> Markup:
        return element("svg", shapes, viewBox="0 0 28 12", _class="cx", aria_hidden="true")

    line = element("path", _class="train", d="M1 8L9 5L27 4")
    dots = element("path", _class="val", d="M2 6L26 6")
    items = (
        (drawn(line), "training, smoothed"),
        (drawn(dots, element("circle", _class="val", cx=14, cy=6, r=3)), "validation, whole split"),
        (drawn(dots, element("circle", _class="partial", cx=14, cy=6, r=3)), "validation, first part"),
        (drawn(element("path", _class="band", d="M1 2L27 2L27 10L1 10Z"), line), "mean, lowest and highest of seeds"),
    )
    return element("div", [element("span", picture, text) for picture, text in items], _class="key-of")


def _figure(panel: Panel, groups: Sequence[Group], number: int) -> Markup:
    caption = element("figcaption", f"Bits per byte {TITLES[panel.axis]}")
    return element("figure", caption, chart(panel, groups, str(number)))


# --- Tables --------------------------------------------------------------------------------------------------------


def _scores(groups: Sequence[Group]) -> Markup:
    modes = list(dict.fromkeys((e.split, e.mode) for group in groups for run in group.runs for e in run.evaluated))
    known = [g.score for g in groups if math.isfinite(g.score.mean)]
    limits = _limits(known)
    heads = ["group or run", "bits per byte", "", *(f"{mode}, {split}" for split, mode in modes)]
    heads += ["model", "parameters", "FLOP a byte", "data", "compute", "time", "speed", "MFU", "memory"]
    rows = [element("tr", _score_cells(g, i, modes, limits), data_g=i) for i, g in enumerate(groups)]
    return _table(heads, rows, left=("group or run", "model", ""), sort=True)


def _score_cells(
    group: Group, index: int, modes: Sequence[tuple[str, str]], limits: tuple[float, float]
) -> Iterator[Markup]:
    runs, score = group.runs, group.score
    ends = list(dict.fromkeys(run.origin.status for run in runs))
    yield element("td", _named(group, index), "" if ends == ["finished"] else element("p", ", ".join(ends)))
    told = element("b", _bits(score.mean))
    yield _cell(told, _score_note(group), value=score.mean if math.isfinite(score.mean) else "")
    drawn = bar(score, limits) if math.isfinite(score.mean) else ""
    yield element("td", element("span", drawn, _class=colour(index)), _class="left")
    for mode in modes:
        yield _evaluated_cell([e for run in runs for e in run.evaluated if (e.split, e.mode) == mode], len(runs))
    kinds = ", ".join(dict.fromkeys(run.origin.kind for run in runs))
    yield element("td", kinds, element("small", _shorten([run.origin.stages for run in runs])), _class="left")
    yield _amount(runs, lambda run: math.nan if run.origin.parameters is None else run.origin.parameters, _count)
    yield _amount(runs, lambda run: run.flops_per_byte, lambda value: amount("flops", value))
    for axis in AXES:
        yield _amount(runs, partial(Run.spent, axis=axis), partial(amount, axis))
    yield _amount(runs, lambda run: run.perf["perf/bytes_per_s"], lambda value: f"{amount('bytes', value)}/s")
    yield _amount(runs, lambda run: run.perf["perf/mfu"], lambda value: f"{value:.0%}")
    yield _amount(runs, lambda run: run.perf["mem/peak_bytes"], lambda value: amount("bytes", value))


def _score_note(group: Group) -> str:
    """What stands below a score: on what, and from where to where."""
    parts = [_ON[group.scored_on]] if _ON[group.scored_on] else []
    if len(group.runs) > 1 and math.isfinite(group.score.mean):
        parts.append(f"{_bits(group.score.low)} to {_bits(group.score.high)}")
    return ", ".join(parts)


def _evaluated_cell(found: Sequence[Evaluated], of: int) -> Markup:
    """Mean over seeds with the ends of the interval; of several seeds those of the widest reach."""
    if not found:
        return _cell(NONE, value="")
    mean = sum(e.bpb for e in found) / len(found)
    lows = [e.low for e in found if math.isfinite(e.low)]
    highs = [e.high for e in found if math.isfinite(e.high)]
    notes = [f"{_bits(min(lows))} to {_bits(max(highs))}"] if lows and highs else []
    notes += [f"{len(found)} of {of} runs"] if len(found) < of else []
    return _cell(_bits(mean), *notes, value=mean)


def _amount(runs: Sequence[Run], of: Callable[[Run], float], told: Callable[[float], str]) -> Markup:
    mean = spread([of(run) for run in runs]).mean
    return _cell(told(mean) if math.isfinite(mean) else NONE, value=mean if math.isfinite(mean) else "")


def _cell(text: str, *notes: str, value: object) -> Markup:
    return element("td", text, [element("small", note) for note in notes if note], data_v=value)


def _every_run(groups: Sequence[Group]) -> Iterator[Markup]:
    """The runs of groups one by one."""
    if all(len(group.runs) == 1 for group in groups):
        return
    rows = []
    for i, group in enumerate(groups):
        for run in group.runs:
            alone = Group(run.name, (run,))
            on = _ON[alone.scored_on]
            rows.append(
                element(
                    "tr",
                    element("td", _named(alone, i)),
                    _cell(_bits(alone.score.mean), on, value=alone.score.mean),
                    [
                        _cell(amount(axis, run.spent(axis)) if run.spent(axis) > 0 else NONE, value=run.spent(axis))
                        for axis in AXES
                    ],
                    element("td", run.origin.status, _class="left"),
                    element("td", run.origin.device, _class="left"),
                    data_g=i,
                )
            )
    heads = ("run", "bits per byte", "data", "compute", "time", "end", "device")
    yield element(
        "details", element("summary", "Every run"), _table(heads, rows, left=("run", "end", "device"), sort=True)
    )


def _at_equal_cost(groups: Sequence[Group]) -> Iterator[Markup]:
    found = equal_costs(groups)
    if len(groups) < 2 or not found:
        return
    heads = ["group or run", *(f"after {amount(cost.axis, cost.budget)} of {_COST_NAMES[cost.axis]}" for cost in found)]
    best = [min((v for v in cost.bpb if math.isfinite(v)), default=math.nan) for cost in found]
    rows = []
    for i, group in enumerate(groups):
        cells = [element("td", _named(group, i))]
        for cost, lowest in zip(found, best, strict=True):
            value = cost.bpb[i]
            text: str = _bits(value) if math.isfinite(value) else NONE
            cells.append(_cell(element("b", text) if value == lowest else text, value=value))
        rows.append(element("tr", cells, data_g=i))
    yield element("h3", "At equal cost")
    yield element(
        "p",
        "Training bits per byte, smoothed, where each had spent the same: the most that three quarters of the groups "
        "did. A run at the end of its learning-rate decay is ahead of one that was still in the middle of it.",
        _class="muted",
    )
    yield _table(heads, rows, left=("group or run",), sort=True)


_COST_NAMES = {"bytes": "data", "flops": "compute", "minutes": "time"}


def _differences(groups: Sequence[Group]) -> Iterator[Markup]:
    """Settings that differ: a row for each setting, or for each group where there are more groups than settings."""
    found = differences(groups)
    if len([run for group in groups for run in group.runs]) < 2:
        return
    yield element("h3", "Settings that differ")
    if not found:
        yield element("p", "None but the names.", _class="muted")
        return
    if len(groups) > max(8, len(found)):
        rows = [
            element("tr", element("td", _named(group, i)), [_setting(values[i]) for _, values in found], data_g=i)
            for i, group in enumerate(groups)
        ]
        yield _table(("group or run", *(key for key, _ in found)), rows, left=None, sort=False)
        return
    heads: list[str] = ["setting", *(_named(group, i) for i, group in enumerate(groups))]
    rows = [element("tr", element("td", key, _class="key"), map(_setting, values)) for key, values in found]
    yield _table(heads, rows, left=None, sort=False)


def _setting(value: str) -> Markup:
    return element("td", value, _class="set")


def _table(heads: Sequence[str], rows: Sequence[Markup], *, left: Sequence[str] | None, sort: bool) -> Markup:
    """left: heads of columns of words, which stand at the left; None: all."""
    cells = []
    for head in heads:
        is_left = left is None or head in left
        content = element("button", head, type="button") if sort and head else head
        cells.append(element("th", content, scope="col", _class="left" if is_left else None))
    table = element(
        "table",
        element("thead", element("tr", cells)),
        element("tbody", rows),
        _class="sorted" if sort else None,
    )
    return element("div", table, _class="wide", tabindex=0)


# --- Samples and notes ---------------------------------------------------------------------------------------------


def _samples(groups: Sequence[Group], budget: list[int]) -> Iterator[Markup]:
    having = [(i, group) for i, group in enumerate(groups) if group.best.samples]
    if not having:
        return
    yield element("h3", "Samples")
    figures = []
    for i, group in having[:MOST_SAMPLE_GROUPS]:
        run = group.best
        for sample in run.samples[:1] if len(having) > 6 else run.samples:
            caption = element("figcaption", _named(Group(run.name, (run,)), i), element("small", f" {sample.name}"))
            figures.append(element("figure", caption, _sample(run.path, sample, budget), data_g=i))
    yield element("div", figures, _class="samples")
    if len(having) > MOST_SAMPLE_GROUPS:
        yield element("p", f"Those of the {MOST_SAMPLE_GROUPS} best; the others are in their runs.", _class="muted")


def _sample(folder: Path, sample: Sample, budget: list[int]) -> Markup:
    content = sample.content
    if content is None or len(content) > budget[0]:
        return element("p", f"Not shown for its size; see {folder / 'samples' / sample.name}", _class="muted")
    budget[0] -= len(content)
    if sample.suffix == ".txt":
        return element("pre", shown(content) or "(empty)")
    source = f"data:{_MIME[sample.suffix]};base64,{base64.b64encode(content).decode()}"
    if sample.suffix == ".png":
        return element("img", src=source, alt=f"sample {sample.name}")
    return element("audio", "", controls="", preload="metadata", src=source)


def _notes(groups: Sequence[Group]) -> Iterator[Markup]:
    items = []
    for group in groups:
        if differing := unlike(group):
            keys = ", ".join(differing[:6]) + (" and more" if len(differing) > 6 else "")
            items.append(f"{group.name}: its runs are shown as seeds of one experiment, but differ in {keys}")
        items += [f"{run.name}: {'; '.join(run.notes)}" for run in group.runs if run.notes]
    if items:
        yield element("h3", "Notes")
        yield element("ul", [element("li", item) for item in items], _class="notes")


def _closing(command: str) -> Markup:
    text = (
        "Bits per byte: nats summed over all targets of the whole validation split / ln 2 / its bytes, the last time "
        "it was scored. Ranges below a score are the lowest and the highest seed; those of evaluations are intervals "
        "by bootstrap over documents. Compute is training FLOPs by formula, matrix products alone. Bytes/s and MFU are "
        "medians over the run; memory is the largest process's peak, on a GPU what was allocated there. "
        f"mbtrain {__version__}: "
    )
    return element("section", element("h2", "How this was measured"), element("p", text, element("code", command)))


# --- Words ---------------------------------------------------------------------------------------------------------


def _bits(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.4f}" if math.isfinite(value) else "infinite"


def _count(value: float) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _shorten(words: Sequence[str], most: int = 60) -> str:
    text = ", ".join(dict.fromkeys(word for word in words if word)) or NONE
    return text if len(text) <= most else text[: most - 1] + "…"


def _limits(scores: Sequence[Spread]) -> tuple[float, float]:
    """Of the pictures of scores; what is far behind the others stands at the edge."""
    if not scores:
        return 0.0, 1.0
    means = sorted(score.mean for score in scores)
    low, high = min(score.low for score in scores), max(score.high for score in scores)
    return low, min(high, means[len(means) // 2] + 4 * max(means[len(means) // 2] - low, 0.05))


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
