"""Training as it is used: real launches, every ZeRO stage, resume, signals, failures."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbtrain import checkpoint, config, evaluation, metrics, session
from mbtrain.data.rows import Stream
from mbtrain.engine import parameter_groups
from mbtrain.errors import CheckpointError
from mbtrain.model import build
from mbtrain.model.loss import nats
from mbtrain.schedule import lr_factor
from mbtrain.shards import dataset_hash, load_manifest, open_split
from tests import launch, tiny
from tests.test_checkpoint import write

STEPS = 6
# Ranks add gradients in another order, and where a gradient is nearly 0 Adam turns that rounding into a step: weights
# may differ by a hundredth of one step at the peak LR of 1e-2. A wrong mean or clip moves them by whole steps.
WEIGHT_NOISE = 0.01 * 1e-2


@pytest.fixture
def settings(shards: Path, tmp_path: Path) -> Path:
    return launch.config_file(tmp_path, tree(shards))


def tree(shards: Path, **sections: Any) -> dict[str, Any]:
    base = tiny.tree(2, data={"path": str(shards)}, train={"steps": STEPS, "global_batch_size": 8})
    base["checkpoint"] = {"every_steps": 2, "keep_last": 10}
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return base


def bare_loop(shards: Path, settings: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training as a dozen lines of torch: losses by step and the final weights."""
    c = config.validate(settings)
    torch.manual_seed(c.train.seed)
    model = build(c)
    optimizer = torch.optim.AdamW(parameter_groups(model, c), betas=c.optim.betas, eps=c.optim.eps)
    stream = Stream(open_split(shards, "train"), boundary=True, seed=c.train.seed)
    rows, t = c.train.global_batch_size, c.data.seq_len
    losses = []
    for step in range(c.train.steps or 0):
        ids = torch.from_numpy(stream.rows(np.arange(step * rows, (step + 1) * rows), t)[0]).long()
        loss = nats(model(ids), ids).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.train.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = c.optim.lr * group["lr_scale"] * lr_factor(c.optim, step, step / (c.train.steps or 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def weights(run: Path) -> dict[str, torch.Tensor]:
    found, problems = checkpoint.newest(run)
    assert found is not None
    assert not problems
    return checkpoint.load_weights(found)


def test_one_rank_is_the_bare_loop(shards: Path, tmp_path: Path, settings: Path) -> None:
    launch.mbtrain(["train", str(settings), f"--run={tmp_path / 'run'}"])
    losses, final = bare_loop(shards, tree(shards))
    assert launch.losses(tmp_path / "run") == pytest.approx(losses, abs=1e-6)
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weight, final[name], atol=WEIGHT_NOISE, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_of_every_zero_stage_agree_with_one(
    shards: Path, tmp_path: Path, settings: Path, stage: int, precision: str
) -> None:
    if precision == "autocast" and stage in (0, 2):
        pytest.skip("autocast at stage 0 is what bf16 there is; stages 1 and 3 stand for 2")
    run = tmp_path / "run"
    overrides = [f"--train.zero_stage={stage}", f"--train.precision={precision}"]
    launch.mbtrain(["train", str(settings), f"--run={run}", *overrides], ranks=2)
    expected, final = bare_loop(shards, tree(shards))
    tolerance = 1e-5 if precision == "fp32" else 0.03
    assert launch.losses(run) == pytest.approx(expected, abs=tolerance)
    if precision == "fp32":
        for name, weight in weights(run).items():
            torch.testing.assert_close(weight, final[name], atol=WEIGHT_NOISE, rtol=0)
    lines = metrics.read(run / "metrics.jsonl")
    norms = [line["optim/grad_norm"] for line in lines if "optim/grad_norm" in line]
    assert len(norms) == STEPS
    assert all(math.isfinite(norm) and norm > 0.05 for norm in norms)
    # `mbtrain eval`, on one rank and in batches of its own, gives what the training said.
    assert evaluation.evaluate_run(run, batch=3)["bpb"] == pytest.approx(lines[-1]["val/bpb"], abs=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_mup_survives_every_zero_stage(shards: Path, tmp_path: Path, stage: int) -> None:
    """Groups of different LR, decay and eps, each under the schedule; five LRs at least, not one."""
    stages = [
        {**stage, "base_d_model": stage["d_model"] // factor, "base_n_layers": 1}
        for stage, factor in zip(tiny.STAGES[2], (4, 2), strict=True)
    ]
    mup = {"preset": "modern", "parametrization": "mup", "stages": stages, "mup": {"depth_power": 0.5}}
    optim = {"weight_decay": 1.0, "embedding_lr": 3.0, "schedule": "cosine"}
    settings = {**tree(shards, optim=optim, train={"zero_stage": stage}), "model": mup}
    c = config.validate(settings)
    scales = {group["lr_scale"] for group in parameter_groups(build(c), c)}
    assert len(scales) >= 5
    run = tmp_path / "run"
    launch.mbtrain(["train", str(launch.config_file(tmp_path, settings)), f"--run={run}"], ranks=2)
    expected, final = bare_loop(shards, settings)
    assert launch.losses(run) == pytest.approx(expected, abs=1e-5)
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, final[name], atol=3 * WEIGHT_NOISE, rtol=0)
    sp, _ = bare_loop(shards, {**settings, "model": {**mup, "parametrization": "sp"}})
    assert launch.losses(run) != pytest.approx(sp, abs=1e-3), "the claim is about mup"


@pytest.mark.parametrize(("ranks", "sequence", "stage"), [(2, 2, 1), (4, 2, 2), (4, 4, 3), (2, 2, 0)])
@pytest.mark.parametrize("rows", ["packed", "sample"])
def test_ranks_that_share_their_rows_agree_with_one(
    shards: Path, tmp_path: Path, ranks: int, sequence: int, stage: int, rows: str
) -> None:
    """Sequence parallelism, also with rows of which only some ids count, and of which a rank may have none."""
    if rows == "sample" and (ranks, stage) != (4, 3):
        pytest.skip("once is enough")
    model = {"stages": [{**tiny.tree(2)["model"]["stages"][0], "n_heads": 4}, *tiny.tree(2)["model"]["stages"][1:]]}
    settings = tree(shards, model=model, data={"rows": rows}, train={"sequence_parallel": sequence})
    run, alone = tmp_path / "run", tmp_path / "alone"
    path = launch.config_file(tmp_path, settings)
    launch.mbtrain(["train", str(path), f"--run={run}", f"--train.zero_stage={stage}"], ranks=ranks)
    launch.mbtrain(["train", str(path), f"--run={alone}", "--train.sequence_parallel=1"])
    assert launch.losses(run) == pytest.approx(launch.losses(alone), abs=1e-5)
    (bpb, expected), (done, whole) = zip(*[(scores(r), progress_of(r)) for r in (run, alone)], strict=True)
    assert bpb == pytest.approx(expected, abs=1e-5)
    assert (done.bytes, done.rows_digest) == (whole.bytes, whole.rows_digest)
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, weights(alone)[name], atol=WEIGHT_NOISE, rtol=0)


def scores(run: Path) -> list[float]:
    return [line["val/bpb"] for line in metrics.read(run / "metrics.jsonl") if "val/bpb" in line]


def progress_of(run: Path) -> checkpoint.Progress:
    found, _ = checkpoint.newest(run)
    assert found is not None
    return found.progress


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 4), (2, 2)])
def test_the_cut_of_the_global_batch_does_not_matter(
    shards: Path, tmp_path: Path, settings: Path, ranks: int, micro: int
) -> None:
    """8 rows in eight pieces, in two, in two on each of two ranks; the tests above have 8 and 4 + 4."""
    expected, _ = bare_loop(shards, tree(shards))
    run = tmp_path / "run"
    cut = ["--train.zero_stage=2", f"--train.micro_batch_size={micro}"]
    launch.mbtrain(["train", str(settings), f"--run={run}", *cut], ranks=ranks)
    assert launch.losses(run) == pytest.approx(expected, abs=1e-5)


