"""Data: shard index -> deterministic order -> packed rows -> batches. The whole state is one position."""
