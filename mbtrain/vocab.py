"""Ids: 0..255 are bytes and nothing else, 256 is the document boundary. Padding is a mask, never an id to predict."""

NUM_BYTES = 256
BOUNDARY = 256
FILLING = -1  # what stands under the mask, for a model that must know where a row ends (subword); else 0


def vocab_size(boundary: bool) -> int:
    """Number of ids a model predicts: 257 where documents are packed with boundaries, else 256."""
    return NUM_BYTES + int(boundary)
