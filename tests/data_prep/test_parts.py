"""A job in parts, by any number of processes, makes what one process makes; so does one that is killed anywhere.

pytest tests/data_prep/test_parts.py
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.append import append
from data_prep.build import build, build_part, merge
from data_prep.job import load_job
from data_prep.locks import LOCK_NAME, folder_lock
from data_prep.recipe import Recipe, parse_splits
from data_prep.text import text_modality
from data_prep.verify import verify
from mbtrain.errors import DataError
from mbtrain.shards import load_manifest, open_split
from tests.data_prep.test_build import REPOSITORY, Killed, contents, digests

RECIPE = Recipe(splits=parse_splits("splits", "train=2/3,val=1/3"), shard_bytes=30_000)
QUICK: dict[str, Any] = {"workers": 1, "group_bytes": 9000}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """40 files, some in need of no copy, a duplicate, and records good and bad."""
    dice = random.Random(3)
    root = tmp_path / "sources"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02d}.bin").write_bytes(dice.randbytes(70_000 if i % 15 == 7 else dice.randrange(1, 4000)))
    (root / "bad.jsonl").write_text('{"text": "one"}\n{oops\n' + '{"text": ""}\n')
    shutil.copy(root / "37.bin", root / "zz-copy.bin")
    return root


def whole(sources: Path, out: Path) -> dict[str, str]:
    """Digests of the data set that one process makes at once."""
    build(text_modality("text"), [str(sources)], out, RECIPE, **QUICK)
    return digests(out)


def part(sources: Path, out: Path, i: int, n: int, **options: Any) -> dict[str, int]:
    return build_part(text_modality("text"), [str(sources)], out, RECIPE, (i, n), **{**QUICK, **options})


def test_parts_in_any_order_make_what_one_process_makes(sources: Path, tmp_path: Path) -> None:
    expected = whole(sources, tmp_path / "whole")
    for number, order in enumerate([[0], [2, 0, 1], [1, 1, 0, 2, 0], list(range(60))]):
        out, n = tmp_path / f"out{number}", max(order) + 1
        done = [part(sources, out, i, n) for i in order]
        merge(out, workers=1)
        assert digests(out) == expected
        if len(order) == n:  # the parts are disjoint and cover everything
            assert sum(figures["files"] for figures in done) == 42
            assert sum(figures["bytes"] for figures in done) == sum(path.stat().st_size for path in sources.iterdir())


def test_shares_of_a_merge_may_be_written_apart(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    expected = whole(sources, tmp_path / "whole")
    out = tmp_path / "out"
    part(sources, out, 0, 1)
    assert merge(out, workers=1, part=(2, 3)) is None
    shards = len([name for name in expected if name.endswith(".tar")])
    assert f"({len(range(2, shards, 3))} of {shards} shards are)" in capsys.readouterr().err
    assert merge(out, workers=1, part=(0, 3)) is None
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/*-0*.tar")}
    assert 0 < len(written) < shards
    manifest = merge(out, workers=2)  # the share that nobody wrote is written too
    assert digests(out) == expected
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert merge(out, workers=1) == manifest == load_manifest(out)
    assert verify(out, 1)[1] == []


def test_a_job_without_parts_goes_on_with_what_parts_read(sources: Path, tmp_path: Path) -> None:
    expected = whole(sources, tmp_path / "whole")
    part(sources, tmp_path / "out", 1, 3)
    assert whole(sources, tmp_path / "out") == expected
    assert part(sources, tmp_path / "out", 1, 3)["files"] > 0  # the data set is finished, and that is all right


def test_parts_that_are_not_done_are_named(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="expected a folder made by mbtrain-prep"):
        merge(out, workers=1)
    out.mkdir()
    with pytest.raises(DataError, match="no part was read here"):
        merge(out, workers=1)
    for i in (0, 2, 3):
        part(sources, out, i, 5)
    with pytest.raises(
        DataError, match=r"parts 1/5, 4/5 not done \(\d+ of \d+ groups are not read\); run what is miss"
    ):
        merge(out, workers=1)
    part(sources, out, 1, 5)
    with pytest.raises(DataError, match=r"part 4/5 not done"):
        merge(out, workers=1, part=(0, 2))


def test_parts_of_different_jobs_do_not_mix(sources: Path, tmp_path: Path) -> None:
    part(sources, tmp_path / "out", 0, 2)
    recipe = Recipe(splits=RECIPE.splits, shard_bytes=9)
    with pytest.raises(DataError, match="unfinished job with other shard_bytes"):
        build_part(text_modality("text"), [str(sources)], tmp_path / "out", recipe, (1, 2), **QUICK)
    (sources / "new").write_text("new")
    with pytest.raises(DataError, match="unfinished job with other sources"):
        part(sources, tmp_path / "out", 1, 2)


def test_max_reject_is_checked_when_all_parts_are_there(sources: Path, tmp_path: Path) -> None:
    part(sources, tmp_path / "out", 0, 1)
    with pytest.raises(DataError, match=r"bad\.jsonl line 2: not JSON.*: 1 of 44 cannot be read"):
        merge(tmp_path / "out", workers=1, max_reject=0.01)
    assert merge(tmp_path / "out", workers=1, max_reject=0.05) is not None


def test_a_job_is_read_back_from_its_mark(sources: Path, tmp_path: Path) -> None:
    os.rename(
        sources / "00.bin", os.fsencode(sources / "n\udcff.bin".encode("utf-8", "surrogateescape").decode("latin"))
    )
    with open(os.fsencode(sources) + b"/\xff\xfe.bin", "wb") as file:  # a name that is no Unicode
        file.write(b"x")
    part(sources, tmp_path / "out", 0, 1)
    job = load_job(tmp_path / "out")
    assert job.recipe == RECIPE
    assert job.options == text_modality("text").options
    assert os.fsencode(job.files[-1].path) == os.fsencode(sources) + b"/\xff\xfe.bin"
    merge(tmp_path / "out", workers=1)
    assert b"x" in contents(tmp_path / "out", "train") + contents(tmp_path / "out", "val")


# ---- locks --------------------------------------------------------------------------------------------------------


def test_parts_share_the_folder_and_no_one_else_does(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part(sources, out, 0, 2)
    with folder_lock(out, shared=True):  # another part at work
        part(sources, out, 1, 2)
        for job in (lambda: merge(out, workers=1), lambda: whole(sources, out)):
            with pytest.raises(DataError, match="another mbtrain-prep works on it, or a part of it"):
                job()
        merge(out, workers=1, part=(0, 2))
    with folder_lock(out), pytest.raises(DataError, match="another mbtrain-prep works on it"):
        part(sources, out, 1, 2)
    merge(out, workers=1)
    assert not (out / LOCK_NAME).exists()


def test_a_part_is_not_at_work_twice(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep import build as build_module

    def read_pass(*arguments: Any) -> None:
        monkeypatch.undo()
        with pytest.raises(DataError, match="part 1/2 is at work already"):
            part(sources, tmp_path / "out", 1, 2)
        part(sources, tmp_path / "out", 0, 2)

    monkeypatch.setattr(build_module, "read_pass", read_pass)
    part(sources, tmp_path / "out", 1, 2)
    with pytest.raises(DataError, match="part 1/2 not done"):
        merge(tmp_path / "out", workers=1)


def test_parts_that_start_at_once_make_one_job(sources: Path, tmp_path: Path) -> None:
    expected = whole(sources, tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.data_prep.test_parts import part\n"
        "part(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), 3)\n"
    )
    command = [sys.executable, str(script), str(sources), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stderr=subprocess.PIPE, text=True) for i in range(3)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    merge(tmp_path / "out", workers=1)
    assert digests(tmp_path / "out") == expected


# ---- killed -------------------------------------------------------------------------------------------------------


shutil_rmtree_of_the_library = shutil.rmtree


def shutil_rmtree(path: Path) -> None:
    """The real one, for the tests' own use."""
    shutil_rmtree_of_the_library(path, ignore_errors=True)


