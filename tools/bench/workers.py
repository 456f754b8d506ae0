"""Each engine in a process of its own, so that they share no threads.

Two OpenMP pools in one process are together larger than the machine, and libgomp then stops
spinning in both: each would be measured at another speed than it has alone.
"""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol, Self

from edgeroute.runtime.errors import EdgerouteError

POLL_S = 0.5  # a wait without limit cannot be interrupted on Windows
END_S = 10.0


class Engine(Protocol):
    """What lives in a worker."""

    def close(self) -> None:
        """Free everything."""


class Worker:
    """One engine, made and used in a process of its own; idle, it sleeps.

    Raises:
        Exception: whatever the factory raises there.
    """

    def __init__(self, factory: Callable[..., Engine], *args: object) -> None:
        # Spawned, not forked: a fork would inherit half of this process's threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, args), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self._kill()
            raise

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def call(self, method: str, *args: object) -> Any:
        """Call a method of the engine there and return its result, or raise its error."""
        self._pipe.send((method, args))
        return self._answer()

    def close(self) -> None:
        """Close the engine and end the process."""
        try:
            self.call("close")
            self._process.join(END_S)
        finally:
            self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:  # it may be in the middle of something long: Ctrl-C does not wait for that
            self._kill()

    def _answer(self) -> Any:
        try:
            while not self._pipe.poll(POLL_S):
                pass  # a process that ends closes its pipe, which ends the wait
            error, value = self._pipe.recv()
        except (EOFError, ConnectionError) as lost:
            self._process.join(END_S)
            raise EdgerouteError(
                f"a benchmark's worker process ended with status {self._process.exitcode}"
            ) from lost
        if error is not None:
            raise error
        return value

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process.close()


class Respawned:
    """An engine that gets a new process for every measured call.

    Where the kernel puts a process's pages decides several per cent of its speed and stays for
    its life: runs in one process would all share the same luck.
    """

    def __init__(self, factory: Callable[..., Engine], *args: object) -> None:
        self._factory, self._args = factory, args

    def call(self, method: str, *args: object, warm: tuple[object, ...] = ()) -> Any:
        """Start a process, make the `warm` call there if there is one, then the measured one."""
        with Worker(self._factory, *self._args) as worker:
            if warm:
                worker.call(str(warm[0]), *warm[1:])
            return worker.call(method, *args)


def _serve(pipe: Connection, factory: Callable[..., Engine], args: tuple[object, ...]) -> None:
    """Make the engine, then answer calls until one of them was `close`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    try:
        engine = factory(*args)
    except Exception as error:
        pipe.send((error, None))
        return
    pipe.send((None, None))
    method = ""
    while method != "close":
        try:
            method, given = pipe.recv()
        except EOFError:  # the parent is gone
            engine.close()
            return
        try:
            pipe.send((None, getattr(engine, method)(*given)))
        except Exception as error:
            pipe.send((error, None))
