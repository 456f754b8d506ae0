"""One engine's whole life under a memory limit, phase by phase, with the bytes each phase read."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from edgeroute.engine import Runtime, Settings
from edgeroute.offload.disk import DiskFile
from edgeroute.offload.disk_speed import measure
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.bench.limit import disk_read_bytes
from edgeroute.tools.bench.peer import Peer, PeerParams, load_library

MIN_TOKENS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LifePlan:
    """What an engine does in one process.

    First token of a one-token prompt; a prompt, `n_warm` tokens uncounted, `n_tokens` counted;
    another prompt of equal length, and `n_after` tokens right behind it. A phase of decoding
    that lasts longer than `max_s` ends earlier, after two tokens at the least.
    """

    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    n_warm: int = 16
    n_tokens: int = 64
    n_after: int = 32
    max_s: float = 20.0

    @property
    def n_ctx(self) -> int:
        """Cells of the longest sequence."""
        return max(map(len, self.prompts)) + 1 + max(self.n_warm + self.n_tokens, self.n_after)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Tokens computed in some seconds; `experts` are the pager's counters of that time.

    `read_bytes` is what the kernel read from the disk for the process, None where it does not
    count.
    """

    n_tokens: int
    seconds: float
    read_bytes: int | None
    experts: Mapping[str, float] = field(default_factory=dict)

    @property
    def tok_s(self) -> float:
        """Tokens per second."""
        return self.n_tokens / self.seconds

    @property
    def moved_bytes(self) -> float:
        """Bytes brought from the disk: what the pager counted, else what the kernel did."""
        if self.experts:
            return self.experts["demand_bytes"] + self.experts["prefetch_bytes"]
        return float(self.read_bytes or 0)

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        return {
            "n_tokens": self.n_tokens,
            "seconds": round(self.seconds, 6),
            "tok_s": round(self.tok_s, 4),
            "read_bytes": self.read_bytes,
            "experts": dict(self.experts),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What LifePlan measured. `first` counts from before the model was opened.

    `pager` is what the runtime said of its experts in the end, as it said it.
    """

    first: Phase
    decode: Phase
    prefill: Phase
    after: Phase
    pager: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        phases = {name: getattr(self, name).to_dict() for name in PHASES}
        return phases | {"pager": dict(self.pager)}


PHASES: Final = ("first", "decode", "prefill", "after")


@dataclass(frozen=True, slots=True)
class _Mark:
    """A moment: clock, bytes read so far, counters so far."""

    at: float
    read_bytes: int | None
    experts: Mapping[str, float]

    def phase(self, end: "_Mark", n_tokens: int) -> Phase:
        """What happened from this moment to another."""
        read = None
        if self.read_bytes is not None and end.read_bytes is not None:
            read = end.read_bytes - self.read_bytes
        counted = {name: value - self.experts.get(name, 0) for name, value in end.experts.items()}
        return Phase(n_tokens=n_tokens, seconds=end.at - self.at, read_bytes=read, experts=counted)


COUNTERS: Final = ("hits", "late", "misses", "demand_bytes", "prefetch_bytes", "stall_s")


class Paged:
    """A Runtime within its budget."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._began = _mark()
        self._runtime = Runtime(path, **settings)

    def live(self, plan: LifePlan) -> Life:
        """Do all that the plan says, once."""
        self._runtime.generate(
            prompt_ids=plan.prompts[0][:1], max_tokens=1, temperature=0.0, prefix="off"
        )
        first = self._began.phase(self._mark(), 1)
        _, decode = self._answer(plan.prompts[0], plan, (plan.n_warm, plan.n_tokens))
        prefill, after = self._answer(plan.prompts[1], plan, (0, plan.n_after))
        return Life(first=first, decode=decode, prefill=prefill, after=after,
                    pager=self._experts())  # fmt: skip

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()

    def _answer(
        self, prompt: tuple[int, ...], plan: LifePlan, counts: tuple[int, int]
    ) -> tuple[Phase, Phase]:
        """Compute a prompt, then decode (uncounted, counted) tokens: both phases."""
        n_skip, n_count = counts
        began, n_seen, n_last = self._mark(), 0, 0
        start: _Mark | None = None
        end: _Mark | None = None
        prefill: Phase | None = None
        with self._runtime.stream(
            prompt_ids=list(prompt), max_tokens=1 + n_skip + n_count, temperature=0.0, seed=1,
            prefix="off",
        ) as stream:  # fmt: skip
            for chunk in stream:
                if not chunk.token_ids:
                    continue
                n_seen += len(chunk.token_ids)
                end = self._mark()
                if prefill is None:
                    prefill = began.phase(end, len(prompt))
                if start is None and n_seen > n_skip:
                    start, n_last = end, n_seen
                if start and n_seen >= n_last + MIN_TOKENS and end.at > start.at + plan.max_s:
                    break
        n_tokens = n_seen - n_last
        if prefill is None or start is None or end is None or n_tokens < MIN_TOKENS:
            raise UsageError(f"the model ends its answer after {n_seen} tokens; this benchmark "
                             f"counts from {n_skip + 1} on; use another model")  # fmt: skip
        return prefill, start.phase(end, n_tokens)

    def _mark(self) -> _Mark:
        return _Mark(time.perf_counter(), disk_read_bytes(), counters(self._experts()))

    def _experts(self) -> Mapping[str, object]:
        found = self._runtime.stats().get("experts")
        return found if isinstance(found, Mapping) else {}


def counters(
    experts: Mapping[str, object], kinds: tuple[str, ...] = ("decode", "prefill")
) -> dict[str, float]:
    """Sum what the pager counted in decode or prefill or both; empty where there is none."""
    parts = [experts[kind] for kind in kinds if kind in experts]
    return {
        name: sum(part[name] for part in parts if isinstance(part, Mapping))
        for name in COUNTERS
        if parts
    }


class Mapped:
    """llama.cpp with the file mapped: the kernel pages, by the page cache's own rules."""

    def __init__(self, path: Path, params: PeerParams) -> None:
        load_library()  # its import is not what is measured
        self._began = _mark()
        self._peer = Peer(path, params)

    def live(self, plan: LifePlan) -> Life:
        """Do all that the plan says, once."""
        self._peer.clear()
        np.argmax(self._peer.prefill(plan.prompts[0][:1]))
        first = self._began.phase(_mark(), 1)
        _, decode = self._answer(plan.prompts[0], plan, (plan.n_warm, plan.n_tokens))
        prefill, after = self._answer(plan.prompts[1], plan, (0, plan.n_after))
        return Life(first=first, decode=decode, prefill=prefill, after=after)

    def close(self) -> None:
        """Free everything."""
        self._peer.close()

    def _answer(
        self, prompt: tuple[int, ...], plan: LifePlan, counts: tuple[int, int]
    ) -> tuple[Phase, Phase]:
        """Compute a prompt, then decode (uncounted, counted) tokens: both phases."""
        n_skip, n_count = counts
        self._peer.clear()
        began = _mark()
        token = int(np.argmax(self._peer.prefill(prompt)))
        prefill, pos = began.phase(_mark(), len(prompt)), len(prompt)
        if n_skip:
            token, warm = self._steps(token, pos, n_skip, plan.max_s)
            pos += warm.n_tokens
        return prefill, self._steps(token, pos, n_count, plan.max_s)[1]

    def _steps(self, token: int, pos: int, n_tokens: int, max_s: float) -> tuple[int, Phase]:
        """Decode greedily; return the last token and how it went."""
        start = end = _mark()
        n_done = 0
        while n_done < n_tokens and (n_done < MIN_TOKENS or end.at < start.at + max_s):
            token = int(np.argmax(self._peer.step(token, pos + n_done)))
            n_done, end = n_done + 1, _mark()
        return token, start.phase(end, n_done)


def _mark() -> _Mark:
    return _Mark(time.perf_counter(), disk_read_bytes(), {})


class Store:
    """The disk under the same limit, as the pager reads it: long reads past the page cache."""

    def __init__(self, path: Path) -> None:
        self._disk = DiskFile.open(path)

    def bytes_s(self, seconds: float, seed: int) -> float:
        """Measure the best of several read lengths and depths, bytes per second."""
        return measure(self._disk, seconds=seconds, seed=seed).best.bytes_s

    def mode(self) -> str:
        """How the file is read."""
        return self._disk.mode

    def close(self) -> None:
        """Close the file."""
        self._disk.close()
