"""Steps written by a remote model: asked for in text, taken over in the answer's own tokens."""

import time
from typing import TYPE_CHECKING, Final, NamedTuple

from edgeroute.remote import RemoteModel, RemotePrompt
from edgeroute.request import Request
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.skippers.step_bounds import MAX_TOKENS
from edgeroute.skippers.step_price import PassCost
from edgeroute.step_state import StepState

if TYPE_CHECKING:
    from edgeroute.runtime.records import SamplingParams

SPARE_TOKENS: Final = 16
"""Asked for beyond the longest step, so that its end is seen and not cut off."""


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
        """Begin a step; False while the endpoint is left alone after a failure."""
        if not self._model.available:
            return False
        params: SamplingParams = request.sampler.params
        prompt = RemotePrompt(
            prompt=request.source.prompt, messages=request.source.messages,
            answer=state.text.decode(errors="replace"),
        )  # fmt: skip
        state.heard.clear()
        state.asked = time.perf_counter()
        state.call = self._model.write(
            prompt, max_tokens=min(request.n_left, MAX_TOKENS + SPARE_TOKENS),
            temperature=params.temperature, top_p=params.top_p, seed=request.sampler.seed,
        )  # fmt: skip
        return True

    def hear(self, request: Request, state: StepState) -> Told | None:
        """Return the step once it is whole; None while more is to come."""
        call = state.call
        assert call is not None
        done = call.done  # before the text is taken: what came with the end must not be missed
        state.heard += call.poll()
        tokens, whole = self._step(state)
        if not whole and not done:
            return None
        call.stop()
        state.call = None
        if tokens and call.failure is None:  # latency and all, as a share of each token
            self.cost.observe(1, (time.perf_counter() - state.asked) / len(tokens))
        if whole:
            return Told(tokens[: request.n_left], ended=False, failed=False)
        ended = call.finish == "stop"
        failed = call.failure is not None or not (tokens or ended)
        return Told([] if failed else tokens[: request.n_left], ended=ended, failed=failed)

    def _step(self, state: StepState) -> tuple[list[int], bool]:
        """Return the tokens heard up to a step's end, and whether it ended."""
        bounds = state.bounds.copy()
        text = state.heard.decode(errors="ignore")
        if state.text.endswith(b"\n"):  # chat templates trim what they are to go on with
            text = text.lstrip("\r\n")
        tokens = self._tokenizer.encode_more(text)
        for i, token in enumerate(tokens):
            if bounds.push(self._tokenizer.piece(token)):
                return tokens[: i + 1], True
        return tokens, False

    def end(self, state: StepState) -> None:
        """Stop what was asked for an answer that ended."""
        if state.call is not None:
            state.call.stop()
            state.call = None

    def stats(self) -> dict[str, object]:
        """Return calls, failures and latency."""
        return self._model.stats()

    def close(self) -> None:
        """End all calls; safe to call twice."""
        self._model.close()
