"""The live side of a trace: routes as they are chosen, in memory and in a file."""

from collections import deque

import numpy as np
import numpy.typing as npt

from edgeroute.offload.trace_file import TraceWriter
from edgeroute.offload.trace_records import (
    Mark,
    Record,
    Trace,
    TraceMeta,
    TraceStep,
    make_step,
)
from edgeroute.runtime.errors import UsageError


class TraceRecorder:
    """Keeps the latest steps in memory, up to a number of bytes; may write all to a file.

    Not thread-safe: the engine thread owns it.
    """

    def __init__(
        self, meta: TraceMeta, max_bytes: int = 32 << 20, writer: TraceWriter | None = None
    ) -> None:
        self.meta = meta
        self.max_bytes = max_bytes
        self.n_dropped = 0
        self._writer = writer
        self._steps: deque[TraceStep] = deque()
        self._n_bytes = 0
        self._prefill = False
        self._open: list[tuple[int, npt.NDArray[np.generic]]] = []

    @property
    def writes(self) -> bool:
        """Whether steps go to a file."""
        return self._writer is not None

    def begin_step(self, prefill: bool = False) -> None:
        """End the step before, if any, and begin one."""
        self.end_step()
        self._prefill = prefill

    def record(self, layer: int, ids: npt.ArrayLike) -> None:
        """Enter what a layer chose: ids [n_tokens * n_expert_used] or [n_tokens, n_expert_used].

        The ids are copied.
        """
        self._open.append((layer, np.array(ids)))

    @property
    def n_open(self) -> int:
        """Layers of the step at work that have chosen."""
        return len(self._open)

    def end_step(self) -> None:
        """End the step; one without any layer leaves nothing.

        Raises:
            TraceError: a layer or expert that the header has not; the step is left out.
            OSError: the file could not be written; the step is in memory.
        """
        if not self._open:
            return
        chosen, self._open = self._open, []
        step = make_step(self.meta, self._prefill, chosen)
        self._steps.append(step)
        self._n_bytes += step.n_bytes
        while self._n_bytes > self.max_bytes and len(self._steps) > 1:
            self._n_bytes -= self._steps.popleft().n_bytes
            self.n_dropped += 1
        if self._writer is not None:
            self._writer.append(step)

    def mark(self, label: str) -> None:
        """Enter into the file that a sequence begins, of a domain `label`.

        Raises:
            UsageError: no file is written, or the label is too long.
            OSError: the file could not be written.
        """
        if self._writer is None:
            raise UsageError("no trace is recorded here; open the Runtime with trace=FILE")
        self._writer.append(Mark(step=self._writer.n_steps, label=label))

    def enter(self, record: Record) -> None:
        """Write a record to the file, if there is one.

        Raises:
            OSError: the file could not be written.
        """
        if self._writer is not None:
            self._writer.append(record)

    def trace(self) -> Trace:
        """The ended steps that are kept."""
        return Trace(meta=self.meta, steps=tuple(self._steps))
