"""The adapters of one Runtime: which there are, slots for a few, and what requests ask for."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgeroute.adapter_routing import POLICIES, AdapterRouting, RoutingSetup, state_path
from edgeroute.config import RunParams
from edgeroute.models.adapter_file import AdapterFile, base_shapes, find_adapters, open_adapter
from edgeroute.models.adapter_groups import group_targets
from edgeroute.models.base import Model
from edgeroute.models.forward import Forward
from edgeroute.offload.adapter_load import n_blocks, targets_of
from edgeroute.offload.adapter_store import MAX_SLOTS_PER_TOKEN, AdapterStore
from edgeroute.request import Request
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.ledger import Ledger
from edgeroute.runtime.lora import LoraSlots, LoraTarget

LEDGER_OWNER = "adapter slots"
DEFAULT_RESIDENT = 8
"""Adapters in memory at once, where no number is given and the budget allows."""
BUDGET_SHARE = 0.1
"""Of the budget, what adapters take at most where no number is given; one always fits."""
RANK_STEP, MAX_SLOT_RANK, EMPTY_RANK = 8, 64, 16
MAX_WEIGHT = 100.0
ALIGNMENT = 128  # at least what any backend asks for between tensors

LedgerOf = Callable[[Device], Ledger]
"""Gives the account of a device's memory."""
Mixture = Mapping[str, float]
Asked = Mixture | str | None
"""What a request asks for: adapters with factors, `auto` or `auto:mix`, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """A library opened, and the slots it gets.

    Attributes:
        files: the adapters.
        rank: rows of one slot; adapters of a higher rank take several.
        n_slots: slots.
        n_resident: adapters of the largest kind that these hold.
        n_used: slots that one of the largest kind takes.
        targets: the weights that any of them changes.
        state: where what the router learns is kept; None for nowhere.
    """

    files: tuple[AdapterFile, ...]
    rank: int
    n_slots: int
    n_resident: int
    n_used: int
    targets: tuple[LoraTarget, ...]
    state: Path | None

    @property
    def n_bytes(self) -> int:
        """Bytes of the slot tensors, the slot of zeros and alignment included."""
        return slots_bytes(self.targets, self.rank, self.n_slots)

    def compute_bytes(self, n_ubatch: int) -> int:
        """Bound what one adapter's products take in the compute buffer, beside the model's."""
        widest = max((target.n_out for target in self.targets), default=0)
        return 4 * n_ubatch * self.n_used * 2 * widest


def plan_adapters(
    file: Path, model: Model, params: RunParams, budget_bytes: int
) -> AdapterPlan | None:
    """Open the adapters that a Runtime is given and size their slots; None without any.

    Args:
        file: the model's.
        model: what they must fit.
        params: names them.
        budget_bytes: of the whole runtime.

    Raises:
        AdapterFileError: one of them cannot be used with this model.
    """
    if params.adapters is None:
        return None
    base = base_shapes(model)
    files = tuple(open_adapter(path, base) for path in find_adapters(params.adapters))
    ranks = [pair.rank for each in files for pair in each.tensors] or [EMPTY_RANK]
    # At least so high that the highest is not in more slots than a request may use.
    least = min(MAX_SLOT_RANK, max(min(ranks), max(ranks) / MAX_SLOTS_PER_TOKEN))
    rank = math.ceil(least / RANK_STEP) * RANK_STEP
    blocks = max((n_blocks(each, rank) for each in files), default=1)
    targets = tuple(sorted({target for each in files for target in targets_of(each)}))
    n_resident = params.adapter_slots or min(DEFAULT_RESIDENT, len(files) or DEFAULT_RESIDENT)
    if params.adapter_slots is None:
        slot_bytes = blocks * LoraSlots.bytes_per_slot(targets, rank)
        share = BUDGET_SHARE * budget_bytes
        while n_resident > 1 and (n_resident + 1) * slot_bytes > share:
            n_resident -= 1
    return AdapterPlan(
        files=files, rank=rank, n_slots=blocks * n_resident, n_resident=n_resident, n_used=blocks,
        targets=targets, state=state_path(file, params.adapter_state),
    )  # fmt: skip


def slots_bytes(targets: Sequence[LoraTarget], rank: int, n_slots: int) -> int:
    """Bound the bytes of slot tensors, the slot of zeros and alignment included."""
    return (n_slots + 1) * LoraSlots.bytes_per_slot(targets, rank) + 2 * ALIGNMENT * len(targets)


class Host(NamedTuple):
    """What the library needs of the engine.

    `wake` is called from the loading thread when an adapter has arrived; `encode` turns a
    prompt into token ids.
    """

    wake: Callable[[], None]
    encode: Callable[[str], list[int]]


class Adapters(Closing):
    """The library while a model runs. The engine thread owns it."""

    def __init__(
        self, forward: Forward, ledger_of: LedgerOf, plan: AdapterPlan, host: Host
    ) -> None:
        """Make the slots and let `forward` use them.

        Args:
            forward: the model.
            ledger_of: each device's has an entry for its slots as planned.
            plan: the library.
            host: what it needs of the engine.

        Raises:
            CapacityError: no memory for the slots.
        """
        self.base = base_shapes(forward.model)
        self._forward = forward
        self._ledger_of = ledger_of
        self._slots = LoraSlots(forward.device_of, plan.rank, plan.n_slots)
        self.store = AdapterStore(self._slots, host.wake)
        spare = 0 if plan.n_resident >= len(plan.files) else 1  # for what only passes through
        hp = forward.model.hparams
        try:
            self.routing = AdapterRouting(self.store, forward.embed, RoutingSetup(
                n_embd=hp.n_embd, encode=host.encode, n_resident=plan.n_resident - spare,
                identities={file.name: _identity(file) for file in plan.files}, state=plan.state,
            ))  # fmt: skip
            self._slots.extend(group_targets(plan.targets))
            for file in plan.files:
                self.store.add(file)
            self._book()
        except BaseException:
            self._free()
            raise
        forward.lora, forward.lora_width = self._slots, plan.n_used

    def open(self, path: str | Path) -> AdapterFile:
        """Check an adapter against this model; any thread may call it.

        Raises:
            AdapterFileError: it cannot be used.
        """
        return open_adapter(path, self.base)

    def add(self, file: AdapterFile) -> None:
        """Put an adapter into the library, in place of one of the same name.

        Raises:
            CapacityError: it does not fit the slots or, changing other weights than those
                there are slots for, the budget. The library is as before.
        """
        self.store.check_size(file)
        new = set(targets_of(file)) - {t for t in targets_of(file) if t.name in self._slots.names}
        if new:
            self._extend(new)
        self.store.add(file)
        self.routing.add(file.name, _identity(file))

    # requests, on the engine thread

    def hold(self, request: Request) -> bool:
        """Lease what a request asks for and begin to load it; False while there is no room.

        Raises:
            UsageError: the adapter was removed meanwhile.
            CapacityError: it can never fit.
        """
        if request.adapter is None or request.lease is not None:
            return True
        if isinstance(request.adapter, str):
            request.turn = self.routing.choose(request.prompt_ids, request.adapter)
            request.adapter = request.turn.mixture
        request.lease = self.store.lease(request.adapter)
        request.leased = time.monotonic()
        return request.lease is not None

    def has_arrived(self, request: Request) -> bool:
        """Whether all that a request leased is in its slots; then it may be computed.

        Raises:
            AdapterFileError: an adapter cannot be read.
        """
        lease = request.lease
        if lease is None:
            return True
        if not self.store.ready(lease):
            return False
        if not request.adapter_s:  # asked again where there are no cells yet
            request.adapter_s = time.monotonic() - request.leased
        request.lora = lease.row
        return True

    def release(self, request: Request) -> None:
        """Give back what a request leased; safe to call twice."""
        if request.lease is None or request.lease.released:
            return
        turn = request.turn
        if turn is not None and request.first_token is not None:
            self.routing.remember(request.id, turn)
            self.routing.paid(turn, request.adapter_s + _prefill_again_s(request))
        self.store.release(request.lease)

    def remove(self, name: str) -> None:
        """Take an adapter out of the library; requests that use it keep it to their end.

        Raises:
            UsageError: there is none of that name.
        """
        self.store.remove(name)
        self.routing.remove(name)

    def stats(self) -> dict[str, object]:
        """Return what is where, and what the router has done, as plain JSON types."""
        return self.store.stats() | {"auto": self.routing.stats()}

    def _extend(self, targets: set[LoraTarget]) -> None:
        label = f"{LEDGER_OWNER} (added)"
        with contextlib.ExitStack() as entered:
            for device, mine in self._slots.by_device(targets).items():
                more = slots_bytes(mine, self._slots.rank, self._slots.n_slots)
                ledger = self._ledger_of(device)
                ledger.reserve({label: more})
                entered.callback(ledger.release, label)
            self._slots.extend(group_targets(targets))
        self._book()
        self._forward.graphs.clear()

    def _book(self) -> None:
        """Enter what the slots really take instead of what was planned."""
        for device in self._slots.devices:
            self._ledger_of(device).replace(LEDGER_OWNER, self._slots.bytes_on(device))

    def close(self) -> None:
        """Save what was learned, let a running load end, free the slots; safe to call twice."""
        self._forward.lora = None
        try:
            self.routing.save()
        finally:
            self._free()

    def _free(self) -> None:
        self.store.close()
        self._slots.close()


def _identity(file: AdapterFile) -> str:
    """Tell an adapter's file from its successor."""
    n_bytes, mtime_ns, *_ = file.identity
    return f"{n_bytes}-{mtime_ns}"


