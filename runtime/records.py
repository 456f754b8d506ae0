"""Small frozen records that pass between the floors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from edgeroute.runtime.errors import UsageError

MAX_SHOWN = 16
KV_TYPE_NAMES: Final = ("f16", "q8_0")
"""How keys and values may be stored."""
PrefixMode = Literal["exact", "all", "off"]
"""Which cells a prompt may reuse: with a fresh run's bits, any of equal tokens, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request turns logits into tokens. `temperature=0` is greedy.

    `shown_tokens` are texts of control tokens that a grammar may ask for, and that are part
    of the answer's text: a vocabulary may mark a call to a tool by one. Texts of tokens that
    end generation, or of none at all, change nothing.

    Raises:
        UsageError: a value is outside its range; the message names it and the range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    grammar: str | None = None
    json_schema: Mapping[str, object] | str | None = None
    shown_tokens: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
        _check_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_range("repeat_last_n", self.repeat_last_n, 0, 2**20)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, 100)
        if self.grammar is not None and self.json_schema is not None:
            raise UsageError("grammar and json_schema exclude each other; pass one of them")
        shown = self.shown_tokens
        if not isinstance(shown, list | tuple) or not all(isinstance(t, str) for t in shown):
            raise UsageError(f"shown_tokens must be a list of texts, got {shown!r:.80}")
        if len(shown) > MAX_SHOWN:
            raise UsageError(f"{len(shown)} shown_tokens were given, the limit is {MAX_SHOWN}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a non-number, NaN, or a value outside [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} must be a number, got {value!r}")
    if isinstance(low, int) and not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{name} must be between {low} and {high}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The log-probability in nats of one sampled token and of its strongest rivals."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()
