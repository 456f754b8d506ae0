"""A paged model that does without experts: what it computed is written down, and done again."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeroute.models.forward import Forward, Piece
from edgeroute.models.moe import n_ranked
from edgeroute.models.paged import PagedForward
from edgeroute.runtime.batch_shape import BatchShape
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.tensor import F32, I32, set_bytes
from edgeroute.runtime.weights import ResidentWeights

Routes = dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]
"""Of one pass: by layer, the experts that compute and their weights, (n_tokens, k) each."""


class Listening:
    """Writes down what every decode pass of a paged forward computes."""

    def __init__(self, forward: PagedForward) -> None:
        self.passes: list[Routes] = []
        self._without: Any = forward._without
        self._carry, self._moe = forward._carry, forward._moe
        self._choose = self._without.choose
        self._without.choose = self._listen

    def _listen(self, step: Any, choice: Any, here: Any) -> Any:
        found = self._choose(step, choice, here)
        n = len(choice.ids) // choice.k
        ranked = n_ranked(self._moe, step.expert_rule, step.expert_value)
        numbers, weights = self._carry.read_routes(n, ranked)
        if not self.passes or step.il in self.passes[-1]:
            self.passes.append({})
        self.passes[-1][step.il] = (numbers[:, : found.k], weights[:, : found.k])
        return found


class Replaying(Forward):
    """A model in memory whose decode passes compute the experts that they are told to."""

    routes: Routes | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        twin: Any = copy.copy(self.model)
        route = twin.route

        def told(b: Builder, il: int, h: Any) -> Any:
            if self.routes is None:
                return route(b, il, h)
            n, k = self.routes[il][0].shape
            return b.more(f"ids{il}", I32, k, n), b.more(f"weights{il}", F32, 1, k, n)

        twin.route = told
        self.model = twin

    def _fill(self, graph: Graph, pieces: Sequence[Piece], shape: BatchShape) -> None:
        super()._fill(graph, pieces, shape)
        for il, (numbers, weights) in (self.routes or {}).items():
            set_bytes(graph.inputs.more[f"ids{il}"], np.ascontiguousarray(numbers))
            set_bytes(graph.inputs.more[f"weights{il}"], np.ascontiguousarray(weights))


def replayed(opened: Any, play: Callable[..., Any], steps: Any, passes: list[Routes]) -> Any:
    """Compute steps in memory as `play` does, decode passes with the experts that `passes` name."""
    weights = ResidentWeights(opened.file, opened.device, opened.model.specs(),
                              repack_experts=False)  # fmt: skip
    weights.load()
    forward = Replaying(opened.model, opened.device, weights, opened.kv)
    waiting, run = list(passes), forward.run

    def told(pieces: Sequence[Piece], *args: Any, **kwargs: Any) -> Any:
        decodes = all(len(piece.tokens) == 1 for piece in pieces)
        forward.routes = waiting.pop(0) if decodes else None
        forward.graphs.clear()
        return run(pieces, *args, **kwargs)

    forward.run = told  # type: ignore[method-assign]
    try:
        found = play(forward, steps)
        assert not waiting
        return found
    finally:
        forward.close()
        weights.close()
