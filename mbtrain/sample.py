"""Generation: continue prompts byte by byte, exactly as the model distributes them, and write what comes as what it is.

Each row draws from its own stream of random numbers, a function of (seed, row): a row's bytes do not depend on which
rows are generated beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbtrain import checkpoint, render, vocab
from mbtrain.evaluate import load_model
from mbtrain.model import Model
from mbtrain.model.decode import Decoder, kept_bytes
from mbtrain.model.subword import Subword
from mbtrain.request import Asked, Plan, chosen, plan, read_prompt

_RUN_BYTES = 64  # that are made without Python, before it is seen whether rows have ended


@dataclass(frozen=True)
class Sampling:
    """How the next byte is chosen.

    temperature 0 takes the likeliest byte; top_k keeps the k likeliest; top_p keeps the smallest set of likeliest
    bytes whose probability reaches p. Cuts are made after the temperature, top_k first.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """Samples on disk: what was planned, the files, the continuations as raw bytes and the rate over all of them."""

    plan: Plan
    paths: list[Path]
    continuations: list[bytes]
    bytes_per_s: float

    @property
    def n_bytes(self) -> int:
        """Bytes made, in all."""
        return sum(map(len, self.continuations))


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """Logits (b, v) -> probabilities (b, v) after temperature (above 0), top_k and top_p."""
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        kept, ids = logits.topk(how.top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, kept)
    p = logits.softmax(dim=-1)
    if how.top_p is not None and how.top_p < 1:
        ordered, ids = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the likeliest is always kept
        ordered = ordered.masked_fill(before >= how.top_p, 0)
        p = torch.zeros_like(p).scatter(-1, ids, ordered)
        p = p / p.sum(dim=-1, keepdim=True)
    return p


def choose(logits: Tensor, uniform: Tensor, how: Sampling) -> Tensor:
    """The next id of each row, (b,): the point `uniform` (b, 1) in [0, 1) of the cumulative distribution."""
    if how.temperature == 0:
        return logits.argmax(dim=-1)
    total = probabilities(logits, how).double().cumsum(dim=-1)
    # Scaled by the last sum, so that rounding never lets a point fall behind the last possible id.
    return torch.searchsorted(total, uniform * total[:, -1:], right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def generate(
    model: Model, prompts: Sequence[bytes], n_bytes: int, how: Sampling, *, documents: bool = True, ends: bool = True
) -> list[bytes]:
    """Continue each prompt by up to n_bytes; a row ends early where the model predicts the document boundary.

    Where the model knows boundaries, a prompt is the beginning of a document. Prompts may differ in length: all rows
    advance together and the longer prompts' own bytes are fed where they have some. documents=False: no boundary stands
    before a prompt. ends=False: the boundary is impossible, so that each row gets n_bytes.
    """
    if not prompts or n_bytes == 0:
        return [b"" for _ in prompts]
    if isinstance(model, Subword):
        return _by_tokens(model, prompts, n_bytes, how, documents=documents, ends=ends)
    device = next(model.parameters()).device
    knows_boundary = model.vocab_size > vocab.NUM_BYTES
    # Where documents are kept apart, one has nothing before it, not even the boundary that ended another.
    begin = [vocab.BOUNDARY] if knows_boundary and documents and not model.config.isolate_documents else []
    given = [begin + list(prompt) for prompt in prompts]
    row, patch = model.seq_len, model.patch_size
    # A prompt that fills a row is cut to what the decoder would keep of it, whatever stands beside it in the batch.
    given = [ids if len(ids) < row else ids[len(ids) - kept_bytes(row, patch) :] for ids in given]
    shortest = min(map(len, given))
    offsets = [len(ids) - shortest for ids in given]  # steps in which a row takes bytes of its prompt
    steps = max(offsets) + n_bytes
    forced = torch.full((len(given), max(offsets)), -1, dtype=torch.int64)
    for i, ids in enumerate(given):
        forced[i, : offsets[i]] = torch.tensor(ids[shortest:], dtype=torch.int64)
    forced = forced.to(device)
    point = torch.arange(steps) - torch.tensor(offsets).unsqueeze(1)
    points = _uniforms(how, len(given), n_bytes, device).gather(1, point.clamp(0, n_bytes - 1).to(device))

    was_training = model.training
    model.eval()
    decoder = model.decoder(len(given))
    out: list[list[int]] = [[] for _ in given]
    ended = [False] * len(given)
    logits = decoder.feed(
        torch.tensor([ids[:shortest] for ids in given], dtype=torch.int64, device=device).view(len(given), -1)
    )
    possible = model.vocab_size if ends else vocab.NUM_BYTES
    step = 0
    while True:
        made = None
        if step >= forced.shape[1] and isinstance(decoder, Decoder) and how.top_k is None and how.top_p is None:
            made = decoder.run(logits, points[:, step : step + _RUN_BYTES], possible, how.temperature)
        if made is not None:
            chosen, logits = made
        else:
            chosen = choose(logits[:, :possible], points[:, step : step + 1], how).unsqueeze(1)
            if step < forced.shape[1]:
                own = forced[:, step : step + 1]
                chosen = torch.where(own >= 0, own, chosen)
        for i, row in enumerate(chosen.tolist()):
            for byte in row[max(offsets[i] - step, 0) :]:
                ended[i] = ended[i] or byte == vocab.BOUNDARY
                if ended[i] or len(out[i]) == n_bytes:
                    break
                out[i].append(byte)
        step += chosen.shape[1]
        if all(end or len(row) == n_bytes for end, row in zip(ended, out, strict=True)):
            break
        if made is None:
            logits = decoder.feed(chosen)
    model.train(was_training)
    return [bytes(row) for row in out]


def _uniforms(how: Sampling, rows: int, number: int, device: torch.device) -> Tensor:
    """Points in [0, 1), float64 (rows, number): a row's are its own, whatever the number of rows."""
    drawn = [np.random.Generator(np.random.Philox(key=[how.seed, i])).random(number) for i in range(rows)]
    return torch.from_numpy(np.stack(drawn)).to(device)


def _by_tokens(
    model: Subword, prompts: Sequence[bytes], n_bytes: int, how: Sampling, *, documents: bool, ends: bool
) -> list[bytes]:
    """As `generate`, token by token and row by row: rows have their bytes at different tokens."""
    knows_boundary = model.vocab_size > vocab.NUM_BYTES
    points = _uniforms(how, len(prompts), n_bytes, next(model.parameters()).device)

    def row(i: int, prompt: bytes) -> bytes:
        def pick(logits: Tensor, token: int) -> Tensor:
            return choose(logits, points[i : i + 1, token : token + 1], how)

        return model.continued(prompt, n_bytes, pick, begin=knows_boundary and documents, ends=knows_boundary and ends)

    was_training = model.training
    model.eval()
    made = [row(i, prompt) for i, prompt in enumerate(prompts)]
    model.train(was_training)
    return made


def make(model: Model, planned: Plan, how: Sampling) -> list[bytes]:
    """The planned continuations."""
    prompts = [planned.prompt] * planned.count
    return generate(model, prompts, planned.n_bytes, how, documents=planned.documents, ends=planned.ends)


def write(planned: Plan, continuations: Sequence[bytes], target: Path) -> list[Path]:
    """Write what was made, as what it is, to `target`; several texts or sounds to numbered files in its place."""
    contents = render.files(planned.form, planned.prompt, continuations, planned.original)
    digits = len(str(len(contents) - 1))
    paths = [target]
    if len(contents) > 1:
        paths = [target.with_name(f"{target.stem}_{i:0{digits}}{target.suffix}") for i in range(len(contents))]
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, contents, strict=True):
        checkpoint.write_atomically(path, content)
    return paths


