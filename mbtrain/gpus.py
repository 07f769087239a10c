"""The most that GPUs compute, from their makers' data sheets."""

from __future__ import annotations

from mbtrain.errors import ConfigError

# Dense tensor-core TFLOP/s without sparsity: (bf16 or fp16, tf32 or fp32). A longer name stands before its beginning.
PEAKS = {
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417),
    "H100": (989, 494),
    "H200": (989, 494),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L4": (121, 60),
    "A10G": (70, 35),
    "V100": (112, 14),
    "RTX 4090": (165, 83),
    "RTX 3090": (71, 36),
    "B200": (2250, 1125),
}


def peak(name: str, precision: str) -> float | None:
    """Operations per second of a GPU whose driver gives it this name, in this precision; None for an unknown one."""
    for key, (low, full) in PEAKS.items():
        if key in name:
            return (full if precision == "fp32" else low) * 1e12
    return None


def named(option: str, name: str) -> str:
    """The name in PEAKS that a user means, whatever its capitals. Raises ConfigError for none of them."""
    for key in PEAKS:
        if key.lower().replace(" ", "") == name.lower().replace(" ", "").replace("_", "").replace("-", ""):
            return key
    raise ConfigError(f"{option}: got {name!r}, expected one of {', '.join(PEAKS)}")
