"""Cells of a pool, and who owns them: contiguous regions, taken from the smallest gap that fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CELL_BUCKET: Final = 256
"""Cells per step of a region and of what attention reads. Source: llama.cpp pads alike."""


def round_cells(n_cells: int) -> int:
    """Round up to a whole number of buckets, at least one."""
    return max(CELL_BUCKET, -(-n_cells // CELL_BUCKET) * CELL_BUCKET)


@dataclass(slots=True)
class Region:
    """Cells `start` to `start + n_cells` of the pool, owned by one sequence."""

    start: int
    n_cells: int


class Cells:
    """Who owns which of `n_cells` cells.

    Attributes:
        n_cells: in all, a whole number of buckets.
    """

    def __init__(self, n_cells: int) -> None:
        self.n_cells = round_cells(n_cells)
        self._free: list[Region] = [Region(0, self.n_cells)]
        self._largest = 0  # cells of a region

    @property
    def n_free_cells(self) -> int:
        """Cells that no sequence owns."""
        return sum(region.n_cells for region in self._free)

    def allocate(self, n_cells: int) -> Region | None:
        """Take a region of at least `n_cells` from the smallest gap that fits, or None."""
        want = round_cells(n_cells)
        gaps = [region for region in self._free if region.n_cells >= want]
        if not gaps:
            return None
        gap = min(gaps, key=lambda region: region.n_cells)
        region = Region(gap.start, want)
        self._largest = max(self._largest, want)
        gap.start += want
        gap.n_cells -= want
        if gap.n_cells == 0:
            self._free.remove(gap)
        self._given(gap.start)
        return region

    def take_all(self) -> Region:
        """Take all cells of a pool, for an owner who shares them out.

        Raises:
            ValueError: some have an owner.
        """
        region = self.allocate(self.n_cells)
        if region is None:
            raise ValueError("some cells of this pool have an owner")
        return region

    def release(self, region: Region) -> None:
        """Give a region back; it must not be used again."""
        self._free = _merge([*self._free, Region(region.start, region.n_cells)])
        region.n_cells = 0

    def would_fit(self, n_cells: int, regions: Sequence[Region]) -> bool:
        """Tell whether releasing `regions` would make a gap of `n_cells`."""
        want = round_cells(n_cells)
        return any(gap.n_cells >= want for gap in _merge([*self._free, *regions]))

    def shrink(self, region: Region, n_cells: int) -> None:
        """Give back what lies beyond the first `n_cells` of a region."""
        keep = round_cells(n_cells)
        if keep < region.n_cells:
            tail = Region(region.start + keep, region.n_cells - keep)
            region.n_cells = keep
            self.release(tail)

    def grow(self, region: Region, n_cells: int) -> bool:
        """Extend a region in place to at least `n_cells`; False where a neighbour is in the way."""
        extra = round_cells(n_cells) - region.n_cells
        if extra <= 0:
            return True
        end = region.start + region.n_cells
        for gap in self._free:
            if gap.start == end and gap.n_cells >= extra:
                gap.start += extra
                gap.n_cells -= extra
                region.n_cells += extra
                self._free = [each for each in self._free if each.n_cells]
                self._given(gap.start)
                return True
        return False

    def _given(self, end: int) -> None:
        """Note that cells before `end` have, or had, an owner."""


def _merge(gaps: Sequence[Region]) -> list[Region]:
    """Sort regions and join neighbours, into new records."""
    merged: list[Region] = []
    for gap in sorted(gaps, key=lambda each: each.start):
        if merged and merged[-1].start + merged[-1].n_cells == gap.start:
            merged[-1].n_cells += gap.n_cells
        else:
            merged.append(Region(gap.start, gap.n_cells))
    return merged
