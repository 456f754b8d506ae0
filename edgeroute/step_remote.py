"""Steps written by a remote model: asked for in text, taken over in the answer's own tokens.

A call goes on over a step's end: while the small model here looks at the next step, the remote one
writes it already. If the small one is to write it, the call is stopped.
"""

import time
from typing import TYPE_CHECKING, NamedTuple

from edgeroute.remote import RemoteModel, RemotePrompt
from edgeroute.request import Request
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.skippers.step_price import PassCost
from edgeroute.step_state import StepState

if TYPE_CHECKING:
    from edgeroute.runtime.records import SamplingParams


class Told(NamedTuple):
    """A step that a remote model wrote: its tokens, whether the answer ends with it, or that
    nothing usable came."""

    tokens: list[int]
    ended: bool
    failed: bool


class RemoteWriter:
    """Asks a remote model for steps. The engine thread owns it; nothing here waits.

    Args:
        model: the endpoint.
        tokenizer: of the answers.
    """

    def __init__(self, model: RemoteModel, tokenizer: Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.cost = PassCost()

    def ask(self, request: Request, state: StepState) -> bool:
        """Begin a step, or let a call go on; False while the endpoint is left alone."""
        if state.call is not None:
            return True
        if not self._model.available:
            return False
        params: SamplingParams = request.sampler.params
        prompt = RemotePrompt(
            prompt=request.source.prompt, messages=request.source.messages,
            answer=state.text.decode(errors="replace"),
        )  # fmt: skip
        state.asked = time.perf_counter()
        state.call = self._model.write(
            prompt, max_tokens=request.n_left,
            temperature=params.temperature, top_p=params.top_p, seed=request.sampler.seed,
        )  # fmt: skip
        return True

    def hear(self, request: Request, state: StepState) -> Told | None:
        """Return the step once it is whole; None while more is to come."""
        call = state.call
        assert call is not None
        done = call.done  # before the text is taken: what came with the end must not be missed
        state.heard += call.poll()
        tokens, whole, n_bytes = self._step(state)
        if not whole and not done:
            return None
        now = time.perf_counter()
        if tokens and call.failure is None:  # latency and all, as a share of each token
            self.cost.observe(1, (now - state.asked) / len(tokens))
        state.asked = now
        del state.heard[:n_bytes]
        if whole:
            return Told(tokens[: request.n_left], ended=False, failed=False)
        self.end(state)
        ended = call.finish == "stop"
        failed = call.failure is not None or not (tokens or ended)
        return Told([] if failed else tokens[: request.n_left], ended=ended, failed=failed)

    def _step(self, state: StepState) -> tuple[list[int], bool, int]:
        """Return the tokens heard up to a step's end, whether it ended, and its bytes."""
        bounds = state.bounds.copy()
        text = state.heard.decode(errors="ignore")
        n_bytes = 0
        if state.text.endswith(b"\n"):  # chat templates trim what they are to go on with
            n_bytes = len(text) - len(text.lstrip("\r\n"))
        tokens = self._tokenizer.encode_more(text[n_bytes:])
        for i, token in enumerate(tokens):
            piece = self._tokenizer.piece(token)
            n_bytes += len(piece)
            if bounds.push(piece):
                return tokens[: i + 1], True, n_bytes
        return tokens, False, n_bytes

    def end(self, state: StepState) -> None:
        """Stop what was asked for, where others write on or the answer ended."""
        state.heard.clear()
        if state.call is not None:
            state.call.stop()
            state.call = None

    def stats(self) -> dict[str, object]:
        """Return calls, failures and latency."""
        return self._model.stats()

    def close(self) -> None:
        """End all calls; safe to call twice."""
        self._model.close()
