"""A data set on one page: samples as what they are, lengths, byte values, and how far the bytes compress.

Drawn by matplotlib's Agg: no display, no global state of pyplot.
"""

from __future__ import annotations

import codecs
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.stats import extent_said, scores_of
from mbtrain.media.audio import spectrogram, to_pcm
from mbtrain.shards import Manifest, Split, load_manifest, open_split, whole_file

SAMPLES = 16

_COLOR, _COLOR_LIGHT = "#4c78a8", "#b8cbe0"
_INK, _MUTED, _LINE, _PAPER = "#333333", "#767676", "#bbbbbb", "#f6f6f4"
_SIZE_INCHES, _DPI = (17.0, 11.5), 100
_MONO = "DejaVu Sans Mono"  # comes with matplotlib
_TEXT_LINES, _TEXT_COLUMNS = 7, 84
_HEARD_S = 30.0
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def draw(root: Path, figures: dict[str, Any], target: Path) -> None:
    """Draw the data set in `root`, of which `data_prep.stats.stats` gave the figures, to a PNG file (1700 x 1150).

    Raises:
        DataError: the data set is damaged.
        OSError: target cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    manifest = load_manifest(root)
    splits = {name: open_split(root, name) for name, info in manifest.splits.items() if info.samples}
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    _heading(figure, Path(root).resolve().name, figures)
    sheet = figure.add_gridspec(1, 1, left=0.035, right=0.655, top=0.905, bottom=0.03)[0]
    {"text": _texts, "image": _images, "audio": _sounds}[manifest.modality](figure, sheet, manifest, splits)
    right = figure.add_gridspec(
        4, 1, left=0.735, right=0.975, top=0.885, bottom=0.03, hspace=0.55, height_ratios=[1, 1, 0.9, 0.75]
    )
    lengths = np.concatenate([split.lengths for split in splits.values()]) if splits else np.zeros(0, np.int64)
    _draw_lengths(figure.add_subplot(right[0]), manifest, lengths, figures)
    _draw_bytes(figure.add_subplot(right[1]), figures)
    _draw_scores(figure.add_subplot(right[2]), figures)
    _draw_sum(figure.add_subplot(right[3]), figures)
    for split in splits.values():
        split.close()
    with whole_file(target) as file:
        canvas.print_png(file)


def chosen(sizes: dict[str, int], count: int = SAMPLES) -> list[tuple[str, int]]:
    """(split, sample number) of up to `count` samples, evenly spaced in each split; all splits have about as many.

    sizes: the number of samples of each split.
    """
    quotas = dict.fromkeys(sizes, 0)
    while sum(quotas.values()) < min(count, sum(sizes.values())):
        # the split that has fewest so far and some left; of several the first
        name = min((name for name in sizes if quotas[name] < sizes[name]), key=lambda name: quotas[name])
        quotas[name] += 1
    return [(name, (2 * i + 1) * sizes[name] // (2 * quota)) for name, quota in quotas.items() for i in range(quota)]


def text_head(head: bytes, drawable: Callable[[str], bool] = str.isprintable) -> Iterator[str]:
    r"""Lines of the text at the start of a document; what cannot be drawn is shown as the \xNN of its bytes.

    A character that was cut off at the end of `head` is left out.
    """
    text = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode(head)
    for line in text.replace("\r\n", "\n").split("\n"):
        characters = line.expandtabs(4)
        yield "".join(c if drawable(c) else "".join(f"\\x{byte:02x}" for byte in c.encode()) for c in characters)


# ---- the sheet of samples -----------------------------------------------------------------------------------------


def _sizes(splits: dict[str, Split]) -> dict[str, int]:
    return {name: len(split) for name, split in splits.items()}


def _images(figure: Any, sheet: Any, manifest: Manifest, splits: dict[str, Split]) -> None:
    tiles = sheet.subgridspec(4, 4, wspace=0.06, hspace=0.14)
    for place, (name, i) in zip(tiles, chosen(_sizes(splits)), strict=False):
        split = splits[name]
        height, width = split.image_size(i)
        axes = figure.add_subplot(place)
        pixels = np.frombuffer(split.read(i), np.uint8).reshape(height, width, 3)
        # matplotlib's own choice smooths what is shrunk; what is enlarged is to be seen pixel by pixel
        axes.imshow(pixels, interpolation="auto" if max(height, width) > 270 else "nearest")
        axes.set_axis_off()
        axes.set_title(f"{name} {i}  ·  {height} × {width}", fontsize=8, color=_MUTED, pad=3)


def _sounds(figure: Any, sheet: Any, manifest: Manifest, splits: dict[str, Split]) -> None:
    tiles = sheet.subgridspec(4, 4, wspace=0.14, hspace=0.30)
    rate, encoding = int(manifest.prep.get("sample_rate", 16_000)), str(manifest.prep.get("encoding", "pcm16"))
    width = 1 if encoding == "mulaw8" else 2
    for number, (place, (name, i)) in enumerate(zip(tiles, chosen(_sizes(splits)), strict=False)):
        split = splits[name]
        frames = int(split.lengths[i]) // width
        heard = min(frames, round(_HEARD_S * rate))
        pcm = to_pcm(split.read(i, 0, heard * width), encoding)
        above, below = place.subgridspec(2, 1, hspace=0.0, height_ratios=[1, 1.6])
        cut = f", first {_HEARD_S:g} s" if heard < frames else ""
        wave, sound = figure.add_subplot(above), figure.add_subplot(below)
        _waveform(wave, pcm, rate)
        wave.set_title(f"{name} {i}  ·  {frames / rate:.2f} s{cut}", fontsize=8, color=_MUTED, pad=3)
        sound.imshow(
            spectrogram(pcm, rate),
            origin="lower",
            aspect="auto",
            extent=(0, max(heard / rate, 0.025), 0, rate / 2000),  # of one window at least
            cmap="magma",
            vmin=-90,
            vmax=-20,
        )
        _plain(sound)
        sound.tick_params(labelsize=7, labelleft=number % 4 == 0)
        sound.locator_params(nbins=4)
        if number % 4 == 0:
            sound.set_ylabel("kHz", fontsize=7, color=_MUTED, labelpad=2)
        if number >= 12:
            sound.set_xlabel("s", fontsize=7, color=_MUTED, labelpad=0)


def _waveform(axes: Any, pcm: np.ndarray, rate: int) -> None:
    """The loudest and the lowest value in each of the columns of a tile, so that no peak is lost."""
    columns = min(240, len(pcm))
    edges = np.linspace(0, len(pcm), columns + 1).astype(int)
    parts = [pcm[a:b] for a, b in zip(edges, edges[1:], strict=False)] or [np.zeros(1, np.int16)]
    parts = parts * 2 if len(parts) == 1 else parts
    low, high = (np.array([int(pick(part)) for part in parts]) / 32768 for pick in (np.min, np.max))
    loudest = max(0.01, float(np.abs(np.concatenate([low, high])).max()))
    middle, half = (high + low) / 2, np.maximum((high - low) / 2, 0.015 * loudest)  # silence is a line, not nothing
    axes.fill_between(np.arange(len(parts)), middle - half, middle + half, color=_COLOR, linewidth=0, step="mid")
    axes.set(xlim=(0, len(parts) - 1), ylim=(-1.05 * loudest, 1.05 * loudest), xticks=[], yticks=[])
    axes.text(0.99, 0.95, f"±{loudest:.2f}", transform=axes.transAxes, ha="right", va="top", fontsize=6.5, color=_MUTED)
    axes.set_facecolor(_PAPER)
    axes.spines[:].set_visible(False)


def _texts(figure: Any, sheet: Any, manifest: Manifest, splits: dict[str, Split]) -> None:
    tiles = sheet.subgridspec(8, 2, wspace=0.03, hspace=0.28)
    for place, (name, i) in zip(tiles, chosen(_sizes(splits)), strict=False):
        split = splits[name]
        length = int(split.lengths[i])
        head = split.read(i, 0, min(length, 4 * _TEXT_LINES * _TEXT_COLUMNS))
        lines: list[str] = []
        for line in text_head(head.lstrip(b"\r\n") or head, _drawable):
            lines += textwrap.wrap(line, _TEXT_COLUMNS, drop_whitespace=False, replace_whitespace=False) or [""]
        axes = figure.add_subplot(place)
        axes.set(xticks=[], yticks=[], facecolor=_PAPER)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{name} {i}  ·  {length:,} bytes", fontsize=8, color=_MUTED, pad=3, loc="left")
        axes.text(
            0.012,
            0.93,
            "\n".join(lines[:_TEXT_LINES]),
            transform=axes.transAxes,
            va="top",
            fontsize=6.9,
            family=_MONO,
            color=_INK,
            linespacing=1.25,
            parse_math=False,
        )


def _drawable(character: str) -> bool:
    return character.isprintable() and ord(character) in _characters()


@cache
def _characters() -> frozenset[int]:
    """What the font for text has a picture of."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(_MONO)).get_charmap())


