"""The depth plan of one Runtime: what `depth=` asks for, its stand-ins, and its guard's verdict."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.depth_routing import load_router, route_prefill
from edgeroute.models.base import Hparams
from edgeroute.models.depth_file import DepthFile, find_depth_file, fingerprint
from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import DepthFileError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.placed_weights import Homes, PlacedWeights
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.skippers.auto import MAX_KL, fastest
from edgeroute.skippers.depth_router import DepthRouter
from edgeroute.skippers.guard import Guard, GuardParams, promise_of
from edgeroute.skippers.plan import SUB_BLOCKS, DepthPlan
from edgeroute.skippers.plan_json import plans_from_json

ROUTER_SUFFIX = ".router.npz"
ROUTED = "routed"
"""What `depth=` calls the routers' decisions."""

Logits = npt.NDArray[np.float32]


class Depth(Closing):
    """One plan, ready to run. The engine thread owns it.

    Attributes:
        plan: what is computed.
        spans: the same, as a forward takes it.
        key: tells its keys and values from the full model's; None where those of a token depend
            on the tokens behind it, so that they serve no other prompt.
        guard: watches its quality; None for a plan that promises nothing.
    """

    def __init__(self, plan: DepthPlan, standins: ResidentWeights | None) -> None:
        self.plan = plan
        self.spans = Forward.spans(plan.steps(), plan.name)
        pruned = any(layer.keep < 100 for layer in plan.layers)
        self.key: str | None = None if pruned else plan.key
        promise = promise_of(plan, GuardParams())
        self.guard = None if promise is None else Guard(promise)
        self.standins: ResidentWeights | PlacedWeights | None = standins
        self._run = sum({layer.attn, layer.ffn} <= {"run", "repeat"} for layer in plan.layers)

    @property
    def on(self) -> bool:
        """Whether requests may use it: not after it broke its promise."""
        return self.guard is None or self.guard.verdict == "keep"

    @property
    def n_repeats(self) -> int:
        """Further passes over layers."""
        return self.plan.n_repeats

    @property
    def n_bytes(self) -> int:
        """Bytes of its stand-ins."""
        plan = None if self.standins is None else self.standins.plan
        return 0 if plan is None else plan.mapped_bytes + plan.copied_bytes

    def begin(self) -> "Depth":
        """Return what computes one request."""
        return self

    def run(self, forward: Forward, pieces: Sequence[Piece]) -> Logits | None:
        """Compute a batch under the plan: see `Forward.run`, which lends its logits."""
        return forward.run(pieces, self.spans, borrow=True)

    def place(self, homes: Homes) -> None:
        """Plan the stand-ins for the devices of their layers, before they are loaded."""
        planned = self.standins
        if planned is not None:
            self.standins = PlacedWeights(planned.file, planned.specs, homes)
            planned.close()

    def rows(self) -> list[int]:
        """Name the layer of every further pass over a layer, in the order of their keys."""
        found = {step.repeat: step.il for step in self.plan.steps() if step.repeat}
        return [found[j] for j in sorted(found)]

    def load(self, forward: Forward) -> None:
        """Give a forward the stand-ins.

        Raises:
            CapacityError: not enough memory.
        """
        if self.standins is not None:
            self.standins.load()
            forward.standins = self.standins

    def cost(self) -> dict[str, object]:
        """Return what an answer under this plan computed, for its statistics.

        `layers_run` counts layers of which both sub-blocks run, `compute` the share of weights
        that every token is multiplied with, stand-ins and head included.
        """
        layers = self.plan.layers
        return {
            "plan": self.plan.name, "layers_run": self._run, "layers_total": len(layers),
            "compute": self.plan.compute, "kl": self.plan.kl,
        }  # fmt: skip

    def stats(self) -> dict[str, object]:
        """Return the plan's promise, and what its guard has seen."""
        found = self.cost() | {"speed": self.plan.speed, "on": self.on}
        if self.guard is None:
            return found
        seen = self.guard.estimate
        return found | {"guard": {
            "promise_nats": round(self.guard.promise, 6), "kl_nats": round(seen.mean, 6),
            "n_samples": seen.n_samples, "verdict": self.guard.verdict,
        }}  # fmt: skip

    def close(self) -> None:
        """Free the stand-ins; safe to call twice."""
        if self.standins is not None:
            self.standins.close()


class RoutedDepth:
    """Routers that decide for every prompt anew. The engine thread owns it.

    Attributes:
        router: of this model.
    """

    key = None
    on = True
    n_bytes = 0

    def __init__(self, router: DepthRouter) -> None:
        self.router = router
        self.n_routed = 0
        self.n_steps = 0

    @property
    def n_repeats(self) -> int:
        """Further passes over layers, at most."""
        return self.router.limits.max_repeats

    def begin(self) -> "RoutedRequest":
        """Return what computes one request."""
        return RoutedRequest(self)

    def place(self, homes: Homes) -> None:
        """Nothing: routers are no part of a graph."""

    def load(self, forward: Forward) -> None:
        """Nothing: routers are small and in memory."""

    def stats(self) -> dict[str, object]:
        """Return how many of the layers were run, on average over requests."""
        n_layer = self.router.n_layer
        found: dict[str, object] = {"plan": ROUTED, "on": True, "layers_total": n_layer,
                                    "routed": self.n_routed}  # fmt: skip
        if self.n_routed:
            found["layers_run"] = round(self.n_steps / self.n_routed, 3)
        return found


