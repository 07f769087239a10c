"""From source files to a data set: the same bytes however it is made, killed and made again.

pytest tests/data_prep/test_build.py
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import build as build_module
from data_prep.build import build
from data_prep.locks import folder_lock
from data_prep.recipe import Recipe, parse_split_bytes, parse_splits
from data_prep.text import text_modality
from data_prep.verify import verify
from mbtrain.errors import DataError
from mbtrain.shards import COUNTS, Manifest, open_split

REPOSITORY = Path(__file__).parents[2]
SPLITS = "train=0.8,val=0.2"


def make(sources: Path | list[Path], out: Path, splits: str = SPLITS, **options: Any) -> Manifest:
    """A data set in small groups and small shards, in this process unless `workers` is given."""
    recipe_options = {key: options.pop(key) for key in list(options) if key in Recipe.__dataclass_fields__}
    shares = None if "split_bytes" in recipe_options else parse_splits("splits", splits)
    recipe = Recipe(splits=shares, **{"shard_bytes": 20_000, **recipe_options})
    names = [str(source) for source in (sources if isinstance(sources, list) else [sources])]
    options = {"workers": 1, "group_bytes": 4000, **options}
    return build(text_modality("text"), names, out, recipe, **options)


def contents(out: Path, split: str) -> list[bytes]:
    opened = open_split(out, split)
    return [opened.read(i) for i in range(len(opened))]


def counts(**known: int) -> dict[str, int]:
    return {**dict.fromkeys(COUNTS, 0), **known}


def rejections(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "rejected.parquet").to_pylist()


def digests(root: Path) -> dict[str, str]:
    """Sha256 of every file under a folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Syncing matters in a power cut only, and takes most of these tests' time where the disk is shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """90 files of 0 to 3000 bytes in two folders, with duplicates, an empty one, and records good and bad."""
    dice = random.Random(1)
    root = tmp_path / "sources"
    for i in range(90):
        path = root / ("a" if i % 3 else "b") / f"{i:02d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dice.randbytes(dice.randrange(1, 3000)))
    shutil.copy(root / "a" / "01.bin", root / "b" / "zz-copy.bin")
    (root / "empty").touch()
    (root / "records.jsonl").write_text('{"text": "one"}\n{"text": "one"}\n{oops\n{"text": "two"}\n')
    return root


def test_the_number_of_workers_and_the_grouping_change_nothing(sources: Path, tmp_path: Path) -> None:
    one = make(sources, tmp_path / "one")
    three = make(sources, tmp_path / "three", workers=3)
    coarse = make(sources, tmp_path / "coarse", group_bytes=10**9)
    assert one == three == coarse
    assert len(one.splits["train"].shards) > 3
    assert digests(tmp_path / "one") == digests(tmp_path / "three") == digests(tmp_path / "coarse")


