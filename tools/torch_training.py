"""What trainings in torch share: how long, at which rate, on which windows, in which type."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeroute.tools.torch_llama import TorchLlama

_N_ROWS: Final = 512
"""Tokens of one update."""
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


class Predictions:
    """A model's head over some tokens only: those that a text has.

    Args:
        model: the model.
        tokens: ids, int32 (n,).
    """

    def __init__(self, model: TorchLlama, tokens: npt.NDArray[np.int32]) -> None:
        self._dtype = model.dtype
        self._head, self._bias = model.head_rows(torch.from_numpy(tokens).long())

    def __call__(self, normed: Tensor) -> Tensor:
        """Return log-probabilities, F32 (..., n), of what the model gives its head."""
        logits = F.linear(normed.to(self._dtype), self._head).float()
        return (logits if self._bias is None else logits + self._bias).log_softmax(-1)


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean divergence of log-probabilities from wanted ones, nats a token."""
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()


class Pace(NamedTuple):
    """The highest rate, how often the text is gone over at most, and when training ends.

    `until` is a time of `time.monotonic`.
    """

    rate: float
    epochs: float
    until: float


def train(
    weights: Sequence[Tensor], loss: Callable[[npt.NDArray[np.int64]], Tensor],
    windows: tuple[int, int], pace: Pace,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> None:  # fmt: skip
    """Lower a loss by its gradient, in place.

    Args:
        weights: what is learnt.
        loss: of a batch of windows.
        windows: how many there are, and the tokens of each.
        pace: how fast, and how long.
        progress: told of every update.
    """
    n_windows, n_window = windows
    n_batch = max(1, _N_ROWS // n_window)
    schedule = Schedule(pace.rate, math.ceil(pace.epochs * n_windows / n_batch), pace.until)
    optimiser = torch.optim.AdamW(weights, lr=pace.rate, betas=(0.9, 0.99), weight_decay=0.0)
    for batch in batches(n_windows, n_batch):
        if not schedule.go_on(optimiser):
            return
        optimiser.zero_grad()
        torch.autograd.backward(loss(batch))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        progress("training", schedule.n_done, schedule.n_updates)


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
