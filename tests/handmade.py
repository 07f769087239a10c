"""Data sets of a few samples, written by tarfile and pyarrow: a second writer of the format, without data prep."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mbtrain.shards import (
    COUNTS,
    EXTENSIONS,
    REJECTED_NAME,
    SCHEMA_VERSION,
    Manifest,
    ShardInfo,
    SplitInfo,
    file_sha256,
    index_schema,
    shard_name,
    write_manifest,
)


@dataclass(frozen=True)
class Made:
    """A sample: its bytes, and for images [h, w, 3], for sounds [frames] and Hz."""

    content: bytes
    shape: list[int] | None = None
    sample_rate: int | None = None


def picture(pixels: np.ndarray) -> Made:
    """uint8 [h, w, 3]."""
    return Made(pixels.tobytes(), list(pixels.shape))


def sound(pcm: np.ndarray, sample_rate: int = 16000) -> Made:
    """int16 [frames], as pcm16."""
    return Made(pcm.astype("<i2").tobytes(), [len(pcm)], sample_rate)


def dataset(
    root: Path,
    modality: str,
    splits: Mapping[str, Sequence[Sequence[Made]]],
    *,
    prep: Mapping[str, Any] | None = None,
    rejected: int = 0,
    **counts: int,
) -> Path:
    """Write a data set of these samples by split and shard; `counts` go into the manifest, `found` is their sum."""
    root.mkdir(parents=True, exist_ok=True)
    infos = {}
    for split, shards in splits.items():
        (root / split).mkdir(exist_ok=True)
        made = tuple(_shard(root / split, shard_name(split, i), modality, shard) for i, shard in enumerate(shards))
        infos[split] = SplitInfo(sum(s.samples for s in made), sum(s.bytes for s in made), made)
    if rejected:
        columns = {"source": "in", "file": "x", "where": "", "reason": "empty", "bad": False}
        pq.write_table(pa.Table.from_pylist([columns] * rejected), root / REJECTED_NAME, write_page_checksum=True)
    counted = dict.fromkeys(COUNTS, 0) | {"rejected": rejected} | counts
    counted["found"] = sum(info.samples for info in infos.values()) + sum(
        counted[key] for key in ("duplicates", "near_duplicates", "rejected")
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        modality=modality,
        documents="whole",
        prep=dict(prep or {}),
        sources={"files": 1, "bytes": 1, "digest": "0" * 64},
        counts=counted,
        splits=infos,
        rejected_sha256=file_sha256(root / REJECTED_NAME) if rejected else "",
    )
    write_manifest(root, manifest)
    return root


def _shard(folder: Path, name: str, modality: str, samples: Sequence[Made]) -> ShardInfo:
    tar_path, parquet_path = folder / f"{name}.tar", folder / f"{name}.parquet"
    rows: list[dict[str, Any]] = []
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            digest = hashlib.sha256(sample.content).hexdigest()
            member = tarfile.TarInfo(f"{digest[:32]}.{EXTENSIONS[modality]}")
            member.size = len(sample.content)
            tar.addfile(member, io.BytesIO(sample.content))
            rows.append({"key": digest[:32], "bytes": member.size, "modality": modality, "shape": sample.shape})
            rows[-1] |= {"sample_rate": sample.sample_rate, "source": "in", "hash": digest}
    with tarfile.open(tar_path) as tar:
        for row, member in zip(rows, tar, strict=True):
            row["offset"] = member.offset_data
    pq.write_table(pa.Table.from_pylist(rows, schema=index_schema()), parquet_path, write_page_checksum=True)
    return ShardInfo(
        name=name,
        samples=len(rows),
        bytes=sum(row["bytes"] for row in rows),
        size_tar=tar_path.stat().st_size,
        size_parquet=parquet_path.stat().st_size,
        sha256_tar=file_sha256(tar_path),
        sha256_parquet=file_sha256(parquet_path),
    )
