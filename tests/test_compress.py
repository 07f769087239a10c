"""Compression: any bytes come back; the size is what the full forward pass says; bad files and other models are told.

pytest tests/test_compress.py
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain import cli, config, evaluate, mbz
from mbtrain import compress as compressing
from mbtrain.checkpoint import Progress
from mbtrain.compress import Loaded, compress, compress_file, decompress, decompress_file
from mbtrain.config import Config
from mbtrain.data import scan
from mbtrain.data.opening import Opened
from mbtrain.data.rows import Stream
from mbtrain.errors import CheckpointError, ConfigError, DataError
from mbtrain.model import build
from mbtrain.shards import open_split
from tests import launch, tiny
from tests.handmade import Made, dataset, picture, sound
from tests.test_checkpoint import write

SEQ_LEN = 32
ONE_STAGE = tiny.STAGES[1]
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one stage": (1, {}),
    "two stages": (2, {}),
    "three stages": (3, {}),
    "documents apart": (2, {"isolate_documents": True}),
    "transformer": (1, {"kind": "transformer", "stages": [{**ONE_STAGE[0], "window": 8}]}),
    "perceiver": (1, {"kind": "perceiver_ar", "latents": 8, "stages": [{**ONE_STAGE[0], "n_layers": 2}]}),
    "space": (2, {"patching": "space"}),
    "without global": (2, {"without": "global"}),
    "cross patch": (2, {"cross_patch": 2}),
    "conv encoder": (2, {"conv_encoder": [3]}),
}


def settings_of(kind: str, boundary: bool = True) -> Config:
    stages, model = KINDS[kind]
    sections: dict[str, Any] = {"model": model, "data": {"boundary": boundary}}
    return tiny.make(stages, seq_len=SEQ_LEN, **sections)


def randomised(made: Config, scale: float = 0.2) -> Any:
    """A model in fp32 that is far from uniform."""
    torch.manual_seed(0)
    model = build(made).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(scale * torch.randn_like(param))
    return model


@cache
def loaded(kind: str = "two stages", boundary: bool = True, scale: float = 0.2) -> Loaded:
    made = settings_of(kind, boundary)
    hashes = compressing._settings_hash(made)
    model = randomised(made, scale)
    return Loaded(model, compressing._weights_hash(model), hashes, 4, (), [], "run/checkpoints/step_0000000004")


def back(of: Loaded, packed: bytes) -> bytes:
    return b"".join(decompress(of, *mbz.unpack(packed, "x.mbz"), "x.mbz"))


def full_bits(of: Loaded, content: bytes) -> float:
    """What the full forward pass gives the rows, among the 256 bytes, summed in float64."""
    bits = 0.0
    with torch.inference_mode():
        for at in range(0, len(content), SEQ_LEN):
            row = torch.tensor([list(content[at : at + SEQ_LEN])])
            logp = of.model(row)[..., :256].double().log_softmax(-1)
            bits -= float(logp.gather(2, row[..., None]).sum()) / math.log(2)
    return bits


NAMED = {
    "empty": b"",
    "a zero": b"\0",
    "zeros": bytes(300),
    "a row": bytes(range(SEQ_LEN)),
    "a row and one": bytes(range(SEQ_LEN + 1)),
    "every byte": bytes(range(256)),
    "random": np.random.default_rng(0).bytes(777),
    "words": b"the cat sat on the mat, the dog did not. " * 12,
}


@pytest.mark.parametrize("content", NAMED.values(), ids=NAMED.keys())
def test_files_of_every_sort_come_back(content: bytes) -> None:
    packed, bits = compress(loaded(), content, batch=6)
    assert back(loaded(), packed) == content
    assert bits == pytest.approx(full_bits(loaded(), content), rel=1e-4)
    assert compress(loaded(), content, batch=6)[0] == packed  # the same every time
    assert abs(8 * len(packed) - bits) <= 0.01 * bits + 8 * 64


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=4 * SEQ_LEN + 5), st.integers(1, 6), st.booleans())
def test_any_bytes_come_back_and_cost_what_the_model_says(content: bytes, batch: int, boundary: bool) -> None:
    of = loaded("three stages", boundary)
    packed, bits = compress(of, content, batch=batch)
    assert back(of, packed) == content
    assert abs(8 * len(packed) - bits) <= 0.01 * bits + 8 * 64
    assert bits == pytest.approx(full_bits(of, content), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_compresses(kind: str) -> None:
    content = NAMED["words"] + NAMED["random"][:50]
    packed, bits = compress(loaded(kind), content, batch=5)
    assert back(loaded(kind), packed) == content
    assert bits == pytest.approx(full_bits(loaded(kind), content), rel=1e-4)
    assert abs(8 * len(packed) - bits) <= 0.01 * bits + 8 * 64


def repeating(certainty: float) -> Loaded:
    """A model that is sure, to that many nats, that the byte before comes again."""

    class Again(torch.nn.Module):
        seq_len, vocab_size = SEQ_LEN, 257

        def decoder(self, batch: int, compiled: bool = True) -> Any:
            class Decoder:
                def feed(self, ids: torch.Tensor) -> torch.Tensor:
                    logits = torch.zeros(batch, 257)
                    if ids.shape[1]:
                        logits.scatter_(1, ids[:, -1:], certainty)
                    return logits

            return Decoder()

    return replace(loaded(), model=Again())  # type: ignore[arg-type]


@pytest.mark.parametrize("certainty", [1.0, 12.0, 18.0, 25.0, 32.0])
def test_the_size_is_the_score_at_probabilities_that_one_symbol_could_not_have(certainty: float) -> None:
    """The coder's steps alone would make at most 24 bits of a byte that costs up to 46."""
    content = bytes(range(0, 250)) * 8
    packed, bits = compress(repeating(certainty), content)
    assert bits / len(content) > certainty / math.log(2) - 2
    assert abs(8 * len(packed) - bits) <= 0.01 * bits + 8 * 64
    assert back(repeating(certainty), packed) == content


