"""What a pool takes and returns: settings, why a model answered, the answer, the stream."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from edgeroute.engine import Runtime
from edgeroute.options import Options
from edgeroute.pool_async import Leaver
from edgeroute.request import Outcome
from edgeroute.runtime.errors import ClosedError
from edgeroute.shelf_place import Lease
from edgeroute.skippers.pool_choice import Why
from edgeroute.stats import Generation
from edgeroute.stream import Chunks, Stream

Reason = Why | Literal["asked for", "refused before"]


class PoolSettings(TypedDict, total=False):
    """Keyword arguments of Pool beyond its configuration.

    `memory`, `tolerance`, `max_tries` and `energy` override those of `[pool]`. `state` is the file
    that keeps what feedback taught: `off` for nowhere, None for one of the user's. The others are
    a Runtime's, the same for every model.
    """

    memory: str | int | None
    tolerance: float | None
    max_tries: int | None
    energy: float | None
    state: str | Path | None
    threads: int | None
    n_ctx: int | None
    n_kv: int | None
    n_ubatch: int | None
    max_batch: int | None
    kv_type: str | None
    device: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTry:
    """One model asked: what that took, waiting for room and opening it included.

    `accepted` is what `verify` said of the answer, None where nobody was asked.
    """

    model: str
    seconds: float
    wait_s: float
    n_prompt: int
    n_generated: int
    accepted: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Which model answered and why, what it was thought to lack, and what was spent.

    Attributes:
        model: who answered.
        why: `asked for` where the caller named it; `refused before` where `verify` had turned
            down another model's answer.
        demand: of the query, by dimension.
        stated: shortfall of the model by its profile.
        shortfall: the same with what feedback taught, and what it is given on trust.
        price_s: seconds that the answer was expected to take.
        tries: every model asked, in order; the last is `model`.
        joules_per_token: that the answer was expected to take, where energy counts.
        worth: of it in accuracy and energy, where energy counts.
    """

    model: str
    why: Reason
    demand: Mapping[str, float]
    stated: float
    shortfall: float
    price_s: float
    tries: tuple[PoolTry, ...]
    joules_per_token: float | None = None
    worth: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Return all of it as plain JSON types."""
        energy = {"joules_per_token": self.joules_per_token, "worth": self.worth}
        known = {name: round(each, 6) for name, each in energy.items() if each is not None}
        return known | {
            "model": self.model,
            "why": self.why,
            "demand": dict(self.demand),
            "stated_shortfall": round(self.stated, 6),
            "shortfall": round(self.shortfall, 6),
            "price_s": round(self.price_s, 6),
            "seconds": round(sum(each.seconds for each in self.tries), 6),
            "n_generated": sum(each.n_generated for each in self.tries),
            "tries": [dataclasses.asdict(each) for each in self.tries],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolGeneration(Generation):
    """A finished answer of a pool: `pool` says which model gave it, and why."""

    pool: Route


def whole_answer(
    runtime: Runtime, prompt: str | None, options: Options, leaver: Leaver | None
) -> Generation:
    """Have a model answer.

    Args:
        runtime: the model.
        prompt, options: as of `Runtime.generate`.
        leaver: whoever waits and may leave, on which the answer is cancelled; None where nobody
            can.

    Raises:
        EdgerouteError: see `Runtime.generate`.
    """
    if leaver is None:
        return runtime.generate(prompt, **options)
    with runtime.stream(prompt, **options) as stream:
        leaver.follow(stream)
        for chunk in stream:
            if chunk.generation is not None:
                return chunk.generation
    raise ClosedError("the engine ended without an answer")


class PoolStream(Chunks):
    """Iterator over the chunks of one answer; the last has its whole PoolGeneration.

    The model is in use until its engine has written the answer, however slowly that is read: so
    whoever reads may ask other models meanwhile. `cancel` asks for the end: what was produced
    still comes. `close`, leaving a `with` block, or dropping the object cancels and listens no
    longer.
    """

    def __init__(
        self, stream: Stream, lease: Lease, finish: Callable[[Generation], PoolGeneration]
    ) -> None:
        inbox: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        super().__init__(inbox)
        self._stream = stream
        parts = (stream, lease, finish, inbox)
        threading.Thread(target=_pass_on, args=parts, name="edgeroute-pool", daemon=True).start()

    @property
    def id(self) -> str:
        """Id of the generation."""
        return self._stream.id

    def cancel(self) -> None:
        """Ask the model to end the answer, within one token or one operation of a prefill."""
        self._stream.cancel()

    def close(self) -> None:
        """Cancel, and expect nothing more; safe to call twice."""
        self._done = True
        self._stream.cancel()

    def __del__(self) -> None:
        # Not relied on for memory: it only spares the work for an answer nobody waits for.
        self._stream.cancel()


def _pass_on(
    stream: Stream, lease: Lease, finish: Callable[[Generation], PoolGeneration],
    inbox: "queue.SimpleQueue[Outcome]",
) -> None:  # fmt: skip
    """Pass chunks on until the engine is done with an answer, and give its model back."""
    try:
        for chunk in stream:
            if chunk.generation is None:
                inbox.put(chunk)
                continue
            lease.close()
            inbox.put(dataclasses.replace(chunk, generation=finish(chunk.generation)))
    except BaseException as error:  # the reader's, who is told
        if isinstance(error, ClosedError):
            lease.broke()
        lease.close()
        inbox.put(error)
