"""What a generation returns: text, tokens, and what it cost."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from edgeroute.runtime.records import TokenLogprob

if TYPE_CHECKING:
    from edgeroute.skippers.steps import StepPart, Who

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


@dataclass(slots=True, kw_only=True)
class Speculated:
    """What speculation did for one answer.

    Every pass gives one token that no draft is needed for, and the accepted ones: passes and
    accepted together are the tokens behind the answer's first, an ending one included.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    sources: Counter[str] = field(default_factory=Counter)
    on: bool = False
    """Whether any source drafted in the end."""

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        return {
            "source": self.sources.most_common(1)[0][0] if self.sources else None,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "passes": self.passes,
            "tokens_per_pass": round((self.passes + self.accepted) / max(1, self.passes), 3),
            "draft_s": round(self.draft_s, 6),
            "on": self.on,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStats:
    """Counts, seconds and bytes of one request.

    `ttft_s` runs from the call to the first token; `prefill_s` only while its own prompt was
    computed; `decode_s` from the first token to the last. `memory_bytes` is what the whole
    runtime has entered in its ledger.
    """

    n_prompt: int
    n_cached: int
    n_generated: int
    queue_s: float
    prefill_s: float
    ttft_s: float
    decode_s: float
    memory_bytes: int
    threads: int
    experts: dict[str, int | float] | None = None
    """What the paged experts cost meanwhile: hits, misses, hit_ratio, demand_bytes,
    prefetch_bytes and stall_s, those of requests that ran at the same time included."""

    layers: dict[str, int | float] | None = None
    """Of streamed layers: how many are resident and streamed (the head counts as one), bytes
    read and stall_s meanwhile, those for other requests included."""

    adapters: dict[str, object] | None = None
    """Which adapters served it: used (name to factor), hit (whether all were in memory), and
    wait_s until they were; the same of the small model's, in steps, under small."""

    speculation: dict[str, object] | None = None
    """Where tokens may be drafted: source (which drafted most), drafted, accepted, passes,
    tokens_per_pass, draft_s and on, see Speculated."""

    depth: dict[str, object] | None = None
    """Of an answer under a depth plan: plan, layers_run (whole), layers_total, compute (share of
    the weights that a token is multiplied with) and kl (nats, as calibrated)."""

    steps: "tuple[StepPart, ...] | None" = None
    """Of an answer in steps: who wrote what, see StepPart. Together they have all tokens of the
    answer, one that ended it included, and all that either model evaluated for it."""

    session: dict[str, object] | None = None
    """Of an answer in a session: name, restored_tokens, restore_s (from the request to its cells),
    bytes (read), not_restored (why nothing was; None where something was) and saved (True where
    its cells are being saved while the caller has its answer, else why not). Where two models
    write, only those of the answer's own model are saved; the other one reads the text again."""

    energy: dict[str, object] | None = None
    """What it took: joules, joules_per_token (of the answer, the prompt's included; None without
    a token), source (of the joules), estimated (whether a model stands in for a counter) and scope
    (what they cover: what other programs do meanwhile is in a machine's counters). Of requests
    that ran at the same time each has its share, see `edgeroute.energy_book`."""

    continued: tuple[str, ...] | None = None
    """Of an answer that was under way when a device was lost: how it went on, once a loss."""

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens computed (not reused) per second."""
        return (self.n_prompt - self.n_cached) / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens after the first per second; in steps, all tokens per second that the steps took.

        Steps come as wholes, and the first of them may be the whole answer.
        """
        if self.steps:
            spent_s = sum(part.seconds for part in self.steps)
            return self.n_generated / spent_s if spent_s > 0 else 0.0
        return (self.n_generated - 1) / self.decode_s if self.decode_s > 0 else 0.0

    def to_dict(self) -> dict[str, object]:
        """Return all figures, rates included, as plain JSON types."""
        experts: dict[str, object] = {} if self.experts is None else {"experts": self.experts}
        layers = {} if self.layers is None else {"layers": self.layers}
        adapters = {} if self.adapters is None else {"adapters": self.adapters}
        drafts = {} if self.speculation is None else {"speculation": self.speculation}
        depth = {} if self.depth is None else {"depth": self.depth}
        steps = {} if self.steps is None else {"steps": [asdict(part) for part in self.steps]}
        session = {} if self.session is None else {"session": self.session}
        energy = {} if self.energy is None else {"energy": self.energy}
        continued = {} if self.continued is None else {"continued": list(self.continued)}
        return (
            {
                "n_prompt": self.n_prompt,
                "n_cached": self.n_cached,
                "n_generated": self.n_generated,
                "queue_s": round(self.queue_s, 6),
                "prefill_s": round(self.prefill_s, 6),
                "ttft_s": round(self.ttft_s, 6),
                "decode_s": round(self.decode_s, 6),
                "prefill_tok_s": round(self.prefill_tok_s, 3),
                "decode_tok_s": round(self.decode_tok_s, 3),
                "memory_bytes": self.memory_bytes,
                "threads": self.threads,
            }
            | experts
            | layers
            | adapters
            | drafts
            | depth
            | steps
            | session
            | energy
            | continued
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of streamed text: whole characters, nothing of a stop string.

    The last chunk has a `finish_reason` and the whole `generation`. `model` says who of a pair
    wrote it, where answers are written in steps.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    model: "Who | None" = None
    finish_reason: FinishReason | None = None
    generation: "Generation | None" = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of its tokens, where they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished answer."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats
    adapter: str | None = None
    seed: int | None = None
    logprobs: tuple[TokenLogprob, ...] = field(default=())
