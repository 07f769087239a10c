"""The parameters that the bytes of a data set depend on, and how they are written as options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mbtrain.errors import ConfigError
from mbtrain.shards import SPLIT_NAME

DEFAULT_SPLITS = "train=0.9,val=0.05,test=0.05"
DEFAULT_SHARD_BYTES = 128 * 1024**2
DEFAULT_SAMPLE_BYTES = 64 * 1024

# The tar format (USTAR) writes a member's size in eleven octal digits.
LARGEST_SAMPLE_BYTES = 8**11 - 1

_UNITS = {"": 1}
for _power, _letter in enumerate("kMGT", start=1):
    _UNITS |= {_letter: 1000**_power, _letter.upper(): 1000**_power, f"{_letter}i": 1024**_power}
    _UNITS |= {f"{_letter.upper()}i": 1024**_power}


@dataclass(frozen=True)
class Recipe:
    """Everything besides the sources that decides a data set's bytes. Sizes are in bytes.

    splits         (name, fraction) pairs: a split by the hash of each sample's content; None with `split_bytes`
    split_bytes    (name, bytes) pairs: a split of one long file by position, in pieces of `sample_bytes`
    shard_bytes    a shard is closed by the sample with which its tar reaches this size
    include        patterns for files in source folders; empty means all
    exclude        patterns for files and folders to leave out
    min_bytes      shorter samples are rejected
    max_bytes      longer samples are rejected
    near_dups      a sample whose estimated Jaccard similarity to one before it reaches this is left out; None: none is
    """

    splits: tuple[tuple[str, Fraction], ...] | None
    split_bytes: tuple[tuple[str, int], ...] | None = None
    sample_bytes: int = DEFAULT_SAMPLE_BYTES
    shard_bytes: int = DEFAULT_SHARD_BYTES
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_bytes: int = 1
    max_bytes: int = LARGEST_SAMPLE_BYTES
    near_dups: float | None = None

    def __post_init__(self) -> None:
        if (self.splits is None) == (self.split_bytes is None):
            raise ConfigError("splits, split_bytes: expected one of them, got both or none; leave one out")
        if self.split_bytes is not None and (self.min_bytes > 1 or self.max_bytes < LARGEST_SAMPLE_BYTES):
            raise ConfigError(
                "min_bytes, max_bytes: have no meaning with split_bytes, which cuts one file; leave them out"
            )
        if self.near_dups is not None:
            if not 0.3 <= self.near_dups < 1:  # false too for what is no number
                raise ConfigError(f"near_dups: expected a similarity of 0.3 to below 1, got {self.near_dups:g}")
            if self.split_bytes is not None:
                raise ConfigError("near_dups: has no meaning with split_bytes, which cuts one file; leave it out")
        if not 1 <= self.min_bytes <= self.max_bytes <= LARGEST_SAMPLE_BYTES:
            got = f"{self.min_bytes} and {self.max_bytes}"
            raise ConfigError(
                f"min_bytes, max_bytes: expected 1 <= min_bytes <= max_bytes <= {LARGEST_SAMPLE_BYTES}, got {got}"
            )
        if not 1 <= self.sample_bytes <= LARGEST_SAMPLE_BYTES:
            raise ConfigError(f"sample_bytes: expected 1 to {LARGEST_SAMPLE_BYTES}, got {self.sample_bytes}")
        if self.shard_bytes < 1:
            raise ConfigError(f"shard_bytes: expected 1 or more, got {self.shard_bytes}")

    @property
    def split_names(self) -> tuple[str, ...]:
        """Names of the splits in their order."""
        return tuple(name for name, _ in (self.splits or self.split_bytes or ()))

    def as_json(self) -> dict[str, Any]:
        """The recipe as it stands in the manifest; equal recipes give equal objects."""
        if self.split_bytes is None:
            how: dict[str, Any] = {"splits": {name: _plain_share(share) for name, share in self.splits or ()}}
            how |= {"min_bytes": self.min_bytes, "max_bytes": self.max_bytes, "near_dups": self.near_dups}
        else:
            how = {"split_bytes": dict(self.split_bytes), "sample_bytes": self.sample_bytes}
        patterns = {"include": list(self.include), "exclude": list(self.exclude)}
        return {**how, "shard_bytes": self.shard_bytes, **patterns}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """The recipe of which `as_json` made `value`; keys that are none of the recipe's are left alone.

        Raises:
            KeyError, TypeError, ValueError, ConfigError: it is of no recipe.
        """
        ours = {key: value[key] for key in cls.__dataclass_fields__ if key in value}
        ours |= {key: tuple(value[key]) for key in ("include", "exclude")}
        if "splits" in ours:
            ours["splits"] = tuple((name, Fraction(str(share))) for name, share in value["splits"].items())
        else:
            ours |= {"splits": None, "split_bytes": tuple(value["split_bytes"].items())}
        return cls(**ours)


def _plain_share(share: Fraction) -> float | str:
    """0.9 of 9/10, for which it is exact as decimals, and "1/3" of 1/3."""
    return float(share) if Fraction(str(float(share))) == share else str(share)


def parse_size(key: str, text: str) -> int:
    """Bytes of `4096`, `64k` (64,000), `64Ki` (65,536), `90M`, `1.5G`; the unit may end in B.

    Raises:
        ConfigError: it is not a size, or not a whole number of bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMGT]?i?)B?", text.strip().replace("_", ""), re.ASCII)
    size = Fraction(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else None
    if size is None or size.denominator != 1:
        raise ConfigError(f"{key}: expected a size such as 65536, 64Ki (65,536) or 90M (90,000,000), got {text!r}")
    return int(size)


def parse_splits(key: str, text: str) -> tuple[tuple[str, Fraction], ...]:
    """Names and exact fractions of `train=0.9,val=0.05,test=0.05`.

    Raises:
        ConfigError: a name or number is wrong, or the fractions do not sum to 1.
    """
    pairs = tuple((name, _fraction(key, share)) for name, share in _named(key, text, ()))
    if (total := sum(share for _, share in pairs)) != 1:
        raise ConfigError(f"{key}: expected fractions that sum to 1, got {float(total):g} from {text!r}")
    return pairs


def parse_split_bytes(key: str, text: str) -> tuple[tuple[str, int], ...]:
    """Names and bytes of `90M,5M,5M` (train, val and test, in this order) or `train=90M,val=5M`.

    Raises:
        ConfigError: a name or size is wrong, or a size is zero.
    """
    pairs = tuple((name, parse_size(key, size)) for name, size in _named(key, text, ("train", "val", "test")))
    if empty := [name for name, size in pairs if size == 0]:
        raise ConfigError(f"{key}: expected sizes of 1 byte or more, got 0 for {empty[0]}; leave the split out")
    return pairs


def parse_patterns(text: str) -> tuple[str, ...]:
    """The patterns of a comma-separated list."""
    return tuple(pattern for pattern in (part.strip() for part in text.split(",")) if pattern)


def _named(key: str, text: str, default_names: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, value) of `a=1,b=2`, or of `1,2` where there are default names."""
    parts = [part.strip() for part in text.split(",")]
    if not any("=" in part for part in parts) and len(parts) <= len(default_names):
        parts = [f"{name}={part}" for name, part in zip(default_names, parts, strict=False)]
    pairs: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or not SPLIT_NAME.fullmatch(name):
            raise ConfigError(f"{key}: expected NAME=VALUE,NAME=VALUE with names in small letters, got {text!r}")
        if name in pairs:
            raise ConfigError(f"{key}: the split {name!r} is given twice in {text!r}")
        pairs[name] = value
    return list(pairs.items())


def _fraction(key: str, text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ConfigError(f"{key}: expected fractions above 0 and up to 1, got {text!r}")
    return share
