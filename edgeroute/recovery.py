"""A model opened again when one of its devices is lost, and the requests that go on with it.

What a device held is lost with it: weights, which the model's file has, and cells, which are
computed again. What a request is lies in our own memory: its prompt, what it has answered, its
sampler with its random numbers, its grammar, the text on its way. So it goes on where it was once
its prompt and its answer so far were read again.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from edgeroute.config import RunParams
from edgeroute.device_loss import Losses, lost_names
from edgeroute.opening import Opening
from edgeroute.request import EngineState
from edgeroute.runtime import machine
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import DeviceLostError, EdgerouteError
from edgeroute.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeroute.adapters import Adapters
    from edgeroute.loaded import LoadedModel
    from edgeroute.request import Request
    from edgeroute.scheduler import Scheduler

RECONNECT_S: Final = 2.0
"""How long the lost device is looked for before the model is opened without it."""
POLL_S: Final = 0.2
LOOK_S: Final = 0.05
"""How often cancels and deadlines are looked for meanwhile."""
AGAIN_S: Final = 3.0
"""How long after a try that failed the next may come."""
HOST: Final = "cpu"


class Parts(NamedTuple):
    """A model, and what runs requests on it."""

    loaded: "LoadedModel"
    scheduler: "Scheduler"

    def close(self) -> None:
        """Free everything."""
        try:
            if self.scheduler.steps is not None:
                self.scheduler.steps.close()
        finally:
            self.loaded.close()


class _Borrowed(Opening):
    """A file and a vocabulary that stay open when the model that was made of them is closed.

    Callers' threads read the vocabulary at any time, and so do grammars of requests that go on.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self.file = opening.file

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary, as soon as it is read."""
        return self._opening.tokenizer

    def close(self) -> None:
        """Leave both to their owner."""


class Recovery(Closing):
    """Opens a Runtime's model, and opens it again. The engine thread owns it.

    Args:
        path: of the model's file.
        params: settings.
        wake: called from other threads when something that was waited for has arrived.
        wanted: whether a model is still wanted; that may change at any time.

    Raises:
        ModelFileError: the file cannot be opened.

    Attributes:
        losses: what was lost so far.
        down: what is told to whoever asks while nothing could be opened.
    """

    def __init__(
        self, path: Path, params: RunParams, wake: Callable[[], None], wanted: Callable[[], bool]
    ) -> None:
        self._path, self._params, self._wake, self._wanted = path, params, wake, wanted
        self._opening = Opening(path)
        self.losses = Losses()
        self.down: str | None = None
        self._loss: _Loss | None = None
        self._tried_at = 0.0
        self._how = ""

    def open(self, params: RunParams | None = None) -> Parts:
        """Open the model.

        Raises:
            EdgerouteError: see LoadedModel; nothing stays allocated.
        """
        meter = machine.LoadMeter()  # its first reading covers the time of loading
        # Imported now, not at the top: the vocabulary is being read meanwhile.
        from edgeroute.loaded import LoadedModel

        borrowed = _Borrowed(self._opening)
        loaded = LoadedModel(self._path, params or self._params, borrowed, self._wake)
        try:
            from edgeroute.engine_setup import make_scheduler

            return Parts(loaded, make_scheduler(loaded, meter, self._wake))
        except BaseException:
            loaded.close()
            raise

    def check(self, parts: Parts) -> None:
        """Raise DeviceLostError where one of the model's devices is gone, or was not replaced."""
        if self.down is not None:
            raise DeviceLostError(self.down)
        parts.scheduler.check()

    def loss_of(self, parts: Parts, error: BaseException) -> DeviceLostError | None:
        """Return the loss that an error comes from; None where nothing is lost."""
        if isinstance(error, DeviceLostError):
            return error
        try:
            parts.scheduler.check()
        except DeviceLostError as loss:
            loss.__cause__ = error
            return loss
        return None

    # what is done about a loss

    def heal(self, parts: Parts, loss: DeviceLostError) -> Parts:
        """Open the model again, and let the requests go on that can; the others end.

        Args:
            parts: what computed; it is closed.
            loss: what those are told that cannot go on.

        Returns:
            What computes now; `parts`, without requests, where nothing could be opened.
        """
        n_before = parts.scheduler.n_finished
        going = parts.scheduler.hand_over(loss)
        self.losses.n_failed += parts.scheduler.n_finished - n_before
        if self.down is not None and time.monotonic() - self._tried_at < AGAIN_S:
            self._end(going, self.down)
            return parts
        try:
            with _looked_after(going, parts.scheduler):
                if self._loss is None:
                    self._loss = _Loss.of(parts, loss)
                    self.losses.n_lost += max(1, len(self._loss.names))
                    self._close(parts)
                new = self._again(parts, self._loss)
        except BaseException as error:  # a bug: those who wait must hear of it
            self._end(going, f"{loss}; opening the model again failed: {error!r}")
            raise
        if new is None:
            self._end(going, self.down or str(loss))
            return parts
        self._go_on(going, new.scheduler)
        return new

    def _again(self, old: Parts, loss: "_Loss") -> Parts | None:
        """Open the model with the same devices, or else with others; None where neither works."""
        whys = []
        for params in self._ways(loss):
            if not self._wanted():
                break
            same = params is self._params
            try:
                new = self._reconnect(params) if same else self.open(params)
            except (EdgerouteError, OSError) as error:
                whys.append(f"it could not be opened with device {params.device}: {error}")
                continue
            end = "" if same else ", which may be slower"
            self._how = (f"{loss.words}; the model was opened again with device "
                         f"{params.device}{end}")  # fmt: skip
            self.losses.n_opened += 1
            self.losses.note("; ".join([self._how, *_carry_over(old, new)]))
            self.down = self.losses.down = self._loss = None
            return new
        last = "bring the device back, and the next request will try it"
        self.down = self.losses.down = "; ".join([loss.words, *whys, last])
        self._tried_at = time.monotonic()
        return None

    def _ways(self, loss: "_Loss") -> Iterator[RunParams]:
        """Give the settings to try, the best first."""
        yield self._params
        for device in dict.fromkeys([",".join(loss.left), HOST]):
            if device not in ("", self._params.device):
                yield dataclasses.replace(self._params, device=device)

    def _reconnect(self, params: RunParams) -> Parts:
        """Open the model with the devices it had, as soon as they answer, within RECONNECT_S.

        Raises:
            EdgerouteError: see LoadedModel.
        """
        end = time.monotonic() + RECONNECT_S
        while True:
            try:
                return self.open(params)
            except DeviceLostError:
                if not self._wanted() or time.monotonic() + POLL_S > end:
                    raise
            time.sleep(POLL_S)

    def _go_on(self, requests: "list[Request]", scheduler: "Scheduler") -> None:
        self.losses.n_continued += len(requests)
        for request in requests:
            if request.started is not None:
                request.continued = [*(request.continued or ()), self._how]
            scheduler.submit(request)

    def _close(self, parts: Parts) -> None:
        """Free what is left of a model; what fails in that is told, for the model is gone."""
        try:
            parts.close()
        except (EdgerouteError, OSError) as error:
            self.losses.note(f"what was lost could not be closed in order: {error}")

    def _end(self, requests: "list[Request]", why: str) -> None:
        self.losses.n_failed += len(requests)
        for request in requests:
            request.sampler.close()
            request.emit(DeviceLostError(why))

    def close(self) -> None:
        """Close file and vocabulary; safe to call twice."""
        self._opening.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loss:
    """Devices that are gone, in words too, and the others of the same model."""

    names: tuple[str, ...]
    left: tuple[str, ...]
    words: str

    @classmethod
    def of(cls, parts: Parts, error: DeviceLostError) -> "_Loss":
        """Look which devices of a model are gone, before it is closed."""
        names = lost_names(parts.loaded)
        devices = parts.loaded.devices
        left = [each.info.name for each in devices.accelerators if each.info.name not in names]
        if devices.cpu_shares:
            left.append(HOST)
        return cls(names=tuple(names), left=tuple(left), words=str(error))