# ---- figures ------------------------------------------------------------------------------------------------------


def _heading(figure: Any, name: str, figures: dict[str, Any]) -> None:
    splits = "  ·  ".join(f"{split} {info['samples']:,}" for split, info in figures["splits"].items())
    size = f"{figures['samples']:,} samples  ·  {_amount(figures['bytes'])} in {figures['shards']} shards"
    figure.text(0.035, 0.972, name, fontsize=17, color=_INK, weight="bold", va="center", parse_math=False)
    line = f"{figures['modality']}  ·  {size}  ·  {splits}"
    figure.text(0.035, 0.944, line, fontsize=10.5, color=_MUTED, va="center", parse_math=False)


def _draw_lengths(axes: Any, manifest: Manifest, lengths: np.ndarray, figures: dict[str, Any]) -> None:
    _plain(axes)
    prep, per_unit, unit = manifest.prep, 1.0, "bytes"
    if manifest.modality == "audio":
        per_unit, unit = float(prep.get("sample_rate", 16_000)) * (1 if prep.get("encoding") == "mulaw8" else 2), "s"
    _title(
        axes, "lengths of samples", f"median {_number(np.median(lengths) / per_unit)} {unit}" if len(lengths) else ""
    )
    if len(lengths) == 0 or lengths.min() == lengths.max():
        axes.set(xticks=[], yticks=[])
        all_of = (
            f"all {len(lengths):,}: {_number(float(lengths[0]) / per_unit)} {unit}" if len(lengths) else "no sample"
        )
        axes.text(0.5, 0.5, all_of, transform=axes.transAxes, ha="center", va="center", fontsize=11, color=_INK)
        return
    low, high = float(lengths.min()) / per_unit, float(lengths.max()) / per_unit
    wide = high / low > 20
    bins = np.geomspace(low, high, 41) if wide else np.linspace(low, high, 41)
    bins[0], bins[-1] = low, high  # geomspace may miss them by a rounding
    axes.hist(lengths / per_unit, bins=bins, color=_COLOR)
    axes.set(xscale="log" if wide else "linear", xlim=(low, high))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if not wide:
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: _number(value))
    axes.set_xlabel(unit, fontsize=8, color=_INK)
    axes.set_ylabel("samples", fontsize=8, color=_INK)