def sample_run(
    path: str | Path,
    asked: Asked,
    how: Sampling,
    out: str | Path | None = None,
    raw: str | Path | None = None,
    last: bool = False,
) -> Written:
    """Sample from a run's newest whole checkpoint (the first source, unless told otherwise) and write what comes.

    The default file is RUN/samples/step_<step>_seed_<seed>.txt, .png or .wav. raw: a file for the bytes as they are,
    prompt and continuation of each row, in the model's order. last: by the weights that were trained, where the run
    also keeps averages of them. Raises ConfigError, CheckpointError.
    """
    read_prompt(asked)  # a slip of the pen is said before anything is loaded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, settings, found, run = load_model(path, device, last)
    forms = chosen(run, settings, asked)
    texts = [form for form in forms if form.modality == "text"] if asked.prompt else []
    planned = plan((texts or forms)[0], settings, asked)
    start = time.perf_counter()
    continuations = make(model, planned, how)
    seconds = time.perf_counter() - start
    name = f"{checkpoint.name_of(found.progress.step)}_seed_{how.seed}{planned.form.suffix}"
    paths = write(planned, continuations, Path(out) if out is not None else run / "samples" / name)
    if raw is not None:
        Path(raw).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(Path(raw), b"".join(planned.prompt + row for row in continuations))
    return Written(planned, paths, continuations, sum(map(len, continuations)) / seconds)


def lines_of(made: Written) -> Iterator[str]:
    """Texts as a terminal shows them; nothing of pictures and sounds, which are files to be opened."""
    for i, row in enumerate(made.continuations if made.plan.form.modality == "text" else ()):
        if len(made.paths) > 1:
            yield f"--- {made.paths[i]}"
        yield as_text(made.plan.prompt + row)


def headline(made: Written) -> str:
    """How many bytes, how fast, where they are, and what a picture shows that nobody made."""
    first, *others = made.paths
    where = f"{first} .. {others[-1].name}" if others else f"{first}"
    said = f"{made.n_bytes} bytes at {made.bytes_per_s:.0f} bytes/s -> {where}"
    if made.plan.assumed:
        said += f" (taken for {render.hxw(made.plan.form)} pixels; --shape=HxW says otherwise)"
    if made.plan.missing_bytes:
        said += f" (grey: {made.plan.missing_bytes} bytes of {made.plan.form.picture_bytes} are missing)"
    return said


def as_text(content: bytes) -> str:
    """Bytes as a person can read them: UTF-8 where it is, every other byte as \\xNN; nothing is dropped."""
    return content.decode("utf-8", errors="backslashreplace")
