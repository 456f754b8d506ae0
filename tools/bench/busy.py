"""Busy processes beside a benchmark; none outlives it."""

import contextlib
import subprocess
import sys
from types import TracebackType
from typing import Self

# The thread ends the process when its parent is gone, however that ended: the pipe closes.
_LOOP = """
import os, sys, threading
def watch():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
print(flush=True)
while True:
    pass
"""


class BusyProcesses:
    """`n` processes that each keep one core busy from entering to leaving the context."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, while they run."""
        return tuple(process.pid for process in self._processes)

    def start(self) -> None:
        """Start them and wait until each is in its loop."""
        for _ in range(self._n):
            self._processes.append(
                subprocess.Popen([sys.executable, "-I", "-S", "-c", _LOOP], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            )  # fmt: skip
        for process in self._processes:
            if process.stdout is not None:
                process.stdout.readline()

    def stop(self) -> None:
        """Kill them and wait until they are gone; safe to call twice."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        self._processes.clear()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()