def _draw_bytes(axes: Any, figures: dict[str, Any]) -> None:
    _plain(axes)
    histogram = np.array([split["histogram"] for split in figures["splits"].values()], np.int64).sum(axis=0)
    _title(axes, "byte values", _spaced(extent_said(figures, "histogram_bytes")))
    total = max(1, int(histogram.sum()))
    axes.bar(np.arange(256), histogram / total * 100, width=1.0, color=_COLOR, linewidth=0)
    axes.set(yscale="log", xlim=(-0.5, 255.5))
    if histogram.any():
        axes.set_ylim(max(1e-6, histogram[histogram > 0].min() / total * 50), histogram.max() / total * 200)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xticks([0, 32, 64, 96, 128, 160, 192, 224, 255])
    axes.set_xlabel("byte", fontsize=8, color=_INK)
    axes.set_ylabel("% of bytes", fontsize=8, color=_INK)


def _draw_scores(axes: Any, figures: dict[str, Any]) -> None:
    _plain(axes)
    scores = scores_of(figures)
    dimension = " = bits per dimension" if figures["modality"] == "image" else ""
    _title(axes, f"bits per byte{dimension}", "")
    where = np.arange(len(scores))
    axes.barh(where, [8] * len(scores), height=0.62, color=_PAPER)
    colors = [_COLOR_LIGHT if label == "entropy" else _COLOR for label, _ in scores]
    axes.barh(where, [bpb for _, bpb in scores], height=0.62, color=colors)
    for at, (_, bpb) in zip(where, scores, strict=True):
        inside = bpb > 6.5
        axes.text(
            min(bpb, 8) + (-0.12 if inside else 0.12),
            at,
            f"{bpb:.4f}",
            va="center",
            ha="right" if inside else "left",
            fontsize=9,
            color="white" if inside and colors[at] == _COLOR else _INK,
        )
    axes.set(xlim=(0, 8), yticks=where, yticklabels=[label for label, _ in scores])
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.tick_params(axis="y", labelsize=9)
    axes.spines[["bottom"]].set_visible(False)
    on = f"entropy {extent_said(figures, 'histogram_bytes')}, compressors {extent_said(figures, 'codec_bytes')}"
    if figures["codec_bytes"] == figures["histogram_bytes"]:
        on = extent_said(figures, "codec_bytes")
    axes.set_xlabel(textwrap.fill(_spaced(on), 62), fontsize=8, color=_MUTED)


