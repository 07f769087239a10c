"""The verbs of `mbtrain-prep`; thin. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mbtrain.command import Program, closest, finish, flag, no_unknown, number, write
from mbtrain.command import main as run_program
from mbtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_prep.sources import Modality
    from mbtrain.shards import Manifest


# Options of the three verbs that read sources, with what they are if not given.
_COMMON = dict.fromkeys(
    ("out", "splits", "shard_bytes", "workers", "engine", "part", "column", "glob", "exclude", "min_bytes", "max_bytes")
    + ("max_reject", "strict", "overwrite", "dry_run", "json"),
    "",
)
_COMMON_HELP = """
  --out=DIR             folder of the data set
  --splits=LIST         shares by content hash                             (train=0.9,val=0.05,test=0.05)
  --shard-bytes=SIZE    size at which a tar is closed                                            (128Mi)
  --glob=PATTERNS       which files of folders: '*.py' at any depth, 'src/**/*.py' from SRC on     (all)
  --exclude=PATTERNS    names or paths to leave out, such as 'tests,*.min.js,docs/**'             (none)
  --min-bytes=SIZE --max-bytes=SIZE    samples outside are left out and counted             (1, 8Gi - 1)
  --max-reject=SHARE    make nothing if more than this share cannot be read or decoded, such as 0.01 (1)
  --strict              the same as --max-reject=0
  --workers=N           processes; the files are the same for any number                         (cores)
  --engine=ray          work on the Ray cluster of RAY_ADDRESS, or on a local one; pip install mbtrain[ray]
  --part=i/n            only read part i (0 to n-1) of n, as a job array does; mbtrain-prep merge DIR follows
  --dry-run             say what would be made, and write nothing
  --overwrite           replace what another job made in DIR
  --json                last line on stdout: {"samples", "bytes", "shards", "found", "duplicates", "rejected", ...}