RESUMED_STEPS = 30


def with_dropout(shards: Path, tmp_path: Path, stage: int, precision: str, steps: int) -> Path:
    train = {"zero_stage": stage, "precision": precision, "steps": steps}
    return launch.config_file(tmp_path, tree(shards, model={"block": {"dropout": 0.1}}, train=train))


def same_end(run: Path, other: Path, step: int, files: int = 4) -> None:
    """What was measured at every step, weights, moments and progress are the same, bit for bit."""
    assert measured(run) == measured(other)
    assert len(launch.losses(run)) == step
    path, twin = (r / "checkpoints" / checkpoint.name_of(step) for r in (run, other))
    assert len(list(path.glob("*.safetensors"))) == files
    for file in sorted(path.glob("*.safetensors")):
        assert file.read_bytes() == (twin / file.name).read_bytes(), file.name
    was, now = (asdict(checkpoint.verify(p).progress) for p in (path, twin))
    assert {**was, "elapsed_s": 0, "mlflow_run_id": ""} == {**now, "elapsed_s": 0, "mlflow_run_id": ""}


def measured(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock and the machine decide."""
    kept = ("step", "train/", "val/", "optim/", "guard/", "progress/bytes", "progress/epoch", "data/")
    lines = metrics.read(run / "metrics.jsonl")
    return [{key: repr(value) for key, value in line.items() if key.startswith(kept)} for line in lines]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16")])
def test_killed_and_resumed_ends_bitwise_the_same(shards: Path, tmp_path: Path, stage: int, precision: str) -> None:
    """SIGKILL after a checkpoint, with dropout on."""
    path = with_dropout(shards, tmp_path, stage, precision, RESUMED_STEPS)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch.mbtrain(["train", str(path), f"--run={whole}"], ranks=2)
    processes = launch.begin(["train", str(path), f"--run={broken}"], ranks=2)
    launch.wait_for(lambda: list(broken.glob("checkpoints/step_*")), processes)
    for process in processes:
        process.kill()
    launch.end(processes)
    killed_at = len(launch.losses(broken))
    assert 2 <= killed_at < RESUMED_STEPS, "the kill came too late to show anything"
    launch.mbtrain(["train", str(path), f"--run={broken}", "--resume"], ranks=2)
    same_end(whole, broken, RESUMED_STEPS)


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "bf16"), (0, "bf16")])
def test_resumed_from_halfway_ends_bitwise_the_same(shards: Path, tmp_path: Path, stage: int, precision: str) -> None:
    """The run's own folder, from which all that came after its second checkpoint is lost but for the metrics."""
    path = with_dropout(shards, tmp_path, stage, precision, 8)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch.mbtrain(["train", str(path), f"--run={whole}"], ranks=2)
    shutil.copytree(whole, broken)
    for step in (6, 8):
        shutil.rmtree(broken / "checkpoints" / checkpoint.name_of(step))
    ended = launch.mbtrain(["train", str(path), f"--run={broken}", "--resume"], ranks=2)
    assert f"{checkpoint.name_of(4)} at step 4" in ended.stderr
    same_end(whole, broken, 8)


def test_a_damaged_checkpoint_is_passed_over_and_named(shards: Path, tmp_path: Path, settings: Path) -> None:
    run = tmp_path / "run"
    launch.mbtrain(["train", str(settings), f"--run={run}"])
    before = launch.losses(run)
    newest = run / "checkpoints" / checkpoint.name_of(STEPS)
    damaged = next(newest.glob("moments-*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    ended = launch.mbtrain(["train", str(settings), f"--resume={run}"])
    assert damaged.name in ended.stderr
    assert f"going on from {run}/checkpoints/{checkpoint.name_of(STEPS - 2)}" in ended.stderr
    assert launch.losses(run) == before
    checkpoint.verify(newest)


LONG = {"steps": 100_000}  # until something ends it
SELDOM = {"every_steps": 100_000}


@pytest.mark.parametrize("told", ["SIGUSR1", "SIGINT", "file"])
def test_other_ways_to_say_stop(shards: Path, tmp_path: Path, told: str) -> None:
    run = tmp_path / "run"
    path = launch.config_file(tmp_path, tree(shards, train=LONG, checkpoint=SELDOM))
    processes = launch.begin(["train", str(path), f"--run={run}"], ranks=2)
    launch.wait_for((run / "metrics.jsonl").exists, processes)
    if told == "file":
        (run / "stop").touch()
    else:
        processes[0].send_signal(signal.Signals[told])
    ended = launch.end(processes, timeout_s=60)
    assert ended.codes == [143, 143], ended.stderr
    assert progress_of(run).step == len(launch.losses(run))
    assert not (run / "stop").exists(), "the next start must not stop at once"


def test_sigterm_saves_and_the_run_goes_on(shards: Path, tmp_path: Path) -> None:
    """Though a validation, which is collective, is due after every step. Beside it, the run directory is refused."""
    settings = tree(shards, train=LONG, checkpoint=SELDOM, eval={"every_steps": 1})
    path = launch.config_file(tmp_path, settings)
    run = tmp_path / "run"
    processes = launch.begin(["train", str(path), f"--run={run}"], ranks=2)
    launch.wait_for((run / "metrics.jsonl").exists, processes)
    second = launch.mbtrain(["train", str(path), f"--resume={run}"], expect=2)
    assert "another training is at work in it" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert not (run / "status.json").exists()
    processes[1].send_signal(signal.SIGTERM)  # one rank alone is told; all must act
    ended = launch.end(processes, timeout_s=60)
    assert ended.codes == [143, 143], ended.stderr
    done = len(launch.losses(run))
    found, _ = checkpoint.newest(run)
    assert found is not None
    assert found.progress.step == done
    assert '"KILLED"' in (run / "status.json").read_text()
    ended = launch.mbtrain(["train", f"--resume={run}", f"--train.steps={done + 1}", "--json"])
    assert launch.last_json(ended.stdout)["step"] == done + 1


@pytest.mark.parametrize("stage", [0, 2])
def test_non_finite_stops_all_ranks_before_the_update(shards: Path, tmp_path: Path, stage: int) -> None:
    """A weight that makes the loss infinite: no rank hangs, the cause is named, the checkpoint stays as it was."""
    run = tmp_path / "run"
    settings = tree(shards, train={"zero_stage": stage, "steps": 4})
    path = launch.config_file(tmp_path, settings)
    run.mkdir()
    shutil.copy(path, run / "config.yaml")
    model = build(config.validate(settings))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = math.nan
    written = write(run, model, checkpoint.Progress(step=2, dataset_hash=dataset_hash(load_manifest(shards))), ranks=2)
    ended = launch.mbtrain(["train", str(path), f"--resume={run}"], ranks=2, expect=2)
    assert "step 3: not finite: rank 0: the loss is nan" in ended.stderr
    assert ended.stderr.count("not finite") == 1, "said once, not by every rank"
    assert list((run / "checkpoints").iterdir()) == [written]
    checkpoint.verify(written)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_the_launchers_give_the_same_run(shards: Path, tmp_path: Path, settings: Path, launcher: str) -> None:
    run = tmp_path / "run"
    bin_ = Path(sys.executable).parent
    command = {
        "deepspeed": [bin_ / "deepspeed", "--num_gpus=2", f"--master_port={launch.free_port()}", "--module", "mbtrain"],
        "torchrun": [
            bin_ / "torchrun",
            "--nproc-per-node=2",
            f"--master-port={launch.free_port()}",
            "-m",
            "mbtrain",
            "--",
        ],
    }[launcher]
    train = ["train", str(settings), f"--run={run}", "--train.zero_stage=1", "--json"]
    # The launcher looks for its own programs on the path.
    env = launch.environment(PATH=f"{bin_}:{os.environ['PATH']}")
    ended = subprocess.run([*map(str, command), *train], env=env, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    expected, _ = bare_loop(shards, tree(shards))
    assert launch.losses(run) == pytest.approx(expected, abs=1e-5)
    assert '"val/bpb": ' in ended.stdout


def test_a_run_is_not_overwritten_and_goes_on_only_as_what_it_was(shards: Path, tmp_path: Path, settings: Path) -> None:
    """A start that is refused leaves the run as it stands: its status, its configuration, its metrics."""
    run = tmp_path / "run"
    first = launch.mbtrain(["train", str(settings), f"--run={run}", "--train.steps=1", "--json"])
    before = contents(run)
    assert b'"FINISHED"' in before["status.json"]
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    manifest = moved / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"train"', '"other"').replace('"val"', '"train"').replace('"other"', '"val"'))
    refused = {
        (f"--run={run}",): "holds a run already",
        (f"--resume={run}", "--data.seq_len=64"): "data.seq_len: got 64, expected 32, with which",
        (f"--resume={run}", f"--data.path={moved}"): str(moved),
    }
    for options, said in refused.items():
        ended = launch.mbtrain(["train", str(settings), *options], expect=2)
        assert said in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
        assert contents(run) == before

    # Taken up at its end, it has nothing to do: no second score, and the first is said again.
    again = launch.mbtrain(["train", f"--resume={run}", "--json"], ranks=2)
    assert launch.last_json(again.stdout) == launch.last_json(first.stdout)
    assert (run / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("section", "key", "value"), [("data", "boundary", False), ("data", "train_split", "val"), ("train", "seed", 1)]
)
def test_what_a_resumed_run_may_not_change(section: str, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^{section}\.{key}: got {value}, expected .* with which runs/a was"):
        session._must_fit(tiny.make(), tiny.make(**{section: {key: value}}), Path("runs/a"))
    with pytest.raises(CheckpointError, match="its model differs"):
        session._must_fit(tiny.make(2), tiny.make(3), Path("runs/a"))
    session._must_fit(tiny.make(), tiny.make(data={"path": "moved"}, optim={"lr": 1.0}), Path("runs/a"))


def test_a_disk_that_is_full_on_one_rank_costs_checkpoints_but_not_the_run(shards: Path, tmp_path: Path) -> None:
    """Rank 1 may write no file of more than 4 kB for a while; the last good checkpoint stays until it may again."""
    path = launch.config_file(tmp_path, tree(shards, train=LONG, checkpoint={"every_steps": 5, "keep_last": 1}))
    run = tmp_path / "run"
    processes = launch.begin(["train", str(path), f"--run={run}"], ranks=2)
    launch.wait_for(lambda: list(run.glob("checkpoints/step_*")), processes)
    unlimited = resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    launch.wait_for(lambda: (run / "log.txt").read_text().count("NOT saved") >= 2, processes)
    found, problems = checkpoint.newest(run)
    assert found is not None
    assert not problems
    assert launch.losses(run)[-1:] != [], "it goes on"
    assert len(launch.losses(run)) > found.progress.step
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, unlimited)
    launch.wait_for(lambda: list(run.glob("checkpoints/step_*"))[0:1] not in ([], [found.path]), processes)
    processes[0].send_signal(signal.SIGTERM)
    ended = launch.end(processes, timeout_s=60)
    assert ended.codes == [143, 143], ended.stderr
    assert "NOT saved, the last good stays: rank 1: [Errno 27] File too large" in ended.stderr
    assert [p.name for p in (run / "checkpoints").iterdir()] == [checkpoint.name_of(len(launch.losses(run)))]


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_by_itself(
    shards: Path, tmp_path: Path, settings: Path
) -> None:
    """Its metrics, samples and damaged files are all that is left of it: nothing is changed."""
    run = tmp_path / "run"
    launch.mbtrain(["train", str(settings), f"--run={run}"])
    for path in (run / "checkpoints").iterdir():
        os.truncate(path / "checkpoint.json", 10)
    before = contents(run)
    ended = launch.mbtrain(["train", str(settings), f"--resume={run}"], expect=2)
    assert "none of its 3 checkpoints is whole" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert contents(run) == before


def test_which_checkpoints_a_run_keeps(shards: Path, tmp_path: Path) -> None:
    """The newest stays, and those of every 40 steps; how long training waited is said."""
    run = tmp_path / "run"
    settings = tree(shards, train=LONG, checkpoint={"every_steps": 20, "keep_last": 1, "keep_every_steps": 40})
    path = launch.config_file(tmp_path, settings)
    processes = launch.begin(["train", str(path), f"--run={run}"], ranks=2)
    checkpoints = run / "checkpoints"
    launch.wait_for(lambda: (checkpoints / checkpoint.name_of(60)).exists(), processes)
    processes[0].send_signal(signal.SIGTERM)
    ended = launch.end(processes, timeout_s=60)
    last = progress_of(run).step
    kept = {checkpoint.name_of(step) for step in range(40, last + 1, 40)}
    assert {path.name for path in checkpoints.iterdir()} == kept | {checkpoint.name_of(last)}
    lines = ended.stderr.splitlines()
    saved = [i for i, line in enumerate(lines) if "· saved step_0000000020" in line]
    assert re.search(r"training waited 0\.\d{3} s", lines[saved[0]])


def test_a_tar_cut_off_while_training_ends_all_ranks_with_one_line(shards: Path, tmp_path: Path) -> None:
    """Only the rank whose row lies there finds out, in one of its four micro-steps; the other is told."""
    copied = tmp_path / "shards"
    shutil.copytree(shards, copied)
    train = {**LONG, "micro_batch_size": 1}
    path = launch.config_file(tmp_path, tree(copied, train=train, checkpoint=SELDOM))
    run = tmp_path / "run"
    processes = launch.begin(["train", str(path), f"--run={run}"], ranks=2)
    launch.wait_for((run / "metrics.jsonl").exists, processes)
    (tar,) = copied.rglob("train*.tar")
    os.truncate(tar, tar.stat().st_size * 9 // 10)
    ended = launch.end(processes, timeout_s=60)
    assert ended.codes == [2, 2], ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("mbtrain: ")]
    assert len(said) == 1
    assert re.match(rf"mbtrain: step \d+: rank [01]: {tar}: cut off", said[0])
    assert "Traceback" not in ended.stderr
    assert '"FAILED"' in (run / "status.json").read_text()
    assert progress_of(run).step == len(launch.losses(run)), "what was trained until then is saved"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--train.stepss=3", "train.stepss: unknown key"),
        ("--optim.lr=big", "optim.lr: got 'big'"),
        ("--data.seq_len=30", "data.seq_len: got 30, expected a multiple of"),
        ("--model.stages.0.n_heads=5", "model.stages.0.n_heads: got 5, expected a divisor of d_model = 32"),
        (
            "--train.global_batch_size=3",
            "train.global_batch_size: got 3, expected a multiple of the number of ranks, 2",
        ),
        ("--data.path=/nowhere", "/nowhere"),
        ("--data.val_split=dev", "data.val_split: got 'dev', expected one of"),
        ("--train.precision=fp16", "train.zero_stage: got 0, expected 1, 2 or 3 with train.precision=fp16"),
        ("--train.precision=fp16 --train.zero_stage=1", "train.precision: got fp16"),
        ("--train.sequence_parallel=3", "train.sequence_parallel: got 3, expected a divisor of"),
        ("--run=/dev/null/run", "Not a directory: '/dev/null/run"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(settings: Path, tmp_path: Path, override: str, said: str) -> None:
    ended = launch.mbtrain(["train", str(settings), f"--run={tmp_path / 'run'}", *override.split()], ranks=2, expect=2)
    lines = [line for line in ended.stderr.splitlines() if "mbtrain: " in line]
    assert said in lines[0], ended.stderr
    assert "Traceback" not in ended.stderr
