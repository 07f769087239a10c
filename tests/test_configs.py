"""Every shipped experiment loads, can be counted and cut, and says in its header how it is run.

pytest tests/test_configs.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mbtrain import config, cost
from mbtrain.model.flops import count
from mbtrain.sweep import spec as specs
from tests.launch import ROOT

# A plan is a list of runs, read by `mbtrain bench claims`; tests/bench/test_claims.py loads its rows.
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.y*ml"))
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.y*ml") if path.stem != "plan" and path not in SWEEPS)


def header(path: Path) -> str:
    """The comment lines at the top of a file, as one text."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def test_there_are_some() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_configuration(path: Path) -> None:
    """Loads; its whole form loads again to the same; parameters and FLOPs come out; one rank can run it."""
    settings = config.load(path)
    assert config.validate(config.load(path).model_dump(mode="json")) == settings
    counted = count(settings)
    assert counted.parameters > 0
    assert counted.training_per_byte > 0
    micro, accumulation = config.batch_shape(settings, 1)
    assert micro * accumulation == settings.train.global_batch_size
    config.step_limit(settings, counted.training_per_byte)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep(path: Path) -> None:
    """Every point of every axis makes a configuration."""
    spec = specs.read(path)
    plan = specs.planned(spec)
    points = {point: trial for trial in reversed(plan) for point in trial.values.items()}
    chosen = {trial.name: trial for trial in points.values()}
    assert len(points) == sum(len(axis.points) for axis in spec.axes) or spec.draws
    assert set(specs.settings(spec, list(chosen.values()))) == set(chosen)


