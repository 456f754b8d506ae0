"""What trainings in torch share: how long, at which rate, on which windows, in which type."""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

WARM_UP: Final = 10
"""Updates until the full rate."""
_N_TRIED: Final = 1024
"""Rows of the product that the types are timed with."""


class Schedule:
    """A rate that rises, then falls to nothing by the end: of the updates or of the time.

    Args:
        rate: the highest.
        most: updates at most.
        until: a time of `time.monotonic`.

    Attributes:
        n_done: updates that were begun.
        n_updates: how many there will be, as far as is known.
    """

    def __init__(self, rate: float, most: int, until: float) -> None:
        self._rate, self._most, self._until = rate, most, until
        self._began = time.monotonic()
        self.n_done, self.n_updates = 0, most

    def go_on(self, optimiser: torch.optim.Optimizer) -> bool:
        """Set the rate of the next update; False where there is none."""
        now = time.monotonic()
        if now >= self._until:
            return False
        if self.n_done >= WARM_UP:
            each_s = (now - self._began) / self.n_done
            self.n_updates = min(self._most, self.n_done + int((self._until - now) / each_s))
        if self.n_done >= self.n_updates:
            return False
        rising = min(1.0, (self.n_done + 1) / WARM_UP)
        falling = 0.5 * (1 + math.cos(math.pi * self.n_done / self.n_updates))
        for group in optimiser.param_groups:
            group["lr"] = self._rate * rising * falling
        self.n_done += 1
        return True


def batches(n_windows: int, n_batch: int) -> Iterator[npt.NDArray[np.int64]]:
    """Give batches of windows without end, in an order that is shuffled for each time round."""
    rng, left = np.random.default_rng(0), np.empty(0, np.int64)
    for _ in itertools.count():
        if len(left) < n_batch:
            left = np.concatenate([left, rng.permutation(n_windows)])
        yield left[:n_batch]
        left = left[n_batch:]


def quicker_type() -> torch.dtype:
    """Return the type that this processor multiplies in: bfloat16 only where it knows that."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(_N_TRIED, _N_TRIED, dtype=dtype)
        _ = x @ x
        began = time.perf_counter()
        _ = x @ x
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=lambda dtype: seconds[dtype])