def killed_everywhere(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], again: Callable[[], object], every: int = 1
) -> int:
    """Do `work`, killed before or after each of its steps that others can see, and then `again`; returns how often.

    A removal of a folder is killed in its middle, too.
    """
    steps: dict[tuple[Any, str], Callable[..., Any]] = {
        (os, "replace"): os.replace,
        (os, "link"): os.link,
        (shutil, "rmtree"): shutil_rmtree_of_the_library,
    }
    moments = 0
    for moment in range(0, 1000, every):
        left = moment // 2

        def stopping(step: Callable[..., Any], after: bool = moment % 2 == 1) -> Callable[..., Any]:
            def stopped(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left >= 0 or after:
                    result = step(*arguments, **options)
                elif step is shutil_rmtree_of_the_library:
                    for path in [path for path in sorted(arguments[0].rglob("*")) if path.is_file()][::2]:
                        path.unlink()
                if left < 0:
                    raise Killed
                return result

            return stopped

        with monkeypatch.context() as patch:
            for (module, name), step in steps.items():
                patch.setattr(module, name, stopping(step))
            try:
                work()
                return moments
            except Killed:
                moments += 1
        again()
    raise AssertionError("the work has no end")


def test_a_part_and_a_merge_that_are_killed_anywhere_go_on(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(sources, tmp_path / "whole")
    out = tmp_path / "out"

    def work() -> None:
        shutil_rmtree(out)
        part(sources, out, 0, 2)
        part(sources, out, 1, 2)
        merge(out, workers=1, part=(0, 2))
        merge(out, workers=1)

    def again() -> None:
        if not (out / "manifest.json").exists():
            part(sources, out, 0, 2)
            part(sources, out, 1, 2)
        merge(out, workers=1)
        assert digests(out) == expected

    assert killed_everywhere(monkeypatch, work, again, every=3) > 15


def test_an_append_that_is_killed_anywhere_leaves_the_old_or_the_new_data_set(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(sources, tmp_path / "old")
    old = {split: contents(tmp_path / "old", split) for split in ("train", "val")}
    more = tmp_path / "more"
    more.mkdir()
    for i in range(6):
        (more / f"{i}.bin").write_bytes(bytes([i]) * 3000 * (i + 1))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    append(tmp_path / "new", [str(more)], **QUICK)
    expected = digests(tmp_path / "new")
    out = tmp_path / "out"

    def work() -> None:
        shutil_rmtree(out)
        shutil.copytree(tmp_path / "old", out)
        append(out, [str(more)], **QUICK)

    def again() -> None:
        for split in old:
            opened = open_split(out, split, check="full")
            assert [opened.read(i) for i in range(len(old[split]))] == old[split]
        append(out, [str(more)], **QUICK)
        assert digests(out) == expected

    assert killed_everywhere(monkeypatch, work, again, every=3) > 15


def test_a_part_that_is_killed_gives_its_locks_back(sources: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom data_prep import build\n"
        "build.read_pass = lambda *a: (print('in', flush=True), time.sleep(300))\n"
        "from tests.data_prep.test_parts import part\npart(Path(sys.argv[1]), Path(sys.argv[2]), 0, 1)\n"
    )
    command = [sys.executable, str(script), str(sources), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    with pytest.raises(DataError, match="part 0/1 is at work already"):
        part(sources, tmp_path / "out", 0, 1)
    process.kill()
    process.wait()
    process.stdout.close()
    time.sleep(0.05)
    part(sources, tmp_path / "out", 0, 1)
    assert merge(tmp_path / "out", workers=1) is not None


SBATCH = """#!/usr/bin/env bash
# Runs a job at once, task by task, as sbatch would have it run later.
set -euo pipefail
count=0
while [[ $1 == --* ]]; do
    case $1 in --array=0-*) count=$((${1#--array=0-} + 1)) ;; --dependency=*) echo "$1" >>"$LOG" ;; esac
    shift
done
echo "$MBTRAIN_PREP_STEP $count" >>"$LOG"
export SLURM_ARRAY_TASK_COUNT=$count SLURM_CPUS_PER_TASK=1
for ((i = 0; i < (count > 0 ? count : 1); i++)); do SLURM_ARRAY_TASK_ID=$i bash "$@" >&2; done
echo "7;cluster"
"""


def test_the_slurm_script_reads_writes_and_finishes(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "VENV": str(Path(sys.executable).parents[1]),
        "PARTS": "2",
        "MERGE": "--max-reject=0.5",
    }
    options = ["--splits=train=2/3,val=1/3", "--shard-bytes=30k"]
    command = ["bash", str(REPOSITORY / "launch" / "prep.slurm"), "text", str(sources), *options]
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text().split() == [
        *("read", "2", "--dependency=afterok:7", "write", "2", "--dependency=afterok:7", "finish", "0")
    ]
    assert digests(tmp_path / "out") == whole(sources, tmp_path / "whole")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected VERB SRC... --out=DIR" in done.stderr
