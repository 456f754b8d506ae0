"""Bridges: what stands in for the layers that stream, while those that stay draft.

A bridge is a depth plan that runs some layers, crosses the block behind them by one stand-in,
and runs the others. A drafts file, in the format of depth files, holds several, for blocks of
different lengths: which one serves depends on how much memory there is.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgeroute.config import RunParams
from edgeroute.models.base import Hparams
from edgeroute.models.depth_file import DepthFile, find_depth_file
from edgeroute.models.forward import Forward
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import DepthFileError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.skippers.plan_json import plans_from_json

SUFFIX: Final = ".drafts"
DRAFTING: Final = ("auto", "self")
"""Settings of `speculate` under which the layers that stay may draft."""

_RUN, _SKIP = LayerDepth(), LayerDepth(attn="skip", ffn="skip")
_CROSS = LayerDepth(attn="approximate", ffn="approximate")


def bridge_layers(first: int, end: int, n_layer: int) -> tuple[LayerDepth, ...]:
    """Return the layers of a plan that crosses layers `first` to `end`."""
    return (_RUN,) * first + (_CROSS,) + (_SKIP,) * (end - first - 1) + (_RUN,) * (n_layer - end)


@dataclass(frozen=True, slots=True)
class Bridge:
    """A plan that crosses layers `first` to `end` by one stand-in."""

    plan: DepthPlan
    first: int
    end: int

    @classmethod
    def of(cls, plan: DepthPlan) -> "Bridge":
        """Find the block that a plan crosses.

        Raises:
            DepthFileError: it does anything else.
        """
        n = len(plan.layers)
        first = next((il for il, layer in enumerate(plan.layers) if layer == _CROSS), n)
        end = next((il for il in range(first + 1, n) if plan.layers[il] != _SKIP), n)
        if not 0 < first < end < n or plan.layers != bridge_layers(first, end, n):
            raise DepthFileError(
                f"plan {plan.name!r} is no bridge: it must run some layers, cross those behind "
                "them by one stand-in, and run the others; calibrate the drafts again"
            )
        return cls(plan, first, end)

    @property
    def block(self) -> frozenset[int]:
        """The layers that it stands for."""
        return frozenset(range(self.first, self.end))

    @property
    def spans(self) -> tuple[Span, ...]:
        """What a draft computes: up to the far side of the block, and from there."""
        steps = [step for step in self.plan.steps() if step.reads or step.approximates]
        (whole,) = Forward.spans(steps, self.plan.name)
        near, far = whole.steps[: self.first + 1], whole.steps[self.first + 1 :]
        return whole._replace(steps=near, output=False), whole._replace(steps=far, embed=False)


class BridgeFile(Closing):
    """The bridges of a model; use it as a context manager or call `close`."""

    def __init__(self, path: Path, model: GGUFFile, hparams: Hparams) -> None:
        """Open and check a drafts file.

        Raises:
            ModelFileError: it is no GGUF file, or a malformed one.
            DepthFileError: it is for another model or version, or holds no bridges.
        """
        self._source = DepthFile(path, model, hparams, bridges=True)
        try:
            plans = plans_from_json(self._source.plans, hparams.n_layer)
            self._bridges = {bridge.block: bridge for bridge in map(Bridge.of, plans)}
        except BaseException:
            self._source.close()
            raise

    def find(self, streamed: Sequence[int]) -> Bridge | None:
        """Return the bridge over just these layers, if there is one."""
        return self._bridges.get(frozenset(streamed))

    def weights(self, bridge: Bridge, device: Device) -> ResidentWeights:
        """Plan where a bridge's tensors go, for the caller to load and to close first.

        Raises:
            DepthFileError: one is missing.
        """
        specs = self._source.specs(bridge.plan.name, bridge.plan.approximated)
        return ResidentWeights(self._source.file, device, specs)

    def bytes_of(self, bridge: Bridge, device: Device) -> int:
        """Return the bytes that a bridge's tensors take.

        Raises:
            DepthFileError: one is missing.
        """
        with contextlib.closing(self.weights(bridge, device)) as weights:
            return weights.plan.mapped_bytes + weights.plan.copied_bytes

    def close(self) -> None:
        """Unmap the file."""
        self._source.close()


def open_bridges(file: GGUFFile, hparams: Hparams, params: RunParams) -> BridgeFile | None:
    """Open the drafts file of a model whose own layers draft; None where there is none.

    Raises:
        ModelFileError, DepthFileError: there is one that cannot be used.
    """
    if params.speculate not in DRAFTING or params.depth != "full":
        return None
    path = find_depth_file(file, SUFFIX)
    return None if path is None else BridgeFile(path, file, hparams)
