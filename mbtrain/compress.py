"""Lossless compression by the model's own predictions: a range coder, whose output's size proves bits per byte.

    file -> rows of seq_len bytes, each begun without context (evaluation's mode basic)
         -> batches of rows that advance together, byte by byte, through the model's cached generation
         -> each byte coded as the model distributes it -> words of 32 bits

What is decoded must be predicted from bit for bit the same floats as when it was coded. So both ways are the same lines
(`_code`): the same calls of the decoder, through torch alone, in fp32 on the CPU, with the same number of rows and
threads, which the file says (mbz.py). Rows that are missing in the last batch, and rows that are over, go on with zeros
that nobody codes.
Another processor or version of torch may round otherwise: what comes out is compared with the original's hash.

The coder (constriction's RangeEncoder) knows probabilities as multiples of 2**-24 and gives each symbol one of them at
least. Bytes rarer than 2**-18 are therefore coded in two symbols or three: an escape, which has that probability at
least, then the byte among the rare ones. So the size is the model's also where it is wrong about every byte, down to
2**-54; a byte of which it is certain costs 3e-5 bits.

The alphabet is the 256 bytes. Where the model knows document boundaries, too, their probability is divided among the
bytes: the file's length is in the header, so a boundary would tell nothing. No boundary stands before the first byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mbtrain import checkpoint, codecs, mbz, render
from mbtrain.config import Config
from mbtrain.data import scan
from mbtrain.errors import CheckpointError, ConfigError, DataError
from mbtrain.evaluate import load_model
from mbtrain.log import bar, duration, size
from mbtrain.mbz import Header
from mbtrain.model import Model
from mbtrain.shards import whole_file
from mbtrain.vocab import NUM_BYTES

SUFFIX = ".mbz"
BATCH = 32

_RARE = 2.0**-18  # 64 of the coder's steps
_LEVELS = 3
_ESCAPE, _NEVER = NUM_BYTES, NUM_BYTES + 1
_STEP = 2.0**-23  # the coder's probabilities are not further above those it is given: one step, and rounding
_SLACK_BITS = 256

# Symbols' distributions (n, 258), and the symbols (n,) where they are known -> the symbols (n,).
Coder = Callable[[np.ndarray, np.ndarray], np.ndarray]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Loaded:
    """A model to code with: what it is (hashes and step as in a header), and the sources it was trained on."""

    model: Model
    weights: bytes
    settings: bytes
    step: int
    patch_sizes: tuple[int, ...]
    forms: list[render.Form]
    where: str


def load(path: str | Path, step: int | None = None) -> Loaded:
    """The newest whole checkpoint of a run, the checkpoint given, or of a run the one of a step, if it is there.

    Raises CheckpointError; ConfigError for a model that does not predict bytes.
    """
    at = Path(path)
    if step is not None and (at / "checkpoints" / checkpoint.name_of(step) / "checkpoint.json").exists():
        at = at / "checkpoints" / checkpoint.name_of(step)
    model, settings, found, run = load_model(at, torch.device("cpu"))
    if settings.model.kind == "subword":
        raise ConfigError(f"{run}: model.kind=subword predicts pieces of words; only models of bytes can compress")
    patches = tuple(stage.patch_size for stage in settings.model.stages) if settings.data.scan == "patch" else ()
    return Loaded(
        model,
        _weights_hash(model),
        _settings_hash(settings),
        found.progress.step,
        patches,
        render.forms(run, settings),
        str(found.path),
    )


def compress(
    loaded: Loaded,
    content: bytes,
    *,
    batch: int = BATCH,
    shape: tuple[int, int] | None = None,
    progress: Progress = lambda done: None,
) -> tuple[bytes, float]:
    """(the whole compressed file, bits that the model gives this content) of any bytes, also none.

    Args:
        loaded: the model.
        content: what is compressed.
        batch: most rows that advance together.
        shape: height and width of the pictures that the content is, one after the other; each begins a row and is
            coded in the model's scan order. None: bytes as they stand.
        progress: is told how many bytes were done since it was called last.

    Raises:
        CheckpointError: the model predicts something that is no number.
        ConfigError: the content is no pictures of that shape, or the shape cannot be scanned.
    """
    import constriction

    pictures = _pictures(loaded, shape, len(content))
    threads = min(torch.get_num_threads(), mbz.MAX_THREADS)
    header = Header(
        weights=loaded.weights,
        settings=loaded.settings,
        step=min(loaded.step, 2**32 - 1),
        rounding=_rounding_hash(),
        batch=_even(_row_count(loaded, len(content), pictures), batch),
        threads=threads,
        height=shape[0] if shape else 0,
        width=shape[1] if shape else 0,
        length=len(content),
        digest=hashlib.sha256(content).digest()[: mbz.CONTENT_HASH],
    )
    stream = np.frombuffer(content, np.uint8)
    if pictures is not None:
        stream = stream.reshape(-1, len(pictures))[:, pictures].reshape(-1)
    encoder = constriction.stream.queue.RangeEncoder()
    family = constriction.stream.model.Categorical(perfect=False)

    def encode(tables: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        encoder.encode(symbols, family, tables)
        return symbols

    bits, at = 0.0, 0
    with _threads(threads):
        for lengths in _batches(loaded, len(content), pictures, header.batch):
            ids = np.zeros((header.batch, loaded.model.seq_len), np.uint8)
            for row, length in zip(ids, lengths.tolist(), strict=False):
                row[:length] = stream[at : at + length]
                at += length
            bits += _code(loaded, ids, lengths, encode, progress)
    return mbz.pack(header, encoder.get_compressed().astype("<u4").tobytes()), bits


def decompress(
    loaded: Loaded, header: Header, words: bytes, name: str, progress: Progress = lambda done: None
) -> Iterator[bytes]:
    """The original, piece by piece, from what mbz.unpack gave; `name` stands in errors.

    Only when it ends without an error is known that the pieces are the original. What it holds in memory is a batch of
    rows and a picture.

    Raises:
        CheckpointError: another model or other settings made the file.
        DataError: the words end early, or what came out is not the original.
    """
    import constriction

    _must_be_its_model(loaded, header, name)
    try:
        pictures = _pictures(loaded, header.shape, header.length)
    except ConfigError as error:
        raise DataError(f"{name}: {error}") from error
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    family = constriction.stream.model.Categorical(perfect=False)
    spent = 0.0

    def decode(tables: np.ndarray, _: np.ndarray) -> np.ndarray:
        nonlocal spent
        try:
            symbols = np.asarray(decoder.decode(family, tables))
        except AssertionError as error:  # no symbol has this place
            raise _not_the_original(header, name) from error
        # On words that are not there the coder would go on for ever: a length that they cannot hold ends here.
        p = tables[np.arange(len(symbols)), symbols] / tables.sum(axis=1)
        spent -= float(np.log2(p + _STEP).sum())
        if spent > 8 * len(words) + _SLACK_BITS or (symbols == _NEVER).any():
            raise _not_the_original(header, name)
        return symbols

    digest, pending = hashlib.sha256(), bytearray()
    with _threads(header.threads):
        for lengths in _batches(loaded, header.length, pictures, header.batch):
            ids = np.zeros((header.batch, loaded.model.seq_len), np.uint8)
            _code(loaded, ids, lengths, decode, progress)
            for row, length in zip(ids, lengths.tolist(), strict=False):
                pending += row[:length].tobytes()
            piece = bytes(pending)
            if pictures is not None:
                whole = np.frombuffer(piece, np.uint8, len(piece) // len(pictures) * len(pictures))
                raster = np.empty_like(whole).reshape(-1, len(pictures))
                raster[:, pictures] = whole.reshape(raster.shape)
                piece = raster.tobytes()
            del pending[: len(piece)]
            digest.update(piece)
            yield piece
    if digest.digest()[: mbz.CONTENT_HASH] != header.digest or not decoder.maybe_exhausted():
        raise _not_the_original(header, name)


def compress_file(
    path: str | Path,
    run: str | Path,
    *,
    out: str | Path | None = None,
    batch: int = BATCH,
    shape: str = "",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compress a file beside other compressors; the output (FILE.mbz) gets its name when it is whole.

    Returns {"path", "bytes", "compressed_bytes", "bpb", "model_bpb", "step", "bytes_per_s"} and bits per byte of gzip,
    xz, zstd, and of PNG or FLAC where they apply (None for no bytes). Raises ConfigError, CheckpointError, DataError.
    """
    path = Path(path)
    target = Path(out) if out is not None else path.with_name(path.name + SUFFIX)
    _must_be_free(target, path, overwrite)
    content = _read(path)
    if len(content) > mbz.MAX_BYTES:
        raise DataError(f"{path}: got {len(content)} bytes, expected at most {mbz.MAX_BYTES}")
    loaded = load(run)
    pictures = _shape_of(loaded, path, content, shape)
    began = time.perf_counter()
    with _shown(len(content)) as progress:
        packed, bits = compress(loaded, content, batch=batch, shape=pictures, progress=progress)
    seconds = time.perf_counter() - began
    with _written(target) as file:
        file.write(packed)
    size = len(content)
    rivals: dict[str, Any] = {"gzip_bpb": None, "xz_bpb": None, "zstd_bpb": None}
    if size:
        rate = next((form.sample_rate for form in loaded.forms if form.modality == "audio" and form.unit == 2), None)
        spoken = path.suffix.lower() == ".pcm"
        rivals = codecs.of_file(content, shape=pictures, sample_rate=rate if spoken else None)
    return {
        "path": target,
        "bytes": size,
        "compressed_bytes": len(packed),
        "bpb": 8 * len(packed) / size if size else None,
        "model_bpb": bits / size if size else None,
        **rivals,
        "step": loaded.step,
        "bytes_per_s": size / seconds,
    }


