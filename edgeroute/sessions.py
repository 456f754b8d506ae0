"""Saved sessions of one Runtime: cells that survive a restart.

A request that names a session begins with the cells that were saved of it, where those reach
further than what is in memory; its own are saved when it ends. Disks are waited for by threads
of their own: the engine thread only hands cells over and takes them back.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from edgeroute.config import RunParams
from edgeroute.depth import Depth
from edgeroute.request import Request
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import SessionFileError
from edgeroute.runtime.held_cells import HeldCells
from edgeroute.runtime.prefix import MIN_REUSE, PrefixCache
from edgeroute.runtime.sequence import Classes, Sequence
from edgeroute.runtime.session_file import SessionFacts, Tokens
from edgeroute.runtime.units import format_bytes, parse_bytes
from edgeroute.session_folder import DEFAULT_BYTES, SavedSession, SessionFolder
from edgeroute.session_gauge import RestoreGauge
from edgeroute.session_visit import Visit
from edgeroute.session_work import Copies, Look, Restored, SessionWork, Wanted

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel

MAX_SAVING: Final = 8
"""Saves under way or waiting; each holds its cells."""
PATIENCE_S: Final = 5.0
"""How long a save may hold cells that a request waits for."""
LOOK_S: Final = 5.0
"""How long a request waits to hear what is saved of its session."""
RESTORE_MIN_S, RESTORE_MAX_S = 1.0, 30.0
"""Bounds of how long it waits for its cells: no longer than computing them would take."""
CLOSE_S: Final = 20.0
"""How long closing waits for saves."""
CLOSE_POLL_S: Final = 0.002
UNKNOWN: Final = (
    "under this depth plan keys and values depend on the tokens behind them, so that saved ones "
    "would serve no other prompt"
)


@dataclass(slots=True, kw_only=True, eq=False)
class _Saving:
    """A save under way. `wanted` may become False in any thread."""

    facts: SessionFacts
    held: HeldCells
    began: float
    wanted: bool = True
    started: bool = False
    future: Future[None] | None = None


@dataclass(slots=True)
class _Counts:
    """What happened so far; any thread changes it under the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    numbers: Counter[str] = field(default_factory=Counter)
    last_error: str | None = None

    def add(self, error: str | None = None, **numbers: int) -> None:
        with self.lock:
            self.numbers.update(numbers)
            self.last_error = error or self.last_error


