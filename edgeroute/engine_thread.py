"""The thread that owns ggml: it loads a model, runs what is handed to it, and frees the model."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from edgeroute.config import RunParams
from edgeroute.mailbag import Mailbag
from edgeroute.outstanding import Outstanding
from edgeroute.pulse import Heart, Pulse, opens_in
from edgeroute.recovery import Parts, Recovery
from edgeroute.request import Request
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import ClosedError, DeviceLostError

if TYPE_CHECKING:
    from edgeroute.device_loss import Losses
    from edgeroute.loaded import LoadedModel
    from edgeroute.scheduler import Scheduler

Command = Callable[[], None]
"""What the engine thread does for another between two tokens; it raises nothing."""
STALL_POLL_S = 0.02
"""How often cancels and deadlines are looked for while only adapters are waited for."""
ABANDONED_WAIT_S = 2.0
"""How long closing waits for a thread that was given up."""
JOIN_POLL_S = 0.1


class EngineThread(Closing):
    """Hands requests and commands to the thread, and watches it. Any thread may use it.

    Attributes:
        parts: the model and its scheduler, the thread's own; others only read them. Both are
            replaced together when the model is opened again.
        mailbag: for listeners on event loops.

    Raises:
        EdgerouteError: the model cannot be loaded, see LoadedModel; the thread has ended.
    """

    def __init__(self, path: Path, params: RunParams) -> None:
        self._path = path
        self._params = params
        self._inbox: queue.SimpleQueue[Request | Command | None] = queue.SimpleQueue()
        self._closing = False
        self._abandoned = False
        self._failure: BaseException | None = None
        self._gate = threading.Lock()  # orders "is it open?" against "now it is closed"
        self._outstanding = Outstanding()
        self._heart = Heart()
        self.mailbag = Mailbag()
        self.parts: Parts
        self._recovery: Recovery
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=(ready,), name="edgeroute-engine", daemon=True
        )
        self._thread.start()
        opens_in(self._thread)
        try:
            ready.result()
        except BaseException:
            if ready.done():  # not where Ctrl-C ended the wait for it
                self._thread.join()
            raise

    # for others

    @property
    def loaded(self) -> "LoadedModel":
        """The model that answers now."""
        return self.parts.loaded

    @property
    def scheduler(self) -> "Scheduler":
        """What runs requests on it."""
        return self.parts.scheduler

    @property
    def losses(self) -> "Losses":
        """Devices that were lost, and what became of it."""
        return self._recovery.losses

    def check_open(self) -> None:
        """Raise ClosedError where nothing can be handed to the thread any more."""
        if self._failure is not None:
            raise ClosedError(f"the engine stopped: {self._failure}") from self._failure
        if self._closing:
            raise ClosedError("this Runtime was closed; make a new one")

    def submit(self, request: Request) -> None:
        """Hand a request over; its listener hears of everything that follows.

        Raises:
            ClosedError: the thread takes no more.
        """
        with self._gate:
            try:
                self.check_open()
            except ClosedError:
                request.sampler.close()
                raise
            request.emit = self._outstanding.listen(request.emit)
            self._note_waking()
            self._inbox.put(request)
            guard = self.scheduler.depth_guard
            if guard is not None and guard.checking:
                self.loaded.device.stop_flag.set()

    def order(self, action: Command) -> None:
        """Have the thread do something between two tokens; raise what that raises."""
        done: Future[None] = Future()
        with self._gate:
            self.check_open()
            wait = self._outstanding.add(done.set_exception)

            def run() -> None:
                if wait.ended:
                    return
                self._heart.command = True
                try:
                    self._make_ready()
                    action()
                except BaseException as error:  # the caller's, not the engine's
                    told = self._recovery.loss_of(self.parts, error) or error
                    wait.tell(done.set_exception, told, last=True)
                else:
                    wait.tell(done.set_result, None, last=True)
                finally:
                    self._heart.command = False

            self._note_waking()
            self._inbox.put(run)
        done.result()

    def _note_waking(self) -> None:
        """Note when a thread that has nothing to do gets something; the gate is held."""
        if not self.scheduler.busy and not self._inbox.qsize() and not self._heart.command:
            self._heart.woke = time.monotonic()

    @property
    def n_queued(self) -> int:
        """What was handed over and not taken yet."""
        return self._inbox.qsize()

    def pulse(self) -> Pulse:
        """Tell whether the thread works, and since when nothing has come of it."""
        if not self._thread.is_alive():
            return Pulse(busy=False, idle_s=0.0, doing="nothing: the engine has stopped")
        return self._heart.read(*self.parts, self.n_queued)

    def interrupt(self) -> None:
        """Stop what the devices compute now: a batch of a prompt, which is computed again."""
        self.loaded.device.stop_flag.set()
        if self.loaded.small is not None:
            self.loaded.small.device.stop_flag.set()

    def abandon(self, error: BaseException) -> int:
        """End all that others wait for with `error`; say nothing more to them, whatever comes.

        Returns:
            How many waited.
        """
        with self._gate:
            self._abandoned = True
            if self._failure is None:
                self._failure = error
        n_ended = self._outstanding.fail_all(error)
        self.interrupt()
        self._inbox.put(None)
        return n_ended

    @property
    def stuck_bytes(self) -> int:
        """Bytes that an abandoned thread still holds; 0 once it has freed them."""
        stuck = self._abandoned and self._thread.is_alive()
        return self.loaded.ledger.used_bytes if stuck else 0

    def close(self) -> None:
        """End everything with ClosedError, wait for the thread, or a while for an abandoned one."""
        with self._gate:
            self._closing = True
        self._inbox.put(None)
        if threading.current_thread() is self._thread:
            return
        patience_s = ABANDONED_WAIT_S
        while self._thread.is_alive() and patience_s > 0:
            self._thread.join(JOIN_POLL_S)
            patience_s -= JOIN_POLL_S * self._abandoned

    # the thread

    def _wake(self) -> None:
        self._inbox.put(None)

    def _serve(self, ready: "Future[None]") -> None:
        """Load, loop until closed, free: the whole life of the thread."""
        try:
            recovery = Recovery(self._path, self._params, self._wake, lambda: self._wanted)
        except BaseException as error:
            ready.set_exception(error)
            return
        self._recovery = recovery
        self.mailbag.own()
        with recovery:
            try:
                self._take(recovery.open())
            except BaseException as error:
                ready.set_exception(error)
                return
            try:
                ready.set_result(None)
                self._loop()
            finally:
                self.parts.close()

    def _take(self, parts: Parts) -> None:
        """Work with these from now on."""
        self.parts = parts
        parts.scheduler.before_pass = self.mailbag.empty

    @property
    def _wanted(self) -> bool:
        """Whether the thread is to go on."""
        return not self._closing and self._failure is None

    def _loop(self) -> None:
        error: BaseException = ClosedError("this Runtime was closed while the request ran")
        try:
            while self._wanted:
                try:
                    self._round()
                except BaseException as failure:
                    self._heal(failure)
            error = self._failure or error  # given up by another thread, with its reason
        except BaseException as failure:  # a bug: everyone waiting must hear of it
            with self._gate:
                self._failure = self._failure or failure
            error = ClosedError(f"the engine stopped: {failure!r}")
            error.__cause__ = failure
        while not self._inbox.empty():
            self._receive(wait_s=0.0)
        self.scheduler.fail_all(error)
        self.mailbag.empty()

    def _round(self) -> None:
        """Take what has arrived, and do one step of what there is to do."""
        self._heart.beat = time.monotonic()
        self.mailbag.empty()
        scheduler = self.scheduler
        if not scheduler.busy and self._inbox.empty() and self._recovery.down is None:
            scheduler.use_the_pause(self._inbox.empty)
        if scheduler.stalled and scheduler.busy:
            self._receive(wait_s=STALL_POLL_S)
        else:
            self._receive(wait_s=0.0 if scheduler.busy else None)
        scheduler = self.scheduler
        if not scheduler.busy and self._recovery.down is not None:
            return  # nobody asks for what could not be opened
        self._recovery.check(self.parts)
        scheduler.step()
        scheduler.check()

    def _heal(self, failure: BaseException) -> None:
        """Open the model again if a failure comes of a lost device; else raise it."""
        loss = self._recovery.loss_of(self.parts, failure)
        if loss is None:
            raise failure
        if not self._wanted:
            return
        self.mailbag.empty()
        self._heart.opening = True
        try:
            self._take(self._recovery.heal(self.parts, loss))
        finally:
            self._heart.beat = time.monotonic()
            self._heart.opening = False

    def _make_ready(self) -> None:
        """See to it that there is a model.

        Raises:
            DeviceLostError: there is none, for a device is gone.
        """
        try:
            self._recovery.check(self.parts)
        except DeviceLostError as loss:
            self._heal(loss)
            self._recovery.check(self.parts)

    def _receive(self, *, wait_s: float | None) -> None:
        """Take what has arrived; sleep up to `wait_s` until something does, None for ever."""
        while wait_s != 0.0 or not self._inbox.empty():
            with contextlib.suppress(queue.Empty):
                arrived = self._inbox.get(timeout=wait_s)
                if isinstance(arrived, Request):
                    self.scheduler.submit(arrived)
                elif arrived is not None:
                    arrived()
            wait_s = 0.0