def _prefill_again_s(request: Request) -> float:
    """Estimate what computing those tokens took whose cells another adapter's request left."""
    n_computed = len(request.prompt_ids) - request.n_cached
    n_again = max(0, request.n_common - request.n_cached)
    return request.prefill_s * min(1.0, n_again / n_computed)


def parse_adapter(value: object, known: Callable[[str], bool]) -> Asked:
    """Check what a request asks for.

    Args:
        value: a name, one of the router's POLICIES, None, or a mapping of names to factors.
        known: whether there is an adapter of that name.

    Raises:
        UsageError: it is none of these, an adapter is unknown, or a factor out of range.
    """
    if value is None or (isinstance(value, str) and value in POLICIES):
        return value
    pairs = {value: 1.0} if isinstance(value, str) else value
    if not isinstance(pairs, Mapping) or not 0 < len(pairs) <= MAX_SLOTS_PER_TOKEN:
        raise UsageError(
            f"adapter must be a name, {', '.join(POLICIES)}, None, or 1 to "
            f"{MAX_SLOTS_PER_TOKEN} names with a factor each, got {value!r:.200}"
        )
    found: dict[str, float] = {}
    for name, weight in pairs.items():
        if not isinstance(name, str) or not known(name):
            raise UsageError(
                f"there is no adapter {name!r:.80}; `edgeroute adapters list` shows those there are"
            )
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not abs(weight) <= MAX_WEIGHT:
            raise UsageError(
                f"the factor of adapter {name!r} must be a number up to {MAX_WEIGHT:g}, "
                f"got {weight!r:.80}"
            )
        found[name] = float(weight)
    return found
