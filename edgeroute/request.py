"""One request on its way through the engine: what was asked, how far it is, who listens."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from edgeroute.runtime.records import PrefixMode, TokenLogprob
from edgeroute.stats import Chunk, FinishReason, Generation, GenerationStats, Speculated

# What only types need is not imported: a model's vocabulary is read as soon as this is there.
if TYPE_CHECKING:
    from edgeroute.adapter_routing import Turn
    from edgeroute.depth import Depth, RoutedRequest
    from edgeroute.energy_book import EnergySource
    from edgeroute.offload.adapter_store import Lease
    from edgeroute.offload.counters import LayerCount
    from edgeroute.runtime.device import Device
    from edgeroute.runtime.lora import LoraRow
    from edgeroute.runtime.sampler import Sampler
    from edgeroute.runtime.sequence import Sequence as Cells
    from edgeroute.runtime.text_stream import TextStream
    from edgeroute.session_visit import Visit
    from edgeroute.skippers.steps import Who
    from edgeroute.step_adapters import SmallHeld
    from edgeroute.step_state import StepState

TIMER_MARGIN_S: Final = 0.001
"""By which a timer may be early."""
Outcome = Chunk | BaseException
"""What a listener hears: chunks, the last with a finish_reason; or one exception."""


class Source(NamedTuple):
    """What a prompt was before it was encoded."""

    prompt: str | None = None
    messages: tuple[Mapping[str, object], ...] | None = None
    tools: tuple[Mapping[str, object], ...] | None = None


NO_SOURCE: Final = Source()
"""Of a prompt that came as token ids."""


class EngineState(NamedTuple):
    """What the engine holds and has done when a request ends."""

    memory_bytes: int
    threads: int
    experts: "LayerCount | None"
    layers: dict[str, int | float] | None
    energy: "EnergySource | None" = None


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Owned by the engine thread, except `cancel`, which any thread may call."""

    prompt_ids: list[int]
    max_tokens: int
    sampler: "Sampler"
    text: "TextStream"
    emit: Callable[[Outcome], None]
    streaming: bool
    prefix: PrefixMode = "exact"
    deadline: float | None = None
    id: str = field(default_factory=lambda: f"gen-{uuid.uuid4().hex[:24]}")
    created: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    adapter: Mapping[str, float] | str | None = None
    """What was asked for, as `parse_adapter` gives it."""
    small_adapter: Mapping[str, float] | None = None
    """The same of the small model, in steps."""
    depth_full: bool = False
    """Whether the whole model was asked for."""
    depth: "Depth | RoutedRequest | None" = None
    """What computes it, from its first cell to its last; None for the whole model."""
    speculate: bool = True
    """Whether tokens may be drafted for it."""
    source: Source = NO_SOURCE
    asked_steps: str | None = None
    """How its steps are to be written; None for the Runtime's way."""
    other_prompt_ids: list[int] = field(default_factory=list)
    """The prompt in the other model's vocabulary, where that is another one."""
    other_sampler: "Callable[[int], Sampler] | None" = None
    """Makes what draws the other model's tokens, where `sampler` does not: the n-th one."""
    steps: "StepState | None" = None
    """Of an answer in steps."""
    model: "Who | None" = None
    """Who wrote its last token, in steps."""
    session: str | None = None
    """Whose saved cells it begins with, and which it saves its own for."""
    visit: "Visit | None" = None
    """How far that is."""
    on_cancel: Callable[[], None] | None = None
    """Stops the computation that runs for this request alone."""

    experts_before: "LayerCount | None" = None
    layers_before: dict[str, int | float] | None = None
    lease: "Lease | None" = None
    leased: float = 0.0
    adapter_s: float = 0.0
    lora: "LoraRow | None" = None
    turn: "Turn | None" = None
    small_held: "SmallHeld | None" = None
    """What the small model holds for it."""
    n_common: int = 0
    speculated: Speculated | None = None
    sequence: "Cells | None" = None
    n_cached: int = 0
    started: float | None = None
    prefill_s: float = 0.0
    energy_j: float = 0.0
    energy_s: float = 0.0
    """Seconds of passes since the meter was last read."""
    first_token: float | None = None
    last_token: float = 0.0
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    continued: list[str] | None = None
    """How it went on where a device was lost that computed it."""

    @property
    def n_left(self) -> int:
        """Tokens that the answer may still have."""
        return self.max_tokens - len(self.token_ids)

    @property
    def n_cells(self) -> int:
        """Cells that the prompt and the longest answer need; the last token needs none."""
        return len(self.prompt_ids) + self.max_tokens - 1

    def cancel(self) -> None:
        """Ask for the end: within one token, or one operation of a prefill."""
        self.cancelled = True
        stop = self.on_cancel
        if stop is not None:
            stop()

    def restart(self) -> None:
        """Forget what it held in an engine that is gone; what it has said already counts.

        It may be submitted to another one, which reads prompt and answer again and goes on.
        """
        self.sequence = self.lease = self.lora = self.depth = self.visit = None
        self.small_held = None
        self.experts_before = self.layers_before = None
        self.n_cached = self.n_common = 0
        self.adapter_s = 0.0

    def interrupted(self) -> FinishReason | None:
        """Tell whether the listener left or the time is over."""
        if self.cancelled:
            return "cancelled"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "timeout"
        return None

    def add_token(self, token_id: int, now: float) -> None:
        """Note a generated token and pass on the text it made certain."""
        if self.first_token is None:
            self.first_token = now
        self.last_token = now
        self.token_ids.append(token_id)
        if self.sampler.last_logprob is not None:
            self.logprobs.append(self.sampler.last_logprob)
        self.pending.append(token_id)
        self._pass_on(self.text.push(token_id))

    def add_end(self, token_id: int, now: float) -> None:
        """Note the model's own end-of-generation token, which has no text."""
        if self.first_token is None:
            self.first_token = now
        self.last_token = now

    def finish(self, reason: FinishReason, engine: EngineState) -> None:
        """Close the texts and tell the listener; the engine has freed the cells already."""
        self._pass_on(self.text.flush())
        generation = Generation(
            id=self.id, text="".join(self.pieces), token_ids=tuple(self.token_ids),
            finish_reason=reason, stats=self._stats(engine), adapter=self._adapter_name(),
            seed=self.sampler.seed, logprobs=tuple(self.logprobs),
        )  # fmt: skip
        self.emit(Chunk(text="", token_ids=tuple(self.pending), finish_reason=reason,
                        generation=generation, logprobs=self._pending_logprobs()))  # fmt: skip

    def _pass_on(self, text: str) -> None:
        if not text:
            return
        self.pieces.append(text)
        if self.streaming:
            self.emit(Chunk(text=text, token_ids=tuple(self.pending), model=self.model,
                            logprobs=self._pending_logprobs()))  # fmt: skip
            self.pending.clear()

    def _pending_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Return the figures of the tokens that the listener has not heard of."""
        return tuple(self.logprobs[len(self.logprobs) - len(self.pending) :])

    def _adapter_name(self) -> str | None:
        """What served the request: a name, or `a:0.7+b:0.3`, or None."""
        if self.lease is None or not self.lease.pages:
            return None
        pairs = list(zip(self.lease.pages, self.lease.weights, strict=True))
        if len(pairs) == 1 and pairs[0][1] == 1.0:
            return pairs[0][0].name
        return "+".join(f"{page.name}:{weight:g}" for page, weight in pairs)

    def _session_stats(self) -> dict[str, object] | None:
        """Tell what became of its session."""
        if self.session is None or self.visit is not None:
            return None if self.visit is None else self.visit.to_dict()
        why = "it ended before its session was looked for"
        return {"name": self.session, "restored_tokens": 0, "restore_s": 0.0, "bytes": 0,
                "not_restored": why, "saved": why}  # fmt: skip

    def _adapter_stats(self) -> dict[str, object] | None:
        """Tell which adapters served, whether they were there, and what waiting for them cost."""
        found: dict[str, object] = {}
        if self.lease is not None:
            found = _lease_facts(self.lease, self.adapter_s)
            if self.turn is not None:
                found["auto"] = self.turn.to_dict()
        if self.small_held is not None and self.steps is not None:
            found["small"] = _lease_facts(self.small_held.lease, self.small_held.wait_s)
        return found or None

    def _energy_stats(self, source: "EnergySource | None") -> dict[str, object] | None:
        """Tell its share of the joules, and where they are from."""
        if source is None:
            return None
        n = len(self.token_ids)
        return {
            "joules": round(self.energy_j, 6),
            "joules_per_token": round(self.energy_j / n, 6) if n else None,
            **source._asdict(),
        }

    def _stats(self, engine: EngineState) -> GenerationStats:
        now = time.monotonic()
        first = self.first_token or now
        return GenerationStats(
            n_prompt=len(self.prompt_ids), n_cached=self.n_cached,
            n_generated=len(self.token_ids),
            queue_s=(self.started or now) - self.created, prefill_s=self.prefill_s,
            ttft_s=first - self.created, decode_s=max(0.0, self.last_token - first),
            memory_bytes=engine.memory_bytes, threads=engine.threads,
            experts=_cost(self.experts_before, engine.experts),
            layers=_layer_cost(self.layers_before, engine.layers), adapters=self._adapter_stats(),
            speculation=None if self.speculated is None else self.speculated.to_dict(),
            depth=None if self.depth is None else self.depth.cost(),
            steps=None if self.steps is None else tuple(self.steps.account.parts),
            session=self._session_stats(), energy=self._energy_stats(engine.energy),
            continued=None if self.continued is None else tuple(self.continued),
        )  # fmt: skip


def sequence_of(request: Request) -> "Cells":
    """Return the cells of a request that runs."""
    if request.sequence is None:
        raise RuntimeError(f"request {request.id} has left the engine")
    return request.sequence


@contextlib.contextmanager
def stoppable(requests: Sequence[Request], device: "Device") -> Iterator[None]:
    """Let what a device computes for requests be stopped, once none of them wants it any more.

    A cancel or a deadline ends the wish of one.
    """
    flag = device.stop_flag

    def stop_if_unwanted() -> None:
        if all(request.interrupted() for request in requests):
            flag.set()

    flag.clear()
    for request in requests:
        request.on_cancel = stop_if_unwanted
    timer = _timer(requests, stop_if_unwanted)
    stop_if_unwanted()
    device.watch_stop_flag(True)
    try:
        yield
    finally:
        device.watch_stop_flag(False)
        for request in requests:
            request.on_cancel = None
        if timer is not None:
            timer.cancel()


def _timer(requests: Sequence[Request], action: Callable[[], None]) -> threading.Timer | None:
    """Start a timer for the last of some deadlines: whoever was cancelled was looked at then."""
    deadlines = [request.deadline for request in requests if request.deadline is not None]
    if not deadlines:
        return None
    timer = threading.Timer(max(0.0, max(deadlines) - time.monotonic()) + TIMER_MARGIN_S, action)
    timer.start()
    return timer


def _lease_facts(lease: "Lease", wait_s: float) -> dict[str, object]:
    """Tell of held adapters which they are, and what waiting for them cost."""
    used = {page.name: w for page, w in zip(lease.pages, lease.weights, strict=True)}
    return {"used": used, "hit": lease.hit, "wait_s": round(wait_s, 6)}


def _cost(before: "LayerCount | None", after: "LayerCount | None") -> dict[str, int | float] | None:
    """Return what was counted between two readings; None where no expert is paged."""
    if after is None:
        return None
    spent = after if before is None else after.since(before)
    return {
        "hits": spent.hits,
        "misses": spent.misses + spent.late,
        "hit_ratio": round(spent.hit_ratio, 4),
        "demand_bytes": spent.demand_bytes,
        "prefetch_bytes": spent.prefetch_bytes,
        "stall_s": round(spent.stall_s, 6),
    }


def _layer_cost(
    before: dict[str, int | float] | None, after: dict[str, int | float] | None
) -> dict[str, int | float] | None:
    """Return how layers were split in the end, and what streaming cost between two readings."""
    if after is None:
        return None
    spent = {name: after[name] - (before or {}).get(name, 0) for name in ("bytes", "stall_s")}
    return after | spent | {"stall_s": round(spent["stall_s"], 6)}