SRC is a file, a folder, or a URL (s3://, gs://, https://). .tar and .zip are opened, .gz, .bz2, .xz and .zst
unpacked. Exact duplicates are left out; what is rejected stands with its reason in DIR/rejected.parquet, and
found = samples + duplicates + near_duplicates + rejected. Killed and started again, it goes on where it was.
Sizes: 65536, 64Ki (x 1024), 90M (x 1,000,000). Lists and patterns are separated by commas."""


def text(*sources: str, **given: str) -> None:
    """mbtrain-prep text SRC... --out=DIR [options]

    Makes a data set of documents. A plain file is one document, its bytes unchanged; so is each line of .jsonl and
    .ndjson, each row of .parquet and each member of an archive.

      --split-bytes=LIST    one long file by position: train,val,test sizes, or NAME=SIZE,NAME=SIZE    (not)
      --sample-bytes=SIZE   length of the pieces that --split-bytes cuts                              (64Ki)
      --column=NAME         field of the document in records; nested: a.b                             (text)
      --match=REGEX         leave out documents in which this is nowhere found                        (none)
      --reject=REGEX        leave out documents in which this is found                                (none)
      --near-dups=SHARE     leave out documents that resemble one before them so much, such as 0.8 (Jaccard
                            similarity of byte 8-grams, by MinHash; slow; pip install mbtrain[near])   (not)
    {common}

    Examples:
      mbtrain-prep text enwik8.xz --out=shards/enwik8 --split-bytes=90M,5M,5M
      mbtrain-prep text /usr/lib/python3 --out=shards/python --glob='*.py' --exclude=test,tests,site-packages
      mbtrain-prep text books/ wiki.jsonl.zst web.parquet --out=shards/mix --column=content --splits=train=0.99,val=0.01
    """
    own = dict.fromkeys(("split_bytes", "sample_bytes", "match", "reject", "near_dups"), "")
    options = _options(given, {**_COMMON, **own, "column": "text"})
    if options["splits"] and options["split_bytes"]:
        raise ConfigError("--splits, --split-bytes: expected one of them, got both; leave one out")
    if options["sample_bytes"] and not options["split_bytes"]:
        raise ConfigError("--sample-bytes: cuts pieces only together with --split-bytes; leave it out or give both")

    from data_prep.text import text_modality

    modality = text_modality(options["column"], match=options["match"], reject=options["reject"])
    _prepare(modality, sources, options)


def image(*sources: str, **given: str) -> None:
    """mbtrain-prep image SRC... --out=DIR [options]

    Makes a data set of images: JPEG, PNG, WebP, GIF (its first frame), BMP and TIFF files, members of archives, the
    bytes in a column of .parquet, and .npy arrays. One image is one sample of raw RGB, turned as its EXIF says.

      --size=PIXELS         side of the centre square that each becomes; none: as large as it is        (64)
      --filter=NAME         by which it is resized: lanczos, bicubic, bilinear, box                (lanczos)
      --draft               let the JPEG decoder shrink large photos on the way: faster, slightly other pixels
      --max-pixels=N        an image that declares more is rejected before it is decoded          (67108864)
      --column=NAME         field of the image in records; nested: a.b                               (image)
    {common}

    Examples:
      mbtrain-prep image photos/ --out=shards/photos64
      mbtrain-prep image 'imagenet/train-*.parquet' --out=shards/imagenet --column=image.bytes --max-reject=0.001
      mbtrain-prep image scans.tar --out=shards/scans --size=none --splits=train=0.98,val=0.02
    """
    own = {"size": "64", "filter": "lanczos", "draft": "", "max_pixels": "", "column": "image"}
    options = _options(given, {**_COMMON, **own})

    from data_prep.image import image_modality

    most = {"max_pixels": number("--max-pixels", options["max_pixels"], int, 1)} if options["max_pixels"] else {}
    modality = image_modality(
        size=None if options["size"] == "none" else number("--size", options["size"], int, 1),
        filter=options["filter"],
        draft=flag("--draft", options["draft"]),
        column=options["column"],
        **most,
    )
    _prepare(modality, sources, options)


def audio(*sources: str, **given: str) -> None:
    """mbtrain-prep audio SRC... --out=DIR [options]

    Makes a data set of recordings: WAV, FLAC, OGG and MP3 files, members of archives, and the bytes in a column of
    .parquet, of any rate and number of channels. One sample is a recording, or a segment of one, as raw mono PCM.

      --rate=HZ             of the samples                                                           (16000)
      --encoding=NAME       pcm16 (16-bit little-endian) or mulaw8 (one byte a frame)                (pcm16)
      --segment=SECONDS     cut recordings to this length, in order; none: they stay whole            (none)
      --column=NAME         field of the recording in records; nested: a.b                           (audio)
    {common}

    Examples:
      mbtrain-prep audio LibriSpeech/ --out=shards/speech
      mbtrain-prep audio calls.tar --out=shards/calls --rate=8000 --encoding=mulaw8
      mbtrain-prep audio music/ --out=shards/music --segment=30 --glob='*.flac,*.mp3' --max-reject=0.01
    """
    own = {"rate": "16000", "encoding": "pcm16", "segment": "none", "column": "audio"}
    options = _options(given, {**_COMMON, **own})

    from data_prep.audio import audio_modality

    modality = audio_modality(
        sample_rate=number("--rate", options["rate"], int, 1),
        encoding=options["encoding"],
        segment_s=None if options["segment"] == "none" else number("--segment", options["segment"], float, 0),
        column=options["column"],
    )
    _prepare(modality, sources, options)


for _verb in (text, image, audio):
    _verb.__doc__ = inspect.cleandoc(_verb.__doc__ or "").replace("{common}", _COMMON_HELP.strip("\n"))


def _prepare(modality: Modality, sources: tuple[str, ...], options: dict[str, str]) -> None:
    """What text, image and audio do, once they know their modality."""
    if not sources:
        raise ConfigError(f"SRC: expected files or folders, got none; see mbtrain-prep {modality.name} --help")
    if not options["out"]:
        raise ConfigError("--out: expected a folder, got nothing; give --out=DIR")
    if not options["column"]:
        raise ConfigError("--column: expected a name, got nothing")

    from data_prep import recipe as r
    from data_prep.build import build, build_part

    split_bytes = options.get("split_bytes", "")
    recipe = r.Recipe(
        splits=None if split_bytes else r.parse_splits("--splits", options["splits"] or r.DEFAULT_SPLITS),
        split_bytes=r.parse_split_bytes("--split-bytes", split_bytes) if split_bytes else None,
        sample_bytes=_size("--sample-bytes", options.get("sample_bytes", ""), r.DEFAULT_SAMPLE_BYTES),
        shard_bytes=_size("--shard-bytes", options["shard_bytes"], r.DEFAULT_SHARD_BYTES),
        include=r.parse_patterns(options["glob"]),
        exclude=r.parse_patterns(options["exclude"]),
        min_bytes=_size("--min-bytes", options["min_bytes"], 1),
        max_bytes=_size("--max-bytes", options["max_bytes"], r.LARGEST_SAMPLE_BYTES),
        near_dups=number("--near-dups", near, float, 0) if (near := options.get("near_dups", "")) else None,
    )
    out, part, as_json = Path(options["out"]), _part(options["part"]), flag("--json", options["json"])
    how = _how(options)
    overwrite, dry_run = (flag(f"--{key.replace('_', '-')}", options[key]) for key in ("overwrite", "dry_run"))
    if dry_run:
        from data_prep.estimate import estimate, lines

        figures = estimate(modality, sources, out, recipe)
        for line in lines(figures):
            write(line)
        finish(figures, as_json)
    elif part is not None:
        if overwrite or options["max_reject"] or options["strict"]:
            raise ConfigError(
                "--overwrite, --max-reject, --strict: are about all parts, and --part reads one; remove DIR yourself, "
                "and give the other two to mbtrain-prep merge"
            )
        done = build_part(modality, sources, out, recipe, part, **how)
        write(f"{out}: part {part[0]}/{part[1]}: {done['files']} files, {done['bytes']} bytes are read")
        finish({"part": options["part"], **done, "path": str(out)}, as_json)
    else:
        limit = _max_reject(options)
        _report(build(modality, sources, out, recipe, max_reject=limit, overwrite=overwrite, **how), out, as_json)


def merge(*path: str, **given: str) -> None:
    """mbtrain-prep merge DIR [options]

    Makes a data set of parts that mbtrain-prep text (image, audio) --part=i/n read, by any number of machines that
    share DIR: the same files, byte for byte, as without parts. It says which parts are not done, if so.

      --part=i/n            only write share i (0 to n-1) of n of the shards; a merge without --part follows
      --max-reject=SHARE    make nothing if more than this share could not be read or decoded            (1)
      --strict              the same as --max-reject=0
      --workers=N           processes; the files are the same for any number                         (cores)
      --engine=ray          work on the Ray cluster of RAY_ADDRESS, or on a local one
      --json                last line on stdout: {"samples", "bytes", "shards", "found", "duplicates", "rejected", ...}

    Example (launch/prep.slurm is one for Slurm):
      mbtrain-prep text books/ --out=shards/books --part=0/2     and, perhaps on another machine,
      mbtrain-prep text books/ --out=shards/books --part=1/2     then
      mbtrain-prep merge shards/books
    """
    names = ("part", "max_reject", "strict", "workers", "engine", "json")
    options = _options(given, dict.fromkeys(names, ""))
    out, part, as_json = _one_folder(path), _part(options["part"]), flag("--json", options["json"])
    limit, how = _max_reject(options), _how(options)

    from data_prep.build import merge as merge_parts

    manifest = merge_parts(out, part=part, max_reject=limit, **how)
    if manifest is not None:
        _report(manifest, out, as_json)
    else:
        finish({"part": options["part"], "path": str(out)}, as_json)


def append(*path: str, **given: str) -> None:
    """mbtrain-prep append DIR SRC... [options]

    Adds new sources to a finished data set, by the options it was made with. Its samples stay where they are, byte for
    byte, and new ones that it holds already are left out as duplicates; new shards follow the old ones in each split.
    Until it is done, DIR is what it was.

      --max-reject=SHARE    add nothing if more than this share of the new cannot be read or decoded     (1)
      --strict              the same as --max-reject=0
      --workers=N           processes; the files are the same for any number                         (cores)
      --engine=ray          work on the Ray cluster of RAY_ADDRESS, or on a local one
      --overwrite           give up an unfinished append of other sources
      --json                last line on stdout, of the whole data set: {"samples", "bytes", "shards", "found", ...}

    Example:
      mbtrain-prep append shards/books more-books/ late.jsonl.zst
    """
    names = ("max_reject", "strict", "workers", "engine", "overwrite", "json")
    options = _options(given, dict.fromkeys(names, ""))
    if len(path) < 2:
        raise ConfigError("DIR SRC...: expected a data set and files or folders; see mbtrain-prep append --help")
    out, overwrite, as_json = Path(path[0]), flag("--overwrite", options["overwrite"]), flag("--json", options["json"])
    limit, how = _max_reject(options), _how(options)

    from data_prep.append import append as append_to

    _report(append_to(out, path[1:], max_reject=limit, overwrite=overwrite, **how), out, as_json)


def _report(manifest: Manifest, out: Path, as_json: bool) -> None:
    """Say what a data set holds."""
    from mbtrain.shards import REJECTED_NAME

    splits = manifest.splits
    per_split = {n: {"samples": s.samples, "bytes": s.bytes, "shards": len(s.shards)} for n, s in splits.items()}
    figures: dict[str, Any] = {
        key: sum(split[key] for split in per_split.values()) for key in ("samples", "bytes", "shards")
    }
    figures |= {**manifest.counts, "splits": per_split, "path": str(out)}
    for name, split in per_split.items():
        write(f"{name}: {split['samples']} samples, {split['bytes']} bytes, {split['shards']} shards")
    near = f" + {figures['near_duplicates']} near-duplicates" if figures["near_duplicates"] else ""
    rejected = f"{figures['rejected']} rejected" + (f" (see {out / REJECTED_NAME})" if figures["rejected"] else "")
    duplicates = f"{figures['duplicates']} duplicates{near}"
    write(f"{out}: {figures['found']} found = {figures['samples']} samples + {duplicates} + {rejected}")
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


def stats(*path: str, out: str = "", full: str = "", json: str = "", **unknown: str) -> None:
    """mbtrain-prep stats DIR [--out=FILE.png] [--full] [--json]

    Shows samples, bytes and lengths by split and source, what was left out, the bytes' entropy (what a model without
    context needs), and bits per byte by gzip -9 and xz -9e, of images by PNG and lossless WebP, of 16-bit audio by
    FLAC. Draws the same and 16 samples (pictures; waveforms and spectrograms; heads of texts) on one page.

      --out=FILE.png   the page                                                            (DIR/stats.png)
      --full           take the entropy and the compressors' scores on all bytes, however many, rather than of a large
                       data set on some MB that are evenly spread over it
      --json           last line on stdout: all figures, with each split's histogram of byte values, and "picture"

    Example:
      mbtrain-prep stats shards/enwik8
    """
    no_unknown(stats, unknown)
    root, as_json, all_bytes = _one_folder(path), flag("--json", json), flag("--full", full)
    target = Path(out) if out else root / "stats.png"
    if target.suffix.lower() != ".png":
        raise ConfigError(f"--out={out}: expected a file that ends in .png")

    from data_prep.pictures import draw
    from data_prep.stats import stats as stats_of_data
    from data_prep.stats import table

    figures = stats_of_data(root, all_bytes)
    for line in table(figures):
        write(line)
    try:
        draw(root, figures, target)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{target}: cannot be written: {reason}; choose another place with --out=FILE.png") from None
    write(f"picture {target}")
    finish({**figures, "picture": target}, as_json)


def vocabulary(*path: str, **given: str) -> None:
    """mbtrain-prep vocabulary DIR --out=FILE [options]

    Makes a vocabulary of tokens (BPE, by the tokenizers library) of the bytes of a text data set's train split, for
    models with model.kind=subword. Any bytes have tokens. The same data and options give the same file.

      --out=FILE        the vocabulary, a .json
      --size=N          tokens in it, those of the 256 bytes and of the boundary included; fewer if there are no more
                        pairs of tokens that stand in the data twice                                  (4096)
      --limit=SIZE      read so many bytes, of samples drawn evenly; all words of what is read are kept in memory (all)
      --json            last line on stdout: {"tokens", "bytes", "bytes_per_token", "sha256", "path"}

    Example, where CONFIG has one stage of patch_size 1:
      mbtrain-prep vocabulary shards/books --out=shards/books.json --size=8192
      mbtrain train CONFIG --model.kind=subword --model.vocabulary=shards/books.json --model.vocabulary_size=8192
    """
    options = _options(given, {"out": "", "size": "4096", "limit": "", "json": ""})
    root, as_json = _one_folder(path), flag("--json", options["json"])
    if not options["out"]:
        raise ConfigError("--out: expected a file, got nothing; give --out=FILE")
    size = number("--size", options["size"], int, 1)
    limit = _size("--limit", options["limit"], 0) or None

    from data_prep.vocabulary import vocabulary as make

    figures = make(root, Path(options["out"]), size, limit)
    write(
        f"{figures['path']}: {figures['tokens']} tokens of {figures['bytes']} bytes, "
        f"{figures['bytes_per_token']:.3f} bytes a token"
    )
    finish(figures, as_json)


def task(*name: str, **given: str) -> None:
    """mbtrain-prep task words|addition|actions --out=DIR [--seed=N] [--lines=N] [options]

    Makes a data set of lines whose rules are known exactly, to see whether a model learns them; `mbtrain eval-task RUN`
    marks what it makes. The lines stand in DIR/<task>.txt, too. The same options give the same files.

      words       words; consonants and vowels alternate, no letter comes twice, first letters differ for four words
      addition    A + B = C; with A and B in 0..100
      actions     DATA ACTION RESULT; where a digit says which letters of this line, or of the one before, come again

      --out=DIR         folder of the data set
      --seed=N          other lines for each                                                             (0)
      --lines=N         lines to train on           (words 8000, addition 8000, actions 50000); for validation a tenth
      --overwrite       replace what another job made in DIR
      --json            last line on stdout: {"samples", "bytes", "shards", "found", "duplicates", "rejected", ...}

    Example:
      mbtrain-prep task actions --out=shards/actions
      mbtrain train configs/tasks/actions.yaml && mbtrain eval-task runs/actions
    """
    options = _options(given, dict.fromkeys(("out", "seed", "lines", "overwrite", "json"), ""))
    if len(name) != 1:
        raise ConfigError(f"TASK: expected one of words, addition, actions, got {' '.join(name) or 'nothing'}")
    if not options["out"]:
        raise ConfigError("--out: expected a folder, got nothing; give --out=DIR")
    seed = number("--seed", options["seed"] or "0", int, 0)
    lines = number("--lines", options["lines"], int, 1) if options["lines"] else None
    overwrite, as_json = flag("--overwrite", options["overwrite"]), flag("--json", options["json"])

    from data_prep.tasks import make_task

    out = Path(options["out"])
    _report(make_task(name[0], out, seed=seed, lines=lines, overwrite=overwrite), out, as_json)


_HELP = """mbtrain-prep: raw files -> shards for mbtrain train

  mbtrain-prep text SRC... --out=DIR    make a data set of documents
  mbtrain-prep image SRC... --out=DIR   make a data set of images
  mbtrain-prep audio SRC... --out=DIR   make a data set of recordings
  mbtrain-prep merge DIR                make a data set of parts that several machines read (--part=i/n)
  mbtrain-prep append DIR SRC...        add new sources to a data set; what is in it stays where it is
  mbtrain-prep verify DIR               check every byte of a data set against its hashes
  mbtrain-prep stats DIR                samples, lengths, bytes, compressors as baselines, and a page to look at
  mbtrain-prep vocabulary DIR           make a vocabulary of tokens of a data set, for models with model.kind=subword
  mbtrain-prep task NAME --out=DIR      make a data set of a small task with exact rules: words, addition, actions

