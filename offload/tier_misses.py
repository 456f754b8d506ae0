"""What becomes of experts that a device has not: sent up from DRAM, or left to the processor."""

import time
from collections.abc import Mapping, Sequence

from edgeroute.offload.expert_pool import ExpertPool
from edgeroute.offload.expert_store import ExpertStore
from edgeroute.offload.page_table import Missing
from edgeroute.offload.tier_counts import TierCount, TierCounters, count_layer, sum_counts
from edgeroute.runtime.upload import Uploader


class TierMisses:
    """Sends experts up, and counts what was missed. Not thread-safe: the engine thread owns it."""

    def __init__(
        self, uploader: Uploader, pool_of: Mapping[int, ExpertPool], below: ExpertStore
    ) -> None:
        """Count from zero.

        Args:
            uploader: of the device; it must outlive this.
            pool_of: the device's slots by layer.
            below: the tier in DRAM.
        """
        self._uploader, self._pool_of, self._below = uploader, pool_of, below
        n_layer = 1 + max(pool_of)
        self.decode, self.prefill = TierCounters(n_layer), TierCounters(n_layer)
        self._counters = self.decode

    def begin(self, *, prefill: bool) -> None:
        """Count what follows as prefill, or as decode."""
        self._counters = self.prefill if prefill else self.decode

    def left(self, il: int, n_experts: int) -> None:
        """Count experts of a layer that stay in DRAM, where the processor computes them."""
        self._pool_of[il].table.counters.misses[il] += n_experts
        self._counters.away[il] += n_experts

    def send(
        self, il: int, absent: Sequence[Missing], host: Mapping[int, int], *, wait: bool
    ) -> float:
        """Send experts of a layer to the device, and return how many seconds that took.

        Args:
            il: the layer.
            absent: their pages, each with the slot on the device that it is to have.
            host: experts and their slots in DRAM, which are held.
            wait: return when they have arrived, not when they are on their way.

        Raises:
            DeviceLostError: the device is gone. The pages that were not sent are not there.
        """
        began = time.perf_counter()
        pool, source = self._pool_of[il], self._below.pool(il)
        tensors, infos = pool.slots.tensors(pool.infos(il)), source.infos(il)
        n_sent = 0
        try:
            for page, slot, _, _ in absent:
                from_slot = host[page % pool.plan.n_expert]
                assert source.table.slot_of(page) == from_slot, "a DRAM slot was refilled"
                for part, tensor in enumerate(tensors):
                    data = source.slots.view(from_slot, infos, part)
                    self._uploader.send(tensor, pool.slots.offset(slot, part), data)
                pool.table.loaded(page)
                n_sent += 1
        except BaseException:
            self.failed(il, absent[n_sent:])
            raise
        finally:
            self._counters.uploaded[il] += n_sent
            self._counters.n_bytes[il] += n_sent * pool.plan.page_bytes
        if wait:
            self._uploader.finish()
        seconds = time.perf_counter() - began
        self._counters.upload_s[il] += seconds
        return seconds

    def failed(self, il: int, absent: Sequence[Missing]) -> None:
        """Give back the slots of pages that will not come."""
        for one in absent:
            self._pool_of[il].table.failed(one.page)

    def layers(self, *, prefill: bool) -> dict[int, TierCount]:
        """Return where each layer's experts were found so far, in decode or in prefill."""
        own = self.prefill if prefill else self.decode
        return {
            il: count_layer(il, own, *(
                pool.table.prefill if prefill else pool.table.decode
                for pool in (self._pool_of[il], self._below.pool(il))
            ))
            for il in sorted(self._pool_of)
        }  # fmt: skip

    def stats(self) -> dict[str, object]:
        """Return what was found where, of decode and of prefill, and layer by layer."""
        kinds = {name: self.layers(prefill=name == "prefill") for name in ("decode", "prefill")}
        return {
            **{name: sum_counts(layers.values()).to_dict() for name, layers in kinds.items()},
            "layers": {name: [{"il": il} | count.to_dict() for il, count in layers.items()]
                       for name, layers in kinds.items()},
        }  # fmt: skip