def decompress_file(
    path: str | Path, run: str | Path, *, out: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Restore a file; it gets its name only when its bytes are the original's.

    Of a run the checkpoint that made the file is taken, where it is still kept. Returns {"path", "bytes",
    "compressed_bytes", "bytes_per_s"}. Raises ConfigError, CheckpointError, DataError.
    """
    path = Path(path)
    if out is None and (path.suffix != SUFFIX or path.name == SUFFIX):
        raise ConfigError(f"{path}: its name does not end with {SUFFIX}; say with --out=FILE what is to be written")
    target = Path(out) if out is not None else path.with_suffix("")
    _must_be_free(target, path, overwrite)
    packed = _read(path)
    header, words = mbz.unpack(packed, str(path))
    loaded = load(run, header.step)
    if header.rounding != _rounding_hash():
        sys.stderr.write(f"mbtrain: {path} was made by another processor or torch, whose floats may differ: trying\n")
    began = time.perf_counter()
    with _shown(header.length) as progress, _written(target) as file:
        for piece in decompress(loaded, header, words, str(path), progress):
            file.write(piece)
    rate = header.length / (time.perf_counter() - began)
    return {"path": target, "bytes": header.length, "compressed_bytes": len(packed), "bytes_per_s": rate}


def lines_of(figures: Mapping[str, Any]) -> Iterator[str]:
    """What compress_file gives, for a person."""
    yield f"{figures['path']}: {figures['bytes']} bytes -> {figures['compressed_bytes']}"
    if figures["bytes"]:
        model = f"{figures['bpb']:.4f} bits per byte; the model's own sum {figures['model_bpb']:.4f}"
        yield f"  mbtrain   {model} (step {figures['step']}, {figures['bytes_per_s']:.0f} bytes/s)"
        for key, name in _RIVALS.items():
            if key in figures:
                yield f"  {name:<9} {figures[key]:.4f}"


_RIVALS = {
    "gzip_bpb": "gzip -9",
    "xz_bpb": "xz -9e",
    "zstd_bpb": "zstd -19",
    "png_bpb": "PNG",
    "flac_bpb": "FLAC",
}


# ---- one way for both -------------------------------------------------------------------------------------------


@torch.inference_mode()
def _code(loaded: Loaded, ids: np.ndarray, lengths: np.ndarray, coder: Coder, progress: Progress) -> float:
    """Bring a batch of rows, uint8 (b, t), through the coder; returns the bits that the model gives them.

    Of the first rows so many bytes as `lengths` says are read, or filled in. Rows whose turn is over, and those without
    a length, keep their zeros.
    """
    decoder = loaded.model.decoder(len(ids), compiled=False)
    fed = torch.zeros((len(ids), 0), dtype=torch.int64)
    bits = 0.0
    for t in range(int(lengths.max())):
        logits = decoder.feed(fed)[:, :NUM_BYTES].double().numpy()
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(axis=1, keepdims=True)
        if not np.isfinite(total).all():
            raise CheckpointError(f"{loaded.where}: what it predicts is no number; it cannot compress")
        on = np.flatnonzero(lengths > t)
        ids[on, t] = _code_bytes((weights / total)[on], ids[on, t], coder)
        bits += float((np.log(total) + top - logits)[on, ids[on, t]].sum()) / math.log(2)
        fed = torch.from_numpy(ids[:, t : t + 1].astype(np.int64))
        progress(len(on))
    return bits


def _code_bytes(p: np.ndarray, known: np.ndarray, coder: Coder) -> np.ndarray:
    """Code a byte of each row by its distribution (n, 256); returns the bytes (n,), which decoding finds.

    A level codes the bytes that are not rare in it, or that the others come: that has at least the probability of a
    rare one. Where it has more than they have together, the rest of the next level belongs to a symbol that never is.
    """
    out = known.astype(np.int32)
    left = np.arange(len(p))
    for level in range(_LEVELS):
        rare = (p < _RARE) if level < _LEVELS - 1 else np.zeros_like(p, bool)
        others = np.where(rare, p, 0.0)
        escape = np.maximum(others.sum(axis=1), _RARE if level < _LEVELS - 1 else 0.0)
        tables = np.zeros((len(p), NUM_BYTES + 2))
        tables[:, :NUM_BYTES] = p - others
        tables[:, _ESCAPE] = escape
        tables[:, _NEVER] = np.maximum(1 - p.sum(axis=1), 0.0) if level else 0.0
        symbols = coder(tables, np.where(rare[np.arange(len(p)), out[left]], _ESCAPE, out[left]).astype(np.int32))
        found = symbols != _ESCAPE
        out[left[found]] = symbols[found]
        if found.all():
            break
        left, p = left[~found], (others / escape[:, None])[~found]
    return out


def _batches(loaded: Loaded, length: int, pictures: np.ndarray | None, batch: int) -> Iterator[np.ndarray]:
    """Bytes of each row, int64, of one batch after the other: rows of seq_len, begun anew at each picture."""
    sample, seq_len = length if pictures is None else len(pictures), loaded.model.seq_len
    a_sample = -(-sample // seq_len)
    rows = _row_count(loaded, length, pictures)
    for first in range(0, rows, batch):
        number = np.arange(first, min(first + batch, rows)) % a_sample
        yield np.minimum(sample - number * seq_len, seq_len)


def _row_count(loaded: Loaded, length: int, pictures: np.ndarray | None) -> int:
    if pictures is None:
        return -(-length // loaded.model.seq_len)
    return length // len(pictures) * -(-len(pictures) // loaded.model.seq_len)


def _even(rows: int, batch: int) -> int:
    """Rows together, at most `batch`, such that the last batch lacks few."""
    return -(-rows // -(-rows // batch)) if rows else 1


def _pictures(loaded: Loaded, shape: tuple[int, int] | None, length: int) -> np.ndarray | None:
    """Row position -> byte of the raster, for pictures of this shape that `length` bytes are. Raises ConfigError."""
    if shape is None:
        return None
    size = 3 * math.prod(shape)
    if not 0 < size <= mbz.MAX_PICTURE_BYTES or max(shape) > mbz.MAX_SIDE or length % size:
        allowed = f"pictures of at most {mbz.MAX_PICTURE_BYTES} bytes, of which {length} bytes are a whole number"
        raise ConfigError(f"--shape: got {shape[0]}x{shape[1]}, {size} bytes, expected {allowed}")
    try:
        return scan.order(*shape, loaded.patch_sizes)
    except ValueError as error:
        raise ConfigError(f"--shape: {error}, in which the model reads") from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- what made a file -------------------------------------------------------------------------------------------


def _weights_hash(model: Model) -> bytes:
    """Of fp32 weights by name and shape, however many files they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()[: mbz.WEIGHTS_HASH]


def _settings_hash(settings: Config) -> bytes:
    """Of what decides how bytes are predicted. Defaults are left out: a setting that is new changes no hash."""
    said = settings.model.model_dump(mode="json", exclude_defaults=True)
    data = {"seq_len": settings.data.seq_len, "scan": settings.data.scan, "vocab_size": settings.vocab_size}
    return hashlib.sha256(json.dumps([said, data], sort_keys=True).encode()).digest()[: mbz.SETTINGS_HASH]


def _rounding_hash() -> bytes:
    """Of what decides how floats are rounded, as far as it can be known."""
    said = f"{torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {np.__version__}"
    return hashlib.sha256(said.encode()).digest()[: mbz.ROUNDING_HASH]


def _must_be_its_model(loaded: Loaded, header: Header, name: str) -> None:
    if header.weights != loaded.weights:
        made, here = f"{header.weights.hex()} (step {header.step})", f"{loaded.weights.hex()} (step {loaded.step})"
        raise CheckpointError(
            f"{name}: the model {made} made it, {loaded.where} has {here}; give the run or checkpoint that made it"
        )
    if header.settings != loaded.settings:
        what = "model, data.seq_len or data.scan"
        raise CheckpointError(
            f"{name}: the model is the same, but its settings ({what}) are others in {loaded.where}'s config.yaml"
        )


def _not_the_original(header: Header, name: str) -> DataError:
    """The checksum held, so the file is as it was written: the predictions are others than when it was written."""
    known = "another processor or torch" if header.rounding != _rounding_hash() else "the same torch, as it seems"
    return DataError(
        f"{name}: what comes out is not the original (its sha256 differs): floats are rounded otherwise here than "
        f"where it was made ({known}); decompress it there. Nothing was written"
    )


# ---- files ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def _written(target: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends well."""
    try:
        with whole_file(target) as file:
            yield file
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror})") from error


