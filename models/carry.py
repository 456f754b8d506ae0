"""What the stages of a paged pass hand on, and what the host reads of it: who computes what."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.models.base import MoeHparams, Rated
from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.tensor import (
    F32,
    I32,
    Descriptors,
    get_bytes,
    new_tensor,
    place_all,
    set_bytes,
    set_range,
    shape,
)

Floats = npt.NDArray[np.float32]


class Choice(NamedTuple):
    """The experts that n tokens compute.

    Attributes:
        numbers: of experts, I32 (n * k,): `k` per token, best first, token after token.
        ids: the same.
        k: the most that any token computes.
        left_out: bool (n * k,), which of `ids` do not compute after all; None if all do.
        packed: the carry holds these `k` alone, and its weights are theirs.
    """

    numbers: npt.NDArray[np.int32]
    ids: list[int]
    k: int
    left_out: npt.NDArray[np.bool_] | None = None
    packed: bool = False

    def computed(self) -> list[int]:
        """The ids that compute, repeated as often as they do."""
        if self.left_out is None:
            return self.ids
        return [expert for expert, out in zip(self.ids, self.left_out, strict=True) if not out]

    def pairs(self, of: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
        """Places in `ids` that are marked in `of` and compute."""
        return np.flatnonzero(of if self.left_out is None else of & ~self.left_out)

    def rows(self, ranked: int) -> npt.NDArray[np.int32]:
        """Where the output of each of `ranked` experts of every token is, I32 (n * ranked,).

        One that does not compute has its token's best one's: it weighs nothing there, and a
        token's own output spoils no other token.
        """
        best = np.arange(0, len(self.ids), self.k, dtype=np.int32)
        found = np.repeat(best, ranked).reshape(-1, ranked)
        found[:, : self.k] += np.arange(self.k, dtype=np.int32)
        if self.left_out is not None:
            out = self.left_out.reshape(-1, self.k)
            found[:, : self.k][out] = np.broadcast_to(best[:, None], out.shape)[out]
        return found.ravel()


class Views(NamedTuple):
    """What a stage finds of `n` tokens: see `Carry`."""

    x: Tensor
    h: Tensor
    weights: Tensor
    ids: Tensor
    guess: Tensor
    guess_weights: Tensor
    outs: Tensor
    rows: Tensor


class Carry:
    """What one stage leaves to the next, in a buffer of its own.

    x and h F32 [n_embd, n] (residual stream, normed input of the experts), weights F32
    [1, k, n], ids I32 [k, n], the guess of the next layer's likewise, outs F32 [n_embd, k, n].
    Where it is `rated`, all experts' ratings too, F32 [n_expert, n] each.
    """

    def __init__(
        self, device: Device, n_embd: int, moe: MoeHparams, n_tokens: int, *, rated: bool = False
    ) -> None:
        self.n_tokens = n_tokens
        self._n_embd, k = n_embd, moe.n_expert_used
        self._n_expert = moe.n_expert
        self._descriptors = Descriptors(9)
        kinds = {
            "x": (F32, (n_embd, n_tokens)), "h": (F32, (n_embd, n_tokens)),
            "weights": (F32, (k, n_tokens)), "ids": (I32, (k, n_tokens)),
            "guess_weights": (F32, (k, n_tokens)), "guess": (I32, (k, n_tokens)),
            "outs": (F32, (n_embd, k * n_tokens)),
        }  # fmt: skip
        if rated:
            kinds |= dict.fromkeys(("probs", "ranked"), (F32, (moe.n_expert, n_tokens)))
        self._all = {
            name: new_tensor(self._descriptors, kind, ne, name)
            for name, (kind, ne) in kinds.items()
        }
        self._buffer: Buffer = place_all(list(self._all.values()), device)

    @property
    def n_bytes(self) -> int:
        """Bytes of the buffer."""
        return self._buffer.n_bytes

    @staticmethod
    def plan_bytes(n_embd: int, moe: MoeHparams, n_tokens: int) -> int:
        """Return the bytes that a Carry for so many tokens takes, alignment apart."""
        k = moe.n_expert_used
        return 4 * n_tokens * (2 * n_embd + 4 * k + n_embd * k)

    def views(self, b: Builder, n: int, ranked: int, k: int | None = None) -> Views:
        """View the first n tokens' part of each.

        Args:
            b: the graph.
            n: tokens.
            ranked: experts per token that the router left.
            k: how many of them are looked at; None for all.
        """
        g, ctx, n_embd, all_of = b.g, b.ctx, self._n_embd, self._all
        k, column, row = k or ranked, n_embd * 4, ranked * 4
        flat = {
            name: g.ggml_view_2d(ctx, all_of[name], n_embd, n, column, 0) for name in ("x", "h")
        }
        chosen = {
            name: g.ggml_view_2d(ctx, all_of[name], k, n, row, 0) for name in ("ids", "guess")
        }
        weights = {
            name: g.ggml_view_3d(ctx, all_of[name], 1, k, n, 4, row, 0)
            for name in ("weights", "guess_weights")
        }
        return Views(
            **flat, **chosen, **weights, rows=all_of["outs"],
            outs=g.ggml_view_3d(ctx, all_of["outs"], n_embd, k, n, column, k * column, 0),
        )  # fmt: skip

    def keep_ratings(self, b: Builder, rated: Rated) -> None:
        """Have a graph keep what a router says of every expert."""
        n_expert, n, _, _ = shape(rated.probs)
        for name, value in rated._asdict().items():
            b.keep(value, b.g.ggml_view_2d(b.ctx, self._all[name], n_expert, n, 4 * n_expert, 0))

    def read_ratings(self, n: int) -> tuple[Floats, Floats]:
        """Read what was kept for n tokens: probabilities and ranks, F32 (n, n_expert) each."""
        probs, ranked = (np.empty((n, self._n_expert), np.float32) for _ in range(2))
        get_bytes(self._all["probs"], probs)
        get_bytes(self._all["ranked"], ranked)
        return probs, ranked

    def read_routes(self, n: int, ranked: int) -> tuple[npt.NDArray[np.int32], Floats]:
        """Read the experts that the router left for n tokens, and their weights: (n, ranked)."""
        numbers = np.empty((n, ranked), np.int32)
        weights = np.empty((n, ranked), np.float32)
        get_bytes(self._all["ids"], numbers)
        get_bytes(self._all["weights"], weights)
        return numbers, weights

    def write_routes(self, numbers: npt.NDArray[np.int32], weights: Floats) -> None:
        """Put others in their place: I32 and F32 (n, ranked), C-contiguous."""
        set_bytes(self._all["ids"], numbers)
        set_bytes(self._all["weights"], weights)

    def read_choice(self, n: int, ranked: int, *, thinned: bool) -> Choice:
        """Read what n tokens chose.

        Args:
            n: tokens.
            ranked: experts per token that the router left.
            thinned: whether those that weigh nothing are left out.
        """
        return self._read("ids", "weights", n, ranked, thinned)

    def read_guess(self, n: int, ranked: int, *, thinned: bool) -> list[int]:
        """Read the experts that n tokens may choose in the next layer, likewise."""
        return self._read("guess", "guess_weights", n, ranked, thinned).computed()

    def read_h(self, n: int) -> npt.NDArray[np.float32]:
        """Read the normed input of the experts for n tokens: F32 (n, n_embd)."""
        found = np.empty((n, self._n_embd), np.float32)
        get_bytes(self._all["h"], found)
        return found

    @staticmethod
    def n_runs(rows: npt.NDArray[np.intp]) -> int:
        """Count runs of consecutive numbers among ascending ones."""
        return 1 + int(np.count_nonzero(np.diff(rows) != 1)) if len(rows) else 0

    def write_rows(self, rows: npt.NDArray[np.intp], outs: npt.NDArray[np.float32]) -> None:
        """Write outputs of pairs computed elsewhere, a message per run of rows.

        Args:
            rows: their numbers, ascending.
            outs: F32 (len(rows), n_embd).
        """
        if not len(rows):
            return
        flat = np.ascontiguousarray(outs).view(np.uint8)
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        first = 0
        for end in ends:
            set_range(self._all["outs"], flat[first:end], int(rows[first]) * self._n_embd * 4)
            first = end

    def _read(self, name: str, weights_name: str, n: int, ranked: int, thinned: bool) -> Choice:
        found = np.empty(n * ranked, np.int32)
        get_bytes(self._all[name], found)
        if not thinned:
            return Choice(found, found.tolist(), ranked)
        weights = np.empty((n, ranked), np.float32)
        get_bytes(self._all[weights_name], weights)
        out = weights == 0
        out[:, 0] = False
        k = ranked - int(np.argmin(out.all(axis=0)[::-1]))
        out, found = out[:, :k].ravel(), found.reshape(n, ranked)[:, :k].ravel()
        return Choice(found, found.tolist(), k, out if out.any() else None)

    def close(self) -> None:
        """Free the buffer; safe to call twice."""
        self._buffer.free()
        self._descriptors.free()
