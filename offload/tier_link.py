"""What sending experts to a device takes: measured into free slots, before there is a miss."""

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from edgeroute.offload.expert_pool import ExpertPool
from edgeroute.offload.miss_cost import Cost
from edgeroute.runtime.upload import Uploader

N_TRIES: Final = 2
"""Of which the quicker counts: the first may wake up a link, or map memory."""
LONG_S: Final = 0.03
"""What a page takes that is tried alone: a fixed part can hardly be seen beside it."""


def suppose(cost: Cost, work: Callable[[int], None], n_most: int) -> None:
    """Time some work on one page, and on several where it is quick, and enter what it took."""
    for n_pages in (1, n_most):
        seconds = min(_timed(work, n_pages) for _ in range(N_TRIES))
        cost.suppose(n_pages, seconds)
        if seconds > LONG_S or n_most == 1:
            return


def _timed(work: Callable[[int], None], n_pages: int) -> float:
    began = time.perf_counter()
    work(n_pages)
    return time.perf_counter() - began


def suppose_uploads(cost: Cost, uploader: Uploader, pool: ExpertPool, n_most: int) -> None:
    """Send noise into slots of a pool that holds nothing yet.

    Raises:
        DeviceLostError: the device is gone.
    """
    infos = pool.plan.layers[0].infos
    tensors = pool.slots.tensors(infos)
    sizes = [info.nbytes // pool.plan.n_expert for info in infos]
    noise = np.random.default_rng().integers(0, 256, max(sizes), np.uint8)

    def send(n_pages: int) -> None:
        for slot in range(n_pages):
            for part, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
                uploader.send(tensor, pool.slots.offset(slot, part), noise[:size].data)
        uploader.finish()

    suppose(cost, send, min(n_most, pool.slots.n_slots))
