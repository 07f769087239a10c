"""Near-duplicates of text: MinHash signatures by datasketch, and which documents resemble one before them.

A document is the set of its byte 8-grams; two documents are near-duplicates where the estimated Jaccard similarity of
their sets reaches a threshold. The estimate has a standard error of 0.04 or less (128 permutations), and the search
(locality-sensitive hashing) may miss a pair near the threshold; both are the same in every run. A document of less than
32 bytes is near to none.

The cost: signatures are made where documents are read, in all workers, at some 2 MB/s each, and take 512 bytes a
document; the search is one process's, at some 60 microseconds and 4 KB of memory a document.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mbtrain.errors import ConfigError

PERMUTATIONS = 128
SIGNATURE_BYTES = 4 * PERMUTATIONS
_SHINGLE_BYTES = 8
_LEAST_BYTES = 32
_SEED = 1
_BATCH_SHINGLES = 16384
_SCHEME = "affine32"


@functools.cache
def _options() -> dict[str, Any]:
    """Of every MinHash; the permutations take longer to make than to use on a short document."""
    from datasketch import MinHash

    made = MinHash(num_perm=PERMUTATIONS, seed=_SEED, scheme=_SCHEME)
    return {"seed": _SEED, "scheme": _SCHEME, "permutations": made.permutations, "hashfunc": int}


def check_installed() -> None:
    """Raise ConfigError if datasketch is not installed."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise ConfigError("--near-dups: needs the package datasketch; pip install 'mbtrain[near]'") from None


def signature(content: bytes) -> bytes:
    """The MinHash signature of a document, uint32 [128] as bytes; empty if it is too short for one."""
    from datasketch import MinHash

    if len(content) < _LEAST_BYTES:
        return b""
    made = MinHash(num_perm=PERMUTATIONS, **_options())
    for start in range(0, len(content) - _SHINGLE_BYTES + 1, _BATCH_SHINGLES):
        stretch = np.frombuffer(content[start : start + _BATCH_SHINGLES + _SHINGLE_BYTES - 1], np.uint8)
        made.update_batch(_shingle_hashes(stretch).tolist())
    return made.hashvalues.astype("<u4").tobytes()


def _shingle_hashes(content: np.ndarray) -> np.ndarray:
    """The distinct 32-bit hashes of all byte 8-grams (splitmix64's finalizer, its upper half)."""
    windows = np.lib.stride_tricks.sliding_window_view(content, _SHINGLE_BYTES)
    grams = np.ascontiguousarray(windows).view("<u8").ravel().astype(np.uint64)
    grams = (grams ^ (grams >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    grams = (grams ^ (grams >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.unique((grams ^ (grams >> np.uint64(31))) >> np.uint64(32))


def first_of_their_kind(signatures: np.ndarray, signed: np.ndarray, threshold: float, old: int = 0) -> np.ndarray:
    """bool [n]: False where a document is near to one that stands before it and is kept.

    Args:
        signatures: uint32 [n, 128].
        signed: bool [n], False for documents without a signature; those are kept.
        threshold: least estimated similarity of what counts as near, 0 to 1.
        old: the first so many are kept whatever they are.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept = np.ones(len(signatures), bool)
    for number in np.flatnonzero(signed).tolist():
        own = signatures[number]
        made = MinHash(hashvalues=own, **_options())
        if number >= old and (candidates := index.query(made)):
            near = (signatures[candidates] == own).mean(axis=1).max()
            if near >= threshold:
                kept[number] = False
                continue
        index.insert(number, made, check_duplication=False)
    return kept