def test_certain_bytes_cost_next_to_nothing() -> None:
    content = bytes(SEQ_LEN * 3000)
    packed, bits = compress(repeating(25.0), content, batch=1000)
    assert bits == pytest.approx(3000 * 8, rel=1e-6)  # the first byte of each row
    assert abs(8 * len(packed) - bits) <= 8 * (mbz.HEADER_BYTES + 8) + 3e-5 * len(content)
    assert back(repeating(25.0), packed) == content


def test_what_is_beyond_all_probability_still_comes_back() -> None:
    """exp() of these is 0 in float64: every byte keeps one of the coder's steps."""
    content = bytes(range(100))
    packed, bits = compress(repeating(5000.0), content)
    assert math.isfinite(bits)
    assert back(repeating(5000.0), packed) == content


def test_a_model_without_numbers_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no number"):
        compress(repeating(math.nan), b"abc")


def test_rows_that_advance_together_lack_few_and_are_at_most_so_many() -> None:
    header = mbz.unpack(compress(loaded(), bytes(SEQ_LEN * 9), batch=8)[0], "x")[0]
    assert header.batch == 5  # two batches: 5 and 4, not 8 and 1
    assert mbz.unpack(compress(loaded(), b"ab", batch=8)[0], "x")[0].batch == 1


# ---- bad files --------------------------------------------------------------------------------------------------