def _draw_sum(axes: Any, figures: dict[str, Any]) -> None:
    axes.set_axis_off()
    rows = [("found", "found"), ("= samples", "samples"), ("+ duplicates", "duplicates")]
    rows += [("+ near-duplicates", "near_duplicates"), ("+ rejected", "rejected")]
    rows += [("", ""), ("passed over", "passed_over"), ("unused bytes", "unused_bytes")]
    for number, (label, key) in enumerate(rows):
        height, color = 1.0 - number / (len(rows) - 0.5), _INK if number < 5 else _MUTED
        style = {"transform": axes.transAxes, "fontsize": 9.5, "color": color, "va": "top"}
        style["weight"] = "bold" if key == "samples" else "normal"
        axes.text(0.0, height, label, **style)
        if key:
            axes.text(0.62, height, f"{figures[key]:,}", ha="right", **style)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines[["bottom"]].set_color(_LINE)
    axes.tick_params(colors=_INK, length=2, width=0.6, labelsize=8, color=_LINE)
    axes.set_axisbelow(True)


def _title(axes: Any, what: str, more: str) -> None:
    axes.set_title(what, loc="left", fontsize=10.5, color=_INK, pad=6)
    axes.set_title(more, loc="right", fontsize=8, color=_MUTED, pad=6)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"


def _amount(size: float) -> str:
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if size >= scale), (1.0, "bytes"))
    return f"{size / scale:,.1f} {unit}" if scale > 1 else f"{size:,} bytes"


def _spaced(text: str) -> str:
    """A sentence with its large numbers grouped by thousands."""
    return " ".join(f"{int(word):,}" if word.isdecimal() else word for word in text.split(" "))
