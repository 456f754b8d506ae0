"""Fit one stand-in to the streams as they are: a linear map, or a narrow feed-forward."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from gguf import GGMLQuantizationType

from edgeroute.tools.convert.moe_activations import Array
from edgeroute.tools.standin_data import Streams
from edgeroute.tools.standin_fit import (
    Ints,
    Ridge,
    Sample,
    by_energy,
    error_ratio,
    token_weights,
)
from edgeroute.tools.standin_records import (
    StandInParams,
    StandInShape,
    StandInTensor,
    StandInValues,
    down_kind,
    unit_power,
)

_F16: Final = GGMLQuantizationType.F16
_BESIDE_STRENGTH: Final = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """One stand-in.

    Attributes:
        tensors: by the last part of their names.
        outputs: what it adds to our stream (n_tokens, n_embd).
        explained_ratio: share of the variance of what the sub-block itself would add here that
            is explained on windows kept apart; a constant mean explains 0.
        strength: of the ridge.
    """

    tensors: dict[str, StandInTensor]
    outputs: Array
    explained_ratio: float
    strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What one fit works with: normed inputs, the sub-block's own outputs, the target."""

    inputs: Array
    own: Array
    target: Array
    weights: Array


def fit_linear(streams: Streams, shape: StandInShape, params: StandInParams) -> Fitted:
    """Fit a linear map of `shape.rank` and a constant.

    Args:
        streams: the full one past the sub-block, ours before it.
        shape: of what, and its rank.
        params: how.
    """
    norm, inputs = _normed(streams, shape)
    task = _task(streams, inputs, _own(streams, shape), params)
    fit, check = streams.split(task.inputs, task.target, task.weights)
    mean_in, mean_out = _means(fit)
    centred = [_shifted(sample, mean_in, mean_out) for sample in (fit, check)]
    ridge = Ridge(centred[0], np.zeros((fit.inputs.shape[1], len(mean_out)), np.float32))
    linear, strength = ridge.best(centred[1], params.strengths)
    a, b = ridge.split(linear, shape.rank)
    bias: Array = np.asarray(mean_out - (mean_in @ a) @ b, np.float32)
    tensors = {
        "norm": StandInTensor.vector(norm),
        "a": StandInTensor.matrix(a.T, _F16), "b": StandInTensor.matrix(b.T, _F16),
        "bias": StandInTensor.vector(bias),
    }  # fmt: skip
    eps = streams.model.hparams.norm_rms_eps
    outputs = StandInValues.of(tensors).outputs(streams.ours, streams.n_window, eps)
    return Fitted(tensors=tensors, outputs=outputs, strength=strength,
                  explained_ratio=_explained(streams, task, outputs))  # fmt: skip


def fit_narrow(streams: Streams, shape: StandInShape, params: StandInParams) -> Fitted:
    """Keep the neurons of most energy, refit their down projection, and add a linear map if any.

    Gate and up are the file's own rows, bit for bit.

    Args:
        streams: the full one past the sub-block, ours before it.
        shape: of what, its width and the rank of the linear map beside it.
        params: how.
    """
    ff = streams.model.feed_forward(shape.il)
    norm, inputs = _normed(streams, shape)
    acts, down = ff.hidden(inputs), np.ascontiguousarray(ff.down.T)
    own = acts @ down if shape.part == "ffn" else _own(streams, shape)
    task = _task(streams, inputs, own, params)
    fitted = np.s_[: streams.n_fit]
    order = by_energy(acts[fitted], task.weights[fitted], down)
    kept = np.sort(order[: shape.width])
    acts, down = acts[:, kept], down[kept]
    tensors = {"norm": StandInTensor.vector(norm)} | _kept_rows(streams, shape.il, kept)
    target, outputs = task.target, np.zeros_like(own)
    if shape.rank:
        a, b = _linear_beside(streams, task, (acts, down), shape.rank)
        tensors |= {"a": StandInTensor.matrix(a.T, _F16), "b": StandInTensor.matrix(b.T, _F16)}
        outputs += (inputs @ tensors["a"].decode().T) @ tensors["b"].decode().T
        target = target - outputs
    fit, check = streams.split(acts, target, task.weights)
    down, strength = Ridge(fit, down).best(check, params.strengths)
    stored = streams.model.file.tensors[f"blk.{shape.il}.ffn_down.weight"].type
    kind = down_kind(GGMLQuantizationType(stored), params.down_type, shape.width)
    tensors["down"] = StandInTensor.matrix(np.ascontiguousarray(down.T), kind)
    outputs += acts @ tensors["down"].decode().T
    outputs[:: streams.n_window] = 0
    return Fitted(tensors=tensors, outputs=outputs, strength=strength,
                  explained_ratio=_explained(streams, task, outputs))  # fmt: skip