class Sessions(Closing):
    """Restores and saves for a Scheduler. The engine thread owns it, but for list and remove."""

    def __init__(
        self, loaded: "LoadedModel", folder: SessionFolder, prefix: PrefixCache, n_ubatch: int,
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        """Begin.

        Args:
            loaded: the model; its ledger has an entry for what is staged.
            folder: where sessions are.
            prefix: of the model.
            n_ubatch: prefill batch.
            wake: called from other threads when something that was waited for is done.
        """
        self.folder = folder
        self.gauge = RestoreGauge()
        self._kv, self._prefix, self._n_ubatch, self._wake = loaded.kv, prefix, n_ubatch, wake
        self._copies = Copies(wake, direct=loaded.kv.is_host)
        self._work = SessionWork(loaded, folder, self._copies)
        self._reader = ThreadPoolExecutor(1, "edgeroute-session-read")
        self._writer = ThreadPoolExecutor(1, "edgeroute-session-write")
        self._saving: list[_Saving] = []
        self._lock = threading.Lock()  # over `_saving`, which `remove` reads too
        self._counts = _Counts()

    # a request's life, on the engine thread

    def has_arrived(self, request: Request, key: str | None) -> bool:
        """Whether nothing of a request's session is waited for any more.

        Args:
            request: whose adapters are there, and whose depth is chosen.
            key: what its cells depend on, as the prefix cache has it.
        """
        visit = request.visit
        if request.session is None:
            return True
        if visit is None:
            visit = request.visit = self._begin(request, request.session, key)
        if visit.settled or visit.look is None:
            return True
        if visit.load is not None:
            if visit.load.done():
                self._land(visit, visit.load)
            elif self._is_late(visit):
                self._give_up(visit, "reading it took longer than computing its tokens would")
        elif visit.look.done():
            return self._decide(request, visit, _found(visit.look))
        elif self._is_late(visit):
            self._settle(visit, "the disk did not answer in time")
        return visit.settled

    def take(self, request: Request, key: str | None) -> Sequence | None:
        """Return a request's restored cells, if it has some that are still what it wants."""
        visit = request.visit
        if visit is None:
            return None
        sequence, visit.sequence = visit.sequence, None
        if sequence is not None and key != visit.key:
            self._prefix.drop(sequence)
            visit.restored_tokens = 0
            sequence = None
        if key != visit.key:
            visit.not_restored = visit.saved = "its depth plan was given up meanwhile"
            visit.facts = visit.look = None
        elif sequence is None and not visit.settled:
            self._settle(visit, "there was no room for its cells")
        return sequence

    def blocked(self) -> None:
        """A request found no cells: saves that hold some for too long let go of them."""
        now = time.monotonic()
        for saving in self._under_way():
            if saving.held.active and now - saving.began > PATIENCE_S:
                saving.held.let_go()

    def end(self, request: Request) -> None:
        """Let go of what a request holds but its sequence, and learn from what it took."""
        if request.first_token is not None:
            n_computed = len(request.prompt_ids) - request.n_cached
            self.gauge.saw_prefill(n_computed, request.prefill_s)
        visit = request.visit
        if visit is not None and not visit.settled:
            self._give_up(visit, "it ended before that was read")
        if visit is not None and visit.sequence is not None:  # restored, and never opened
            self._prefix.drop(visit.sequence)
            visit.sequence = None

    def save(self, request: Request, sequence: Sequence) -> HeldCells | None:
        """Begin to save a finished request's cells.

        Returns:
            What the prefix cache must keep in place meanwhile; None where nothing is saved.
        """
        visit = request.visit
        if visit is None:
            return None
        if visit.facts is None and visit.look is not None and visit.look.done():  # late
            visit.facts = _found(visit.look).facts
        why = self._why_not_saved(visit, sequence)
        if why is not None or visit.facts is None:
            visit.saved = why or visit.saved
            return None
        n = sequence.n_past
        held = HeldCells(self._kv, sequence.region)
        saving = _Saving(facts=visit.facts, held=held, began=time.monotonic())
        with self._lock:
            self._replace_waiting(saving)
            self._saving.append(saving)
        tokens = np.array(sequence.tokens[:n], np.int32)
        classes = np.frombuffer(bytes(sequence.classes[:n]), np.uint8)
        saving.future = self._writer.submit(self._save, saving, tokens, classes)
        visit.saved = True
        return held

    def advance(self) -> None:
        """Do what only the engine thread may do for the others: one copy at most."""
        self._copies.advance()

    # from any thread

    def all_saved(self) -> list[SavedSession]:
        """List this model's saved sessions, newest first."""
        return [each for each in self.folder.sessions() if each.model == self._work.model]

    def remove(self, name: str) -> int:
        """Delete a session of this model, and what is being saved of it; return how many files."""
        for saving in self._under_way():
            if saving.facts.name == name:
                saving.wanted = False
                saving.held.let_go()
        return self.folder.remove(name, self._work.model)

    def stats(self) -> dict[str, object]:
        """Return what was saved and restored so far, and at which speed, as plain JSON types."""
        counts, gauge = self._counts, self.gauge
        names = ("saved", "failed", "restored", "refused", "restored_tokens", "read_bytes",
                 "written_bytes")  # fmt: skip
        with counts.lock:
            found: dict[str, object] = {name: counts.numbers[name] for name in names}
            error = counts.last_error
        return found | {
            "pending": len(self._under_way()),
            "last_error": error,
            "not_worth_it": gauge.n_refused,
            "read_bytes_s": None if gauge.read_bytes_s is None else round(gauge.read_bytes_s),
            "prefill_tok_s": None if gauge.prefill_tok_s is None else round(gauge.prefill_tok_s, 3),
        }

    def close(self) -> None:
        """Wait for saves, within bounds, and end the threads; safe to call twice."""
        end = time.monotonic() + CLOSE_S
        while (pending := self._under_way()) and time.monotonic() < end:
            self._copies.advance()
            time.sleep(CLOSE_POLL_S)
        for saving in pending:
            saving.held.let_go()
        self._copies.close()
        # Threads that a disk holds up must not hold up this one: they have no cells any more.
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=not pending, cancel_futures=True)

    # restoring

    def _begin(self, request: Request, name: str, key: str | None) -> Visit:
        visit = Visit(name=name, key=key, began=time.monotonic(), patience_s=LOOK_S)
        depth = request.depth
        if depth is not None and (depth.key is None or not isinstance(depth, Depth)):
            visit.not_restored = visit.saved = UNKNOWN
            visit.settled = True
            return visit
        visit.wanted = Wanted(
            name=name, lease=request.lease, depth=depth,
            prompt=np.array(request.prompt_ids, np.int32), mode=request.prefix,
            n_ubatch=self._n_ubatch,
        )  # fmt: skip
        visit.look = self._reader.submit(self._work.look, visit.wanted)
        visit.look.add_done_callback(lambda _: self._wake())
        return visit

    def _decide(self, request: Request, visit: Visit, look: Look) -> bool:
        """Begin to restore, where that is worth it; whether the request need not wait."""
        visit.facts = look.facts
        if look.facts is None:
            visit.saved = look.why or visit.saved
        why = look.why or self._why_not_read(request, visit, look)
        if why is not None:
            self._settle(visit, why)
            return True
        sequence = self._prefix.open(list(request.prompt_ids), request.n_cells, "off", visit.key)
        if sequence is None or look.facts is None or visit.wanted is None:
            return True  # the scheduler will find none either, and ask again
        visit.sequence, visit.held = sequence, HeldCells(self._kv, sequence.region)
        likely_s = self.gauge.compute_s(look.n_cells)
        visit.patience_s = RESTORE_MAX_S
        if likely_s is not None:
            visit.patience_s = min(RESTORE_MAX_S, max(RESTORE_MIN_S, likely_s))
        visit.patience_s += time.monotonic() - visit.began
        visit.load = self._reader.submit(self._work.restore, visit.wanted, look.facts, visit.held)
        visit.load.add_done_callback(lambda _: self._wake())
        return False

    def _why_not_read(self, request: Request, visit: Visit, look: Look) -> str | None:
        n_kept = self._prefix.longest(request.prompt_ids, request.prefix, visit.key)
        if n_kept >= look.n_cells:
            return f"{n_kept} tokens of the prompt are in memory, {look.n_cells} are saved"
        return self.gauge.why_not(look.n_cells - n_kept, look.n_bytes)

    def _land(self, visit: Visit, load: Future[Restored]) -> None:
        """Make cells that were read part of the request's sequence."""
        error = load.exception()
        sequence = visit.sequence
        if error is not None or sequence is None:
            told = str(error) if isinstance(error, SessionFileError) else f"it failed: {error!r}"
            self._give_up(visit, told)
            return
        done = load.result()
        sequence.n_past, sequence.classes = done.n_cells, bytearray(done.classes)
        self._prefix.n_reused_cells += done.n_cells
        self.gauge.saw_read(done.n_bytes, done.seconds)
        visit.restored_tokens, visit.n_bytes = done.n_cells, done.n_bytes
        visit.restore_s = time.monotonic() - visit.began
        visit.settled = True
        self._counts.add(restored=1, restored_tokens=done.n_cells, read_bytes=done.n_bytes)

    def _is_late(self, visit: Visit) -> bool:
        return time.monotonic() - visit.began > visit.patience_s

    def _give_up(self, visit: Visit, why: str) -> None:
        """Take the region back from whoever reads into it."""
        if visit.held is not None:
            visit.held.let_go()
        if visit.load is not None:
            visit.load.cancel()
        if visit.sequence is not None:
            self._prefix.drop(visit.sequence)
            visit.sequence = None
        self._settle(visit, why)

    def _settle(self, visit: Visit, why: str) -> None:
        visit.not_restored, visit.settled = why, True
        self._counts.add(refused=1)

    # saving

    def _why_not_saved(self, visit: Visit, sequence: Sequence) -> str | None:
        n = sequence.n_past
        if visit.facts is None:
            return visit.saved if isinstance(visit.saved, str) else UNKNOWN
        if n < MIN_REUSE:
            return f"{n} tokens are fewer than the {MIN_REUSE} that are worth a file"
        n_bytes = n * self._kv.shape.bytes_per_cell
        if n_bytes > self.folder.limit_bytes:
            return (f"it takes {format_bytes(n_bytes)}, over the limit of "
                    f"{format_bytes(self.folder.limit_bytes)}; raise sessions_bytes")  # fmt: skip
        if len(self._under_way()) >= MAX_SAVING:
            return f"{MAX_SAVING} saves are under way already; the disk is too slow for more"
        return None

    def _under_way(self) -> list[_Saving]:
        """List the saves that are not done; forget the others."""
        with self._lock:
            self._saving = [
                each for each in self._saving if each.future is None or not each.future.done()
            ]
            return [*self._saving]

    def _replace_waiting(self, saving: _Saving) -> None:
        """Drop a save of the same session that has not begun."""
        for other in self._saving:
            if other.facts == saving.facts and not other.started:
                other.wanted = False
                other.held.let_go()

    def _save(self, saving: _Saving, tokens: Tokens, classes: Classes) -> None:
        """On the writing thread: save, and count what came of it."""
        saving.started = True
        if not saving.wanted:
            return
        try:
            n_bytes = self._work.save(
                saving.facts, tokens, classes, saving.held, lambda: saving.wanted
            )
        except Exception as error:  # told in the statistics: nobody waits for it
            if saving.wanted:
                self._counts.add(f"{saving.facts.name}: {error or error!r}", failed=1)
        else:
            self._counts.add(saved=1, written_bytes=n_bytes)
        finally:
            saving.held.let_go()
            self._wake()


def _found(look: Future[Look]) -> Look:
    """Return what a look found, also where it failed as nobody expected."""
    error = look.exception()
    return look.result() if error is None else Look(None, 0, 0, f"looking failed: {error!r}")


def open_sessions(
    loaded: "LoadedModel", params: RunParams, prefix: PrefixCache, wake: Callable[[], None]
) -> Sessions:
    """Open what keeps the sessions of a Runtime that was given a folder for them.

    Args:
        loaded: the model.
        params: settings.
        prefix: of the model.
        wake: see Sessions.
    """
    given = params.sessions_bytes
    limit = DEFAULT_BYTES if given is None else parse_bytes(given)
    folder = SessionFolder(Path(params.sessions or ""), limit)
    found = Sessions(loaded, folder, prefix, params.n_ubatch, wake)
    loaded.before_close(found.close)
    return found
