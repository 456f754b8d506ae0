"""A resident mixture of experts that tells what its routers answered, and runs without some."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeroute.loaded import LoadedModel
from edgeroute.models.base import MoeHparams
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.moe import MoeLayers
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.errors import ComputeError, UsageError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.tensor import F32, I32, Descriptors, get_bytes, new_tensor, place_all, shape
from edgeroute.skippers.experts import LayerRule, Weights, with_rules

Logits = npt.NDArray[np.float32]


class WatchedModel(Closing):
    """A second forward over a loaded model's weights and cells.

    Its routers are asked twice where a rule holds, without it and with it: the answer without
    is kept. Lifetime: close it before the loaded model.

    Args:
        loaded: a model with experts, resident; all its cells are taken.
        n_tokens: of the longest window.

    Raises:
        UsageError: the model has no experts, or they are paged.
    """

    def __init__(self, loaded: LoadedModel, n_tokens: int) -> None:
        model = loaded.model
        if model.hparams.moe is None or not isinstance(model, MoeLayers):
            raise UsageError(f"{loaded.file.path.name} has no experts to leave out")
        if loaded.experts is not None:
            raise UsageError(
                f"{loaded.file.path.name} does not fit the memory; its rules are calibrated with "
                "everything resident"
            )
        self.moe: MoeHparams = model.hparams.moe
        self.layers = tuple(il for il in range(model.hparams.n_layer) if model.is_moe(il))
        self._steps = all_run(range(model.hparams.n_layer))
        self._descriptors = Descriptors(2 * len(self.layers))
        self._weights = self._places(F32, n_tokens, "weights")
        self._ids = self._places(I32, n_tokens, "ids")
        places = [*self._weights.values(), *self._ids.values()]
        self._buffer = place_all(places, loaded.device)
        self._forward = Forward(self._twin(model), loaded.device, loaded.forward.weights, loaded.kv)
        self._kv, self._region = loaded.kv, loaded.kv.allocate(loaded.kv.n_cells)
        if self._region is None:
            self.close()
            raise ComputeError("watching a model needs all cells of its KV cache; some are in use")
        self._n_tokens = 0
        self._tokenizer = loaded.tokenizer

    def run(self, window: Sequence[int], rules: Sequence[LayerRule] = ()) -> Logits:
        """Compute a window afresh under one rule per layer with experts; none: all compute.

        Returns:
            Logits after each of its tokens, F32 (n_tokens, n_vocab), valid until the next run.
        """
        steps = with_rules(self._steps, self.layers, rules) if rules else self._steps
        return self._run(window, steps, "")

    def run_without(self, window: Sequence[int], il: int) -> Logits:
        """Compute a window without any routed expert of layer `il`; shared ones stay."""
        return self._run(window, self._steps, _without(il))

    def encode(self, text: str, special: bool) -> list[int]:
        """Turn text into token ids, with what the model expects before a text or without."""
        return self._tokenizer.encode(text, add_special=special, parse_special=False)

    def routes(self) -> list[Weights]:
        """Return what each layer's router gave in the latest run, before any rule.

        Per layer with experts F32 (n_tokens, n_expert_used), best first.
        """
        found = []
        for il in self.layers:
            found.append(np.empty((self._n_tokens, self.moe.n_expert_used), np.float32))
            get_bytes(self._weights[il], found[-1])
        return found

    def chosen(self) -> list[npt.NDArray[np.int32]]:
        """Return the experts whose weights `routes` gives, likewise."""
        found = []
        for il in self.layers:
            found.append(np.empty((self._n_tokens, self.moe.n_expert_used), np.int32))
            get_bytes(self._ids[il], found[-1])
        return found

    def close(self) -> None:
        """Free what is its own; safe to call twice."""
        self._forward.close()
        if self._region is not None:
            self._kv.release(self._region)
            self._region = None
        self._buffer.free()
        self._descriptors.free()

    def _run(self, window: Sequence[int], steps: Sequence[Step], plan: str) -> Logits:
        assert self._region is not None
        self._n_tokens = len(window)
        piece = Piece(tokens=window, pos=0, region=self._region, n_out=len(window))
        logits = self._forward.run([piece], self._forward.spans(steps, plan), borrow=True)
        if logits is None:
            raise ComputeError("the computation was stopped")
        return logits

    def _twin(self, model: MoeLayers) -> Any:
        """Copy a model's description; its routers are listened to, its experts can be left out."""
        twin = copy.copy(model)
        route, ffn_branch = twin.route, twin.ffn_branch

        def watched(b: Builder, il: int, h: Tensor) -> tuple[Tensor, Tensor]:
            rule, b.expert_rule = b.expert_rule, "all"
            ids, weights = route(b, il, h)
            k, n = shape(ids)[0], shape(ids)[1]
            flat = b.g.ggml_reshape_2d(b.ctx, weights, k, n)
            for value, place in ((flat, self._weights[il]), (ids, self._ids[il])):
                b.keep(value, b.g.ggml_view_2d(b.ctx, place, k, n, 4 * k, 0))
            b.expert_rule = rule
            return (ids, weights) if rule == "all" else route(b, il, h)

        def ablated(b: Builder, il: int, x: Tensor) -> Tensor:
            if b.span.plan != _without(il):
                return ffn_branch(b, il, x)
            shared = twin.shared(b, il, twin.ffn_input(b, il, x))
            return b.scale(x, 0.0) if shared is None else shared

        vars(twin).update(route=watched, ffn_branch=ablated)
        return twin

    def _places(self, kind: int, n_tokens: int, name: str) -> dict[int, Tensor]:
        ne = (self.moe.n_expert_used, n_tokens)
        return {il: new_tensor(self._descriptors, kind, ne, f"{name}.{il}") for il in self.layers}


def _without(il: int) -> str:
    """Name the pass that leaves a layer's experts out; graphs are kept by it."""
    return f"without {il}"
