"""Words of text as corpora count them: runs of bytes that are no white space, across whatever is read at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbtrain.shards import Split

READ_BYTES = 1 << 22
_SPACE = np.zeros(256, bool)
_SPACE[list(b" \t\n\r\v\f")] = True


def count_words(split: Split, samples: Sequence[int], sizes: np.ndarray) -> int:
    """Words that begin in the first sizes[i] bytes of these samples i, as len(bytes.split()) counts them.

    So PG-19's 6,966,499 test words were counted (Rae et al. 2019, table 1 of megabyte.md's source). A document begins a
    word; a piece of one long file goes on with the word that the piece before it in the split ended in.
    Raises DataError.
    """
    words = 0
    for i in samples:
        before = np.ones(1, bool)  # whether a word would begin now
        if split.documents == "pieces" and i and split.lengths[i - 1]:
            before = _SPACE[np.frombuffer(split.read(i - 1, int(split.lengths[i - 1]) - 1), np.uint8)]
        for start in range(0, int(sizes[i]), READ_BYTES):
            stop = min(start + READ_BYTES, int(sizes[i]))
            space = np.concatenate([before, _SPACE[np.frombuffer(split.read(i, start, stop), np.uint8)]])
            words += int((space[:-1] & ~space[1:]).sum())
            before = space[-1:]
    return words
