"""The measurements measure what they say: protocol, pairing, keys. Speeds themselves are no test."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbtrain import config
from mbtrain.bench import VERBS, generation, measure, own
from mbtrain.bench import peer as peer_worker
from mbtrain.bench.quality import reached_in_a_tenth
from mbtrain.config import Config
from mbtrain.errors import ConfigError, MbtrainError
from mbtrain.model import build
from mbtrain.model.flops import count
from tests import tiny

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".cache" / "peer" / "bin" / "python"
needs_peer = pytest.mark.skipif(not PEER.exists(), reason="launch/peer.sh has not made the peer's environment")


def tiny_file(folder: Path, shards: Path, **sections: Any) -> Path:
    """A tiny configuration without boundary, on disk."""
    tree = tiny.tree(2, data={"path": str(shards), "boundary": False}, train={"zero_stage": 1}, **sections)
    path = folder / "tiny.yaml"
    path.write_text(config.to_yaml(config.validate(tree)))
    return path


def echo_worker(folder: Path, body: str) -> list[str]:
    """A worker that needs no torch: its handlers are written in `body`."""
    path = folder / "echo.py"
    path.write_text(f"from mbtrain.bench.peer import serve\n{body}\n")
    return [sys.executable, str(path)]


def test_importing_the_verbs_imports_no_torch() -> None:
    code = "import sys, mbtrain.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_unknown_options_are_refused(verb: str) -> None:
    with pytest.raises(ConfigError, match=r"--round: no such option|--round: "):
        VERBS[verb](round="3")


def test_a_worker_answers_with_its_two_clocks_and_its_prints_do_not_disturb(tmp_path: Path) -> None:
    body = (
        "print('before')\ndef add(a, b):\n    print('inside')\n    return {'sum': a + b}\nserve(lambda: {'add': add})"
    )
    body = body.replace("print('before')\n", "").replace("serve(lambda: ", "serve(lambda: print('making') or ")
    with measure.worker(echo_worker(tmp_path, body), "echo", threads=1) as ask:
        for a in (1, 2):
            answer = ask("add", a=a, b=40)
            assert answer["sum"] == 40 + a
            assert answer["wall_s"] >= 0
            assert answer["cpu_s"] >= 0


def test_a_worker_that_dies_is_reported_by_its_last_line(tmp_path: Path) -> None:
    command = echo_worker(tmp_path, "def die():\n    raise SystemExit('out of luck')\nserve(lambda: {'die': die})")
    with pytest.raises(MbtrainError, match="worker echo ended with status 1: out of luck"):
        with measure.worker(command, "echo", threads=1) as ask:
            ask("die")
    with pytest.raises(MbtrainError, match="No module named nothing"):
        with measure.worker([sys.executable, "-m", "nothing"], "nothing", threads=1):
            pass


def test_workers_have_the_threads_that_were_asked_for(tmp_path: Path) -> None:
    body = "import os\nserve(lambda: {'env': lambda: {'threads': os.environ['OMP_NUM_THREADS']}})"
    with measure.worker(echo_worker(tmp_path, body), "echo", threads=2) as ask:
        assert ask("env")["threads"] == "2"


def test_rounds_alternate_and_the_first_is_not_counted() -> None:
    called: list[str] = []

    def part(name: str) -> dict[str, float]:
        called.append(name)
        return {"wall_s": float(len(called)), "cpu_s": 1.0}

    got = measure.interleave({"a": lambda: part("a"), "b": lambda: part("b")}, rounds=3)
    assert "".join(called) == "abababab"
    assert [answer["wall_s"] for answer in got["a"]] == [3, 5, 7]


def test_spreads_are_medians_with_their_range() -> None:
    assert measure.spread([3.0, 1.0, 10.0]) == {"median": 3, "min": 1, "max": 10}
    answers = [{"wall_s": 2.0, "cpu_s": 1.0}, {"wall_s": 4.0, "cpu_s": 1.0}, {"wall_s": 5.0, "cpu_s": 4.0}]
    got = measure.rates(answers, 100)
    assert got["bytes_per_s"] == {"median": 25, "min": 20, "max": 50}
    assert got["bytes_per_cpu_s"] == {"median": 100, "min": 25, "max": 100}


def test_batches_of_a_file_go_round(tmp_path: Path) -> None:
    content = np.arange(250, dtype=np.uint8)
    content.tofile(tmp_path / "rows")
    rows = [peer_worker.rows_at(str(tmp_path / "rows"), i, 2, 50) for i in range(4)]
    assert rows[0].shape == (2, 50)
    assert rows[0].dtype == np.int64
    np.testing.assert_array_equal(np.concatenate([r.ravel() for r in rows[:2]]), content[:200])
    np.testing.assert_array_equal(rows[2], rows[0])


def test_the_trapezoid_rule_is_exact_for_a_line() -> None:
    lengths = generation.sample_lengths(1024, 5)
    assert lengths == [1, 256, 512, 768, 1024]
    assert generation.integrate(lengths, [2.0 * n for n in lengths]) == 1024**2 - 1


@pytest.mark.parametrize(
    ("name", "heads", "parameters", "mflop"), [("small", 4, 5_079_040, 9.269), ("big", 8, 58_528_768, 49.986)]
)
def test_the_peers_shape_is_that_of_the_anchors(name: str, heads: int, parameters: int, mflop: float) -> None:
    """performance.md, section 2: 5.08M parameters and 9.27 MFLOP a byte, 58.5M and 50.0."""
    settings = config.load(ROOT / "configs" / "bench" / f"{name}.yaml")
    assert measure.peer_shape(settings)["heads"] == heads
    counted = measure.peer_count(settings)
    assert counted.parameters == parameters
    assert counted.training_per_byte / 1e6 == pytest.approx(mflop, abs=1e-3)
    assert counted.training_per_byte < counted.executed_per_byte < 1.25 * counted.training_per_byte


def test_shapes_that_the_peer_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.boundary"):
        measure.peer_shape(tiny.make(2))
    wide = [{**stage, "d_ff": 16} for stage in tiny.STAGES[2]]
    with pytest.raises(ConfigError, match=r"model.stages.0.d_ff"):
        measure.peer_shape(tiny.make(2, data={"boundary": False}, model={"stages": wide}))
    with pytest.raises(ConfigError, match=r"--peer=/no/such"):
        measure.find_peer("/no/such")


def test_train_without_a_peer_gives_our_two_speeds(tmp_path: Path, shards: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # where no .cache/peer is
    figures = VERBS["train"](config=str(tiny_file(tmp_path, shards)), rounds="2", steps="1")
    assert figures["bytes_per_s"] > 0
    assert figures["bare_bytes_per_s"] > 0
    assert figures["peer_bytes_per_s"] is figures["ratio"] is None
    assert set(figures["sides"]) == {"engine", "bare"}
    assert 0 < figures["mfu"] < 1
    settings = config.load(tmp_path / "tiny.yaml")
    assert figures["training_flops_per_byte"] == count(settings).training_per_byte
    json.dumps(figures)


def test_engine_and_bare_loop_make_the_same_updates(tmp_path: Path, shards: Path) -> None:
    settings = config.load(tiny_file(tmp_path, shards))
    measure.write_rows(settings, tmp_path, 10_000)
    losses = {}
    for mode in ("engine", "bare"):
        with measure.own_worker(settings, mode, tmp_path, threads=1) as ask:
            losses[mode] = [ask("steps", n=1)["loss_nats"] for _ in range(4)]
    assert losses["engine"] == pytest.approx(losses["bare"], rel=1e-4)
    assert losses["bare"][-1] < losses["bare"][0]


def test_quality_scores_every_byte_of_the_peers_windows(tmp_path: Path, shards: Path, monkeypatch: Any) -> None:
    """Ours may train on other rows, in another shape: what is scored is the peer's."""
    monkeypatch.chdir(tmp_path)
    peers = str(tiny_file(tmp_path, shards))
    own = tmp_path / "own.yaml"
    short = {"path": str(shards), "boundary": False, "seq_len": 16}
    tree = tiny.tree(2, data=short, train={"zero_stage": 1}, model={"positions": "rotary"})
    own.write_text(config.to_yaml(config.validate(tree)))
    options = {"config": str(own), "peer_config": peers, "windows": "3", "clock": "cpu"}
    figures = VERBS["quality"](**options, minutes="0.01", peer_minutes="0.1", seeds="2")
    assert figures["val_bytes"] == 3 * 32
    assert 0 < figures["bpb"] < 9
    assert figures["peer_bpb"] is figures["peer_bpb_by_seed"] is figures["reached_in_a_tenth"] is None
    runs = figures["by_seed"]["engine"]
    assert [run["seed"] for run in runs] == [0, 1]
    assert all(run["steps"] > 0 and run["bytes"] % 16 == 0 for run in runs)
    spread = figures["bpb_by_seed"]
    assert spread["min"] <= spread["median"] <= spread["max"]
    assert spread["mean"] == pytest.approx((runs[0]["bpb"] + runs[1]["bpb"]) / 2)
    assert (figures["minutes"], figures["peer_minutes"]) == pytest.approx((0.01, 0.1))
    with pytest.raises(ConfigError, match=r"--clock"):
        VERBS["quality"](config=peers, clock="sun")