class RoutedRequest:
    """What routers decided for one request: nothing before its first batch is computed."""

    key = None

    def __init__(self, source: RoutedDepth) -> None:
        self._source = source
        self.spans: tuple[Span, ...] = ()
        self._n_run = 0

    def run(self, forward: Forward, pieces: Sequence[Piece]) -> Logits | None:
        """Compute a batch; the first, which is one piece from position 0, also decides.

        Lends its logits, as `Forward.run` does; None where that was stopped.
        """
        if pieces[0].pos:
            return forward.run(pieces, self.spans, borrow=True)
        routed = route_prefill(forward, pieces[0], self._source.router, borrow=True)
        if routed is None:
            return None
        self.spans = forward.spans(routed.steps)
        self._n_run = sum(step.reads for step in routed.steps)
        self._source.n_routed += 1
        self._source.n_steps += self._n_run
        return routed.logits

    def cost(self) -> dict[str, object]:
        """Return what an answer computed, for its statistics; a repeated layer counts twice."""
        return {"plan": ROUTED, "layers_run": self._n_run,
                "layers_total": self._source.router.n_layer}  # fmt: skip


DepthSource = Depth | RoutedDepth
"""Where a Runtime's requests get what computes them."""


@dataclass(frozen=True, slots=True)
class NoDepth:
    """What stands in the place of a plan where the full model runs: it says why."""

    reason: str

    def stats(self) -> dict[str, object]:
        """Return why there is no plan."""
        return {"plan": "full", "on": False, "reason": self.reason}


def open_depth(
    own: contextlib.ExitStack, file: GGUFFile, hparams: Hparams, device: Device, params: RunParams
) -> DepthSource | NoDepth:
    """Find the plan that `depth=` names, and plan its stand-ins; nothing is loaded yet.

    Args:
        own: takes over what is to be closed.
        file: the model.
        hparams: the same's.
        device: where the stand-ins will be.
        params: settings.

    Raises:
        DepthFileError: there is no such plan, or its file does not fit the model.
    """
    given = None if params.depth_file is None else Path(params.depth_file)
    if params.depth == ROUTED:
        where = given or file.path.with_name(file.path.name.removesuffix(".gguf") + ROUTER_SUFFIX)
        model = fingerprint(file)
        return RoutedDepth(load_router(where, hparams.n_layer, hparams.n_embd, model))
    path = given or find_depth_file(file)
    if path is None:
        if params.depth == "auto":
            return NoDepth("the model is not calibrated; `edgeroute calibrate` measures its plans")
        raise DepthFileError(
            f"there is no plan {params.depth!r}: {file.path.name} has no depth file beside it; "
            "run `edgeroute calibrate` on the model, or use depth='full'"
        )
    source = own.enter_context(DepthFile(path, file, hparams))
    plans = plans_from_json(source.plans, hparams.n_layer)
    if params.depth == "auto":
        max_kl = MAX_KL if params.depth_max_kl is None else params.depth_max_kl
        plan = fastest(plans, max_kl)
        if plan is None:
            return NoDepth(f"of {len(plans)} plans none is faster than the full model within "
                           f"{max_kl:g} nats of it")  # fmt: skip
    else:
        plan = next((each for each in plans if each.name == params.depth), None)
        if plan is None:
            names = ", ".join(each.name for each in plans) or "none"
            raise DepthFileError(f"{path.name} has no plan {params.depth!r}; it has {names}")
    _check_experts(plan, hparams)
    return own.enter_context(Depth(plan, _standins(source, plan, device)))


def _standins(source: DepthFile, plan: DepthPlan, device: Device) -> ResidentWeights | None:
    """Plan where the stand-ins of a plan go; None where it has none."""
    wanted = {
        (il, str(part)) for il, layer in enumerate(plan.layers) for part in SUB_BLOCKS
        if layer.act(part) == "approximate"
    }  # fmt: skip
    if not wanted:
        return None
    return ResidentWeights(source.file, device, source.specs(plan.name, wanted))


def _check_experts(plan: DepthPlan, hparams: Hparams) -> None:
    rules = [il for il, layer in enumerate(plan.layers) if layer.expert_rule != "all"]
    if rules and hparams.moe is None:
        raise DepthFileError(
            f"plan {plan.name!r} has a rule for experts in layer {rules[0]}; this model has none"
        )
    if hparams.moe is None:
        return
    lead = [il for il in rules if il < hparams.moe.n_layer_dense_lead]
    if lead:
        raise DepthFileError(
            f"plan {plan.name!r} has a rule for experts in layer {lead[0]}, which has none"
        )