def sealed(header: bytes, words: bytes) -> bytes:
    """A file with a right checksum."""
    return header + zlib.crc32(words, zlib.crc32(header)).to_bytes(4, "little") + words


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_crafted_file_ends_in_an_error_or_the_original(data: st.DataObject) -> None:
    """With a right checksum: whatever is changed behind the hashes, words are cut, lengths lie."""
    content = NAMED["words"][:90]
    packed = compress(loaded(), content, batch=3)[0]
    start, words = bytearray(packed[:47]), bytearray(packed[51:])
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([start, words]))
        part[data.draw(st.integers(4, len(part) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del words[4 * data.draw(st.integers(0, len(words) // 4)) :]
    said = "x.mbz: "
    try:
        assert back(loaded(), sealed(bytes(start), bytes(words))) == content
    except (DataError, CheckpointError) as error:
        said = str(error)
    assert said.startswith("x.mbz: ")
    assert "\n" not in said


def test_a_length_that_the_words_cannot_hold_ends_soon() -> None:
    """A thousand bytes that claim to be a gigabyte: it ends when their bits are spent, not after hours."""
    header, words = mbz.unpack(compress(loaded(), NAMED["random"][:40])[0], "x.mbz")
    pieces = decompress(loaded(), replace(header, length=10**9), words, "x.mbz")
    made = 0

    def all_of_them() -> None:
        nonlocal made
        for piece in pieces:
            made += len(piece)

    with pytest.raises(DataError, match="not the original"):
        all_of_them()
    assert made < 10_000


def test_words_that_are_left_over_are_told() -> None:
    header, words = mbz.unpack(compress(loaded(), NAMED["words"])[0], "x.mbz")
    with pytest.raises(DataError, match="not the original"):
        list(decompress(loaded(), header, words + b"\1\2\3\4" * 5, "x.mbz"))


def test_floats_that_are_rounded_otherwise_are_told() -> None:
    """The same model by its hash, a last bit of its weights elsewhere: as on another processor."""
    content = NAMED["random"] * 3
    packed = compress(loaded(), content)[0]
    other = randomised(settings_of("two stages"))
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1 + 1e-4)
    with pytest.raises(DataError, match=r"floats are rounded otherwise here.*Nothing was written"):
        back(replace(loaded(), model=other), packed)


# ---- runs and files ---------------------------------------------------------------------------------------------


def run_of(folder: Path, kind: str = "two stages", *, data: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """A run directory with a checkpoint at step 4."""
    stages, model = KINDS[kind]
    sections: dict[str, Any] = {"model": model, "data": {"boundary": False, **changes}}
    made = tiny.make(stages, **sections)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(made))
    if data is not None:
        (folder / "environment.json").write_text(json.dumps({"data": data}))
    write(folder, randomised(made), Progress(step=4))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "run")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_bytes(NAMED["words"])
    return path


def verb(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(list(args))
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_verbs_here_and_in_a_process_of_their_own(
    run: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other process has another number of threads of its own."""
    assert verb("compress", str(file), f"--run={run}", "--batch=4", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    packed = Path(f"{file}.mbz").read_bytes()
    assert (figures["bytes"], figures["compressed_bytes"]) == (len(NAMED["words"]), len(packed))
    assert figures["bpb"] == 8 * len(packed) / figures["bytes"]
    assert figures["step"] == 4
    assert [line.split()[0] for line in lines[1:5]] == ["mbtrain", "gzip", "xz", "zstd"]
    assert not {"png_bpb", "flac_bpb"} & figures.keys()
    command = [sys.executable, "-m", "mbtrain", "decompress", f"{file}.mbz", f"--run={run}", f"--out={file}2", "--json"]
    environment = {**launch.environment(), "OMP_NUM_THREADS": str(2 if torch.get_num_threads() == 1 else 1)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bytes"] == figures["bytes"]
    assert Path(f"{file}2").read_bytes() == NAMED["words"]


def test_a_file_of_nothing_and_its_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nothing"
    path.write_bytes(b"")
    assert verb("compress", str(path), f"--run={run}", "--json") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["bytes"], figures["compressed_bytes"], figures["bpb"]) == (0, mbz.HEADER_BYTES, None)
    path.unlink()
    assert verb("decompress", f"{path}.mbz", f"--run={run}") == 0
    assert path.read_bytes() == b""


def test_a_splits_bytes_cost_what_evaluation_says(run: Path, tmp_path: Path) -> None:
    content = NAMED["words"] + NAMED["random"]
    path = dataset(tmp_path / "set", "text", {"val": [[Made(content[:500]), Made(content[500:])]]})
    split = open_split(path, "val")
    source = Opened("set", split, Stream(split, boundary=False, seed=None))
    model = compressing.load(run).model
    scored = evaluate.score(model, [source], seq_len=SEQ_LEN, batch=3, device=torch.device("cpu"))
    (tmp_path / "val").write_bytes(content)
    figures = compress_file(tmp_path / "val", run)
    assert figures["model_bpb"] == pytest.approx(scored.bpb, rel=1e-5)
    assert abs(figures["compressed_bytes"] - scored.bpb * len(content) / 8) <= 0.01 * len(content) + 64


def test_another_model_other_settings_and_a_run_that_went_on(run: Path, file: Path, tmp_path: Path) -> None:
    compress_file(file, run)
    packed, again = Path(f"{file}.mbz"), tmp_path / "again"
    stranger = run_of(tmp_path / "stranger", "three stages")
    with pytest.raises(CheckpointError, match=r"some\.txt\.mbz: the model [0-9a-f]{16} \(step 4\) made it, .*stranger"):
        decompress_file(packed, stranger, out=again)
    settings_ = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings_.replace("scan: patch", "scan: raster"))
    with pytest.raises(CheckpointError, match=r"its settings \(.*data\.scan\) are others"):
        decompress_file(packed, run, out=again)
    (run / "config.yaml").write_text(settings_)
    model = randomised(config.load(run / "config.yaml"), 0.3)
    write(run, model, Progress(step=9))
    decompress_file(packed, run, out=again)  # by the checkpoint of step 4
    assert again.read_bytes() == NAMED["words"]
    write(run, model, Progress(step=10), keep_last=1)
    with pytest.raises(CheckpointError, match=r"\(step 4\) made it, .*step_0000000010 has"):
        decompress_file(packed, run, out=again, overwrite=True)
    assert again.read_bytes() == NAMED["words"]


def test_only_bytes_are_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path, file: Path) -> None:
    made = config.load(run / "config.yaml")
    subword = made.model_copy(update={"model": made.model.model_copy(update={"kind": "subword"})})
    monkeypatch.setattr(compressing, "load_model", lambda *_: (None, subword, None, run))
    with pytest.raises(ConfigError, match=r"model\.kind=subword predicts pieces of words"):
        compress_file(file, run)


@pytest.mark.parametrize("failing", [KeyboardInterrupt, RuntimeError])
def test_what_is_cut_short_leaves_nothing(
    run: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: type[BaseException]
) -> None:
    compress_file(file, run)
    before = sorted(tmp_path.iterdir())

    @contextmanager
    def shown(total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def progress(more: int) -> None:
            nonlocal done
            done += more
            if done > 100:
                raise failing

        yield progress

    monkeypatch.setattr(compressing, "_shown", shown)
    with pytest.raises(failing):
        compress_file(file, run, out=tmp_path / "a.mbz")
    with pytest.raises(failing):
        decompress_file(f"{file}.mbz", run, out=tmp_path / "a.txt")
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_file_writes_nothing(run: Path, file: Path, tmp_path: Path) -> None:
    compress_file(file, run)
    packed = bytearray(Path(f"{file}.mbz").read_bytes())
    packed[60] ^= 1
    (tmp_path / "b.mbz").write_bytes(packed)
    (tmp_path / "c.mbz").write_bytes(sealed(bytes(packed[:47]), bytes(packed[51:])))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="checksum differs"):
        decompress_file(tmp_path / "b.mbz", run)
    with pytest.raises(DataError, match="not the original"):
        decompress_file(tmp_path / "c.mbz", run)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["compress"], "FILE: expected one file, got 0"),
        (["compress", "{file}"], "--run: expected a run directory or checkpoint, got nothing"),
        (["compress", "{file}", "--run={tmp}"], "neither a run directory (no config.yaml) nor a checkpoint"),
        (["compress", "{tmp}/gone", "--run={run}"], "gone: cannot be read (No such file or directory)"),
        (["compress", "{tmp}", "--run={run}"], "cannot be read (Is a directory)"),
        (["compress", "{file}", "--run={run}", "--batch=0"], "--batch: expected a whole number of at least 1"),
        (["compress", "{file}", "--run={run}", "--batch=9999"], "--batch: expected at most 1024, got 9999"),
        (["compress", "{file}", "--run={run}", "--out={tmp}/no/x"], "no is no folder"),
        (["compress", "{file}", "--run={run}", "--out={file}", "--overwrite"], "is what is read"),
        (["compress", "{file}", "--run={run}", "--out=/dev/null", "--overwrite"], "/dev/null: is no plain file"),
        (["compress", "{file}", "--run={run}", "--out={there}"], "there.mbz: is there already"),
        (["compress", "{file}", "--run={run}", "--shape=4x4"], "--shape: got '4x4', expected nothing"),
        (["decompress", "{file}", "--run={run}"], "its name does not end with .mbz; say with --out=FILE"),
        (["decompress", "{there}", "--run={run}"], "begins with b'some', expected 'mbz'"),
        (["decompress", "{there}", "--rnu={run}"], "--rnu: no such option (did you mean run?)"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], words: str, run: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.mbz"
    there.write_bytes(b"something else")
    assert verb(*(arg.format(run=run, file=file, tmp=tmp_path, there=there) for arg in args)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert there.read_bytes() == b"something else"


def test_a_full_disk_is_one_line(run: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mbtrain.shards.os.fsync", full)
    with pytest.raises(DataError, match=r"some\.txt\.mbz: cannot be written \(No space left on device\)"):
        compress_file(file, run)
    assert sorted(file.parent.iterdir()) == [run, file]


def test_an_output_is_replaced_where_that_is_said(run: Path, file: Path) -> None:
    packed = Path(f"{file}.mbz")
    packed.write_bytes(b"old")
    compress_file(file, run, overwrite=True)
    file.write_bytes(b"old")
    decompress_file(packed, run, overwrite=True)
    assert file.read_bytes() == NAMED["words"]


# ---- pictures and sounds ----------------------------------------------------------------------------------------

RNG = np.random.default_rng(1)
PIXELS = (np.add.outer(np.arange(4), np.arange(8))[:, :, None] * 9 + RNG.integers(0, 9, (3, 4, 8, 3))).astype(np.uint8)
IMAGES = [{"name": "pictures", "modality": "image", "shape": [4, 8, 3]}]
SOUND = (8000 * np.sin(np.arange(900) / 20)).astype(np.int16)


def image_run(folder: Path) -> Path:
    """Patches of 2 x 2 pixels, rows of a picture's 96 bytes."""
    run = folder / "images"
    stages = [{**tiny.STAGES[2][0], "patch_size": 12, "d_model": 36, "n_heads": 2}, tiny.STAGES[2][1]]
    made = tiny.make(2, seq_len=96, model={"stages": stages}, data={"boundary": False})
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml(made))
    (run / "environment.json").write_text(json.dumps({"data": IMAGES}))
    write(run, randomised(made), Progress(step=4))
    return run


def test_pictures_are_coded_in_the_models_order_and_come_back(tmp_path: Path) -> None:
    run, raw = image_run(tmp_path), tmp_path / "three.rgb"
    raw.write_bytes(PIXELS.tobytes())
    figures = compress_file(raw, run, batch=2)
    assert mbz.unpack(Path(f"{raw}.mbz").read_bytes(), "x")[0].shape == (4, 8)
    assert figures["png_bpb"] > 0
    path = dataset(tmp_path / "set", "image", {"val": [[picture(p) for p in PIXELS]]})
    split = open_split(path, "val")
    stream = Stream(split, boundary=False, seed=None, align=96, patches=[12, 1])
    model = compressing.load(run).model
    scored = evaluate.score(model, [Opened("set", split, stream)], seq_len=96, batch=3, device=torch.device("cpu"))
    assert figures["model_bpb"] == pytest.approx(scored.bpb, rel=1e-5)
    decompress_file(f"{raw}.mbz", run, out=tmp_path / "again.rgb")
    assert (tmp_path / "again.rgb").read_bytes() == raw.read_bytes()
    order = scan.order(4, 8, (12, 1))
    plain = tmp_path / "scanned.bin"  # the same bytes as they are fed cost the same
    plain.write_bytes(PIXELS.reshape(3, -1)[:, order].tobytes())
    assert compress_file(plain, run, batch=2)["model_bpb"] == figures["model_bpb"]


def test_pictures_of_another_shape_are_rows_of_their_own(tmp_path: Path) -> None:
    """144 bytes a picture: rows of 96 and 48, then the next picture begins; pieces of pictures wait for their rest."""
    run, raw = image_run(tmp_path), tmp_path / "two.rgb"
    content = RNG.bytes(144 * 3)
    raw.write_bytes(content)
    rows = compressing._batches(compressing.load(run), 288, np.arange(144), 3)
    assert [lengths.tolist() for lengths in rows] == [[96, 48, 96], [48]]
    for batch in (1, 4):
        compress_file(raw, run, shape="6x8", batch=batch, overwrite=True)
        decompress_file(f"{raw}.mbz", run, out=tmp_path / "again", overwrite=True)
        assert (tmp_path / "again").read_bytes() == content


def test_what_is_no_picture_is_coded_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = image_run(tmp_path)
    for name, content, hint in (
        ("odd.rgb", bytes(97), "raw pixels whose shape is not known"),
        ("a.png", b"\x89PNG\r\n\x1a\n123", "an encoded file, while the model knows the bytes"),
        ("a.txt", b"text", ""),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        compress_file(path, run)
        said = capsys.readouterr().err
        assert hint in said
        assert bool(said) == bool(hint)
        decompress_file(f"{path}.mbz", run, out=tmp_path / "again", overwrite=True)
        assert (tmp_path / "again").read_bytes() == content
    for shape, words in (("5x8", "expected pictures of at most"), ("1x1", "no whole number of blocks"), ("x", "HxW")):
        (tmp_path / "b.rgb").write_bytes(bytes(96))
        with pytest.raises(ConfigError, match=words):
            compress_file(tmp_path / "b.rgb", run, shape=shape)


def test_a_crafted_shape_takes_no_memory(tmp_path: Path) -> None:
    of = compressing.load(image_run(tmp_path))
    packed = compress(of, bytes(96), shape=(4, 8))[0]
    header, words = mbz.unpack(packed, "x")
    with pytest.raises(DataError):
        mbz.unpack(mbz.pack(replace(header, height=60_000, width=60_000), words), "x")
    with pytest.raises(DataError, match="no whole number of blocks"):
        list(decompress(of, replace(header, height=1, width=32), words, "x"))


def test_sounds_stand_beside_flac(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mbtrain.media import audio

    voice = [{"name": "voice", "modality": "audio", "sample_rate": 16000, "encoding": "pcm16"}]
    run = run_of(tmp_path / "speech", data=voice)
    content = sound(SOUND).content
    (tmp_path / "a.pcm").write_bytes(content)
    (tmp_path / "a.wav").write_bytes(audio.wav(content, 16000, "pcm16"))
    raw, wav = (compress_file(tmp_path / name, run) for name in ("a.pcm", "a.wav"))
    assert 0 < raw["flac_bpb"] < raw["gzip_bpb"] + 8
    assert wav["flac_bpb"] * (len(content) + 44) == pytest.approx(raw["flac_bpb"] * len(content))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a.wav: an encoded file" in said
    decompress_file(tmp_path / "a.wav.mbz", run, out=tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "a.wav").read_bytes()


def test_progress_is_said_in_lines_where_no_terminal_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(compressing.time, "perf_counter", lambda: now[0])
    with compressing._shown(1000) as progress:
        for _ in range(10):
            now[0] += 10.0
            progress(50)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "150 B of 1.00 kB · 5 B/s · 2:50 min left",
        "300 B of 1.00 kB · 5 B/s · 2:20 min left",
        "450 B of 1.00 kB · 5 B/s · 1:50 min left",
    ]
