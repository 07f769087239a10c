"""Runs beside one another: one HTML page that loads nothing, and pictures of its curves.

    reading    a run directory -> what is shown of it, whatever state it is in
    groups     runs -> a section for each data set, groups of seeds, what they scored at equal cost, how they differ
    curves     a section -> panels: what is drawn where, in which units
    vectors    a panel -> SVG in the page         pictures   panels -> a PNG
    markup     elements that escape what is in them            look   style and script of the page
    page       sections -> the page

MLflow experiments are fetched as run directories first (`tracking.fetch`), and read like any others.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mbtrain import tracking
from mbtrain.compare import curves, groups, page, pictures, reading
from mbtrain.compare.reading import Run
from mbtrain.errors import ConfigError
from mbtrain.redact import one_line
from mbtrain.shards import whole_file


@dataclass(frozen=True)
class Compared:
    """What was written, and the runs in it: each with name, group, data, score and costs, best first."""

    path: Path
    pictures: tuple[Path, ...]
    runs: tuple[dict[str, Any], ...]


def compare(run_paths: Sequence[str | Path], out: Path, *, experiment: str = "", uri: str = "") -> Compared:
    """Write OUT/compare.html and a OUT/curves*.png for each data set.

    run_paths   run directories, or checkpoints in them
    experiment  also all runs of this MLflow experiment, of the store `uri` (by default tracking.default_uri)
    Raises ConfigError where nothing is to be compared or `out` cannot be written, MbtrainError for a path that is no
    run and for a store that does not answer or does not know the experiment. What a run lacks is noted on the page.
    """
    folders = list(dict.fromkeys(reading.find(path).resolve() for path in run_paths))
    runs = [reading.read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    if experiment:
        with tempfile.TemporaryDirectory(prefix="mbtrain-compare-") as temporary:
            fetched = tracking.fetch(experiment, uri or None, Path(temporary))
            given = {_uid(folder) for folder in folders} - {""}
            fetched = [folder for folder in fetched if _uid(folder) not in given]
            read = (reading.read(folder, name) for folder, name in zip(fetched, _names(fetched), strict=True))
            runs += [replace(run, path=Path(experiment) / run.name) for run in read]
    if not runs:
        raise ConfigError("RUN: expected run directories or --experiment=NAME, got nothing to compare")
    sections = groups.sections(runs)
    drawn = [(section, curves.panels(section.groups)) for section in sections]
    command = "mbtrain compare " + (f"--experiment={experiment}" if experiment else "RUN ...")
    files: dict[str, bytes] = {}
    for section, panels in drawn:
        if panels:
            suffix = "" if len(drawn) == 1 else f"_{_file_name(section.title)}"
            files[_free(f"curves{suffix}", files)] = pictures.png(section, panels)
    files["compare.html"] = page.render(drawn, one_line(command, 200)).encode()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with whole_file(out / name) as file:
                file.write(content)
    except OSError as error:
        raise ConfigError(f"--out={out}: cannot be written ({error.strerror}); give another folder") from error
    listed = [_figures(run, group, section) for section in sections for group in section.groups for run in group.runs]
    return Compared(out / "compare.html", tuple(out / n for n in files if n.endswith(".png")), tuple(listed))


def _figures(run: Run, group: groups.Group, section: groups.Section) -> dict[str, Any]:
    """One run as --json has it; what is not known is null."""

    def known(value: float) -> float | None:
        return value if value == value and abs(value) != float("inf") else None

    return {
        "run": str(run.path),
        "name": run.name,
        "group": group.name,
        "data": section.title,
        "kind": run.origin.kind,
        "bpb": known(run.score),
        "parameters": run.origin.parameters,
        "training_flops_per_byte": known(run.flops_per_byte),
        **{axis: known(run.spent(axis)) for axis in reading.AXES},
        "bytes_per_s": known(run.perf["perf/bytes_per_s"]),
        "mfu": known(run.perf["perf/mfu"]),
        "peak_bytes": known(run.perf["mem/peak_bytes"]),
        "status": run.origin.status,
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; with as many of the folders above as tell equal names apart."""
    out = []
    for folder in folders:
        depth = 1
        while depth < len(folder.parts) - 1 and any(
            other != folder and other.parts[-depth:] == folder.parts[-depth:] for other in folders
        ):
            depth += 1
        out.append(one_line("/".join(folder.parts[-depth:]), 100))
    return out


def _uid(folder: Path) -> str:
    """The run's own name, by which it is the same one in MLflow."""
    try:
        return (folder / "run_uid").read_text(encoding="utf-8")[:64].strip()
    except (OSError, ValueError):
        return ""


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.")[:40] or "data"


def _free(stem: str, taken: dict[str, bytes]) -> str:
    """STEM.png, or STEM_2.png and so on where that is taken."""
    names = (f"{stem}{'' if i == 1 else f'_{i}'}.png" for i in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)
