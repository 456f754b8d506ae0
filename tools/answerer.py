"""A model that answers questions greedily under any plan, with room for repeated layers."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.depth_routing import route_prefill
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.depth import Steps
from edgeroute.runtime.errors import CapacityError, ComputeError, UsageError
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.template import encode_chat
from edgeroute.skippers.depth_router import DepthRouter
from edgeroute.tools.questions import Question, ends_answer, is_settled

Plan = Steps | DepthRouter
"""What a request computes: steps known before, or routers that decide from the prompt."""

N_CTX: Final = 1024
MAX_REPEATS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model wrote, and what that computed."""

    text: str
    steps: Steps


class Answerer:
    """A model that answers questions under any plan, with room for repeated layers.

    Lifetime: `close` it before the model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.layers is not None or loaded.experts is not None:
            raise CapacityError(
                f"{loaded.file.path.name} does not fit the memory budget; questions are answered "
                "by models in memory only: raise --memory"
            )
        self._loaded = loaded
        shape = dataclasses.replace(loaded.kv.shape, n_repeat=MAX_REPEATS)
        self._kv = KvCache(loaded.device, shape, round_cells(N_CTX))
        self.forward = Forward(loaded.model, loaded.device, loaded.forward.weights, self._kv)
        self.region = self._kv.take_all()
        self.n_layer = loaded.model.hparams.n_layer
        self.n_embd = loaded.model.hparams.n_embd
        self.ends = self._ends()

    def _ends(self) -> npt.NDArray[np.int64]:
        """Tokens that may follow a short answer."""
        tokenizer = self._loaded.tokenizer
        return np.array([
            token for token in range(tokenizer.n_vocab)
            if tokenizer.is_eog(token)
            or ends_answer(tokenizer.piece(token).decode(errors="replace") or "x")
        ])  # fmt: skip

    def encode_text(self, text: str) -> list[int]:
        """Encode text that continues another."""
        return self._loaded.tokenizer.encode(text, add_special=False, parse_special=False)

    def encode(self, question: Question) -> list[int]:
        """Encode a question's prompt: short ones as text, stepwise ones as a chat."""
        if question.form == "steps":
            return encode_chat(self._loaded.tokenizer, question.messages)
        return self._loaded.encode(question.prompt)

    def answer(self, question: Question, plan: Plan) -> Answer:
        """Answer a question greedily, no further than it takes to tell whether it is right.

        Raises:
            ComputeError: the computation failed.
            UsageError: the prompt is too long.
        """
        tokens = self.encode(question)
        if len(tokens) + question.max_tokens > self.region.n_cells:
            raise UsageError(f"a question of {len(tokens)} tokens is longer than {N_CTX} allow")
        steps, logits = self._prefill(tokens, plan)
        spans, tokenizer = self.forward.spans(steps), self._loaded.tokenizer
        written: list[int] = []
        text = ""
        for _ in range(question.max_tokens):
            token = int(logits.argmax())
            if tokenizer.is_eog(token):
                break
            written.append(token)
            text = tokenizer.decode(written)
            if question.stop in text or is_settled(question, text):
                break
            piece = Piece(tokens=[token], pos=len(tokens) + len(written) - 1, region=self.region)
            logits = _checked(self.forward.run([piece], spans))[0]
        return Answer(text=text, steps=steps)

    def _prefill(self, tokens: Sequence[int], plan: Plan) -> tuple[Steps, npt.NDArray[np.float32]]:
        piece = Piece(tokens=tokens, pos=0, region=self.region)
        if not isinstance(plan, DepthRouter):
            return plan, _checked(self.forward.run([piece], self.forward.spans(plan)))[0]
        routed = route_prefill(self.forward, piece, plan)
        if routed is None:
            raise ComputeError("the computation was stopped")
        return routed.steps, routed.logits[0]

    def close(self) -> None:
        """Free graphs and cells; safe to call twice."""
        self.forward.close()
        self._kv.close()


def _checked(logits: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    if logits is None:
        raise ComputeError("the computation was stopped")
    return logits


@contextlib.contextmanager
def open_answerer(path: Path, threads: int = 1) -> Iterator[Answerer]:
    """Load a model to answer questions with."""
    params = RunParams(n_ctx=256, n_ubatch=256, threads=threads)
    with contextlib.closing(LoadedModel(path, params)) as loaded:
        loaded.device.set_threads(threads)
        with contextlib.closing(Answerer(loaded)) as answerer:
            yield answerer
