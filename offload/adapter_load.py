"""An adapter's numbers on their way from its file into slots."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.lora import Halves, LoraSlots, LoraTarget

_MAX_DOUBLINGS = 6
"""Of a scale that is a power of two; more of them are slower than a conversion."""
_MAGNITUDE, _EXPONENT, _NEXT_EXPONENT = map(np.uint16, (0x7FFF, 0x7C00, 0x0400))


class LoraPair(Protocol):
    """One adapted weight: its stem, extents, rank, and the factor on B A."""

    @property
    def name(self) -> str: ...
    @property
    def n_in(self) -> int: ...
    @property
    def n_out(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def scale(self) -> float: ...


class AdapterSource(Protocol):
    """An adapter that was checked against the base model, its numbers still on disk."""

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> Sequence[LoraPair]: ...
    @property
    def n_bytes(self) -> int: ...
    def read(self) -> Iterable[tuple[LoraPair, Halves, Halves]]:
        """Read weight, A (rank, n_in) and B (n_out, rank), one weight at a time."""


class Factors(NamedTuple):
    """How an adapter's scales are applied: `row` on every product, and some into B itself.

    A power of two goes into B without rounding. Another scale that all weights share is left
    to the graph. Scales that differ between weights go into B, which rounds B to halves.
    """

    row: float
    fold: bool


def factors_of(source: AdapterSource) -> Factors:
    """Decide where an adapter's scales go."""
    scales = {pair.scale for pair in source.tensors}
    one = next(iter(scales)) if len(scales) == 1 else 0.0
    folds = len(scales) != 1 or math.frexp(abs(one))[0] in (0.5, 0.0)
    return Factors(1.0, True) if folds else Factors(one, False)


def n_blocks(source: AdapterSource, rank: int) -> int:
    """Count the slots of `rank` rows that an adapter takes."""
    return max(-(-pair.rank // rank) for pair in source.tensors)


def targets_of(source: AdapterSource) -> list[LoraTarget]:
    """List the weights that an adapter changes."""
    return [LoraTarget(pair.name, pair.n_in, pair.n_out) for pair in source.tensors]


class Loaded(NamedTuple):
    """What a load took."""

    seconds: float
    n_bytes: int


def load_into(slots: LoraSlots, source: AdapterSource, where: Sequence[int]) -> Loaded:
    """Read an adapter into its slots, zeros where it changes nothing. Any thread.

    Raises:
        CapacityError: a scale takes B beyond the range of a half.
        AdapterFileError: see the source's `read`. The slots hold nothing of use then.
    """
    began = time.perf_counter()
    fold = factors_of(source).fold
    left = set(slots.names)
    for pair, a, b in source.read():
        left.discard(pair.name)
        if fold and pair.scale != 1.0:
            b = _scaled(source.name, pair, b)
        for block, slot in enumerate(where):
            _write_block(slots, slot, pair, (a, b), block * slots.rank)
    for slot in where:
        slots.clear(slot, left)
    return Loaded(time.perf_counter() - began, source.n_bytes)


def _scaled(name: str, pair: LoraPair, b: Halves) -> Halves:
    mantissa, exponent = math.frexp(pair.scale)
    n_doublings = exponent - 1
    if mantissa == 0.5 and 1 <= n_doublings <= _MAX_DOUBLINGS:
        scaled = b
        for _ in range(n_doublings):
            scaled = _doubled(scaled)
            if _has_infinite(scaled):
                raise _too_large(name, pair)
        return scaled
    with np.errstate(over="ignore"):  # told below
        scaled = (b.astype(np.float32) * np.float32(pair.scale)).astype(np.float16)
    if _has_infinite(scaled):
        raise _too_large(name, pair)
    return scaled


def _too_large(name: str, pair: LoraPair) -> CapacityError:
    return CapacityError(
        f"adapter {name!r} scales {pair.name} by {pair.scale:g}, which takes it beyond the "
        "range of 16-bit numbers; lower its alpha"
    )


def _doubled(values: Halves) -> Halves:
    """Return twice the numbers, exactly; what leaves the range is not finite.

    numpy computes with halves one by one, and converts them so; on their bits it is 10
    times as fast.
    """
    bits = values.view(np.uint16)
    # One more in the exponent; zeros and subnormal numbers, which have none, plus themselves.
    found: Halves = (bits + np.minimum(bits & _MAGNITUDE, _NEXT_EXPONENT)).view(np.float16)
    return found


def _has_infinite(values: Halves) -> bool:
    return bool(values.size) and int((values.view(np.uint16) & _EXPONENT).max()) == _EXPONENT


def _write_block(
    slots: LoraSlots, slot: int, pair: LoraPair, matrices: tuple[Halves, Halves], first: int
) -> None:
    """Write `slots.rank` rows of A and columns of B from `first` on, zeros beyond the rank."""
    a, b = matrices
    n = max(0, min(slots.rank, pair.rank - first))
    if n == 0:
        slots.clear(slot, [pair.name])
        return
    a, b = a[first : first + n], b[:, first : first + n]
    if n < slots.rank:
        a = np.pad(a, ((0, slots.rank - n), (0, 0)))
        b = np.pad(b, ((0, 0), (0, slots.rank - n)))
    slots.write(slot, pair.name, a, b)