@pytest.mark.parametrize("path", CONFIGS + SWEEPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_header_says_the_command(path: Path) -> None:
    """A comment at the top with the command that runs this very file (or a script that does)."""
    said = header(path)
    assert "mbtrain " in said or "launch/" in said, said
    assert str(path.relative_to(ROOT)) in said or "launch/" in said, said


def test_names_are_their_own() -> None:
    """Two configurations of one name would train into the same run directory."""
    names = [config.load(path).name for path in CONFIGS]
    assert len(set(names)) == len(names), names


# Rows of the paper's tables that name sizes: millions of parameters without embeddings, 12 L D^2, of the global (or
# only) and of the local model; batch, LR, context, patch size.
PAPER = """
    text/*_transformer              276.8      -    72  2e-4       1024    1
    text/*_perceiver_ar             213.9      -    72  2e-4       8192    1
    text/*_megabyte                 704.6  226.5    48  2e-4       8192    8
    text/arxiv_without_local       1572.9      -    48  1.5e-4     8192    4
    text/arxiv_without_global           -  302.0   192  2e-4       8192    8
    text/arxiv_without_cross_patch  855.6  302.0    48  2e-4       8192    8
    text/arxiv_cnn_encoder          654.3  226.5    48  2e-4       8192    8
    imagenet64/megabyte_sota       2516.6  302.0     2  2e-4      12288   12
    imagenet64/transformer          679.5      -   512  3e-4       2048    1
    imagenet64/perceiver_ar         201.3      -   512  3e-4      12288    1
    imagenet64/megabyte            1208.0 1208.0   256  3e-4      12288   12
    imagenet256/transformer          42.5      -  1536  2e-4       1024    1
    imagenet256/perceiver_ar         42.5      -   256  2e-4       8192    1
    imagenet256/megabyte             84.9   84.9    16  2e-4     196608  192
    imagenet256/megabyte_raster      84.9   84.9    16  2e-4     196608  192
    imagenet256/patch48              84.9   77.9    16  2e-4     196608   48
    imagenet256/patch768             84.9   56.6    16  2e-4     196608  768
    imagenet256/without_local      6442.5      -    16  2e-4     196608   48
    imagenet256/without_global          -   84.9    16  2e-4     196608  192
    imagenet256/without_cross_patch 169.9  106.2    16  2e-4     196608  192
    imagenet256/cnn_encoder          84.9   84.9    16  2e-4     196608  192
    imagenet640/transformer          56.6      -  4800  3e-4       1024    1
    imagenet640/perceiver_ar         42.5      -  2048  3e-4       4096    1
    imagenet640/megabyte             84.9   56.6    32  3e-4    1228800  192
    audio/transformer                92.0      -  2048  2e-4       1024    1
    audio/perceiver_ar               42.5      -   384  2e-4       8192    1
    audio/megabyte                  302.0   84.9   256  2e-4     524288   32
    audio/without_local            6442.5      -   256  2e-4     524288   32
    audio/without_global                -   84.9   256  2e-4     524288   32
    audio/without_cross_patch       302.0   99.1   256  2e-4     524288   32
    audio/cnn_encoder               302.0   84.9   256  2e-4     524288   32
    pg19/transformer                276.8      -    72  2e-4       2048    1
    pg19/perceiver_ar               213.9      -    72  2e-4       8192    1
    pg19/megabyte                  1208.0  302.0    48  2e-4       8192    8
    pg19/megabyte_16k              1208.0  302.0    48  2e-4      16384    8
    pg19/ratio_350m_290m            302.0  251.7    48  2e-4       8192    8
    pg19/ratio_760m_262m            679.5  226.5    48  2e-4       8192    8
    pg19/ratio_1300m_218m          1208.0  188.7    48  2e-4       8192    8
    pg19/transformer_350m           302.0      -    72  2e-4       1024    1
"""
ROWS = {
    path: row[1:]
    for row in map(str.split, PAPER.strip().splitlines())
    for path in sorted((ROOT / "configs/paper").glob(f"{row[0]}.yaml"))
}


def test_every_row_of_the_paper_has_a_configuration() -> None:
    """And every configuration a row; the controlled rows on text are those of five data sets."""
    assert set(ROWS) == {path for path in CONFIGS if (ROOT / "configs/paper") in path.parents}
    missing = [row.split()[0] for row in PAPER.strip().splitlines() if not list(_of(row.split()[0]))]
    assert not missing
    assert [len(list(_of(f"text/*_{row}"))) for row in ("transformer", "perceiver_ar", "megabyte")] == [5, 5, 5]


def _of(row: str) -> list[Path]:
    return list((ROOT / "configs/paper").glob(f"{row}.yaml"))


@pytest.mark.parametrize("path", ROWS, ids=lambda path: "/".join(path.with_suffix("").parts[-2:]))
def test_a_row_of_the_paper(path: Path) -> None:
    """Its sizes to 3 %, by formula: the matrices of blocks, and all that is neither a byte's nor a position's table."""
    settings, (*sizes, batch, lr, context, patch) = config.load(path), ROWS[path]
    model = settings.model
    counted = count(settings)
    millions = [0.0 if size == "-" else float(size) for size in sizes]
    hidden = [stage.hidden / 1e6 for stage in counted.stages] + [0.0]
    assert hidden[:2] == pytest.approx(millions, rel=0.03)
    built = model.stages[1:] if model.without == "global" else model.stages
    tables = sum(settings.vocab_size * stage.d_byte for stage in built)
    tables += settings.data.seq_len * model.stages[0].d_byte if model.without != "global" else 0
    assert (counted.parameters - tables) / 1e6 == pytest.approx(sum(millions), rel=0.03)
    assert model.preset == "paper"
    assert settings.train.global_batch_size == int(batch)
    assert settings.optim.lr == float(lr)
    assert model.stages[0].patch_size == int(patch)
    # 8,192 is no multiple of half of 768 latents; the header says what is taken.
    expected = 8064 if path.match("imagenet256/perceiver_ar.yaml") else int(context)
    assert settings.data.seq_len == expected
    assert all(stage.d_head in (64, 80, 96, 128, 85) for stage in model.stages)


@pytest.mark.parametrize("path", ROWS, ids=lambda path: "/".join(path.with_suffix("").parts[-2:]))
def test_a_row_of_the_paper_says_its_cost(path: Path) -> None:
    """The GPU hours in its header are those of `mbtrain flops` now."""
    said = re.search(r"([\d.e]+) FLOPs; at 40% of peak ([\d,]+) hours of A100, ([\d,]+) hours of H100", header(path))
    assert said
    budget = cost.figures(config.load(path))["budget"]
    flops, a100, h100 = (float(number.replace(",", "")) for number in said.groups())
    assert flops == pytest.approx(budget["flops"], rel=6e-3)
    assert [a100, h100] == pytest.approx([budget["gpu_hours"]["A100"], budget["gpu_hours"]["H100"]], abs=0.51)
