"""From raw files of all three modalities through one mixture to scores and samples, by real launches.

pytest tests/test_modalities.py
"""

from __future__ import annotations

import json
import random
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbtrain import config, metrics
from mbtrain.data.mixture import mixture
from mbtrain.data.opening import open_sources
from mbtrain.engine import parameter_groups
from mbtrain.errors import ConfigError, DataError
from mbtrain.media import image
from mbtrain.model import build
from mbtrain.model.loss import nats
from mbtrain.schedule import lr_factor
from mbtrain.shards import open_split
from mbtrain.vocab import BOUNDARY
from tests import handmade, launch, tiny

SEQ_LEN = 192  # one picture of 8 x 8 pixels
STEPS = 6
STAGES = [
    {"patch_size": 12, "d_model": 24, "n_layers": 1, "n_heads": 2},
    {"patch_size": 1, "d_model": 16, "n_layers": 1, "n_heads": 2},
]


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data sets: words (text), dots (pictures of 8 x 8), tones (sound of 2 to 19 ms)."""
    from data_prep.cli import main

    root = tmp_path_factory.mktemp("sets")
    rng, numbers = random.Random(0), np.random.default_rng(0)
    for name in ("words", "dots", "tones"):
        (root / name).mkdir()
    for i in range(40):
        (root / "words" / f"{i:02d}.txt").write_text(" ".join(rng.choice(["byte", "patch"]) for _ in range(5 + i)))
        picture = np.full((8, 8, 3), numbers.integers(0, 256, 3), np.uint8)
        picture[2:5, 3:6] = numbers.integers(0, 256, 3)
        (root / "dots" / f"{i:02d}.png").write_bytes(image.png(picture))
        with wave.open(str(root / "tones" / f"{i:02d}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            tone = 8000 * np.sin(np.arange(30 + 7 * i) * (0.1 + i / 100))
            file.writeframes(tone.astype("<i2").tobytes())
    for verb, name, *options in (("text", "words"), ("image", "dots", "--size=8"), ("audio", "tones")):
        with pytest.raises(SystemExit) as end:
            main([verb, str(root / name), f"--out={root / f'{name}.d'}", "--splits=train=0.7,val=0.3", *options])
        assert end.value.code == 0
    return root


def tree(sets: Path, **data: Any) -> dict[str, Any]:
    """A mixture of the three; the words are capped, so that a phase of the mixture ends within the run."""
    sources = [
        {"path": str(sets / "words.d"), "name": "words", "weight": 1, "epochs": 0.5},
        {"path": str(sets / "dots.d"), "name": "dots", "weight": 1},
        {"path": str(sets / "tones.d"), "name": "tones", "schedule": [[0, 2], [SEQ_LEN * 16, 1]]},
    ]
    made = tiny.tree(2, seq_len=SEQ_LEN, data={"sources": sources, **data}, train={"steps": STEPS})
    made["train"] |= {"global_batch_size": 8, "micro_batch_size": 2}
    made["model"]["stages"] = STAGES
    made["checkpoint"] = {"every_steps": 2, "keep_last": 10}
    made["sample"] = {"count": 2, "bytes": 40}
    del made["data"]["path"]
    return made


def bare_loop(settings: config.Config) -> list[float]:
    """The same training in plain torch: each id that counts weighs the same. Losses by step, in nats."""
    torch.manual_seed(settings.train.seed)
    model = build(settings)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), betas=settings.optim.betas, eps=1e-8)
    opened = open_sources(settings, "train", seed=settings.train.seed)
    made = mixture(settings.data, [(source.name, source.stream) for source in opened])
    rows, losses, masked = settings.train.global_batch_size, [], 0
    for step in range(STEPS):
        batch = made.rows(step * rows, rows)
        mask = np.ones(batch.ids.shape, bool) if batch.mask is None else batch.mask
        masked += not mask.all()
        ids, counted = torch.from_numpy(batch.ids).long(), torch.from_numpy(mask)
        loss = nats(model(ids), ids)[counted].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.train.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = settings.optim.lr * group["lr_scale"] * lr_factor(settings.optim, step, step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert masked > 1, "some sounds do not fill their rows"
    return losses


def test_a_mixture_trains_as_the_bare_loop_and_goes_on_with_other_ranks(sets: Path, tmp_path: Path) -> None:
    """Two ranks, four micro-batches a step of unequal fill; then from the middle on one rank: the same losses."""
    path, run = launch.config_file(tmp_path, tree(sets)), tmp_path / "run"
    launch.mbtrain(["train", str(path), f"--run={run}", "--train.zero_stage=1"], ranks=2)
    expected = bare_loop(config.load(path))
    assert launch.losses(run) == pytest.approx(expected, abs=1e-5)

    lines = metrics.read(run / "metrics.jsonl")
    trained = [line for line in lines if "train/bpb" in line]
    shares = [[line[f"data/{name}/share"] for name in ("words", "dots", "tones")] for line in trained]
    assert all(sum(of_step) == pytest.approx(1) for of_step in shares)
    assert shares[0] == pytest.approx([0.25, 0.25, 0.5], abs=0.15), "weights are shares of bytes"
    assert trained[-1]["data/words/epoch"] == pytest.approx(0.5, abs=0.1), "capped"
    assert shares[-1][0] < shares[0][0]
    final = next(line for line in lines if "val/bpb" in line)
    assert {"val/words/bpb", "val/dots/bpb", "val/tones/bpb"} <= set(final)

    for step in (6, 4):
        for file in (run / "checkpoints" / f"step_{step:010d}").iterdir():
            file.unlink()
        (run / "checkpoints" / f"step_{step:010d}").rmdir()
    launch.mbtrain(["train", f"--resume={run}"], ranks=1)
    assert launch.losses(run) == pytest.approx(expected, abs=1e-5)
    again = [line for line in metrics.read(run / "metrics.jsonl") if "train/bpb" in line]
    assert [[line[f"data/{name}/share"] for name in ("words", "dots", "tones")] for line in again] == shares


def test_samples_come_back_as_what_they_are(sets: Path, tmp_path: Path) -> None:
    path, run = launch.config_file(tmp_path, {**tree(sets), "sample": {"bytes": 40}}), tmp_path / "run"
    launch.mbtrain(["train", str(path), f"--run={run}"])
    assert {file.suffix for file in (run / "samples").iterdir()} == {".txt", ".png", ".wav"}
    scored = launch.last_json(launch.mbtrain(["eval", str(run), f"--data={sets / 'dots.d'}", "--json"]).stdout)
    assert scored["bytes"] == int(open_split(sets / "dots.d", "val").lengths.sum()), "no boundaries"
    picture = sets / "dots" / "07.png"
    out = tmp_path / "half.png"
    command = ["sample", str(run), "--source=dots", f"--prompt-file={picture}", "--prompt-bytes=50%", f"--out={out}"]
    launch.mbtrain(command)
    made, given = image.decode(out.read_bytes(), None), image.decode(picture.read_bytes(), None)
    assert made.shape == given.shape == (8, 8, 3)
    assert np.array_equal(made[:4], given[:4]), "patches are 2 x 2 pixels: half of them are the upper half"
    assert not np.array_equal(made[4:], given[4:])


def test_rows_by_modality(sets: Path) -> None:
    """Pictures: one a row, in patch scan. Sound: one recording a row or more. Text: packed, or as asked for."""
    settings = config.validate(tree(sets))
    streams = {source.name: source for source in open_sources(settings, "val", seed=None)}
    dots, tones, words = (streams[name] for name in ("dots", "tones", "words"))
    ids, mask = dots.stream.read_rows(np.arange(len(dots.split)) * SEQ_LEN, SEQ_LEN)
    assert mask is None
    for i, row in enumerate(ids):
        raster = np.frombuffer(dots.split.read(i), np.uint8).reshape(8, 8, 3)
        assert row[:12].tolist() == raster[:2, :2].ravel().tolist()
        assert row[12:24].tolist() == raster[:2, 2:4].ravel().tolist()
    assert tones.stream.align == SEQ_LEN
    assert not tones.stream.boundary
    assert words.stream.align == 1
    assert words.stream.boundary
    raster_scan = config.validate(tree(sets, scan="raster"))
    plain = next(s for s in open_sources(raster_scan, "val", seed=None) if s.name == "dots")
    assert plain.stream.read(0, SEQ_LEN).tolist() == list(dots.split.read(0))


def test_a_document_a_row_and_documents_that_begin_at_patches(sets: Path, tmp_path: Path) -> None:
    one = tree(sets, sources=[{"path": str(sets / "words.d")}])
    rows = config.validate({**one, "data": {**one["data"], "rows": "sample"}})
    [words] = open_sources(rows, "val", seed=None)
    assert words.stream.align == SEQ_LEN
    one["model"]["isolate_documents"] = True
    [words] = open_sources(config.validate(one), "val", seed=None)
    assert words.stream.align == 12
    ids, mask = words.stream.read_rows(np.array([0]), SEQ_LEN)
    ends = np.flatnonzero(ids[0] == BOUNDARY)
    assert mask is not None
    assert len(ends)
    assert all(not mask[0, end + 1 : (end // 12 + 1) * 12].any() for end in ends)
    with pytest.raises(ConfigError, match=r"data\.rows: got packed"):
        open_sources(config.validate({**one, "data": {**one["data"], "rows": "packed"}}), "val", seed=None)
    path, run = launch.config_file(tmp_path, one), tmp_path / "run"
    launch.mbtrain(["train", str(path), f"--run={run}"], ranks=2)
    losses = launch.losses(run)
    assert losses[-1] < losses[0]


def test_a_boundary_is_refused_where_none_follows(sets: Path) -> None:
    pictures = tree(sets, sources=[{"path": str(sets / "dots.d")}])
    with pytest.raises(ConfigError, match=r"data\.boundary: got true, expected false: .*dots\.d holds image samples"):
        open_sources(config.validate(pictures), "train", seed=0)


def test_a_picture_that_cannot_be_scanned_is_named_at_the_start(tmp_path: Path) -> None:
    """Not when its row comes, which may be hours later."""
    pictures = [handmade.picture(np.full((8 - (i == 3), 8, 3), i, np.uint8)) for i in range(5)]
    path = handmade.dataset(tmp_path / "odd", "image", {"train": [pictures], "val": [pictures[:3]]})
    settings = tree(tmp_path, sources=[{"path": str(path)}], boundary=False)
    with pytest.raises(DataError, match=r"odd: sample \w{32} of split 'train': 7 x 8 pixels .* blocks of 2 x 2"):
        open_sources(config.validate(settings), "train", seed=0)
    assert open_sources(config.validate(settings), "val", seed=None)
    settings["data"]["scan"] = "raster"
    assert open_sources(config.validate(settings), "train", seed=0)


def test_data_that_ends_is_a_limit_that_is_said_at_the_start(sets: Path, tmp_path: Path) -> None:
    """Every picture is one row and may be read twice. Asking for more is an error; without steps the run ends there."""
    once = tree(sets, sources=[{"path": str(sets / "dots.d"), "epochs": 2}], boundary=False)
    pictures = len(open_split(sets / "dots.d", "train"))
    path, run = launch.config_file(tmp_path, once), tmp_path / "run"
    refused = launch.mbtrain(["train", str(path), f"--run={run}", "--train.steps=100"], expect=None)
    assert refused.codes[0] != 0
    assert f"end after {2 * pictures} rows of {SEQ_LEN} bytes, at step {2 * pictures // 8} " in refused.stderr
    assert "Traceback" not in refused.stderr
    unlimited = ["train", str(path), f"--run={run}", "--train.steps=null", "--train.minutes=60"]
    ended = launch.mbtrain(unlimited)
    assert f"after step {2 * pictures // 8}: the run ends there" in ended.stderr
    lines = metrics.read(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "val/bpb" in line] == [2 * pictures // 8]
    assert json.loads((run / "status.json").read_text())["status"] == "FINISHED"
    again = launch.mbtrain(["train", f"--resume={run}"])
    assert metrics.read(run / "metrics.jsonl") == lines, again.stderr


def test_sixteen_bits_need_even_rows(sets: Path) -> None:
    odd = tree(sets, sources=[{"path": str(sets / "tones.d")}], boundary=False, seq_len=63)
    odd["model"]["stages"] = [{**STAGES[0], "patch_size": 3}, STAGES[1]]
    with pytest.raises(ConfigError, match=r"data\.seq_len: got 63, expected an even number"):
        open_sources(config.validate(odd), "val", seed=None)


def test_bits_per_byte_of_images_are_bits_per_dimension_and_both_are_said(sets: Path, tmp_path: Path) -> None:
    settings = tree(sets, sources=[{"path": str(sets / "dots.d")}], boundary=False)
    settings["train"]["steps"] = 2
    run = tmp_path / "run"
    ended = launch.mbtrain(["train", str(launch.config_file(tmp_path, settings)), f"--run={run}"])
    assert "(= bits per dimension)" in ended.stderr
    evaluated = launch.mbtrain(["eval", str(run), "--json"])
    assert "bits per byte (= bits per dimension)" in evaluated.stdout
    figures = launch.last_json(evaluated.stdout)
    assert figures["bits_per_dimension"] == figures["bpb"]
