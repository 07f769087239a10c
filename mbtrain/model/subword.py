"""A transformer of BPE tokens over rows of bytes, scored in nats per byte: the rival with a vocabulary.

Legend: b batch · t ids of a row (bytes, boundaries) · n tokens of the longest row of the batch · v tokens there are

A row's ids are cut in tokens on their own, and each token is predicted from those before it in its row (a trainable
pad at the first). -ln p of a token stands in the column of its last id, 0 in all others: a row's columns add up to
-ln p of its sequence of tokens. That is a code for the row's bytes, if not the shortest: other sequences of tokens with
the same bytes have a probability too, and it is wasted. So bits per byte are exact, with the same rows, order, ranks
and sums as those of every model of bytes. What the row's end cuts in two is two tokens.

Rows may end early: ids are vocab.FILLING from there on, and their columns 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from mbtrain import tokens, vocab
from mbtrain.config import ModelConfig
from mbtrain.errors import ConfigError
from mbtrain.model.loss import nats
from mbtrain.model.megabyte import Megabyte, Stage
from mbtrain.model.sequence import Attend, Part


class Subword(nn.Module):
    """ids (b, t) -> nats (b, t). A row of seq_len ids has seq_len tokens at most.

    vocab_size counts the ids of rows, as in models of bytes; vocabulary has the tokens, `transformer` predicts them.
    Raises ConfigError where the vocabulary's file is not whole, or not the one the model was trained with.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int):
        super().__init__()
        assert config.vocabulary is not None
        assert config.vocabulary_size is not None
        self.config, self.vocab_size, self.seq_len, self.patch_size = config, vocab_size, seq_len, 1
        self.vocabulary = tokens.load(config.vocabulary, config.vocabulary_size, config.vocabulary_sha256)
        self.transformer = Megabyte(config, config.vocabulary_size, seq_len)

    def forward(self, ids: Tensor) -> Tensor:
        """-ln p of each token at the column of its last id, 0 elsewhere: (b, t) -> (b, t), float32 at least."""
        b, t = ids.shape
        made, ends = (x.to(ids.device) for x in self.tokens_of(ids))
        real = ends >= 0
        x = cast(Stage, self.transformer.stages[0]).run(made, None)
        # Rows differ in their tokens by a quarter; what fills them up gets no logits.
        each = nats(self.transformer.logits(x[real]).unsqueeze(0), made[real].unsqueeze(0)).squeeze(0)
        columns = (ends + t * torch.arange(b, device=ids.device).unsqueeze(1))[real]
        return each.new_zeros(b * t).scatter(0, columns, each).view(b, t)

    def tokens_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of each row and the columns of their last ids, both (b, n) on CPU; behind a row's end 0 and -1."""
        rows = self.vocabulary.encode(ids.cpu().numpy())
        n = max(1, *map(len, rows))  # a batch of nothing takes its part in ZeRO's collectives, too
        made = np.zeros((len(rows), n), np.int64)
        real = np.arange(n) < np.array([len(row) for row in rows])[:, None]
        made[real] = np.concatenate([np.asarray(row, np.int64) for row in rows])
        ends = np.where(real, self.vocabulary.lengths[made].cumsum(axis=1) - 1, -1)
        return torch.from_numpy(made), torch.from_numpy(ends)

    def unit_bytes(self, ids: Tensor) -> float:
        """Mean ids (bytes and boundaries) of one token of these rows, which hold one at least."""
        _, ends = self.tokens_of(ids)
        return float((ends.amax(dim=1) + 1).sum() / (ends >= 0).sum())

    def training_span(self, t: int, number: int) -> slice | None:
        """None: all columns of a row are predicted in training."""
        return None

    def share(self, part: Part, attend: Attend) -> NoReturn:
        """Raises ValueError: tokens end where they end, so ranks cannot share a row."""
        raise ValueError("sequence parallelism: model.kind=subword has no equal parts of a row")

    def decoder(self, batch: int, compiled: bool = True) -> NoReturn:
        """Raises ConfigError: tokens are predicted here, not the next byte."""
        raise ConfigError("model.kind: got subword, expected another kind: it has no distribution of the next byte")

    @torch.inference_mode()
    def continued(
        self, prompt: bytes, n_bytes: int, choose: Callable[[Tensor, int], Tensor], *, begin: bool, ends: bool
    ) -> bytes:
        """The prompt's continuation by n_bytes, or fewer where the document's end is predicted; the last token is cut.

        choose     logits (1, v) and the number of the token since the prompt -> which one (1,)
        begin      a boundary stands before the prompt
        ends       a boundary may come
        As in rows, seq_len ids are seen at most; from there on, whole tokens within the last half of them.
        """
        row, lengths, boundary = self.seq_len, self.vocabulary.lengths, self.vocabulary.boundary
        given = np.array([vocab.BOUNDARY] * begin + list(prompt), np.int64)
        seen = self.vocabulary.encode([given if len(given) < row else given[len(given) - row // 2 :]])[0]
        decoder, new = self.transformer.decoder(1), seen
        out, device = bytearray(), next(self.parameters()).device
        for number in range(n_bytes):
            logits = decoder.feed(torch.tensor([new], dtype=torch.int64, device=device).view(1, -1))
            if not ends:
                logits = logits.index_fill(1, torch.tensor([boundary], device=device), -torch.inf)
            token = int(choose(logits, number))
            if token == boundary:
                break
            out += self.vocabulary.contents[token]
            if len(out) >= n_bytes:
                break
            seen, new = seen + [token], [token]
            if lengths[seen].sum() >= row:
                seen = new = [seen[i] for i in np.flatnonzero(lengths[seen][::-1].cumsum()[::-1] <= row // 2)]
                decoder = self.transformer.decoder(1)
        return bytes(out[:n_bytes])