Options are --key=value. `mbtrain-prep VERB --help` shows those of a verb, with examples.
Progress goes to stderr. Exit status: 0 done, 2 a mistake or bad data (one line says which), 130 interrupted.
"""


PROGRAM = Program(
    name="mbtrain-prep",
    verbs={
        "text": text,
        "image": image,
        "audio": audio,
        "merge": merge,
        "append": append,
        "verify": verify,
        "stats": stats,
        "vocabulary": vocabulary,
        "task": task,
    },
    flags=("strict", "overwrite", "json", "dry-run", "dry_run", "draft", "full"),
    help=_HELP,
    when_interrupted="interrupted; the same command goes on where it was",
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script: exit status 0 done, 2 after a user's mistake or bad data, 130 after Ctrl-C."""
    if argv is None:
        from data_prep.pool import without_pandas

        without_pandas()
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


def _how(options: dict[str, str]) -> dict[str, Any]:
    """Where the work is done: `workers` (0 on a cluster: all of its cores) and `engine`."""
    engine = options["engine"] or "local"
    return {
        "workers": 0 if engine == "ray" and not options["workers"] else _workers(options["workers"]),
        "engine": engine,
    }


def _max_reject(options: dict[str, str]) -> float:
    """The share of `--max-reject` or `--strict`."""
    strict, share = flag("--strict", options["strict"]), options["max_reject"]
    if strict and share:
        raise ConfigError("--max-reject, --strict: expected one of them, got both; leave one out")
    limit = float(number("--max-reject", share, float, 0)) if share else 1.0
    if limit > 1:
        raise ConfigError(f"--max-reject: expected a share from 0 to 1, got {share!r}")
    return 0.0 if strict else limit


def _part(value: str) -> tuple[int, int] | None:
    """(i, n) of `i/n`."""
    if not value:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value, re.ASCII)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--part: expected i/n with i from 0 to n-1, such as 0/8, got {value!r}")
    return int(match[1]), int(match[2])


def _options(given: dict[str, str], known: dict[str, str]) -> dict[str, str]:
    """The options of a verb: those that were given, or else as in `known`. Raises ConfigError for others."""
    for key in given.keys() - known.keys():
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in known)
        raise ConfigError(f"--{key.replace('_', '-')}: no such option{closest(key, known)}; expected one of {listed}")
    return {**known, **given}
