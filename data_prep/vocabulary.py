"""A BPE vocabulary of a text data set's bytes, for model.kind=subword; see mbtrain/tokens.py for what a token is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mbtrain import tokens
from mbtrain.data.order import permutation
from mbtrain.errors import ConfigError, DataError
from mbtrain.shards import Split, file_sha256, open_split, whole_file

SMALLEST = len(tokens.ALPHABET) + 1  # all bytes and the boundary
LEAST_PAIRS = 2  # a pair that stands but once is no token
PIECE_BYTES = 1 << 20
COUNTED_BYTES = 16 << 20  # bytes per token are those of so much of the data


def vocabulary(root: Path, out: Path, size: int, limit: int | None = None) -> dict[str, Any]:
    """Make a vocabulary of at most `size` tokens of the train split's bytes, and write `out` whole or not at all.

    The same data, size and limit give the same file, byte for byte. limit: so many bytes are read, of samples drawn
    evenly; None: all.
    Returns {"tokens", "bytes", "bytes_per_token", "sha256", "path"}; `tokens` are fewer than `size` where no more pairs
    of tokens stand in the data twice; "bytes" were read, and "bytes_per_token" are of the first 16 MiB of them.
    Raises ConfigError: too few tokens for all bytes. DataError: no text data set, or `out` cannot be written.
    """
    if size < SMALLEST:
        raise ConfigError(f"--size: got {size}, expected {SMALLEST} or more: one token for each byte and the boundary")
    split = open_split(root, "train")
    if split.modality != "text":
        raise DataError(f"{root}: holds {split.modality}, expected text: a vocabulary is made of words")
    if not split.lengths.sum():
        raise DataError(f"{root}: no bytes in its train split; prepare it with a larger share of the data")

    made = tokens.untrained()
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=LEAST_PAIRS,
        special_tokens=[tokens.BOUNDARY],
        initial_alphabet=tokens.ALPHABET,
        show_progress=False,
    )
    made.train_from_iterator((piece.decode("latin-1") for piece in pieces(split, limit)), trainer)
    try:
        with whole_file(out) as file:
            file.write(made.to_str().encode())
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}; choose another place with --out=FILE") from None
    known = made.get_vocab_size()
    read = int(split.lengths.sum())
    counted, used = _counted(tokens.load(out, known), pieces(split, limit))
    return {
        "tokens": known,
        "bytes": read if limit is None else min(read, limit),
        "bytes_per_token": counted / used,
        "sha256": file_sha256(out),
        "path": str(out),
    }


def pieces(split: Split, limit: int | None) -> Iterator[bytes]:
    """A split's samples in parts of 1 MiB at most: all in their order, or in a fixed draw until `limit` bytes."""
    left = int(split.lengths.sum()) if limit is None else limit
    for i in range(len(split)) if limit is None else permutation(0, 0, len(split)):
        length = min(int(split.lengths[i]), left)
        for start in range(0, length, PIECE_BYTES):
            yield split.read(int(i), start, min(start + PIECE_BYTES, length))
        left -= length
        if not left:
            return


def _counted(known: tokens.Vocabulary, parts: Iterator[bytes]) -> tuple[int, int]:
    """Bytes and tokens of the first parts of samples."""
    counted = used = 0
    for part in parts:
        counted += len(part)
        used += len(known.encode([np.frombuffer(part, np.uint8)])[0])
        if counted >= COUNTED_BYTES:
            break
    return counted, used
