"""From a configuration to opened sources: what stands in a data set decides how its rows are cut."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from mbtrain import vocab
from mbtrain.config import Config, SourceConfig
from mbtrain.data.rows import Stream
from mbtrain.errors import ConfigError, DataError
from mbtrain.shards import Manifest, Split, dataset_hash, load_manifest, open_split

FULL_CHECK_BYTES = 16 << 30  # data.check auto: larger splits are compared by file sizes alone


@dataclass(frozen=True)
class Opened:
    """One split of a source, open: its name, its samples, and its rows in the order that was asked for."""

    name: str
    split: Split
    stream: Stream


def open_sources(
    settings: Config, split: str, *, seed: int | None, check: Literal["auto", "size", "full"] = "size"
) -> list[Opened]:
    """Open one split of every source of a configuration.

    Args:
        settings: says where the data is and how rows are cut.
        split: its name, as `train`.
        seed: of the shuffled training order; None: one pass in shard order.
        check: as in the configuration.

    Raises:
        ConfigError: a source cannot be read as configured.
        DataError: no such split, or it holds no bytes; a file is missing, cut off, changed or not as its manifest says.
    """
    manifests = [(source, load_manifest(source.path)) for source in settings.data.mixture]
    if seed is not None:  # a mixture with text may be scored on its pictures alone
        _check_boundary(settings, manifests)
    opened = []
    for source, manifest in manifests:
        small = split in manifest.splits and manifest.splits[split].bytes <= FULL_CHECK_BYTES
        full = check == "full" or (check == "auto" and small)
        samples = open_split(source.path, split, "full" if full else "size")
        try:
            opened.append(Opened(source.label, samples, _stream(settings, samples, seed)))
        except DataError as error:
            raise DataError(f"{source.path}: {error}") from None
    return opened


def data_hash(opened: list[Opened]) -> str:
    """Sha256 (hex): equal exactly when every file of every source is equal, whichever split of them is open."""
    hashes = [dataset_hash(source.split.manifest) for source in opened]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def described(opened: list[Opened]) -> list[dict[str, Any]]:
    """What each source holds, for RUN/environment.json: enough to show samples as pictures and sounds later."""
    out = []
    for source in opened:
        prep = source.split.manifest.prep
        size = source.split.common_image_size()
        out.append(
            {
                "name": source.name,
                "modality": source.split.modality,
                "shape": None if size is None else [*size, 3],
                "sample_rate": prep.get("sample_rate"),
                "encoding": prep.get("encoding"),
                "prep": prep,
            }
        )
    return out


def _check_boundary(settings: Config, manifests: list[tuple[SourceConfig, Manifest]]) -> None:
    if settings.data.boundary and not any(_documents(manifest) for _, manifest in manifests):
        source, manifest = manifests[0]
        what = "pieces of one long file" if manifest.modality == "text" else f"{manifest.modality} samples"
        raise ConfigError(
            f"data.boundary: got true, expected false: {source.path} holds {what}, which no boundary follows"
        )


def _documents(manifest: Manifest) -> bool:
    """Whether a boundary follows each sample: only whole documents of text have an end to be predicted."""
    return manifest.modality == "text" and manifest.documents == "whole"


def _stream(settings: Config, split: Split, seed: int | None) -> Stream:
    data, patches = settings.data, [stage.patch_size for stage in settings.model.stages]
    rows = data.rows
    if rows == "auto":
        rows = "sample" if split.modality != "text" else "aligned" if settings.model.isolate_documents else "packed"
    if rows == "packed" and settings.model.isolate_documents:
        raise ConfigError(
            "data.rows: got packed, expected auto, aligned or sample: with model.isolate_documents a document begins "
            "at a patch"
        )
    if split.modality == "audio" and split.manifest.prep.get("encoding") == "pcm16" and data.seq_len % 2:
        raise ConfigError(
            f"data.seq_len: got {data.seq_len}, expected an even number: 16-bit audio has two bytes a frame"
        )
    scanned = split.modality == "image" and data.scan == "patch"
    return Stream(
        split,
        boundary=data.boundary and _documents(split.manifest),
        seed=seed,
        align={"packed": 1, "aligned": patches[0], "sample": data.seq_len}[rows],
        patches=patches if scanned else None,
        filling=vocab.FILLING if settings.model.kind == "subword" else 0,
    )