def test_the_place_and_times_of_the_sources_change_nothing(sources: Path, tmp_path: Path) -> None:
    make(sources, tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copytree(sources, tmp_path / "elsewhere" / "sources", copy_function=shutil.copyfile)
    make(moved, tmp_path / "there")
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


def test_every_document_is_kept_once_or_counted(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = make(sources, tmp_path / "out")
    assert "MB/s, 1 rejected\n" in capsys.readouterr().err  # what is only empty is no reason to worry
    expected = {path.read_bytes() for path in sources.rglob("*.bin")} | {b"one", b"two"}
    found = contents(tmp_path / "out", "train") + contents(tmp_path / "out", "val")
    assert len(found) == len(expected) == 92
    assert set(found) == expected
    assert manifest.counts == counts(found=96, duplicates=2, rejected=2)
    assert manifest.documents == "whole"
    rejected = rejections(tmp_path / "out")
    assert [(item["file"], item["where"]) for item in rejected] == [("empty", ""), ("records.jsonl", "line 3")]
    assert rejected[0]["reason"] == "empty"
    assert rejected[1]["reason"].startswith("not JSON")
    assert [item["bad"] for item in rejected] == [False, True]
    assert {item["source"] for item in rejected} == {"sources"}
    assert verify(tmp_path / "out", 1)[1] == []


def test_shards_are_readable_by_webdataset_and_tar(sources: Path, tmp_path: Path) -> None:
    import webdataset

    make(sources, tmp_path / "out")
    split = open_split(tmp_path / "out", "train")
    paths = [str(tmp_path / "out" / "train" / f"{shard.name}.tar") for shard in split.manifest.splits["train"].shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["text"] for sample in samples] == [split.read(i) for i in range(len(split))]
    assert [sample["__key__"] for sample in samples] == [split.key(i) for i in range(len(split))]

    number = 0
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                extracted = tar.extractfile(member)
                assert extracted is not None
                assert extracted.read() == split.read(number)
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                number += 1
    assert number == len(split)
    listed = subprocess.run(["tar", "tf", paths[0]], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    assert listed.stdout.split()[0] == f"{split.key(0)}.text"


def test_added_data_moves_no_sample(sources: Path, tmp_path: Path) -> None:
    make(sources, tmp_path / "before")
    for i in range(30):
        (sources / "a" / f"new{i}").write_bytes(os.urandom(500))
    make(sources, tmp_path / "after")
    for split in ("train", "val"):
        assert set(contents(tmp_path / "before", split)) <= set(contents(tmp_path / "after", split))


def test_sources_keep_their_labels(sources: Path, tmp_path: Path) -> None:
    make([sources / "b", sources / "a", sources / "records.jsonl"], tmp_path / "out", "train=1")
    split = open_split(tmp_path / "out", "train")
    assert split.source_names == ["b", "a", "records"]
    assert [split.source_names[n] for n in split.source_index] == ["b"] * 31 + ["a"] * 59 + ["records"] * 2


def test_a_file_of_zero_bytes_is_kept_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(2**20))
    make(tmp_path / "zeros", tmp_path / "out", "train=1")
    assert contents(tmp_path / "out", "train") == [bytes(2**20)]


def test_lengths_outside_the_limits_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(12)))
    manifest = make(tmp_path / "x.jsonl", tmp_path / "out", "train=1", min_bytes=3, max_bytes=8)
    assert [len(document) for document in contents(tmp_path / "out", "train")] == [3, 4, 5, 6, 7, 8]
    assert manifest.counts["rejected"] == 6
    reasons = [item["reason"] for item in rejections(tmp_path / "out")]
    assert not any(item["bad"] for item in rejections(tmp_path / "out"))
    assert reasons[0] == "empty"
    assert reasons[1] == "1 bytes, shorter than 3"
    assert reasons[-1] == "longer than 8 bytes"


def test_strict_stops_at_what_is_bad_but_not_at_what_is_empty(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^sources records\.jsonl line 3: not JSON.*: 1 of 96 cannot be.*--strict"):
        make(sources, tmp_path / "out", max_reject=0)
    assert not (tmp_path / "out" / "manifest.json").exists()
    (sources / "records.jsonl").unlink()
    manifest = make(sources, tmp_path / "other", max_reject=0)
    assert manifest.counts["rejected"] == 1


def test_more_that_is_bad_than_allowed_stops_before_anything_is_written(sources: Path, tmp_path: Path) -> None:
    (sources / "records.jsonl").write_text("{oops\n" * 5 + '{"text": "one"}\n')
    message = r"line 1: not JSON.*line 3: not JSON.*\(and 2 more\): 5 of 98 .*=0\.05 "
    with pytest.raises(DataError, match=message) as error:
        make(sources, tmp_path / "out", max_reject=0.05)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("[!.]*"))
    manifest = make(sources, tmp_path / "out", max_reject=5 / 98)  # goes on, and the limit leaves no trace
    assert manifest.counts == counts(found=98, duplicates=1, rejected=6)
    make(sources, tmp_path / "plain")
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl: no sample in all source files: no key 'text'"):
        make(tmp_path / "x.jsonl", tmp_path / "out")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=1500), min_size=1, max_size=12).filter(any), st.integers(1, 5000))
def test_any_bytes_are_read_back(documents: list[bytes], shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "in").mkdir()
        for i, document in enumerate(documents):
            (root / "in" / f"{i:03d}").write_bytes(document)
        make(root / "in", root / "out", "train=1", shard_bytes=shard_bytes)
        assert contents(root / "out", "train") == list(dict.fromkeys(filter(None, documents)))


# ---- one long file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_pieces_of_one_file_put_together_are_the_file(tmp_path: Path, suffix: str) -> None:
    content = random.Random(2).randbytes(30_000) + bytes(70_000)  # pieces of zeros are equal, and all are kept
    path = tmp_path / f"long{suffix}"
    if suffix:
        import lzma

        path.write_bytes(lzma.compress(content))
    else:
        path.write_bytes(content)
    sizes = parse_split_bytes("split_bytes", "90000,5000,4000")
    manifest = make(path, tmp_path / "out", split_bytes=sizes, sample_bytes=4096)
    assert manifest.documents == "pieces"
    assert manifest.counts == counts(found=25, unused_bytes=1000)
    assert [b"".join(contents(tmp_path / "out", split)) for split in ("train", "val", "test")] == [
        content[:90_000],
        content[90_000:95_000],
        content[95_000:99_000],
    ]
    split = open_split(tmp_path / "out", "train")
    assert set(split.lengths.tolist()) == {4096, 90_000 % 4096}
    assert [split.key(i) for i in (0, 21)] == ["p000000000000", "p000000000021"]
    assert open_split(tmp_path / "out", "val").key(0) == "p000000000022"
    assert verify(tmp_path / "out", 1)[1] == []


