"""A BPE vocabulary of bytes: what its file may hold, and rows of ids in its tokens. Knows no model, imports no torch.

The file is the `tokenizers` library's JSON, written by `mbtrain-prep vocabulary`. A byte is the character of the same
number (latin-1), so that all bytes have tokens, whatever they encode. The document boundary, id 256, is the character
U+0100: a token of its own that is in no merge. Words (letters, with the space before them), numbers, runs of
punctuation and white space are cut apart first, as GPT-2 does; bytes from 128 on count as letters, so that UTF-8
characters stay whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mbtrain import vocab
from mbtrain.config import Config
from mbtrain.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE_NAME = "vocabulary.json"  # in the folder of a run, or of an export
BOUNDARY = chr(vocab.BOUNDARY)
ALPHABET = [chr(byte) for byte in range(vocab.NUM_BYTES)]

_LETTER, _SPACE = r"A-Za-z\u0080-\u00ff", r"\t\n\u000b\u000c\r "
# Of white space before a word, the last character stays for the word.
_WORDS = rf" ?[{_LETTER}]+| ?[0-9]+| ?[^{_SPACE}{_LETTER}0-9]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by number: how many ids each stands for, int64 [n], and its bytes (none of the boundary)."""

    tokenizer: Tokenizer
    lengths: np.ndarray
    contents: tuple[bytes, ...]
    boundary: int

    def encode(self, rows: Sequence[np.ndarray] | np.ndarray) -> list[list[int]]:
        """The tokens of each row of ids, cut on its own. A row ends where its filling (vocab.FILLING) begins.

        The lengths of a row's tokens add up to its ids. Raises ValueError for an id behind filling.
        """
        texts = []
        for row in rows:
            filled = np.flatnonzero(row == vocab.FILLING)
            count = int(filled[0]) if len(filled) else len(row)
            if count + len(filled) != len(row):
                raise ValueError(f"ids stand behind the filling at {count} of a row of {len(row)}")
            # Every id is one unit of UTF-16.
            texts.append(np.asarray(row[:count], "<u2").tobytes().decode("utf-16-le"))
        return [found.ids for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def untrained() -> Tokenizer:
    """How text is cut, with no token yet."""
    # Set, it also keeps the library from warning whoever forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    return made


def load(path: str | Path, size: int, sha256: str | None = None) -> Vocabulary:
    """Read a vocabulary of `size` tokens, and compare it with its sha256 where one is known.

    Raises ConfigError: it cannot be read, is cut off or changed, has another size, or is not what
    `mbtrain-prep vocabulary` writes, so that not all bytes might have tokens.
    """
    return _parsed(_content(path), path, size, sha256)


def _content(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        how = "make it with mbtrain-prep vocabulary"
        raise ConfigError(f"model.vocabulary: {path}: cannot be read ({error.strerror}); {how}") from None


def _parsed(written: bytes, path: str | Path, size: int, sha256: str | None) -> Vocabulary:
    if sha256 is not None and (got := hashlib.sha256(written).hexdigest()) != sha256:
        raise ConfigError(
            f"model.vocabulary: {path}: changed or cut off: expected sha256 {sha256}, got {got}; put back the file "
            "that the model was trained with"
        )
    tokenizer = untrained()
    try:
        tree = json.loads(written)
        known = _frame(json.loads(tokenizer.to_str()))
        tokens: dict[str, int] = dict(tree["model"]["vocab"])
        ours = _frame(tree) == known and [token["content"] for token in tree["added_tokens"]] == [BOUNDARY]
        ours = ours and tree["added_tokens"][0]["id"] == tokens[BOUNDARY]
        ours = ours and sorted(tokens.values()) == list(range(len(tokens))) and all(c in tokens for c in ALPHABET)
        names = sorted(tokens, key=tokens.__getitem__)
        contents = tuple(b"" if name == BOUNDARY else name.encode("latin-1") for name in names)
        tokenizer = type(tokenizer).from_str(written.decode()) if ours else tokenizer
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        ours = False
    except Exception as error:  # the library has no type of its own for it
        raise ConfigError(f"model.vocabulary: {path}: {' '.join(str(error).split())[:200]}") from None
    if not ours:
        raise ConfigError(
            f"model.vocabulary: {path}: cut off, or not a file of mbtrain-prep vocabulary; make it again with that"
        )
    if len(tokens) != size:
        raise ConfigError(f"model.vocabulary_size: got {size}, expected {len(tokens)}, the tokens of {path}")
    lengths = np.array([len(name) for name in names], np.int64)
    return Vocabulary(tokenizer, lengths, contents, tokens[BOUNDARY])


def copied(settings: Config, folder: Path) -> tuple[Config, dict[str, bytes]]:
    """The settings as they are with a copy of their vocabulary in `folder`, and the copy, {name: content}.

    Without a vocabulary: the settings, and nothing. Where the file that they name is gone, a copy that is in `folder`
    already stands for it. Raises ConfigError as `load`.
    """
    named, size = settings.model.vocabulary, settings.model.vocabulary_size
    if named is None or size is None:
        return settings, {}
    copy = folder / FILE_NAME
    source = copy if copy.is_file() and not Path(named).is_file() else Path(named)
    content = _content(source)
    _parsed(content, source, size, settings.model.vocabulary_sha256)
    own = {"vocabulary": str(copy), "vocabulary_sha256": hashlib.sha256(content).hexdigest()}
    return _with_model(settings, **own), {FILE_NAME: content}


def written(settings: Config) -> Config:
    """The settings as they are written into the folder that has their vocabulary: it may be moved."""
    return settings if settings.model.vocabulary is None else _with_model(settings, vocabulary=FILE_NAME)


def _with_model(settings: Config, **changed: str) -> Config:
    return settings.model_copy(update={"model": settings.model.model_copy(update=changed)})


def _frame(tree: dict[str, Any]) -> dict[str, Any]:
    """All of a vocabulary's JSON that does not depend on the data it was made of."""
    model = {key: value for key, value in tree["model"].items() if key not in ("vocab", "merges")}
    return {**tree, "model": model, "added_tokens": []}
