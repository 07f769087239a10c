"""The command line: one line and exit status 2 for every mistake, and the contract of --json.

pytest tests/data_prep/test_cli.py
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import cli
from mbtrain.shards import load_manifest, open_split

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    for i in range(20):
        (tmp_path / "notes" / f"{i}.txt").write_text(f"note {i}")
    (tmp_path / "notes" / "copy.txt").write_text("note 3")
    (tmp_path / "notes" / "empty.txt").touch()
    return tmp_path / "notes"


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(arg) for arg in args])
    assert isinstance(end.value.code, int)
    return end.value.code


def module(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_prep", *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_json_is_the_last_line_of_each_verb(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    command = ["text", "--json", notes, f"--out={out}", "--splits=train=0.5,val=0.5", "--workers=1"]
    for _ in range(2):  # the second time finds it finished
        assert run(*command) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert {key: figures[key] for key in ("samples", "bytes", "shards", "duplicates", "rejected")} == {
            "samples": 20,
            "bytes": 130,
            "shards": 2,
            "duplicates": 1,
            "rejected": 1,
        }
        assert figures["found"] == 22
        assert list(figures["splits"]) == ["train", "val"]
        assert sum(split["samples"] for split in figures["splits"].values()) == 20
    assert run("verify", out, "--json", "--workers=1") == 0
    expected = {"samples": 20, "bytes": 130, "shards": 2, "bad": []}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == expected
    assert run("stats", "--json", out) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["samples"] == 20
    assert len(figures["splits"]["train"]["histogram"]) == 256


def test_options_reach_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "long").write_bytes(bytes(range(256)) * 8)
    options = ["--split-bytes=1Ki,1k", "--sample-bytes=100", "--shard-bytes=4Ki", "--workers=1"]
    assert run("text", tmp_path / "long", f"--out={tmp_path / 'out'}", *options) == 0
    assert "the last 24 bytes" in capsys.readouterr().err
    manifest = load_manifest(tmp_path / "out")
    assert manifest.prep == {
        "split_bytes": {"train": 1024, "val": 1000},
        "sample_bytes": 100,
        "shard_bytes": 4096,
        "include": [],
        "exclude": [],
        "column": "text",
        "match": "",
        "reject": "",
    }

    (tmp_path / "x.jsonl").write_text('{"1e3": "number-like names stay names"}\n{"1e3": "x"}\n')
    options = ["--column=1e3", "--splits=train=1", "--min-bytes=2", "--exclude=a,b/**"]
    assert run("text", tmp_path / "x.jsonl", f"--out={tmp_path / '007'}", *options) == 0
    assert open_split(tmp_path / "007", "train").read(0) == b"number-like names stay names"
    assert load_manifest(tmp_path / "007").prep["exclude"] == ["a", "b/**"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["txt"], "txt: no such verb (did you mean text?)"),
        (["video", "x", "--out=y"], "video: no such verb"),
        (["text"], "SRC: expected files or folders"),
        (["text", "{notes}"], "--out: expected a folder"),
        (["text", "{notes}", "--out"], "--out: has no value"),
        (
            ["text", "{notes}", "--out={out}", "--split-byte=3"],
            "--split-byte: no such option (did you mean split-bytes?)",
        ),
        (["text", "{notes}", "--out={out}", "--normalize"], "--normalize: has no value"),
        (["text", "{notes}", "--out={out}", "-v"], "-v: options are written --key=value"),
        (["text", "{notes}", "--out={out}", "--", "--help=1"], "--: options are written --key=value"),
        (["text", "{notes}", "--out={out}", "--json=perhaps"], "--json: expected true or false, got 'perhaps'"),
        (["text", "{notes}", "--out={out}", "--workers=0"], "--workers: expected a number from 1"),
        (["text", "{notes}", "--out={out}", "--part=2/2"], "--part: expected i/n with i from 0 to n-1"),
        (["text", "{notes}", "--out={out}", "--part=1"], "--part: expected i/n with i from 0 to n-1"),
        (["text", "{notes}", "--out={out}", "--part=0/2", "--strict"], "--strict: are about all parts"),
        (["text", "{notes}", "--out={out}", "--max-reject=2"], "--max-reject: expected a share from 0 to 1"),
        (["text", "{notes}", "--out={out}", "--max-reject=nan"], "--max-reject: expected a number"),
        (["text", "{notes}", "--out={out}", "--max-reject=0.1", "--strict"], "expected one of them, got both"),
        (["text", "{notes}", "--out={out}", "--engine=spark"], "--engine: expected one of local, ray"),
        (["text", "{notes}", "--out={out}", "--near-dups=1"], "near_dups: expected a similarity"),
        (["text", "{notes}", "--out={out}", "--match=("], "--match: expected a regular expression"),
        (["text", "{notes}", "--out={out}", "--column="], "--column: expected a name"),
        (["image", "{notes}", "--out={out}", "--split-bytes=5"], "--split-bytes: no such option"),
        (["image", "{notes}", "--out={out}", "--size=0"], "--size: expected"),
        (["image", "{notes}", "--out={out}", "--size=big"], "--size: expected"),
        (["image", "{notes}", "--out={out}", "--max-pixels=10000000000"], "--max-pixels: expected"),
        (["audio", "{notes}", "--out={out}", "--rate=fast"], "--rate: expected"),
        (["audio", "{notes}", "--out={out}", "--rate=5"], "--rate: expected"),
        (["audio", "{notes}", "--out={out}", "--segment=0"], "segment"),
        (["audio", "{notes}", "--out={out}", "--encoding=mp3"], "encoding"),
        (["merge"], "DIR: expected one folder of a data set, got 0"),
        (["merge", "{notes}"], "notes: no part was read here"),
        (["merge", "{out}"], "expected a folder made by mbtrain-prep"),
        (["append", "{notes}"], "DIR SRC...: expected a data set and files"),
        (["append", "{notes}", "{notes}"], "manifest.json: no manifest"),
        (["append", "{notes}", "{notes}", "--column=x"], "--column: no such option"),
        (["text", "{notes}", "--out={out}", "--shard-bytes=big"], "--shard-bytes: expected a size"),
        (["text", "{notes}", "--out={out}", "--splits=train=0.5"], "--splits: expected fractions that sum to 1"),
        (["text", "{notes}", "--out={out}", "--splits=a=1", "--split-bytes=1"], "expected one of them, got both"),
        (["text", "{notes}", "--out={out}", "--sample-bytes=5"], "--sample-bytes: cuts pieces only together"),
        (["text", "{notes}", "--out={out}", "--split-bytes=5"], "split_bytes: expected one long file"),
        (["text", "{notes}", "--out={out}", "--glob=*.rs"], "no file to read (passed over: 22 not matching)"),
        (["text", "{out}/gone", "--out={out}"], "gone: cannot be read: No such file"),
        (["text", "{notes}", "--out={notes}/0.txt"], "0.txt: File exists"),
        (["verify"], "DIR: expected one folder of a data set, got 0"),
        (["verify", "{notes}", "more"], "got 2"),
        (["verify", "{notes}"], "manifest.json: no manifest"),
        (["stats", "{notes}", "--jsn=1"], "--jsn: no such option (did you mean json?)"),
        (["stats", "{notes}/1.txt"], "1.txt: expected a folder"),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(
    notes: Path, tmp_path: Path, capfd: pytest.CaptureFixture, args: list[str], words: str
) -> None:
    filled = [arg.replace("{notes}", str(notes)).replace("{out}", str(tmp_path / "out")) for arg in args]
    assert run(*filled) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("mbtrain-prep: ")]
    assert len(lines) == 1
    assert captured.err.splitlines()[-1] == lines[0]
    assert words in lines[0]
    assert "Traceback" not in captured.err


def test_damage_gives_status_2_and_the_names(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert run("text", notes, f"--out={out}", "--splits=train=0.5,val=0.5", "--workers=1") == 0
    os.truncate(out / "train" / "train-000000.tar", 1024)
    (out / "val" / "val-000000.parquet").unlink()
    capsys.readouterr()
    assert run("verify", out, "--workers=1", "--json") == 2
    captured = capsys.readouterr()
    assert "train-000000.tar: cut off" in captured.err
    assert "val-000000.parquet: missing" in captured.err
    bad = json.loads(captured.out.splitlines()[-1])["bad"]
    assert any("train-000000.tar" in line for line in bad)
    assert any("val-000000.parquet" in line for line in bad)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    start_s = time.monotonic()
    done = module("--help")
    elapsed_s = time.monotonic() - start_s
    assert done.returncode == 0
    assert "mbtrain-prep verify DIR" in done.stdout
    assert elapsed_s < 2  # 0.05 s on an idle machine; the promise is half a second, the rest is for busy ones
    program = (
        "import sys, data_prep.cli as c\n"
        "try: c.main(['text', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'pyarrow', 'fire'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    shown = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "--split-bytes=LIST" in shown.stdout
    assert "Examples:" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command_and_works_in_processes(notes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["text", notes, f"--out={out}", "--shard-bytes=1Ki", "--workers=2", "--json"]
    done = module(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["shards"] > 5
    assert "torch" not in done.stderr
    failed = module("text", notes, f"--out={out}", "--splits=train=1")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith(f"mbtrain-prep: {out}: holds a finished data set with other")


@pytest.mark.parametrize("verb", sorted(cli.PROGRAM.verbs))
def test_every_help_text_lists_the_options_that_are_accepted(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert run(verb, "x", "y", "--no-such=1") == 2
    accepted = {name.strip() for name in capsys.readouterr().err.partition("expected one of ")[2].split(", ")}
    assert "--json" in accepted
    assert run(verb, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"mbtrain-prep {verb} ")
    assert "{" not in shown.replace('{"', "")
    # in the list of options, or on the first line: those in prose and examples may be of other verbs
    first, *lines = shown.splitlines()
    listed = [first, *(line for line in lines if line.lstrip().startswith("--"))]
    told = {name for line in listed for name in re.findall(r"(?:^|[ \[])(--[a-z-]+)(?=[=: \]]|$)", line)}
    assert told == accepted
    assert f"mbtrain-prep {verb} " in shown.partition("Example")[2]
    assert max(map(len, shown.splitlines())) <= 120
    assert run("--help") == 0
    assert f"mbtrain-prep {verb} " in capsys.readouterr().out


def test_parts_merge_and_append(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, more = tmp_path / "out", tmp_path / "more"
    for part in ("0/2", "1/2"):
        assert run("text", notes, f"--out={out}", f"--part={part}", "--workers=1", "--json") == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["part"] == part
    assert run("merge", out, "--part=0/1", "--workers=1", "--json") == 0
    assert run("merge", out, "--workers=1", "--max-reject=0", "--json") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["found"], figures["samples"]) == (22, 20)
    assert run("text", notes, f"--out={tmp_path / 'one'}", "--workers=1") == 0
    assert (out / "manifest.json").read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()
    more.mkdir()
    (more / "3.txt").write_text("note 3")
    (more / "new.txt").write_text("note new")
    assert run("append", out, more, "--workers=1", "--strict", "--json") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["found"], figures["samples"], figures["duplicates"], figures["rejected"]) == (24, 21, 2, 1)


def test_merge_says_nothing_good_of_a_damaged_manifest(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run("text", notes, f"--out={out}", "--workers=1") == 0
    (out / "manifest.json").write_text("")
    capsys.readouterr()
    assert run("merge", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "manifest.json: cut off or not JSON" in line


def test_filters_are_counted_as_sound_but_unwanted(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--match=note", "--reject=[45]$", "--min-bytes=7", "--strict", "--json", "--workers=1"]
    assert run("text", notes, f"--out={tmp_path / 'out'}", "--splits=train=1", *options) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    # note 10 to note 19, less two; 0 to 9 and the copy are too short, and one is empty
    assert (figures["found"], figures["samples"], figures["rejected"]) == (22, 8, 14)


def test_a_dry_run_writes_nothing_and_is_about_right(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_bytes(os.urandom(1000 + 50 * i))
    (folder / "long.txt").write_bytes(os.urandom(300_000))
    lines = "".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(60_000))
    (folder / "records.jsonl").write_text(lines)
    command = ["text", folder, f"--out={out}", "--splits=train=0.9,val=0.1", "--shard-bytes=4Mi", "--json"]
    assert run(*command, "--dry-run") == 0
    assert not out.exists()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run(*command, "--workers=1") == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["files"], told["out"]) == (42, "would be made")
    assert told["disk_bytes"] < told["free_bytes"]
    assert told["samples"] == pytest.approx(made["samples"], rel=0.25)
    assert told["sample_bytes"] == pytest.approx(made["bytes"], rel=0.25)
    assert told["splits"]["train"]["shards"] == pytest.approx(made["splits"]["train"]["shards"], rel=0.3)
    assert run(*command, "--dry-run") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["out"] == "holds a finished data set with the same options"
    assert run("text", folder / "long.txt", f"--out={out}", "--split-bytes=200k,100k", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["samples"], told["splits"]["val"]["samples"]) == (4 + 2, 2)
    assert told["out"].startswith("holds a finished data set with other")


def test_images_and_audio_go_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import wave

    import numpy as np
    from PIL import Image

    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("RGB", (20 + i, 10), (i, 2, 3)).save(tmp_path / "in" / f"{i}.png")
        with wave.open(str(tmp_path / "in" / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(np.arange(100 * i, 100 * i + 2000, dtype="<i2").tobytes())
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "in" / "bad.wav").write_bytes(b"no sound")
    for verb, more, samples, size in (
        ("image", ["--size=4"], 3, 4 * 4 * 3),
        ("audio", ["--rate=8000", "--segment=0.1"], 9, None),
    ):
        out = tmp_path / verb
        command = [verb, tmp_path / "in", f"--out={out}", "--splits=train=1", "--workers=1", "--json", *more]
        assert run(*command, "--dry-run") == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == samples
        assert run(*command) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (figures["samples"], figures["rejected"], figures["found"]) == (samples, 1, samples + 1)
        split = open_split(out, "train")
        assert split.modality == verb
        if size is not None:
            assert split.lengths.tolist() == [size] * samples
        assert run(*command, "--strict", "--overwrite") == 2
        assert f"bad.{'png' if verb == 'image' else 'wav'}: " in capsys.readouterr().err.splitlines()[-1]