@contextlib.contextmanager
def _looked_after(requests: "list[Request]", scheduler: "Scheduler") -> Iterator[None]:
    """Meanwhile, end and take out requests that are cancelled or whose time is over.

    Args:
        requests: what no engine has.
        scheduler: counts those that ended; it computes nothing meanwhile.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            for request in list(requests):
                if (reason := request.interrupted()) is not None:
                    requests.remove(request)
                    request.sampler.close()
                    scheduler.n_finished += 1
                    request.finish(reason, EngineState(0, 0, None, None))

    thread = threading.Thread(target=look, name="edgeroute-meanwhile", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _carry_over(old: Parts, new: Parts) -> list[str]:
    """Let a model that was opened again have what another learned; say what it cannot have."""
    told = []
    before, after = old.scheduler, new.scheduler
    if before.prefix.n_kept_cells:
        told.append(f"{before.prefix.n_kept_cells} cells kept for later prompts are gone")
    after.count_on(before)
    if before.steps is not None and after.steps is not None:
        after.steps.choice.take_over(before.steps.choice)
    if old.loaded.adapters is not None and new.loaded.adapters is not None:
        told += _add_again(old.loaded.adapters, new.loaded.adapters)
        new.loaded.adapters.routing.take_over(old.loaded.adapters.routing)
    return told


def _add_again(old: "Adapters", new: "Adapters") -> list[str]:
    """Make a library what another was, from the adapters' files; say which could not be read."""
    from edgeroute.models.adapter_records import AdapterFile

    told = []
    for name in set(new.store.names) - set(old.store.names):
        new.remove(name)
    there = {each.name: each for each in new.store.sources}
    for file in old.store.sources:
        if not isinstance(file, AdapterFile) or file == there.get(file.name):
            continue
        try:
            new.add(file)
        except (EdgerouteError, OSError) as error:
            told.append(f"adapter {file.name!r} is gone: {error}")
    return told
