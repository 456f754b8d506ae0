"""What a model would take, read from its header alone: nothing is loaded."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeroute.config import RunParams
from edgeroute.loaded import MemoryPlan, budget_bytes, kv_shape, plan_memory
from edgeroute.models.base import Hparams, Model
from edgeroute.models.registry import describe
from edgeroute.runtime import machine
from edgeroute.runtime.device import Device
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import CELL_BUCKET, round_cells
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools.measure import memory_bandwidth

_MIN_N_CTX, _MAX_N_CTX = 32, 1 << 20
"""What RunParams allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A model's bytes against a budget. `read_bytes` is what one decoded token must read."""

    path: Path
    hparams: Hparams
    params: RunParams
    n_params: int
    type_bytes: dict[str, int]
    memory: MemoryPlan
    budget_bytes: int
    available: machine.Memory
    largest_n_ctx: int | None
    weight_read_bytes: int
    kv_cell_bytes: int

    @property
    def fits(self) -> bool:
        """Whether loading would be let in."""
        return self.memory.total_bytes <= self.budget_bytes

    def read_bytes(self, n_past: int) -> int:
        """Bytes that decoding one token after `n_past` others reads."""
        return self.weight_read_bytes + self.kv_cell_bytes * n_past


def plan_model(path: Path, params: RunParams) -> ModelPlan:
    """Read a model's header and plan its memory; its weights stay on disk.

    Raises:
        ModelFileError, UnsupportedModelError: the file cannot be used.
        UsageError: the device does not exist.
    """
    with GGUFFile.open(path) as file:
        model = describe(file)
        with Device.open(params.device) as device:
            weights = ResidentWeights(file, device, model.specs())
            try:
                return _plan(file, model, weights, params)
            finally:
                weights.close()


def _plan(file: GGUFFile, model: Model, weights: ResidentWeights, params: RunParams) -> ModelPlan:
    type_bytes: dict[str, int] = {}
    for info in file.tensors.values():
        type_bytes[info.type.name] = type_bytes.get(info.type.name, 0) + info.nbytes
    budget = budget_bytes(params)
    return ModelPlan(
        path=file.path, hparams=model.hparams, params=params,
        n_params=sum(math.prod(info.ne) for info in file.tensors.values()),
        type_bytes=dict(sorted(type_bytes.items(), key=lambda pair: -pair[1])),
        memory=plan_memory(model.hparams, weights, params), budget_bytes=budget,
        available=machine.memory(),
        largest_n_ctx=_largest_n_ctx(model.hparams, weights, params, budget),
        weight_read_bytes=_read_per_token(model, weights),
        kv_cell_bytes=kv_shape(model.hparams, params).bytes_per_cell,
    )  # fmt: skip


def _largest_n_ctx(
    hparams: Hparams, weights: ResidentWeights, params: RunParams, budget: int
) -> int | None:
    """Find the longest context, up to the trained one, that fits; None if none does."""

    def fits(n_ctx: int) -> bool:
        changed = dataclasses.replace(params, n_ctx=n_ctx, n_kv=None)
        return plan_memory(hparams, weights, changed).total_bytes <= budget

    most = max(_MIN_N_CTX, min(hparams.n_ctx_train, _MAX_N_CTX))
    if not fits(_MIN_N_CTX):
        return None
    if fits(most):
        return most
    # Bytes grow with whole buckets of cells only.
    low, high = 1, round_cells(most) // CELL_BUCKET
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CELL_BUCKET) else (low, middle)
    return min(low * CELL_BUCKET, most)


def _read_per_token(model: Model, weights: ResidentWeights) -> int:
    """Bytes of weights that one token touches: all of each, but one row of a table."""
    infos, total = weights.infos, 0
    for spec in model.specs():
        info = infos.get(spec.name)
        if info is not None:
            total += info.type.row_size(info.ne[0]) if spec.use == "get_rows" else info.nbytes
    return total


def predict(plan: ModelPlan) -> dict[str, Any]:
    """Measure memory bandwidth and divide: an upper bound of decode speed.

    Arithmetic, a cold page cache and other programs only make it slower. It holds for
    weights larger than the processor's caches.
    """
    threads = plan.params.threads or machine.usable_cores()
    bandwidth = memory_bandwidth(threads).read_bytes_s
    return {
        "bandwidth_bytes_s": round(bandwidth),
        "threads": threads,
        "ceiling_tok_s": round(bandwidth / plan.read_bytes(0), 2),
        "ceiling_tok_s_full_context": round(bandwidth / plan.read_bytes(plan.params.n_ctx), 2),
    }