def test_pieces_need_one_file_that_is_long_enough(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(bytes(100))
    sizes = parse_split_bytes("split_bytes", "90,11")
    with pytest.raises(DataError, match="a: split_bytes: expected 101 bytes or more, got 100"):
        make(tmp_path / "in", tmp_path / "out", split_bytes=sizes)
    (tmp_path / "in" / "b").write_bytes(bytes(100))
    with pytest.raises(DataError, match="expected one long file, got files with 2 documents"):
        make(tmp_path / "in", tmp_path / "out", split_bytes=sizes, overwrite=True)


# ---- stopped, and started again -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def test_a_job_stopped_before_or_after_any_rename_goes_on(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(sources, tmp_path / "whole", group_bytes=30_000, shard_bytes=60_000)
    expected = digests(tmp_path / "whole")
    replace_file = os.replace
    stopped = 0
    for moment in range(200):
        left = moment // 2

        def replace_or_stop(source: Any, target: Any, after: bool = moment % 2 == 1) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                replace_file(source, target)
                return
            if after:
                replace_file(source, target)
            raise Killed

        out = tmp_path / f"out{moment}"
        monkeypatch.setattr(os, "replace", replace_or_stop)
        try:
            make(sources, out, group_bytes=30_000, shard_bytes=60_000)
        except Killed:
            stopped += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", replace_file)
        make(sources, out, group_bytes=30_000, shard_bytes=60_000)
        assert digests(out) == expected
        shutil.rmtree(out)
    assert stopped > 40


def test_finished_work_is_not_done_again(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_manifest", stop)
        with pytest.raises(Killed):
            make(sources, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[a-z]*/*-0*.*")}
    assert len(written) > 10
    make(sources, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in written} == written


SCRIPT = """
import sys
from pathlib import Path
from data_prep.build import build
from data_prep.recipe import Recipe, parse_splits
from data_prep.text import text_modality

if __name__ == "__main__":
    recipe = Recipe(splits=parse_splits("splits", "train=0.8,val=0.2"), shard_bytes=20_000)
    build(text_modality("text"), [sys.argv[1]], Path(sys.argv[2]), recipe, workers=int(sys.argv[3]), group_bytes=4000)
"""


def start(tmp_path: Path, sources: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(sources), str(out), str(workers)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bytes(
    sources: Path, tmp_path: Path, workers: int
) -> None:
    make(sources, tmp_path / "whole")
    dice = random.Random(workers)
    out = tmp_path / "out"
    kills = 0
    for _ in range(4):
        process = start(tmp_path, sources, out, workers)
        deadline_s = time.monotonic() + 20
        # the start of the interpreter is not what is tested: the clock runs from the first staged file on
        while process.poll() is None and not list(out.glob(".prep/stage/*.index")) and time.monotonic() < deadline_s:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        whole = digests(tmp_path / "whole")
        for path in out.glob("[a-z]*/*-0*.*"):  # what has its name is whole
            assert hashlib.sha256(path.read_bytes()).hexdigest() == whole[str(path.relative_to(out))]
    assert kills
    assert start(tmp_path, sources, out, workers).wait(30) == 0
    assert digests(out) == digests(tmp_path / "whole")


def script_that(tmp_path: Path, action: str) -> Path:
    """The script, with an action in the worker that stages group 9."""
    path = tmp_path / "special.py"
    stage = (
        f"def stage(job, count):\n    if job.number == 9:\n        {action}\n    data_prep.stage.stage(job, count)\n"
    )
    main = 'if __name__ == "__main__":'
    imports = "import os, signal, time\nimport data_prep.build, data_prep.stage\n"
    path.write_text(SCRIPT.replace(main, f"{imports}{stage}{main}\n    data_prep.build.stage = stage"))
    return path


def test_a_worker_that_dies_gives_one_line_and_the_job_goes_on(sources: Path, tmp_path: Path) -> None:
    script = script_that(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), str(sources), str(tmp_path / "out"), "2"]
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert died.stderr.strip().splitlines()[-1].startswith("mbtrain.errors.DataError: a worker process died")
    assert not (tmp_path / "out" / "manifest.json").exists()
    make(sources, tmp_path / "out")
    make(sources, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(sources: Path, tmp_path: Path, stop: signal.Signals) -> None:
    pid_path = tmp_path / "pid"
    action = f"open({str(pid_path)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script_that(tmp_path, action)), str(sources), str(tmp_path / "out"), "2"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline_s = time.monotonic() + 30
    while not (pid_path.exists() and pid_path.read_text()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    worker = int(pid_path.read_text())
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal sends it: to all
    else:
        process.send_signal(stop)
    assert process.wait(20) != 0
    while running(worker) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not running(worker)


def running(pid: int) -> bool:
    """Whether a process exists and has not ended (one that nobody waits for stays as a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_full_disk_gives_one_line_and_nothing_half_written(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(DataError, match="No space left on device; mend that") as error:
            make(sources, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    make(sources, tmp_path / "out")


def test_a_finished_data_set_is_found_finished(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = make(sources, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert make(sources, tmp_path / "out", workers=2) == first
    assert "is finished already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_data_set_of_something_else_is_replaced_only_on_request(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(sources, out, "train=1", shard_bytes=5000)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(
        DataError, match=r"finished data set with other shard_bytes \(5000 there, 20000 now\).*--overwrite"
    ):
        make(sources, out, "train=1")
    with pytest.raises(DataError, match="finished data set with other splits"):
        make(sources, out, shard_bytes=5000)
    (sources / "a" / "new").write_text("new")
    with pytest.raises(DataError, match="finished data set with other sources"):
        make(sources, out, "train=1", shard_bytes=5000)
    make(sources, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    make(sources, tmp_path / "fresh")
    assert digests(out) == digests(tmp_path / "fresh")


def test_a_source_that_is_newer_than_the_data_set_is_noticed(sources: Path, tmp_path: Path) -> None:
    make(sources, tmp_path / "out")
    path = sources / "a" / "02.bin"
    path.write_bytes(bytes(path.stat().st_size))
    later_ns = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later_ns, later_ns))
    with pytest.raises(DataError, match=r"02\.bin is newer"):
        make(sources, tmp_path / "out")


def test_a_finished_data_set_that_lost_a_file_is_not_called_finished(sources: Path, tmp_path: Path) -> None:
    make(sources, tmp_path / "out")
    (tmp_path / "out" / "train" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: missing; make the data set again with --overwrite"):
        make(sources, tmp_path / "out")


def test_an_unfinished_job_of_something_else_is_replaced_only_on_request(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_manifest", stop)
        with pytest.raises(Killed):
            make(sources, tmp_path / "out")
    with pytest.raises(DataError, match=r"unfinished job with other shard_bytes \(20000 there, 9000 now\)"):
        make(sources, tmp_path / "out", shard_bytes=9000)
    (sources / "empty").unlink()
    with pytest.raises(DataError, match="unfinished job with other sources"):
        make(sources, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / ".prep")
    with pytest.raises(DataError, match="shards without a manifest"):
        make(sources, tmp_path / "out")
    make(sources, tmp_path / "out", overwrite=True)
    make(sources, tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_a_source_that_changes_while_it_is_read_is_an_error(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = build_module.find_files

    def find_then_change(*arguments: Any) -> Any:
        found = find(*arguments)
        with open(sources / "a" / "02.bin", "ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(build_module, "find_files", find_then_change)
    with pytest.raises(DataError, match=r"02\.bin: changed since the start"):
        make(sources, tmp_path / "out")


def test_a_long_plain_file_is_not_copied_and_its_content_is_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long"
    path.write_bytes(b"a" * 200_000)
    info = path.stat()
    plan = build_module.make_plan

    def change_then_plan(prep: Path, *arguments: Any) -> Any:
        assert not list((prep / "stage").glob("*.blob"))
        path.write_bytes(b"a" * 199_999 + b"b")  # as long and as old as before
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        return plan(prep, *arguments)

    monkeypatch.setattr(build_module, "make_plan", change_then_plan)
    with pytest.raises(DataError, match=r"long: changed at byte 0 since it was staged; start again with --overwrite"):
        make(path, tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "train-000000.tar").exists()
    monkeypatch.undo()
    make(path, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out", "train") + contents(tmp_path / "out", "val") == [path.read_bytes()]


def test_sums_that_do_not_add_up_are_an_error(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_module.make_plan

    def wrong(*arguments: Any) -> Any:
        made = plan(*arguments)
        made.counts["found"] += 1
        return made

    monkeypatch.setattr(build_module, "make_plan", wrong)
    with pytest.raises(DataError, match=r"out: counts: expected 97 found = 92 samples \+ 2 duplicates"):
        make(sources, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_two_jobs_do_not_work_on_one_folder(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with folder_lock(tmp_path / "out"):
        with pytest.raises(DataError, match="another mbtrain-prep works on it"):
            make(sources, tmp_path / "out")
    make(sources, tmp_path / "out")
