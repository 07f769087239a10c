"""The verbs of `mbtrain-prep`; thin. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mbtrain.command import Program, finish, flag, no_unknown, write
from mbtrain.command import main as run_program
from mbtrain.errors import ConfigError, DataError


def text(
    *sources: str,
    out: str = "",
    splits: str = "",
    split_bytes: str = "",
    sample_bytes: str = "",
    shard_bytes: str = "",
    workers: str = "",
    column: str = "text",
    glob: str = "",
    exclude: str = "",
    min_bytes: str = "",
    max_bytes: str = "",
    strict: str = "",
    overwrite: str = "",
    json: str = "",
    **unknown: str,
) -> None:
    """mbtrain-prep text SRC... --out=DIR [options]

    Makes a data set of documents. SRC is a file or a folder. A plain file is one document, its bytes unchanged; each
    line of .jsonl and .ndjson and each row of .parquet is one; .gz, .bz2, .xz and .zst are unpacked. Exact duplicates
    and empty documents are left out and counted. Killed and started again, it goes on where it was.

      --out=DIR             folder of the data set
      --splits=LIST         shares by content hash                             (train=0.9,val=0.05,test=0.05)
      --split-bytes=LIST    one long file by position instead: train,val,test sizes, or NAME=SIZE,NAME=SIZE
      --sample-bytes=SIZE   length of the pieces that --split-bytes cuts                              (64Ki)
      --shard-bytes=SIZE    size at which a tar is closed                                            (128Mi)
      --column=NAME         field of the document in records                                          (text)
      --glob=PATTERNS       which files of folders: '*.py' at any depth, 'src/**/*.py' from SRC on     (all)
      --exclude=PATTERNS    names or paths to leave out, such as 'tests,*.min.js,docs/**'             (none)
      --min-bytes=SIZE --max-bytes=SIZE    documents outside are left out and counted           (1, 8Gi - 1)
      --workers=N           processes; the files are the same for any number                         (cores)
      --strict              stop at what cannot be read or decoded, rather than list it in DIR/rejected.jsonl
      --overwrite           replace what another job made in DIR
      --json                last line on stdout: {"samples", "bytes", "shards", "duplicates", "rejected", "splits", ...}

    Sizes: 65536, 64Ki (x 1024), 90M (x 1,000,000). Lists and patterns are separated by commas.

    Examples:
      mbtrain-prep text enwik8.xz --out=shards/enwik8 --split-bytes=90M,5M,5M
      mbtrain-prep text /usr/lib/python3 --out=shards/python --glob='*.py' --exclude=test,tests,site-packages
      mbtrain-prep text books/ wiki.jsonl.zst web.parquet --out=shards/mix --column=content --splits=train=0.99,val=0.01
    """
    no_unknown(text, unknown)
    if not sources:
        raise ConfigError("SRC: expected files or folders, got none; see mbtrain-prep text --help")
    if not out:
        raise ConfigError("--out: expected a folder, got nothing; give --out=DIR")
    if splits and split_bytes:
        raise ConfigError("--splits, --split-bytes: expected one of them, got both; leave one out")
    if sample_bytes and not split_bytes:
        raise ConfigError("--sample-bytes: cuts pieces only together with --split-bytes; leave it out or give both")
    if not column:
        raise ConfigError("--column: expected a name, got nothing")

    from data_prep import recipe as r
    from data_prep.build import REJECTED_NAME, build
    from data_prep.text import text_modality

    recipe = r.Recipe(
        splits=None if split_bytes else r.parse_splits("--splits", splits or r.DEFAULT_SPLITS),
        split_bytes=r.parse_split_bytes("--split-bytes", split_bytes) if split_bytes else None,
        sample_bytes=_size("--sample-bytes", sample_bytes, r.DEFAULT_SAMPLE_BYTES),
        shard_bytes=_size("--shard-bytes", shard_bytes, r.DEFAULT_SHARD_BYTES),
        include=r.parse_patterns(glob),
        exclude=r.parse_patterns(exclude),
        min_bytes=_size("--min-bytes", min_bytes, 1),
        max_bytes=_size("--max-bytes", max_bytes, r.LARGEST_SAMPLE_BYTES),
        options={"column": column},
    )
    flags = {"strict": flag("--strict", strict), "overwrite": flag("--overwrite", overwrite)}
    as_json = flag("--json", json)
    manifest = build(text_modality(column), sources, Path(out), recipe, workers=_workers(workers), **flags)

    names = manifest.splits
    per_split = {n: {"samples": s.samples, "bytes": s.bytes, "shards": len(s.shards)} for n, s in names.items()}
    figures: dict[str, Any] = {
        key: sum(split[key] for split in per_split.values()) for key in ("samples", "bytes", "shards")
    }
    figures |= {**manifest.counts, "splits": per_split, "path": out}
    for name, split in per_split.items():
        write(f"{name}: {split['samples']} samples, {split['bytes']} bytes, {split['shards']} shards")
    rejected = f"{figures['rejected']} rejected" + (
        f" (see {Path(out) / REJECTED_NAME})" if figures["rejected"] else ""
    )
    write(f"{out}: {figures['samples']} samples, {figures['duplicates']} duplicates left out, {rejected}")
    finish(figures, as_json)


def verify(*path: str, workers: str = "", json: str = "", **unknown: str) -> None:
    """mbtrain-prep verify DIR [--workers=N] [--json]

    Checks every file against the manifest, every sample against its hash, the tars against their indices, and that no
    key stands twice and no content in two splits. Exit status 2 and the names of what is bad otherwise.
    --json: last line on stdout: {"samples", "bytes", "shards", "bad"}

    Example:
      mbtrain-prep verify shards/enwik8
    """
    no_unknown(verify, unknown)
    root, as_json, count = _one_folder(path), flag("--json", json), _workers(workers)

    from data_prep.verify import verify as verify_data

    manifest, problems = verify_data(root, count)
    splits = manifest.splits.values()
    figures = {"samples": sum(s.samples for s in splits), "bytes": sum(s.bytes for s in splits)}
    figures["shards"] = sum(len(s.shards) for s in splits)
    for problem in problems[1:]:
        sys.stderr.write(problem + "\n")
    if not problems:
        write(f"{root}: whole: {figures['samples']} samples, {figures['bytes']} bytes, {figures['shards']} shards")
    finish({**figures, "bad": problems}, as_json)
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; copy the data set again, or make it again with --overwrite")


def stats(*path: str, json: str = "", **unknown: str) -> None:
    """mbtrain-prep stats DIR [--json]

    Shows samples, bytes and lengths by split and source, and the bytes' entropy (what a model without context needs).
    --json: last line on stdout: all figures, with each split's histogram of byte values

    Example:
      mbtrain-prep stats shards/enwik8
    """
    no_unknown(stats, unknown)
    root, as_json = _one_folder(path), flag("--json", json)

    from data_prep.stats import stats as stats_of_data
    from data_prep.stats import table

    figures = stats_of_data(root)
    for line in table(figures):
        write(line)
    finish(figures, as_json)


_HELP = """mbtrain-prep: raw files -> shards for mbtrain train

  mbtrain-prep text SRC... --out=DIR    make a data set of documents
  mbtrain-prep verify DIR               check every byte of a data set against its hashes
  mbtrain-prep stats DIR                samples, bytes and lengths by split and source

Options are --key=value. `mbtrain-prep VERB --help` shows those of a verb, with examples.
Progress goes to stderr. Exit status: 0 done, 2 a mistake or bad data (one line says which), 130 interrupted.
"""


PROGRAM = Program(
    name="mbtrain-prep",
    verbs={"text": text, "verify": verify, "stats": stats},
    flags=("strict", "overwrite", "json"),
    help=_HELP,
    when_interrupted="interrupted; the same command goes on where it was",
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script: exit status 0 done, 2 after a user's mistake or bad data, 130 after Ctrl-C."""
    run_program(PROGRAM, argv)


def _one_folder(path: tuple[str, ...]) -> Path:
    if len(path) != 1:
        raise ConfigError(f"DIR: expected one folder of a data set, got {len(path)}: {' '.join(path) or 'nothing'}")
    return Path(path[0])


def _size(key: str, value: str, default: int) -> int:
    from data_prep.recipe import parse_size

    return parse_size(key, value) if value else default


def _workers(value: str) -> int:
    from data_prep.pool import available_cores

    if not value:
        return available_cores()
    if not value.isdecimal() or not 1 <= int(value) <= 1024:
        raise ConfigError(f"--workers: expected a number from 1 to 1024, got {value!r}")
    return int(value)
