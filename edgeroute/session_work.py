"""What is done for saved sessions beside the engine thread: look, read, check, write."""

import functools
import hashlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from edgeroute.device_loss import devices_at_risk
from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.errors import AdapterFileError, SessionFileError
from edgeroute.runtime.held_cells import Bytes, HeldCells
from edgeroute.runtime.kv_cache import KvShape, all_finite
from edgeroute.runtime.numerics import numerics
from edgeroute.runtime.prefix import reusable
from edgeroute.runtime.records import PrefixMode
from edgeroute.runtime.sequence import Classes
from edgeroute.runtime.session_file import BLOCK_BYTES, SessionFacts, SessionReader, Tokens
from edgeroute.runtime.session_writer import SessionWriter
from edgeroute.session_folder import SessionFolder

if TYPE_CHECKING:
    from edgeroute.depth import Depth
    from edgeroute.loaded import LoadedModel
    from edgeroute.offload.adapter_store import Lease

N_STAGED: Final = 3
"""Blocks in memory at most: one that is read, a part of it, one that is written."""


def staging_bytes(shape: KvShape) -> int:
    """Bytes that saving and restoring take in memory."""
    return N_STAGED * max(BLOCK_BYTES, shape.bytes_per_cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a request asks of its session.

    Attributes:
        name: of the session.
        lease: the adapters that it is computed under.
        depth: the plan that it is computed under.
        prompt: int32 (n_prompt,).
        mode: what may be reused.
        n_ubatch: prefill batch.
    """

    name: str
    lease: "Lease | None"
    depth: "Depth | None"
    prompt: Tokens
    mode: PrefixMode
    n_ubatch: int

    def reusable(self, tokens: Tokens, classes: Classes) -> int:
        """Count the saved cells that may serve it."""
        return reusable((tokens, classes), self.prompt, self.mode, self.n_ubatch)


class Look(NamedTuple):
    """What was found: cells that may serve, bytes to read for them, or why there are none.

    `facts` are what the file depends on; None where it can be neither read nor written.
    """

    facts: SessionFacts | None
    n_cells: int
    n_bytes: int
    why: str | None


class Restored(NamedTuple):
    """Cells that are in the cache now, how they were computed, and what reading them took."""

    n_cells: int
    classes: bytes
    n_bytes: int
    seconds: float


class Copies:
    """Lets other threads copy cells: themselves, or by the engine thread.

    Host memory any thread may copy. A device's the engine thread copies between two of its
    passes, a block at a time.
    """

    def __init__(self, wake: Callable[[], None], *, direct: bool) -> None:
        self._wake, self._direct = wake, direct
        self._lock = threading.Lock()
        self._closed = False
        self._orders: queue.SimpleQueue[tuple[Callable[[], bool], Future[bool]]]
        self._orders = queue.SimpleQueue()

    def run(self, copy: Callable[[], bool]) -> bool:
        """Have a copy made and return what it returns; False once this is closed."""
        if self._direct:
            return copy()
        done: Future[bool] = Future()
        with self._lock:
            if self._closed:
                return False
            self._orders.put((copy, done))
        self._wake()
        return done.result()

    def advance(self) -> None:
        """On the engine thread: make one copy, if one is asked for."""
        if self._orders.empty():
            return
        copy, done = self._orders.get()
        try:
            done.set_result(copy())
        except Exception as error:  # the asker's
            done.set_exception(error)

    def close(self) -> None:
        """Refuse all that is asked for and not done; safe to call twice."""
        with self._lock:
            self._closed = True
        while not self._orders.empty():
            self._orders.get()[1].set_result(False)


class SessionWork:
    """Reads and writes sessions of one model. Each method belongs to one thread, see Sessions."""

    def __init__(self, loaded: "LoadedModel", folder: SessionFolder, copies: Copies) -> None:
        self._loaded, self._folder, self._copies = loaded, folder, copies
        self._kv = loaded.kv
        self._devices = devices_at_risk(loaded)
        self._adapters: dict[tuple[str, int], str] = {}
        self._plans: dict[str, str] = {}

    @functools.cached_property
    def model(self) -> str:
        """Fingerprint of the model's file."""
        return fingerprint(self._loaded.file)

    # the reading thread

    def look(self, wanted: Wanted) -> Look:
        """See what is saved of a session, and whether it could serve."""
        facts: SessionFacts | None = None
        try:
            facts = self._facts(wanted)
            with SessionReader(self._folder.file_of(facts), self._kv.n_cells) as reader:
                head = reader.head
            head.check(facts)
            if head.cell_bytes != self._kv.shape.bytes_per_cell:
                raise SessionFileError("the saved session has cells of another size")
            n_cells = wanted.reusable(head.tokens, head.classes)
            if not n_cells:
                return Look(facts, 0, 0, _why_none(wanted))
            first, n_last = head.block(head.n_blocks(n_cells) - 1)
            return Look(facts, n_cells, (first + n_last) * head.cell_bytes, None)
        except (SessionFileError, AdapterFileError) as error:
            return Look(facts, 0, 0, str(error))
        except OSError as error:
            return Look(facts, 0, 0, f"the model's file cannot be read: {error.strerror}")

    def restore(self, wanted: Wanted, facts: SessionFacts, held: HeldCells) -> Restored:
        """Read cells into the cache, each block checked before.

        Raises:
            SessionFileError: they are damaged, were replaced, or were let go meanwhile.
        """
        began, path = time.perf_counter(), self._folder.file_of(facts)
        with SessionReader(path, self._kv.n_cells) as reader:
            head = reader.head
            head.check(facts)
            n_cells = wanted.reusable(head.tokens, head.classes)
            if head.cell_bytes != self._kv.shape.bytes_per_cell or not n_cells:
                raise SessionFileError("the saved session was replaced meanwhile")
            reader.expect(n_cells)
            n_bytes = 0
            for i in range(head.n_blocks(n_cells)):
                data = reader.read_block(i, self._read_buffer)
                if not all_finite(data, self._kv.shape.kv_type):
                    raise SessionFileError("the saved session has values that are no numbers")
                n_bytes += data.nbytes
                first, n = head.block(i)
                n = min(n, n_cells - first)
                part = self._kv.first_cells(data, n)
                if not self._copies.run(functools.partial(held.write, first, n, part)):
                    raise SessionFileError("the request did not wait for the saved session")
        self._folder.touch(path)
        classes = head.classes[:n_cells].tobytes()
        return Restored(n_cells, classes, n_bytes, time.perf_counter() - began)

    # the writing thread

    def save(
        self, facts: SessionFacts, tokens: Tokens, classes: Classes, held: HeldCells,
        wanted: Callable[[], bool],
    ) -> int:  # fmt: skip
        """Write cells to disk; lets go of them as soon as they are copied.

        Args:
            facts: whose they are.
            tokens: of the cells.
            classes: how they were computed.
            held: where they are.
            wanted: asked before it counts: False, and it is not kept.

        Returns:
            Bytes of the file.

        Raises:
            SessionFileError: the cells were let go by others, or it is not wanted any more.
            OSError: the disk is full, or fails.
            DeviceLostError: the device is gone that had the cells.
        """
        size = self._kv.shape.bytes_per_cell
        with SessionWriter(self._folder.new_part(), facts, tokens, classes, size) as writer:
            step = len(self._write_buffer) // size
            for first in range(0, len(tokens), step):
                n = min(step, len(tokens) - first)
                part = self._write_buffer[: n * size]
                if not self._copies.run(functools.partial(held.read, first, n, part)):
                    raise SessionFileError("the save was given up: others needed its cells")
                writer.add(part)
            held.let_go()
            for device in self._devices:
                device.check()  # else what was copied may be zeros
            if not wanted():
                raise SessionFileError("the session was removed or saved anew meanwhile")
            path = self._folder.file_of(facts)
            writer.commit(path)
            if not wanted():  # it was removed in just this moment
                path.unlink(missing_ok=True)
                raise SessionFileError("the session was removed meanwhile")
        self._folder.make_room(path)
        return writer.n_bytes

    # what cells depend on

    @functools.cached_property
    def _read_buffer(self) -> Bytes:
        return self._new_buffer()

    @functools.cached_property
    def _write_buffer(self) -> Bytes:
        return self._new_buffer()

    def _new_buffer(self) -> Bytes:
        size = self._kv.shape.bytes_per_cell
        return np.empty(max(1, BLOCK_BYTES // size) * size, np.uint8)

    @functools.cached_property
    def _numerics(self) -> str:
        weights = self._loaded.plan.weights
        return numerics(self._loaded.device, weights.repacked, weights.plain)

    def _facts(self, wanted: Wanted) -> SessionFacts:
        """Tell what a request's cells depend on.

        Raises:
            AdapterFileError: an adapter cannot be read any more.
            OSError: nor can the model's file.
        """
        return SessionFacts(
            name=wanted.name, model=self.model, adapter=self._adapter(wanted.lease),
            plan=self._plan(wanted.depth) + self._misses, shape=repr(self._kv.shape),
            numerics=self._numerics,
        )  # fmt: skip

    @property
    def _misses(self) -> str:
        """Tell what tokens of answers may do without, if anything."""
        return "".join(f"|{name}={value!r}" for name, value in self._loaded.params.lossy.items())

    def _adapter(self, lease: "Lease | None") -> str:
        """Tell the adapters by name, contents and factor: names alone may be used again."""
        if lease is None or not lease.pages:
            return ""
        adapters = self._loaded.adapters
        rank = 0 if adapters is None else adapters.store.slots.rank  # how sums are split
        parts = []
        for page, weight in zip(lease.pages, lease.weights, strict=True):
            key = (page.name, page.version)
            if key not in self._adapters:
                found = hashlib.blake2b(digest_size=16)
                for pair, a, b in page.source.read():
                    found.update(
                        repr((pair.name, pair.n_in, pair.n_out, pair.rank, pair.scale)).encode()
                    )
                    found.update(a.tobytes())
                    found.update(b.tobytes())
                self._adapters[key] = found.hexdigest()
            parts.append(f"{page.name}:{self._adapters[key]}*{weight!r}@{rank}")
        return "+".join(parts)

    def _plan(self, depth: "Depth | None") -> str:
        """Tell the depth plan: what it computes, and where its stand-ins come from."""
        if depth is None or not depth.key:
            return ""
        if depth.standins is None:
            return depth.key
        if depth.key not in self._plans:
            self._plans[depth.key] = fingerprint(depth.standins.file)
        return f"{depth.key}@{self._plans[depth.key]}"


def _why_none(wanted: Wanted) -> str:
    if wanted.mode == "off":
        return "nothing may be reused: prefix is off"
    if wanted.mode == "exact":
        return "the prompt does not begin with what is saved, as far as a fresh run's bits go"
    return "the prompt does not begin with what is saved"