def test_quality_refuses_what_could_not_be_scored(tmp_path: Path, shards: Path) -> None:
    peers = str(tiny_file(tmp_path, shards))
    for sections, complaint in (
        ({"data": {"path": str(shards), "boundary": True}}, r"data\.boundary"),
        (
            {"data": {"path": str(shards), "boundary": False, "seq_len": 16}, "model": {"positions": "learned"}},
            r"data\.seq_len: got 16, expected the 32",
        ),
    ):
        own = tmp_path / "own.yaml"
        own.write_text(config.to_yaml(config.validate(tiny.tree(2, **sections))))
        with pytest.raises(ConfigError, match=complaint):
            VERBS["quality"](config=str(own), peer_config=peers)


@pytest.mark.parametrize(
    ("own", "theirs", "share", "reached"),
    [
        ({"max": 3.0}, {"min": 3.0}, 0.1, True),
        ({"max": 3.1}, {"min": 3.0}, 0.1, False),
        ({"max": 2.0}, {"min": 3.0}, 0.2, None),
        ({"max": 2.0}, None, 0.1, None),
    ],
)
def test_a_tenth_is_reached_by_the_worst_seed_against_the_best(
    own: dict[str, float], theirs: dict[str, float] | None, share: float, reached: bool | None
) -> None:
    assert reached_in_a_tenth(own, theirs, share) is reached


