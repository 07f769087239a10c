"""One of several ranks that measures steps at ZeRO stages one after the other: `python -m tests.doctor.ranks YAML...`.

In one process, since the first start brings libraries into memory that no formula is about. Rank 0 writes a line of
JSON for each configuration: the peak of tensors in bytes, of the rank that needed most.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys

from mbtrain import config, engine
from mbtrain.doctor import step
from tests import tiny


def main() -> None:
    ranks = engine.start()
    for stage in (0, 1, 2, 3):
        step.started(tiny.make(train={"zero_stage": stage, "precision": "bf16"}), ranks)
    for path in sys.argv[1:]:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        *_, found = step.started(config.load(path), ranks)
        peaks = engine.gathered(found["peak_bytes"])
        if ranks.rank == 0:
            sys.stdout.write(json.dumps(max(peaks)) + "\n")
            sys.stdout.flush()
    engine.stop()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