def _normed(streams: Streams, shape: StandInShape) -> tuple[Array, Array]:
    """Return the norm's weight that a stand-in uses, and our stream normed by it."""
    name = f"blk.{shape.il}.{'attn' if shape.part == 'attn' else 'ffn'}_norm.weight"
    norm = streams.model.vector(name)
    inputs = unit_power(streams.ours, streams.model.hparams.norm_rms_eps)
    inputs *= norm
    return norm, inputs


def _own(streams: Streams, shape: StandInShape) -> Array:
    """Compute what the sub-block itself would add to our stream."""
    after = streams.ours.copy()
    if shape.part != "ffn":
        streams.model.add_attention(shape.il, after, streams.n_window)
    if shape.part != "attn":
        streams.add_feed_forward(shape.il, streams.model.feed_forward(shape.il), after)
    after -= streams.ours
    return after


def _task(streams: Streams, inputs: Array, own: Array, params: StandInParams) -> _Task:
    """Set the target: what the sub-block adds, and a share of what was missed before it."""
    missed = streams.full - streams.ours
    missed -= own
    missed *= np.float32(params.repair)
    missed += own
    weights = token_weights(streams.ours, streams.n_window)
    return _Task(inputs=inputs, own=own, target=missed, weights=weights)


def _linear_beside(
    streams: Streams, task: _Task, neurons: tuple[Array, Array], rank: int
) -> tuple[Array, Array]:
    """Fit inputs and kept neurons jointly; return the inputs' part, reduced in rank."""
    acts, down = neurons
    n_in = task.inputs.shape[1]
    scale = np.sqrt(np.mean(acts**2) / max(float(np.mean(task.inputs**2)), 1e-20))
    scale = np.float32(scale)  # the ridge should weigh on both alike
    both = np.concatenate([task.inputs * scale, acts], axis=1)
    start = np.concatenate([np.zeros((n_in, down.shape[1]), np.float32), down])
    fit, _ = streams.split(both, task.target, task.weights)
    ridge = Ridge(fit, start)
    found = ridge.solve(_BESIDE_STRENGTH)
    a, b = ridge.split(found[:n_in], rank)
    return a * scale, b


def _kept_rows(streams: Streams, il: int, kept: Ints) -> dict[str, StandInTensor]:
    """Slice the rows of gate and up as they are stored."""
    model, found = streams.model, {}
    for part in ("gate", "up"):
        name = f"blk.{il}.ffn_{part}.weight"
        kind = GGMLQuantizationType(model.file.tensors[name].type)
        rows = np.ascontiguousarray(model.rows(name)[kept])
        plain = {GGMLQuantizationType.F32: np.float32, _F16: np.float16}.get(kind)
        found[part] = StandInTensor(rows=rows if plain is None else rows.view(plain), kind=kind)
    return found


def _means(sample: Sample) -> tuple[Array, Array]:
    share: Array = sample.weights / np.float32(sample.weights.sum())
    mean_in: Array = share @ sample.inputs
    mean_out: Array = share @ sample.targets
    return mean_in, mean_out


def _shifted(sample: Sample, mean_in: Array, mean_out: Array) -> Sample:
    return Sample(inputs=sample.inputs - mean_in, targets=sample.targets - mean_out,
                  weights=sample.weights)  # fmt: skip


def _explained(streams: Streams, task: _Task, outputs: Array) -> float:
    """Compare outputs with what the sub-block itself adds, on windows kept apart."""
    _, check = streams.split(task.inputs, task.own, task.weights)
    return 1 - error_ratio(check, outputs[streams.n_fit :])
