"""What the pools of a live run do, entered into its trace's file step by step."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from edgeroute.offload.expert_pool import ExpertPool
from edgeroute.offload.expert_turns import TurnParams
from edgeroute.offload.trace_recorder import TraceRecorder
from edgeroute.offload.trace_records import Counted, Pools, PoolState, StepPaging
from edgeroute.runtime.errors import UsageError

COUNT_EVERY: Final = 1024
"""Steps after which a file gets the live counters, so that they survive a process that dies."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn a file that takes no more into a sentence."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write the trace: {error.strerror}; make room, or run without a trace"
        ) from error


class _Sums(NamedTuple):
    """What all pools have counted, decode and prefill together."""

    hits: int
    late: int
    misses: int
    demand_bytes: int
    prefetch_bytes: int


class PagingLog:
    """Enters into a trace's file what the pools of a live run do, step by step.

    Not thread-safe: the engine thread owns it. Its records follow their steps, which the
    recorder writes; changes of pools wait for the next step, so that nothing is written between
    steps.

    Args:
        recorder: one that writes to a file.
        pools: as they are before the first step.
        turns: how experts are held in turn.
    """

    def __init__(
        self, recorder: TraceRecorder, pools: Sequence[ExpertPool], turns: TurnParams
    ) -> None:
        self._recorder = recorder
        self._pools = pools
        self._turn_params = turns
        self._waiting: list[Pools] = []
        self._turns: list[int] = []
        self._most = 0
        self._in_turn = self._is_broken = False
        self._n_steps = 0
        self._before = _Sums(0, 0, 0, 0, 0)
        self.changed(begins=True)

    def changed(self, *, begins: bool = False) -> None:
        """Slots or policies are others from the next step on."""
        states = tuple(
            PoolState(
                layers=tuple(layer.il for layer in pool.plan.layers), n_slots=pool.table.n_slots,
                policy=pool.table.policy.name, page_bytes=pool.plan.page_bytes,
                slot_bytes=pool.plan.slot_bytes,
            )
            for pool in self._pools
        )  # fmt: skip
        self._waiting.append(Pools(
            step=0, begins=begins, pools=states, group_bytes=self._turn_params.group_bytes,
            n_ahead=self._turn_params.n_ahead,
        ))  # fmt: skip

    def turns_begin(self, most: int) -> None:
        """The layer that has chosen last takes turns; `most` bounds a group's tokens."""
        self._turns.append(self._recorder.n_open - 1)
        self._most = most
        self._in_turn = True

    def turns_end(self) -> None:
        """All groups of that layer have had theirs."""
        self._in_turn = False

    def broke(self) -> None:
        """A read failed or was stopped."""
        self._is_broken = True

    def end(self, seconds: float, stall_s: float) -> None:
        """End the step, in the recorder too.

        Raises:
            TraceError, OSError: as `TraceRecorder.end_step`.
        """
        turns, self._turns = tuple(self._turns), []
        was_broken = self._is_broken or self._in_turn
        self._is_broken, self._in_turn = True, False  # holds where the step cannot be written
        now = self._sums()
        spent = _Sums(*(new - old for new, old in zip(now, self._before, strict=True)))
        self._before = now
        n_layers = self._recorder.n_open
        for record in self._waiting:
            self._recorder.enter(record)
        self._waiting.clear()
        self._recorder.end_step()
        if not n_layers:
            return
        self._recorder.enter(StepPaging(
            step=0, seconds=seconds, stall_s=stall_s, **spent._asdict(), turns=turns,
            most=self._most if turns else 0, is_broken=was_broken,
        ))  # fmt: skip
        self._is_broken = False
        self._n_steps += 1
        if self._n_steps % COUNT_EVERY == 0:
            self.count()

    def count(self) -> None:
        """Write what the pools have counted so far.

        Raises:
            OSError: the file could not be written.
        """
        tables = [pool.table for pool in self._pools]
        kinds = tuple((table.decode.snapshot(), table.prefill.snapshot()) for table in tables)
        for record in self._waiting:
            self._recorder.enter(record)
        self._waiting.clear()
        self._recorder.enter(Counted(step=0, pools=kinds))

    def _sums(self) -> _Sums:
        sums = [0, 0, 0, 0, 0]
        for pool in self._pools:
            for counters in (pool.table.decode, pool.table.prefill):
                for i, name in enumerate(_Sums._fields):
                    sums[i] += sum(getattr(counters, name))
        return _Sums(*sums)
