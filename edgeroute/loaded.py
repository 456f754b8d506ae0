"""A model ready to run: file, vocabulary, device, weights and KV pool, under one ledger."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from edgeroute.config import RunParams
from edgeroute.devices_open import open_devices
from edgeroute.lever_choice import choose_levers
from edgeroute.memory_plan import MAX_BATCH as MAX_BATCH
from edgeroute.memory_plan import MAX_DRAFT as MAX_DRAFT
from edgeroute.memory_plan import RESERVE_MIN_BYTES as RESERVE_MIN_BYTES
from edgeroute.memory_plan import RESERVE_RATIO as RESERVE_RATIO
from edgeroute.memory_plan import MemoryPlan as MemoryPlan
from edgeroute.memory_plan import budget_bytes as budget_bytes
from edgeroute.memory_plan import kv_shape as kv_shape
from edgeroute.memory_plan import less_reserve as less_reserve
from edgeroute.memory_plan import plan_memory as plan_memory
from edgeroute.memory_plan import plan_parts as plan_parts
from edgeroute.memory_plan import resident_weights
from edgeroute.models.base import Model
from edgeroute.models.forward import Forward
from edgeroute.models.registry import describe
from edgeroute.opening import Opening
from edgeroute.row_bits import Rows, rows_of
from edgeroute.runtime.device import Device
from edgeroute.runtime.device_group import DeviceGroup
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.ledger import COMPUTE_BUFFER, Ledger
from edgeroute.runtime.plain_weights import PlainWeights
from edgeroute.runtime.weights import ResidentWeights

if TYPE_CHECKING:
    from edgeroute.adapters import AdapterPlan, Adapters
    from edgeroute.depth import DepthSource, NoDepth
    from edgeroute.offload.device_tier import DeviceTier
    from edgeroute.offload.expert_store import ExpertStore
    from edgeroute.offload.layer_store import LayerStore
    from edgeroute.paging import MoeSource
    from edgeroute.skippers.misses import MissLevers


class LoadedModel:
    """Everything one model owns, freed in reverse order by `close`.

    `params` are its settings, proofs of levers applied.

    Made, used and closed by the engine thread. An `opening` of the same path is taken over;
    `wake` is called from other threads when something that was waited for has arrived.

    Raises:
        ModelFileError, UnsupportedModelError: the file cannot be used.
        CapacityError: it does not fit; nothing stays allocated.
    """

    def __init__(
        self, path: Path, params: RunParams, opening: Opening | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        began = time.perf_counter()
        self._wake = wake
        self._owned = contextlib.ExitStack()
        try:
            self._load(self._owned.enter_context(opening or Opening(path)), params)
        except BaseException:
            self._owned.close()
            raise
        self.load_s = time.perf_counter() - began

    def _load(self, opening: Opening, params: RunParams) -> None:
        self.file = opening.file
        self.levers = choose_levers(opening.file, params, budget_bytes(params))
        params = self.params = self.levers.params
        self.small = self._load_small(opening, params)
        self._load_weights(params)  # while the vocabulary is being read
        self.tokenizer = opening.tokenizer
        self._book_compute()

    def _book_compute(self) -> None:
        """Enter what the compute buffers really take instead of what was planned."""
        self.compute_ledger.replace(COMPUTE_BUFFER, self.forward.graphs.n_bytes)

    def _load_small(self, opening: Opening, params: RunParams) -> "LoadedModel | None":
        """Open the small model first: what it takes is not there for this one."""
        self._beside_bytes = 0
        if params.small is None:
            return None
        from edgeroute.small import open_small

        process = psutil.Process()
        before = process.memory_info().rss
        opened = open_small(opening, params, self._wake)
        small = self._owned.enter_context(contextlib.closing(opened))
        self._beside_bytes = max(0, process.memory_info().rss - before)
        return small

    def _load_weights(self, params: RunParams) -> None:
        """Plan, enter in the ledger, then place weights, KV pool and compute buffer."""
        own = self._owned
        self.model: Model = describe(self.file)
        self.devices = own.enter_context(open_devices(params, self.file))
        self.device: Device = self.devices.face
        self.experts: ExpertStore | DeviceTier | None = None
        self.misses = self._plan_misses(params)
        self.layers: LayerStore | None = None
        self.adapters: Adapters | None = None
        self.ledger = Ledger(budget_bytes(params))
        self.ledgers = {self.devices.cpu.info.name: self.ledger}
        """Accounts of the devices' memory, by name; the first is this process's."""
        self.compute_ledger = self.ledger
        """The one that `forward.graphs` counts in."""
        self.warnings: tuple[str, ...] = ()
        """What the devices that were asked for cannot do."""
        if self.small is not None:
            from edgeroute.small import small_entries

            self.ledger.reserve(small_entries(self.small))
        self._adapter_plan = self._plan_adapters(params)
        self.depth, self.no_depth = self._plan_depth(params)
        if self.devices.accelerators and self._load_on_devices(params):
            return
        weights = self._plan_resident(params)
        own.callback(weights.close)
        self.plan = self._plan(weights, params)
        if self.plan.total_bytes > self.ledger.free_bytes:
            self._load_in_part(params)
            return
        self.ledger.reserve(self.plan.wants())
        self._place(params, weights)
        self.forward: Forward = Forward(self.model, self.device, weights, self.kv)
        if weights.plain:
            self.forward.plain = PlainWeights(weights, weights.plain)
        self._reserve_compute(params)

    def _plan_resident(self, params: RunParams) -> ResidentWeights:
        """Plan for all weights in memory; say where they cannot be as they were asked for."""
        weights, why = resident_weights(
            self.file, self.device, self.model, params,
            lambda some: self._plan(some, params).total_bytes, self.ledger.free_bytes,
        )  # fmt: skip
        self.warnings += (why,) if why else ()
        return weights

    def _plan_misses(self, params: RunParams) -> "MissLevers | None":
        if not params.lossy:
            return None
        # A model that computes all should not wait for its import.
        from edgeroute.misses import miss_levers

        return miss_levers(params, self.model.hparams, self.file.path.name)

    def _plan_adapters(self, params: RunParams) -> "AdapterPlan | None":
        if params.adapters is None:
            return None
        # A model without adapters should not wait for its import.
        from edgeroute.adapters import plan_adapters

        return plan_adapters(self.file.path, self.model, params, self.ledger.budget_bytes)

    def _plan_depth(self, params: RunParams) -> "tuple[DepthSource | None, NoDepth | None]":
        if params.depth == "full":
            return None, None
        # A model that runs whole should not wait for its import.
        from edgeroute.depth import NoDepth, open_depth

        found = open_depth(self._owned, self.file, self.model.hparams, self.devices.cpu, params)
        return (None, found) if isinstance(found, NoDepth) else (found, None)

    @property
    def _n_repeat(self) -> int:
        return 0 if self.depth is None else self.depth.n_repeats

    def _plan(self, weights: ResidentWeights, params: RunParams) -> MemoryPlan:
        return plan_parts(self.model.hparams, weights, params, (self.depth, self._adapter_plan))

    def _load_on_devices(self, params: RunParams) -> bool:
        """Share the layers out, or page experts where the devices have no room for all.

        Returns:
            False where no device computes anything: the processor does, as without them.
        """
        # Models on the processor need none of this, and should not wait for its import.
        from edgeroute.placing import Source, plan_split
        from edgeroute.split_open import open_split

        source = Source(file=self.file, model=self.model, params=params, depth=self.depth,
                        adapters=self._adapter_plan)  # fmt: skip
        held = {}
        if self.small is not None:
            from edgeroute.small import small_devices

            held = small_devices(self.small)
        try:
            with self._tentative():
                plan = plan_split(self.devices, source, self.ledger.free_bytes, held)
                if plan is None:
                    self._load_tiers(params, held)
                elif plan.placement.devices != (self.devices.cpu,):
                    split = open_split(self._owned, source, self.devices, plan, self.ledger)
                    self.plan, self.kv, self.forward = split.plan, split.kv, split.forward
                    self.ledgers = split.ledgers
                    self._reserve_compute(params)
        except CapacityError as error:
            if not self.devices.chosen:
                raise
            self.warnings = (f"the processor computes: {error}",)
        else:
            self.warnings = () if plan is None else plan.warnings
            if plan is None or plan.placement.devices != (self.devices.cpu,):
                return True
        self.device, self.compute_ledger = self.devices.cpu, self.ledger
        self.ledgers = {self.device.info.name: self.ledger}
        if self.depth is not None:
            self.depth.place(lambda _name: (self.devices.cpu,))
        return False

    @contextlib.contextmanager
    def _tentative(self) -> Iterator[None]:
        """Free what is made within, and take its ledger entries back, if it fails."""
        before = {entry.owner for entry in self.ledger.entries()}
        whole, self._owned = self._owned, contextlib.ExitStack()
        try:
            yield
        except BaseException:
            self._owned.close()
            for entry in self.ledger.entries():
                if entry.owner not in before:
                    self.ledger.release(entry.owner)
            self._owned = whole
            raise
        whole.push(self._owned.pop_all())
        self._owned = whole

    def _load_tiers(self, params: RunParams, held: dict[str, int]) -> None:
        """Place all but the experts on the roomiest device, whose slots the machine's memory feeds.

        Args:
            params: settings.
            held: what a small model has of the devices, by their names.
        """
        from edgeroute.paging_device import TierLoad, load_tiers
        from edgeroute.placing import roomiest

        device, budget = roomiest(self.devices, params, held)
        name = device.info.name
        account = self.ledgers[name] = Ledger(budget, name)
        if held.get(name):
            account.reserve({"small model": held[name]})
        self.device = DeviceGroup([device, self.devices.cpu])
        if self.depth is not None:
            self.depth.place(lambda _name: (device,))
        tiers = load_tiers(self._owned, TierLoad(
            source=self._moe_source(params), cpu=self.devices.cpu, host=self.ledger,
            device=account, beside=self._small_bytes(),
            plan_memory=lambda weights: self._plan(weights, params),
            make_pool=lambda on: self._make_pool(params, on), misses=self.misses,
        ))  # fmt: skip
        self.plan, self.experts, self.forward = tiers.plan, tiers.experts, tiers.forward
        if not device.info.unified:
            self.compute_ledger = account
        self._reserve_compute(params)

    def ledger_of(self, device: Device) -> Ledger:
        """Return the account of a device's memory."""
        return self.ledgers.get(device.info.name, self.ledger)

    def _load_in_part(self, params: RunParams) -> None:
        """Keep a part in memory and page the rest.

        Raises:
            CapacityError: that does not fit either; it names the smaller of the budgets that
                the whole and the part would need.
        """
        whole, small = self.plan, sum(self._small_bytes().values())
        try:
            (self._load_paged if self.model.hparams.moe else self._load_layered)(params)
        except CapacityError as error:
            least = error.smallest_bytes
            if least is not None and least >= whole.total_bytes + small:
                self.ledger.reserve(whole.wants())
            raise

    def _moe_source(self, params: RunParams) -> "MoeSource":
        """Say what experts are paged of, on the device that computes all else."""
        # Models that fit should not wait for its import.
        from edgeroute.paging import moe_source

        return dataclasses.replace(
            moe_source(self.file, self.device, self.model, params),
            beside_bytes=self._beside_bytes, proven=self.levers.proofs.keys(),
        )  # fmt: skip

    def _load_paged(self, params: RunParams) -> None:
        """Place all but the experts, and make slots for as many of those as the budget holds."""
        # Models that fit need none of this, and should not wait for its import.
        from edgeroute.models.paged import PagedForward
        from edgeroute.paging import open_store, plan_paged

        own = self._owned
        source = self._moe_source(params)
        base = source.other_weights()
        own.callback(base.close)
        self.plan = self._plan(base, params)
        small = self._small_bytes()
        paged = plan_paged(source, self.plan.wants() | small, self.ledger.budget_bytes)
        wants = paged.wants()
        self.ledger.reserve({owner: n for owner, n in wants.items() if owner not in small})
        self._place(params, base)
        self.experts = store = open_store(own, source, base, paged)
        self.forward = forward = PagedForward(
            source.model, self.device, store, self.kv, params.n_ubatch, self.misses
        )
        forward.copies = store.copies
        self.ledger.release("expert compute")
        self.ledger.reserve({"expert compute": forward.carry_bytes})
        self._reserve_compute(params)

    def _load_layered(self, params: RunParams) -> None:
        """Place as many layers as the budget holds, and rooms for the others to go through."""
        from edgeroute.paging_layers import LayerSource, open_layers, plan_layers

        own = self._owned
        source = LayerSource(file=self.file, device=self.device, model=self.model, params=params,
                             beside_bytes=self._beside_bytes)  # fmt: skip
        with contextlib.closing(source.base(source.units())) as small:
            fixed = self._plan(small, params).wants()
        layered = plan_layers(source, fixed | self._small_bytes(), self.ledger.budget_bytes)
        base = source.base(layered.streamed)
        own.callback(base.close)
        self.plan = self._plan(base, params)
        self.ledger.reserve(self.plan.wants() | layered.entries)
        self._place(params, base)
        self.layers, self.forward = open_layers(own, source, base, layered, self.kv)
        self._reserve_compute(params)

    def _small_bytes(self) -> dict[str, int]:
        """Return what the small model has taken, as one part of what is planned."""
        return {} if self.small is None else {"the small model": self.ledger.used_bytes}

    def _place(self, params: RunParams, weights: ResidentWeights) -> None:
        """Place weights, and make the pool while the disk reads the first of them."""
        weights.begin()
        self._make_pool(params)
        weights.load()

    def _make_pool(self, params: RunParams, device: Device | None = None) -> KvCache:
        shape = kv_shape(self.model.hparams, params, self._n_repeat)
        self.kv = KvCache(device or self.device, shape, params.n_kv or params.n_ctx)
        self._owned.callback(self.kv.close)
        return self.kv

    def _reserve_compute(self, params: RunParams) -> None:
        self._owned.callback(self.forward.close)
        if self.depth is not None:
            self.depth.load(self.forward)
        if self._adapter_plan is not None:
            from edgeroute.adapters import Adapters, Host

            host = Host(self._wake, self.encode)
            self.adapters = self._owned.enter_context(
                Adapters(self.forward, self.ledger_of, self._adapter_plan, host)
            )
        checks = params.steps_on and params.small is not None
        n_tokens = min(params.n_ubatch, self.kv.n_cells)
        n_out = min(n_tokens, MAX_DRAFT + 1) if checks else 1
        self.forward.reserve(n_tokens, params.n_ctx, n_out)

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids as a plain prompt is: control tokens in it are text."""
        return self.tokenizer.encode(text, add_special=True, parse_special=False)

    @functools.cached_property
    def rows(self) -> Rows:
        """What the bits of a row depend on in this model's products."""
        return rows_of(self)

    @property
    def max_batch(self) -> int:
        """Sequences that decode in one pass without changing each other's bits."""
        return self.rows.max_single

    @property
    def longest_draft(self) -> int:
        """Tokens that a pass may verify beside the next with the bits of one token each."""
        return self.max_batch - 1

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the vocabularies while a thread that does not own the model asks something of it.

        Raises:
            ClosedError: the model was closed.
        """
        with contextlib.ExitStack() as held:
            held.enter_context(self.tokenizer.in_use())
            if self.small is not None:
                held.enter_context(self.small.tokenizer.in_use())
            yield

    def before_close(self, action: Callable[[], None]) -> None:
        """Have something done before anything is freed."""
        self._owned.callback(action)

    def close(self) -> None:
        """Free everything; safe to call twice."""
        self._owned.close()
