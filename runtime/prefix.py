"""Cells of finished sequences, kept for the next prompt that begins alike.

The longest common prefix wins, within one adapter: cells computed under another adapter
are other numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.cells import Region, round_cells
from edgeroute.runtime.held_cells import HeldCells
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.records import PrefixMode
from edgeroute.runtime.sequence import Classes, Sequence, common_prefix, exact_reuse

MIN_REUSE = 8  # copying fewer cells costs more than computing them


@dataclass(slots=True, eq=False)
class _Kept:
    tokens: npt.NDArray[np.int32]
    classes: Classes
    region: Region
    adapter: str | None
    held: HeldCells | None = None
    """Who copies them out meanwhile: until that is done they stay where they are."""

    @property
    def is_held(self) -> bool:
        return self.held is not None and self.held.active


@dataclass(frozen=True, slots=True)
class _Match:
    kept: _Kept
    n_reuse: int


class PrefixCache:
    """Opens sequences in the pool, on kept cells where it can; keeps those that end.

    Not thread-safe: the engine thread owns it.
    """

    def __init__(self, kv: KvCache, n_ubatch: int) -> None:
        self._kv = kv
        self._n_ubatch = n_ubatch
        self._kept: list[_Kept] = []  # least recently used first
        self.n_reused_cells = 0

    def open(
        self,
        tokens: list[int],
        n_cells: int,
        mode: PrefixMode = "exact",
        adapter: str | None = None,
    ) -> Sequence | None:
        """Give a prompt a region of `n_cells`, with as many cells already filled as may be.

        Kept sequences are dropped, least recently used first, until there is room.

        Returns:
            None while running sequences hold the room; ask again when one ends.
        """
        match = self._match(tokens, mode, adapter)
        if match is None:
            region = self._make_room(n_cells, None)
            return None if region is None else Sequence(tokens, region, adapter=adapter)
        region = self._kv.allocate(n_cells)
        if region is None and self._take_over(match.kept, n_cells):
            region = match.kept.region
        elif region is None:
            region = self._make_room(n_cells, match.kept)
        if region is None:  # only the matching cells themselves are in the way
            region = self._make_room(n_cells, None)
            return None if region is None else Sequence(tokens, region, adapter=adapter)
        if region is not match.kept.region:
            self._kv.copy(match.kept.region, region, match.n_reuse)
            self._touch(match.kept)
        self.n_reused_cells += match.n_reuse
        classes = bytearray(match.kept.classes[: match.n_reuse].tobytes())
        return Sequence(tokens, region, match.n_reuse, classes, adapter)

    def longest_common(self, tokens: list[int]) -> int:
        """Return how many leading tokens some kept sequence shares, whatever its adapter."""
        wanted = np.array(tokens[:-1], np.int32)
        return max((common_prefix(kept.tokens, wanted) for kept in self._kept), default=0)

    def longest(self, tokens: list[int], mode: PrefixMode, adapter: str | None = None) -> int:
        """Return how many cells `open` would find filled."""
        match = self._match(tokens, mode, adapter)
        return 0 if match is None else match.n_reuse

    def share(self, sequence: Sequence, others: Iterable[Sequence], mode: PrefixMode) -> int:
        """Fill cells of a sequence that nothing was computed for yet from sequences that run.

        Args:
            sequence: opened, and not begun.
            others: sequences with cells; those of other adapters are passed over.
            mode: what may be reused.

        Returns:
            Cells filled beyond those that were.
        """
        best, n_best = self._best(sequence, others, mode)
        before = sequence.n_past
        if best is None or n_best - before < MIN_REUSE:
            return 0
        self._kv.copy(best.region, sequence.region, n_best)
        sequence.n_past, sequence.classes = n_best, bytearray(best.classes[:n_best])
        self.n_reused_cells += n_best - before
        return n_best - before

    def shareable(self, sequence: Sequence, others: Iterable[Sequence], mode: PrefixMode) -> int:
        """Count the cells that `share` would fill."""
        _, n_best = self._best(sequence, others, mode)
        n = n_best - sequence.n_past
        return n if n >= MIN_REUSE else 0

    def _best(
        self, sequence: Sequence, others: Iterable[Sequence], mode: PrefixMode
    ) -> tuple[Sequence | None, int]:
        """Return which sequence a prompt has the most cells in common with, and how many."""
        wanted = np.array(sequence.tokens, np.int32)
        best, n_best = None, sequence.n_past
        for other in others:
            if other is sequence or other.adapter != sequence.adapter or other.n_past <= n_best:
                continue
            stored = (np.array(other.tokens[: other.n_past], np.int32), _classes(other))
            n = reusable(stored, wanted, mode, self._n_ubatch)
            if n > n_best:
                best, n_best = other, n
        return best, n_best

    def keep(self, sequence: Sequence, held: HeldCells | None = None) -> None:
        """Take a finished sequence's region; its cells serve later prompts.

        Where they are `held` they also stay in place until that is let go.
        """
        n = sequence.n_past
        if n < MIN_REUSE:
            self._kv.release(sequence.region)
            return
        self._kv.shrink(sequence.region, n)
        tokens = np.array(sequence.tokens[:n], np.int32)
        classes = _classes(sequence)
        for old in list(self._kept):  # what the new one covers serves nobody any more
            same = old.adapter == sequence.adapter and not old.is_held
            if (
                same
                and common_prefix(old.tokens, tokens) == len(old.tokens)
                and np.array_equal(old.classes, classes[: len(old.classes)])
            ):
                self._drop(old)
        self._kept.append(_Kept(tokens, classes, sequence.region, sequence.adapter, held))

    def drop(self, sequence: Sequence) -> None:
        """Give a region back whose cells are not worth keeping, or undefined."""
        self._kv.release(sequence.region)

    def clear(self) -> None:
        """Drop everything kept."""
        for kept in list(self._kept):
            self._drop(kept)

    @property
    def n_kept_cells(self) -> int:
        """Cells that kept sequences hold."""
        return sum(kept.region.n_cells for kept in self._kept)

    def _match(self, tokens: list[int], mode: PrefixMode, adapter: str | None) -> _Match | None:
        wanted = np.array(tokens, np.int32)
        best: _Match | None = None
        for kept in self._kept:
            if kept.adapter != adapter:
                continue
            n = reusable((kept.tokens, kept.classes), wanted, mode, self._n_ubatch)
            if n and (best is None or n >= best.n_reuse):
                best = _Match(kept, n)
        return best

    def _take_over(self, kept: _Kept, n_cells: int) -> bool:
        """Make a kept region the new sequence's own, where it is or can be made large enough."""
        if kept.is_held or not self._kv.grow(kept.region, n_cells):
            return False
        self._kept.remove(kept)
        if kept.region.n_cells > round_cells(n_cells):
            self._kv.shrink(kept.region, n_cells)
        return True

    def _make_room(self, n_cells: int, spare: _Kept | None) -> Region | None:
        region = self._kv.allocate(n_cells)
        victims = [kept for kept in self._kept if kept is not spare and not kept.is_held]
        if region is None and not self._kv.would_fit(n_cells, [kept.region for kept in victims]):
            return None  # dropping would not help: keep them for later prompts
        while region is None:
            self._drop(victims.pop(0))
            region = self._kv.allocate(n_cells)
        return region

    def _drop(self, kept: _Kept) -> None:
        if kept.held is not None:
            kept.held.let_go()
        self._kept.remove(kept)
        self._kv.release(kept.region)

    def _touch(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        self._kept.append(kept)


def _classes(sequence: Sequence) -> Classes:
    """Return how a sequence's cells were computed, as a copy."""
    return np.frombuffer(bytes(sequence.classes[: sequence.n_past]), np.uint8)


def reusable(
    stored: tuple[npt.NDArray[np.int32], Classes], prompt: npt.NDArray[np.int32], mode: PrefixMode,
    n_ubatch: int,
) -> int:  # fmt: skip
    """Count the stored cells that may serve a prompt, 0 where that is not worth a copy.

    Args:
        stored: tokens and how the cell of each was computed.
        prompt: the new tokens; the last is always computed.
        mode: what may be reused.
        n_ubatch: prefill batch.
    """
    if mode == "off":
        return 0
    tokens, classes = stored
    n = min(common_prefix(tokens, prompt), len(prompt) - 1)
    if mode == "exact":
        n = exact_reuse(n, classes, len(prompt), n_ubatch)
    return n if n >= MIN_REUSE else 0
