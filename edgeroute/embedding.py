"""Texts as vectors: the mean of a model's final hidden states.

Final states are those behind the output norm, which is what the head reads and what llama.cpp
pools with `--pooling mean` (llama-graph.cpp, build_pooling over t_embd, which is result_norm).
Before the norm, a few values that all texts share outweigh the others by far: cosines of
unrelated texts are close to 1 there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.models.forward import Forward
from edgeroute.request import EngineState, Request
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.errors import ComputeError, DeadlineError
from edgeroute.runtime.ledger import Ledger
from edgeroute.stats import Chunk, FinishReason

Floats = npt.NDArray[np.float32]

MAX_INPUTS: Final = 2048
"""Texts of one call; OpenAI's clients know the same limit."""
STATES: Final = "hidden states"
"""Entry of the ledger."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embeddings:
    """Vectors of texts, in their order.

    Attributes:
        vectors: F32 (n, n_embd), each of length 1: their products are cosines.
        n_tokens: of each text, what the vocabulary adds to it included.
    """

    vectors: Floats
    n_tokens: tuple[int, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class EmbedRequest(Request):
    """All texts of one call. `prompt_ids` is the one at work; between two of them others may run.

    Attributes:
        inputs: token ids of each.
    """

    inputs: Sequence[list[int]]
    _rows: list[Floats] = field(default_factory=list, init=False)
    _sum: npt.NDArray[np.float64] | None = field(default=None, init=False)

    def add(self, states: Floats) -> None:
        """Take final hidden states of the text's next tokens: F32 (n_tokens, n_embd)."""
        part = states.sum(axis=0, dtype=np.float64)
        self._sum = part if self._sum is None else self._sum + part

    def next_input(self) -> bool:
        """Make the text's vector, and go on to the next text; False if there is none.

        Raises:
            ComputeError: the model's numbers make no vector.
        """
        total, self._sum = self._sum, None
        length = 0.0 if total is None else float(np.linalg.norm(total))
        if total is None or not 0.0 < length < float("inf"):
            raise ComputeError(
                f"input {len(self._rows)} has no vector: its hidden states sum up to a vector of "
                f"length {length:g}; the model's weights may be damaged"
            )
        self._rows.append((total / length).astype(np.float32))
        if len(self._rows) == len(self.inputs):
            return False
        self.prompt_ids = self.inputs[len(self._rows)]
        return True

    def restart(self) -> None:
        """As of any request; of the text at work, nothing is kept."""
        Request.restart(self)
        self._sum = None

    def finish(self, reason: FinishReason, engine: EngineState) -> None:
        """Tell the listener; `embeddings` has the result of one that ended with `stop`."""
        if reason == "timeout":
            self.emit(DeadlineError(
                f"{len(self._rows)} of {len(self.inputs)} inputs were embedded in the time given; "
                "pass fewer at once, or a larger timeout_s"
            ))  # fmt: skip
            return
        self.emit(Chunk(text="", finish_reason=reason))

    def embeddings(self) -> Embeddings:
        """Return what was computed, once the request has ended with `stop`."""
        assert len(self._rows) == len(self.inputs)
        n_tokens = tuple(len(ids) for ids in self.inputs)
        return Embeddings(vectors=np.stack(self._rows), n_tokens=n_tokens)


class States:
    """Room for final hidden states, taken when they are first asked for. Engine thread only."""

    def __init__(self, forward: Forward, ledger: Ledger, n_ubatch: int) -> None:
        self._forward = forward
        self._ledger = ledger
        self._n_tokens = min(n_ubatch, forward.kv.n_cells)
        self._held = False

    def spans(self) -> tuple[Span, ...]:
        """Return what computes final hidden states, for `Forward.residual` to read.

        Raises:
            CapacityError: the budget or the device has no room for them.
        """
        if not self._held:
            n_bytes = 4 * self._n_tokens * self._forward.model.hparams.n_embd
            self._ledger.reserve({STATES: n_bytes})
            try:
                self._forward.reserve_stream(self._n_tokens)
            except BaseException:
                self._ledger.release(STATES)
                raise
            self._held = True
        return self._forward.normed()