def test_generate_and_deepspeed_give_their_keys(tmp_path: Path, shards: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(tiny_file(tmp_path, shards))
    figures = VERBS["generate"](config=path, bytes="16", rounds="1", batch="3", prompt_bytes="100")
    assert figures["bytes_per_s"] > 0
    assert figures["batch_gain"] == figures["batch_bytes_per_s"] / figures["bytes_per_s"]
    assert figures["ratio"] is None
    assert 0 < figures["first_byte_s"] < 60
    figures = VERBS["deepspeed"](config=path, rounds="1", precisions="fp32")
    assert set(figures["by_precision"]) == {"fp32"}
    step = figures["engine_step_s"] / figures["bare_step_s"] - 1
    assert figures["overhead_frac"] == pytest.approx(step)


@needs_peer
@pytest.mark.slow
def test_the_peer_answers_every_request_and_scores_byte_0(tmp_path: Path, shards: Path) -> None:
    settings = peer_settings(tmp_path, shards)
    measure.write_rows(settings, tmp_path, 10_000, val_bytes=64)
    np.zeros(64, np.uint8).tofile(tmp_path / "zeros")
    with measure.peer_process(PEER, settings, tmp_path, threads=1) as ask:
        assert ask("describe")["parameters"] == measure.peer_count(settings).parameters
        assert math.isfinite(ask("steps", n=2)["loss_nats"])
        trained = ask("train", seconds=0.2, by="cpu")
        assert trained["bytes"] % (4 * 4 * 32) == 2 * 4 * 32, "2 single batches, then 4 a step"
        for path in (tmp_path / "val.bytes", tmp_path / "zeros"):
            score = ask("score", path=str(path), windows=2, seq_len=32)
            assert score["bytes"] == 64
            assert 0 < score["nats"] / 64 < 10
        assert ask("forward", rows=2, length=7)["wall_s"] > 0
        assert ask("generate", rows=1)["bytes"] == 32


@needs_peer
@pytest.mark.slow
def test_train_gives_the_ratio_to_the_peer(tmp_path: Path, shards: Path) -> None:
    path = tiny_file(tmp_path, shards)
    figures = VERBS["train"](config=str(path), peer=str(PEER), rounds="1", steps="1")
    assert figures["ratio"] == figures["bytes_per_s"] / figures["peer_bytes_per_s"]
    assert figures["peer_parameters"] == measure.peer_count(config.load(path)).parameters


def peer_settings(folder: Path, shards: Path) -> Config:
    """The tiny configuration as the peer can have it."""
    return config.load(tiny_file(folder, shards))


def test_a_bare_loop_refuses_a_model_that_trains_spans_of_rows() -> None:
    settings = tiny.make(1, model={"kind": "perceiver_ar", "latents": 8, "stages": tiny.STAGES[1]})
    with pytest.raises(ConfigError, match=r"model\.kind: got perceiver_ar"):
        own.bare_step(settings, build(settings))


def test_the_roofline_counts_what_the_model_counts(tmp_path: Path, shards: Path) -> None:
    path = tiny_file(tmp_path, shards)
    figures = VERBS["roofline"](config=str(path), rounds="1")
    settings = config.load(path)
    counted = count(settings)
    step_bytes = settings.train.global_batch_size * settings.data.seq_len
    project = 3 * sum(stage.project for stage in counted.stages)  # between stages: no part of them
    expected = (counted.training_per_byte - project) * step_bytes
    assert figures["whole"]["flops"] == pytest.approx(expected, rel=1e-6)
    assert [*figures["parts"]][-1] == "logits and loss"
    for part in figures["parts"].values():
        assert part["mfu"] <= part["of_floor"]
        assert part["seconds"] > 0


def test_the_roofline_is_of_megabyte_in_bf16_or_fp32(tmp_path: Path, shards: Path) -> None:
    path = tiny_file(tmp_path, shards)
    with pytest.raises(ConfigError, match=r"expected model.kind=megabyte"):
        VERBS["roofline"](config=str(other(path)), rounds="1")


def other(path: Path) -> Path:
    """The same configuration in fp16."""
    changed = path.with_name("fp16.yaml")
    changed.write_text(path.read_text().replace("precision: fp32", "precision: fp16"))
    return changed


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_ranks_take_their_rows_of_the_batch_and_lose_as_much(
    tmp_path: Path, shards: Path, precision: str, tolerance: float
) -> None:
    """In bf16 the sums over ranks are the engine's own."""
    path = tiny_file(tmp_path, shards)
    settings = config.load(path, {"train.precision": precision, "optim.lr": "3e-3"})
    measure.write_rows(settings, tmp_path, 4096)
    with measure.own_worker(settings, "engine", tmp_path, 1) as alone:
        with measure.own_ranks(settings, 2, tmp_path, 1) as together:
            for _ in range(4):
                lost = [ask("steps", n=2)["loss_nats"] for ask in (alone, together)]
                assert lost[0] == pytest.approx(lost[1], abs=tolerance)


def test_ranks_share_threads_evenly() -> None:
    with pytest.raises(ConfigError, match=r"--ranks=2: expected a divisor of --threads=3"):
        VERBS["train"](threads="3", ranks="2")
