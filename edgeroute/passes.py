"""Passes over a model for the requests of a scheduler: computed, timed, and entered in books."""

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from edgeroute.models.forward import Forward, Piece
from edgeroute.offload.counters import LayerCount
from edgeroute.request import Request, stoppable
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.ledger import COMPUTE_BUFFER, Ledger
from edgeroute.runtime.threads import ThreadPolicy

if TYPE_CHECKING:
    from edgeroute.adapters import Adapters
    from edgeroute.energy_book import EnergyBook
    from edgeroute.models.ahead import Computed
    from edgeroute.offload.device_tier import DeviceTier
    from edgeroute.offload.expert_store import ExpertStore
    from edgeroute.offload.layer_store import LayerStore
    from edgeroute.run_ahead import RunAhead
    from edgeroute.step_routing import StepRouting

Logits = npt.NDArray[np.float32]
Found = TypeVar("Found")


class Passes(ABC):
    """Computes batches over one Forward. Not thread-safe: the engine thread owns it.

    Attributes:
        before_pass: called before each; what was said so far leaves then at the latest.
        devices: those that may be lost.
        compute_ledger: account of the memory that graphs are computed in.
    """

    def __init__(
        self, forward: Forward, ledger: Ledger, threads: ThreadPolicy, *,
        experts: "ExpertStore | DeviceTier | None", layers: "LayerStore | None",
        adapters: "Adapters | None",
    ) -> None:  # fmt: skip
        self.forward = forward
        self.threads = threads
        self.adapters = adapters
        self.steps: StepRouting | None = None
        self.energy: EnergyBook | None = None
        self.devices: tuple[Device, ...] = ()
        self.compute_ledger = ledger
        self.before_pass: Callable[[], None] = _nothing
        self.n_decode_steps = 0
        self.n_decode_tokens = 0
        self._experts = experts
        self._layers = layers
        self._stores = [store for store in (experts, layers) if store is not None]
        self._compute_bytes = forward.graphs.n_bytes

    @abstractmethod
    def fail(self, request: Request, error: BaseException) -> None:
        """End a request that runs by itself with an error.

        Raises:
            DeviceLostError: a device is gone; the request may go on elsewhere.
        """

    def check(self) -> None:
        """Raise DeviceLostError where a device is gone: what was read from it since is void."""
        for device in self.devices:
            device.check()

    def spent(self) -> tuple[LayerCount | None, dict[str, int | float] | None]:
        """Return what experts and layers that come and go have cost so far."""
        experts = None if self._experts is None else self._experts.spent()
        return experts, None if self._layers is None else self._layers.stats()

    def stalled_s(self) -> float:
        """Seconds spent waiting for a disk so far, which no number of threads would change."""
        return sum([store.stalled_s for store in self._stores]) if self._stores else 0.0

    def run_pass(self, pieces: list[Piece], batch: list[Request]) -> Logits | None:
        """Compute a decode pass, and let the number of threads follow what it took."""
        began = time.perf_counter() - self.stalled_s()
        logits = self._run(pieces, batch)
        if logits is not None:
            self.threads.observe(len(pieces), time.perf_counter() - self.stalled_s() - began)
        return logits

    def run_several(
        self, pieces: list[Piece], batch: list[Request], n: int, ahead: "RunAhead"
    ) -> "list[Computed] | None":
        """Compute `n` tokens of each request of a batch, as `run_pass` computes one."""
        began = time.perf_counter()
        found = self._computed(pieces, batch, lambda: ahead.run(pieces, n))
        if found is not None:
            self.threads.observe(len(pieces), (time.perf_counter() - began) / n)
        return found

    def compute(
        self, request: Request, piece: Piece, spans: tuple[Span, ...] | None = None
    ) -> Logits | None:
        """Compute a piece for a request that runs by itself; None when that failed or stopped."""
        if len(piece.tokens) == 1 and spans is None:
            self.n_decode_steps += 1
            self.n_decode_tokens += 1
            return self.run_pass([piece], [request])
        return self.prefill_pass([request], [piece], spans)

    def prefill_pass(
        self, requests: list[Request], pieces: list[Piece], spans: tuple[Span, ...] | None = None
    ) -> Logits | None:
        """Compute batches of prompts, a piece of each request's; see `stoppable` for what stops it.

        Those of several requests are computed by the same depth plan.
        """
        self.threads.before_prefill()
        with stoppable(requests, self.forward.device):
            return self._run(pieces, requests, spans)

    def _run(
        self, pieces: list[Piece], requests: list[Request], spans: tuple[Span, ...] | None = None
    ) -> Logits | None:
        """Run a batch; None when it was stopped, or its requests were failed."""
        depth = requests[0].depth  # the same for all of them
        if depth is None or spans is not None:
            compute = functools.partial(self.forward.run, pieces, spans, borrow=True)
        else:
            compute = functools.partial(depth.run, self.forward, pieces)
        return self._computed(pieces, requests, compute)

    def _computed(
        self, pieces: list[Piece], requests: list[Request], compute: "Callable[[], Found | None]"
    ) -> "Found | None":
        """Compute a batch and enter it in books; a failed one fails its own requests only."""
        self.before_pass()
        self.forward.device.set_threads(self.threads.n_threads)
        began = time.perf_counter()
        try:
            found = compute()
            self.check()
            if self.adapters is not None or self.steps is not None:
                self._book_compute()
            if self.steps is not None and found is not None:
                n_tokens = sum(len(piece.tokens) for piece in pieces)
                self.steps.saw(n_tokens, time.perf_counter() - began)
            if self.energy is not None:
                self.energy.passed(pieces, requests, time.perf_counter() - began)
            return found
        except EdgerouteError as error:
            for request in requests:
                self.fail(request, error)
            return None

    def _book_compute(self) -> None:
        """Enter what a mixture of adapters, or a draft's logits, made the compute buffer grow to.

        Raises:
            CapacityError: that is over the budget.
        """
        n_bytes = self.forward.graphs.n_bytes
        if n_bytes != self._compute_bytes:
            self.compute_ledger.replace(COMPUTE_BUFFER, n_bytes)
            self._compute_bytes = n_bytes


def _nothing() -> None:
    """Nobody is to be told before a pass."""
