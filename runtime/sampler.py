"""Logits in, one token id out."""

import functools
import math
import os
from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import ComputeError, GrammarError, UsageError
from edgeroute.runtime.records import SamplingParams, TokenLogprob

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Real = TypeVar("Real", np.float32, np.float64)
COLDEST = 1e-30
"""Temperatures below it draw the strongest token: F32 cannot divide the logits by them."""


class Constraint(Protocol):
    """What a sampler needs of a grammar."""

    def allows(self, token_id: int) -> bool:
        """Whether the grammar admits this token next."""

    def mask(self, logits: F32) -> None:
        """Set the logits of all inadmissible tokens to -inf."""

    def accept(self, token_id: int) -> None:
        """Advance past an admissible token."""

    def close(self) -> None:
        """Free what the grammar holds."""


class Vocabulary(Protocol):
    """What a sampler needs of a tokenizer."""

    @property
    def n_vocab(self) -> int:
        """How many logits every call brings."""

    def constraint(self, params: SamplingParams) -> Constraint | None:
        """Compile the grammar or JSON schema in `params`, if it has one."""


class Sampler(Closing):
    """One request's way of choosing tokens; use it as a context manager.

    The order is llama.cpp's: logit bias, penalties over the last `repeat_last_n` tokens of
    prompt and output, grammar, top-k, top-p, min-p, temperature, draw. The grammar is
    asked about the chosen token first and about the whole vocabulary only when it refuses.

    Args:
        params: checked sampling parameters.
        tokenizer: gives the number of logits, and compiles the grammar in `params`.
        prompt_ids: the prompt, for the penalties; only its last tokens are kept.

    Raises:
        UsageError: a biased token is outside the vocabulary.
        GrammarError: the grammar or JSON schema cannot be used.

    Source: llama.cpp common/sampling.cpp and src/llama-sampler.cpp.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Vocabulary,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.n_vocab = tokenizer.n_vocab
        self.seed = params.seed if params.seed is not None else _fresh_seed()
        self.last_logprob: TokenLogprob | None = None
        self._bias_ids, self._bias = _bias_arrays(params, self.n_vocab)
        n_last = params.repeat_last_n if _penalises(params) else 0
        self._recent: deque[int] = deque(maxlen=n_last)
        self._counts: Counter[int] = Counter()
        if n_last:
            for token_id in prompt_ids[-n_last:]:
                self._remember(token_id)
        self._grammar = tokenizer.constraint(params)
        self._shape = (self.n_vocab,)
        self.plain = (  # the strongest token, and nothing else to do: the common case
            params.temperature <= 0
            and params.logprobs is None
            and not n_last
            and not self._bias_ids.size
            and self._grammar is None
        )

    @functools.cached_property
    def _rng(self) -> "np.random.Generator":
        # Made by the first draw: greedy answers should not wait for its import.
        return np.random.Generator(np.random.PCG64(self.seed))

    def close(self) -> None:
        """Free the grammar; closing twice is fine."""
        grammar, self._grammar = self._grammar, None
        if grammar is not None:
            grammar.close()

    def sample(self, logits: F32) -> int:
        """Choose the next token; `accept` must follow before the next call.

        Args:
            logits: F32 (n_vocab,); read only.

        Raises:
            ComputeError: the logits have another shape, or are not all numbers.
            GrammarError: the grammar admits no token; the text so far is valid up to here.
        """
        if logits.shape != self._shape:
            raise ComputeError(f"expected {self.n_vocab} logits, got an array of {logits.shape}")
        if self.plain:
            return _argmax(logits)
        adjusted = self._adjust(logits)
        chosen = self._choose(adjusted)
        if self._grammar is not None and not self._grammar.allows(chosen):
            masked = adjusted.copy() if adjusted is logits else adjusted
            self._grammar.mask(masked)
            if not float(masked.max()) > -np.inf:
                raise GrammarError("the grammar admits no token of this vocabulary here")
            chosen = self._choose(masked)
        if self.params.logprobs is not None:
            self.last_logprob = logprob(logits, chosen, self.params.logprobs)
        return chosen

    def accept(self, token_id: int) -> None:
        """Note a token that became part of the output.

        Raises:
            GrammarError: the grammar does not admit it; nothing has changed.
        """
        if self._grammar is not None:
            self._grammar.accept(token_id)
        if self._recent.maxlen:
            self._remember(token_id)

    def admits(self, token_id: int) -> bool:
        """Whether a token that was chosen elsewhere may follow: the grammar, if any, allows it."""
        return self._grammar is None or self._grammar.allows(token_id)

    def note(self, logits: F32, token_id: int) -> None:
        """Report a token that was chosen elsewhere as if it had been drawn from these logits.

        Args:
            logits: F32 (n_vocab,), as the model gave them.
            token_id: the token.
        """
        if self.params.logprobs is not None:
            self.last_logprob = logprob(logits, token_id, self.params.logprobs)

    def _remember(self, token_id: int) -> None:
        if len(self._recent) == self._recent.maxlen:
            old = self._recent[0]
            self._counts[old] -= 1
            if not self._counts[old]:
                del self._counts[old]
        self._recent.append(token_id)
        self._counts[token_id] += 1

    def _adjust(self, logits: F32) -> F32:
        """Bias and penalties, on a copy; the same array comes back when there are none."""
        if not self._bias_ids.size and not self._counts:
            return logits
        adjusted = logits.astype(np.float32, copy=True)
        if self._bias_ids.size:
            adjusted[self._bias_ids] += self._bias
        if self._counts:
            params = self.params
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            seen = adjusted[ids]
            factor = np.float32(params.repeat_penalty)
            seen = np.where(seen <= 0, seen * factor, seen / factor)
            seen -= counts * np.float32(params.frequency_penalty)
            adjusted[ids] = seen - np.float32(params.presence_penalty)
        return adjusted

    def _choose(self, logits: F32) -> int:
        best = _argmax(logits)
        if self.params.temperature < COLDEST:
            return best
        ids = _candidates(logits, float(logits[best]), self.params)
        kept = logits if ids is None else logits[ids]
        weights = np.exp((kept - logits[best]) / np.float32(self.params.temperature))
        cumulative = np.cumsum(weights, dtype=np.float64)
        drawn = self._rng.random() * cumulative[-1]
        at = min(int(np.searchsorted(cumulative, drawn, side="right")), len(kept) - 1)
        return at if ids is None else int(ids[at])


def _candidates(logits: F32, best: float, params: SamplingParams) -> I64 | None:
    """Ids that top-k, top-p and min-p leave, in ascending order; None means all."""
    ids = _top(logits, params.top_k) if 0 < params.top_k < logits.size else None
    if params.top_p < 1.0:
        kept = logits if ids is None else logits[ids]
        chosen = _nucleus(np.exp(kept - np.float32(best)), params.top_p)
        ids = chosen if ids is None else ids[chosen]
    if params.min_p > 0.0:
        kept = logits if ids is None else logits[ids]
        strong = np.flatnonzero(kept >= np.float32(best + np.log(params.min_p)))
        ids = strong if ids is None else ids[strong]
    return ids


def logprob(logits: F32, token_id: int, n_top: int) -> TokenLogprob:
    """Log-probabilities in nats from raw logits, over the whole vocabulary.

    Args:
        logits: F32 (n_vocab,), as the model gave them.
        token_id: the token to report.
        n_top: how many of the strongest tokens to report beside it.
    """
    best = float(logits.max())
    total = best + float(np.log(np.exp(logits - np.float32(best)).sum(dtype=np.float64)))
    ids = _top(logits, n_top) if n_top else np.arange(0)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    top = tuple((int(i), float(logits[i]) - total) for i in ids)
    return TokenLogprob(token_id=token_id, logprob=float(logits[token_id]) - total, top=top)


def log_softmax(logits: NDArray[Real]) -> NDArray[Real]:
    """Return log-probabilities over the last axis, in the precision of the logits; a copy."""
    logs: NDArray[Real] = logits - logits.max(axis=-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=-1, keepdims=True))
    return logs


def _argmax(logits: F32) -> int:
    """The lowest id of the strongest logit.

    Raises:
        ComputeError: a logit is NaN, one is +inf, or all are -inf.
    """
    at = int(logits.argmax())  # argmax stops at the first NaN
    value = float(logits[at])
    if not math.isfinite(value):
        raise ComputeError(
            f"the model's logits are not numbers: token {at} has {value}; "
            "the model file or the device is faulty"
        )
    return at


def _top(values: F32, k: int) -> I64:
    """Places of the k largest values in ascending order; ties go to the lower place."""
    if k >= values.size:
        return np.arange(values.size)
    edge = np.partition(values, values.size - k)[values.size - k]
    above = np.flatnonzero(values > edge)
    equal = np.flatnonzero(values == edge)[: k - above.size]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(weights: F32, top_p: float) -> I64:
    """Places of the fewest largest weights whose sum reaches top_p of all; at least one."""
    total = float(weights.sum(dtype=np.float64))
    # All weights below this together are less than what top_p leaves out.
    places = np.flatnonzero(weights >= np.float32((1.0 - top_p) * total / weights.size * 0.5))
    strong = weights[places]
    falling = np.sort(strong)[::-1]
    cumulative = np.cumsum(falling, dtype=np.float64)
    n = int(np.searchsorted(cumulative, top_p * total, side="left")) + 1
    return places[_top(strong, n)]


def _penalises(params: SamplingParams) -> bool:
    return (
        params.repeat_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _bias_arrays(params: SamplingParams, n_vocab: int) -> tuple[I64, F32]:
    for token_id, bias in params.logit_bias.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise UsageError(f"logit_bias is keyed by token ids, got {token_id!r}")
        if not 0 <= token_id < n_vocab:
            raise UsageError(
                f"logit_bias names token {token_id}; the vocabulary has {n_vocab} tokens"
            )
        if not isinstance(bias, int | float) or not bias <= 1e9:
            raise UsageError(f"logit_bias of token {token_id} must be at most 1e9, got {bias!r}")
    ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
    return ids, np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))


def _fresh_seed() -> int:
    return int.from_bytes(os.urandom(7), "little")