def _must_be_free(target: Path, source: Path, overwrite: bool) -> None:
    """Raise ConfigError where the output would replace something that it should not."""
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: cannot be written: {target.parent} is no folder")
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"{target}: is what is read; give another --out=FILE")
    if target.exists() and not target.is_file():
        raise ConfigError(f"{target}: is no plain file; give another --out=FILE")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target}: is there already; give another --out=FILE, or --overwrite")


def _shape_of(loaded: Loaded, path: Path, content: bytes, asked: str) -> tuple[int, int] | None:
    """The shape of the pictures that a file's bytes are; says on stderr where they are not what the model knows."""
    kinds = {form.modality for form in loaded.forms}
    if asked:
        sides = [int(side) if side.isdecimal() and len(side) < 6 else 0 for side in asked.split("x")]
        if "image" not in kinds or len(sides) != 2 or not all(sides):
            what = "HxW in pixels, as in 48x64" if "image" in kinds else "nothing: this run knows no images"
            raise ConfigError(f"--shape: got {asked!r}, expected {what}")
        return sides[0], sides[1]
    hint = ""
    if "image" in kinds and path.suffix.lower() == ".rgb" and content:
        known = [form.shape for form in loaded.forms if form.shape is not None]
        fitting = [
            s for s in known if 3 * math.prod(s) <= mbz.MAX_PICTURE_BYTES and not len(content) % math.prod(s, start=3)
        ]
        if fitting:
            return fitting[0]
        hint = "raw pixels whose shape is not known; --shape=HxW lets them be coded in the model's order"
    for modality, starts in _ENCODED.items():
        if kinds == {modality} and content.startswith(starts):
            made = {"image": ".rgb", "audio": ".pcm"}[modality]
            hint = f"an encoded file, while the model knows the bytes that mbtrain-prep makes of one ({made})"
    if hint:
        sys.stderr.write(f"mbtrain: {path}: {hint}. It is compressed as it stands\n")
    return None


_ENCODED = {
    "image": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*"),
    "audio": (b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM", b"\xff\xfb"),
}


@contextmanager
def _shown(total: int) -> Iterator[Progress]:
    """Where it stands, on stderr: a bar on a terminal, which is gone at the end; else a line every half minute."""
    terminal = sys.stderr.isatty()
    began = last = time.perf_counter()
    done = 0

    def progress(more: int) -> None:
        nonlocal done, last
        done += more
        now = time.perf_counter()
        if now - last < (0.2 if terminal else 30.0):
            return
        last = now
        rate = done / (now - began)
        text = f"{size(done)} of {size(total)} · {size(rate)}/s · {duration((total - done) / rate)} left"
        if terminal:
            bar(done / total, text)
        else:
            sys.stderr.write(text + "\n")

    try:
        yield progress
    finally:
        if terminal:
            sys.stderr.write("\r\x1b[K")
