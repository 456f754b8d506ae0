"""One model on one answer: what of it the model has read, and what not yet.

Both models of a pair keep their keys and values for the whole answer. Whoever did not write
catches up in one batch, and only when it is asked for something.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.lora import LoraRow
from edgeroute.runtime.prefix import PrefixCache
from edgeroute.runtime.sequence import CLASS_SINGLE, chunk_classes, next_chunk_end
from edgeroute.runtime.sequence import Sequence as Cells
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.skippers.step_price import PassCost
from edgeroute.skippers.steps import Who

Logits = npt.NDArray[np.float32]
Compute = Callable[[Piece, bool], Logits | None]
"""Runs one piece, and keeps the last layer's output if asked to; None when that was stopped, or
failed and ended its request."""


@dataclass(slots=True, kw_only=True, eq=False)
class StepModel:
    """A local model of a pair, as all answers share it. The engine thread owns it.

    Attributes:
        who: its part.
        forward, prefix, tokenizer: the model, its cells, and its vocabulary.
        n_ubatch: tokens of a prompt computed at once.
        cost: what its passes take, measured.
        n_read: tokens that it evaluated so far.
        n_passes: in how many passes.
    """

    who: Who
    forward: Forward
    prefix: PrefixCache
    tokenizer: Tokenizer
    n_ubatch: int
    cost: PassCost = field(default_factory=PassCost)
    n_read: int = 0
    n_passes: int = 0


class Reader:
    """A model's cells of one answer. `sequence.tokens` are the answer's, as far as it was told.

    Args:
        model: who reads.
        sequence: its cells; whoever opened them closes them.
        n_prompt: leading tokens that are the prompt.
        compute: runs a piece on the model.
        lora: what an adapter adds.
    """

    def __init__(
        self, model: StepModel, sequence: Cells, n_prompt: int, compute: Compute,
        lora: LoraRow | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.sequence = sequence
        self.n_prompt = n_prompt
        self.n_read = 0
        self._n_last = 0
        self._compute = compute
        self._lora = lora

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer in this model's vocabulary."""
        return self.sequence.tokens

    @property
    def has_room(self) -> bool:
        """Whether there is a cell for everything it was told."""
        return len(self.sequence.tokens) <= self.sequence.region.n_cells

    def read(
        self, guesses: Sequence[int] = (), n_out: int | None = None, *, hidden: bool = False
    ) -> Logits | None:
        """Compute one pass over what is behind, and over guesses once those fit beside it.

        Args:
            guesses: tokens that may follow. They become no part of the answer by this.
            n_out: rows of logits, the last ones; None is all behind the last token on.
            hidden: keep the last layer's output, for `hidden`.

        Returns:
            None while more is to be read, or when the pass was stopped. Else logits F32
            (1 + len(guesses), n_vocab), behind the last token and behind each guess, valid
            until the model's next pass.
        """
        sequence, more = self.sequence, list(guesses)
        start, n = sequence.n_past, len(sequence.tokens)
        end = next_chunk_end(start, n, self.model.n_ubatch)
        if more and end == n and n + len(more) - start > self.model.n_ubatch and n - start > 1:
            end = n - 1  # so that what is left and the guesses fit one pass
        done = end == n
        fed = sequence.tokens[start:end] + (more if done else [])
        rows = (len(more) + 1 if n_out is None else n_out) if done else 0
        piece = Piece(tokens=fed, pos=start, region=sequence.region, n_out=rows, lora=self._lora)
        logits = self._compute(piece, hidden)
        if logits is None:
            return None
        self._n_last = len(fed)
        self.n_read += len(fed)
        self.model.n_read += len(fed)
        self.model.n_passes += 1
        sequence.n_past = end
        classes = [CLASS_SINGLE] if len(fed) == 1 else chunk_classes(len(fed))[: end - start]
        sequence.classes += bytes(classes)
        return logits if done else None

    def hidden(self) -> npt.NDArray[np.float32]:
        """Return the last layer's output for the newest token that `read` kept: F32 (n_embd,)."""
        found: npt.NDArray[np.float32] = self.model.forward.residual(self._n_last)[-1]
        return found

    def keep(self) -> None:
        """Count the next guess of the last pass as read: it has become a token of the answer."""
        self.sequence.n_past += 1
        self.sequence.classes.append(0)

    def rewind(self, n: int) -> None:
        """Forget what it was told behind the first `n` tokens."""
        del self.sequence.tokens[n:]
        self.cut(n)

    def cut(self, n: int) -> None:
        """Let go of cells from the `n`-th on."""
        if n < self.sequence.n_past:
            self.sequence.n_past = n
            del self.sequence.classes[n:]


class Follower:
    """The model beside the one that the answer belongs to: it is told what was written.

    Args:
        reader: its cells.
        same: whether both models have one vocabulary.
    """

    def __init__(self, reader: Reader, *, same: bool) -> None:
        self.reader = reader
        self.same = same
        self._agreed = len(reader.tokens)
        """Leading tokens of its own that are the answer's."""
        self._n_bytes = 0
        """Bytes of the answer that those stand for."""

    def follow(self, tokens: list[int], text: bytearray) -> list[int]:
        """Make its tokens those of the answer, keeping the cells of all that agree.

        Args:
            tokens: prompt and answer, in the vocabulary of the model it belongs to.
            text: the answer; whole characters where the vocabularies differ.

        Returns:
            Tokens of its own vocabulary that it did not write itself.
        """
        return self._follow_ids(tokens) if self.same else self._follow_text(text)

    def _follow_ids(self, tokens: list[int]) -> list[int]:
        mine, n = self.reader.tokens, min(self._agreed, len(tokens))
        while n < min(len(mine), len(tokens)) and mine[n] == tokens[n]:
            n += 1
        self.reader.cut(min(n, len(tokens) - 1))
        told = tokens[n:]
        mine[n:] = told
        self._agreed = len(tokens)
        return told

    def _follow_text(self, text: bytearray) -> list[int]:
        news = text[self._n_bytes :]
        mine, piece = self.reader.tokens, self.reader.model.tokenizer.piece
        told: list[int] = []
        if b"".join(piece(token) for token in mine[self._agreed :]) != news:
            self.reader.rewind(self._agreed)
            told = self.reader.model.tokenizer.encode_more(news.decode(errors="replace"))
            mine += told
        self.reader.cut(len(mine) - 1)
        self._agreed, self._n_bytes = len(mine), len(text)
        return told

    def write(self, token: int) -> None:
        """Note a token of its own that is no part of the answer yet."""
        self.reader.tokens.append(token)
