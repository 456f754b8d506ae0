"""Fit stand-ins for the sub-blocks of a dense model: narrow feed-forwards and low-rank maps.

Fitted in the order of the layers, each on the residual stream that the stand-ins before it
leave, so that later ones repair what earlier ones miss. Closed form throughout: neurons are
kept by energy, their down projection is refitted by ridge regression, linear maps are ridge
regressions reduced in rank. Nothing here writes a depth file; `edgeroute calibrate` does.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from edgeroute.models.base import Hparams
from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.depth import Step
from edgeroute.runtime.errors import UnsupportedModelError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.convert.moe_activations import DenseModel
from edgeroute.tools.standin_data import Streams, Windows
from edgeroute.tools.standin_fit import makes_first_state
from edgeroute.tools.standin_parts import Fitted, fit_linear, fit_narrow
from edgeroute.tools.standin_records import (
    DOWN_TYPES,
    PARTS,
    Part,
    StandInParams,
    StandInShape,
    StandInTensor,
)
from edgeroute.tools.standin_work import Done, Work

ARCHITECTURES: Final = ("llama", "qwen2")


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIns:
    """Fitted stand-ins.

    Attributes:
        shapes: what was fitted: all that was asked for, but for sub-blocks that make or remove
            position 0's state (standin_fit.makes_first_state), which must run.
        tensors: by name without a plan, such as `blk.3.ffn.down`.
        n_weights: weights of the stand-ins that every token is multiplied with.
        n_replaced: weights of the sub-blocks they stand for.
        n_model: weights of the whole model that a token is multiplied with.
        explained_ratio: per sub-block, such as `blk.3.ffn`, the share of the contribution's
            variance that its stand-in explains on windows kept apart; a constant mean
            explains 0.
    """

    shapes: tuple[StandInShape, ...]
    tensors: Mapping[str, StandInTensor]
    n_weights: int
    n_replaced: int
    n_model: int
    explained_ratio: Mapping[str, float]

    @property
    def saved_ratio(self) -> float:
        """Share of the weights multiplied per token that a pass with these saves."""
        return (self.n_replaced - self.n_weights) / self.n_model

    def steps(self, n_layer: int) -> tuple[Step, ...]:
        """Return a pass that uses all of them."""
        return steps_of(self.shapes, n_layer)


def fit_plan(
    model_path: Path,
    texts: Windows,
    plan_layers: Sequence[StandInShape],
    params: StandInParams | None = None,
) -> StandIns:
    """Fit a plan's stand-ins.

    Args:
        model_path: a dense model of one of ARCHITECTURES.
        texts: token ids (n_windows, n_window), as moe_text.default_windows returns them; one
            window in eight is kept apart.
        plan_layers: what to fit.
        params: how.

    Raises:
        UsageError: a shape that the model does not have, one sub-block twice, too little text.
        UnsupportedModelError: an architecture, or a type of weights, that numpy cannot compute.
        ModelFileError: the model cannot be read.
    """
    params = params or StandInParams()
    with GGUFFile.open(model_path) as file:
        model = open_dense(file)
        shapes = check_shapes(plan_layers, model.hparams)
        _check_params(params)
        streams = Streams(model, texts)
        fit = _Fit(model, streams, shapes, params)
        work = Work(params.work, _key(file, texts, shapes, params))
        fit.run(work)
        fitted = tuple(s for s in shapes.values() if f"blk.{s.il}.{s.part}" in fit.done.explained)
        return StandIns(
            shapes=fitted, tensors=fit.done.tensors, n_weights=fit.n_weights,
            n_replaced=sum(n_weights_of(model, shape) for shape in fitted),
            n_model=n_weights_of_model(model), explained_ratio=fit.done.explained,
        )  # fmt: skip


class _Fit:
    """The loop over layers."""

    def __init__(
        self, model: DenseModel, streams: Streams,
        shapes: Mapping[tuple[int, Part], StandInShape], params: StandInParams,
    ) -> None:  # fmt: skip
        self._model, self._streams, self._shapes, self._params = model, streams, shapes, params
        self.done = Done()

    @property
    def n_weights(self) -> int:
        return sum(t.n_values for name, t in self.done.tensors.items()
                   if not name.endswith((".norm", ".bias")))  # fmt: skip

    def run(self, work: Work) -> None:
        """Fit layer after layer, up to the last that needs it."""
        last = max(il for il, _ in self._shapes)
        for il in range(work.restore(self._streams, self.done), last + 1):
            self._layer(il)
            work.save(il, self._streams, self.done)
            if self._params.progress is not None:
                self._params.progress("stand-ins", il + 1, last + 1)

    def _layer(self, il: int) -> None:
        """Pass a layer with the full stream, and with ours or a stand-in in its place."""
        streams, whole = self._streams, (il, "layer") in self._shapes
        parts: tuple[Part, ...] = ("layer",) if whole else ("attn", "ffn")
        for part in parts:
            before = streams.full.copy()
            if part != "ffn":
                streams.add_attention(il)
            if part != "attn":
                streams.add_ffn(il)
            shape = self._shapes.get((il, part))
            added = streams.full - before
            if shape is None or makes_first_state(before, added, streams.n_window):
                streams.follow(il, part)
            else:
                self._add(shape)

    def _add(self, shape: StandInShape) -> None:
        """Fit one stand-in to our stream, which has yet to pass the sub-block, and pass it."""
        fit = fit_narrow if shape.width else fit_linear
        found: Fitted = fit(self._streams, shape, self._strengths(shape))
        stem = f"blk.{shape.il}.{shape.part}"
        self.done.tensors |= {f"{stem}.{name}": t for name, t in found.tensors.items()}
        self.done.explained[stem] = found.explained_ratio
        self.done.strengths[stem] = found.strength
        self._streams.add_to_ours(found.outputs)

    def _strengths(self, shape: StandInShape) -> StandInParams:
        """Take the strength that was best for the first stand-in of this kind, if there was one."""
        for (il, part), other in self._shapes.items():
            known = self.done.strengths.get(f"blk.{il}.{part}")
            if known is not None and (part, other.width > 0) == (shape.part, shape.width > 0):
                return replace(self._params, strengths=(known,))
        return self._params


def open_dense(file: GGUFFile) -> DenseModel:
    """Check that numpy can compute a model.

    Raises:
        UnsupportedModelError: it cannot.
        ModelFileError: the file is malformed.
    """
    model = DenseModel(file)
    arch = model.hparams.arch
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path.name} is of architecture {arch}; stand-ins can be fitted for "
            f"{' and '.join(ARCHITECTURES)}; plans that only skip work for all"
        )
    return model


def check_shapes(
    shapes: Sequence[StandInShape], hparams: Hparams
) -> dict[tuple[int, Part], StandInShape]:
    """Check what is to be fitted; return it by layer and sub-block.

    Raises:
        UsageError: see fit_plan.
    """
    found: dict[tuple[int, Part], StandInShape] = {}
    for shape in shapes:
        what = f"a stand-in for {shape.part} of layer {shape.il}"
        if shape.part not in PARTS or not 0 <= shape.il < hparams.n_layer:
            raise UsageError(f"{what}: the model has attn and ffn of layers 0 to "
                             f"{hparams.n_layer - 1}")  # fmt: skip
        if not 0 <= shape.rank <= hparams.n_embd or not 0 <= shape.width <= hparams.n_ff:
            raise UsageError(
                f"{what} has rank {shape.rank} and width {shape.width}; up to {hparams.n_embd} "
                f"and {hparams.n_ff} fit this model"
            )
        if shape.part == "attn" and shape.width:
            raise UsageError(f"{what} has a width; attention has no neurons to keep")
        if not shape.rank and not shape.width:
            raise UsageError(f"{what} has neither rank nor width; skip the sub-block instead")
        if (shape.il, shape.part) in found:
            raise UsageError(f"{what} is asked for twice")
        found[shape.il, shape.part] = shape
    for il, part in found:
        if part == "layer" and ({(il, "attn"), (il, "ffn")} & found.keys()):
            raise UsageError(f"layer {il} has a stand-in as a whole, and another for a part of it")
    if not found:
        raise UsageError("no stand-in is asked for")
    return found


def _check_params(params: StandInParams) -> None:
    if params.down_type not in DOWN_TYPES:
        raise UsageError(f"down projections cannot be stored as {params.down_type!r}; choose from "
                         f"{', '.join(DOWN_TYPES)}")  # fmt: skip
    if not params.strengths or not all(0 < s < np.inf for s in params.strengths):
        raise UsageError(f"ridge strengths are {params.strengths}; positive numbers are wanted")
    if not 0 <= params.repair <= 1:
        raise UsageError(f"repair is {params.repair}, outside 0 to 1")


def steps_of(shapes: Sequence[StandInShape], n_layer: int) -> tuple[Step, ...]:
    """Return a pass that runs all but what the shapes stand for."""
    parts = {(shape.il, shape.part) for shape in shapes}
    return tuple(
        Step(
            il,
            "approximate" if parts & {(il, "attn"), (il, "layer")} else "run",
            "approximate" if parts & {(il, "ffn"), (il, "layer")} else "run",
        )
        for il in range(n_layer)
    )


def n_weights_of(model: DenseModel, shape: StandInShape) -> int:
    """Weights of the sub-block that a shape stands for."""
    halves = ("attn", "ffn") if shape.part == "layer" else (shape.part,)
    return sum(
        int(np.prod(info.ne)) for name, info in model.file.tensors.items()
        if name.startswith(tuple(f"blk.{shape.il}.{half}_" for half in halves))
        and len(info.ne) > 1
    )  # fmt: skip


def n_weights_of_model(model: DenseModel) -> int:
    """Weights that every token is multiplied with: all layers' matrices and the head."""
    whole = (StandInShape(il=il, part="layer") for il in range(model.hparams.n_layer))
    head = model.hparams.n_embd * model.hparams.n_vocab
    return head + sum(n_weights_of(model, shape) for shape in whole)


def _key(
    file: GGUFFile, texts: Windows, shapes: Mapping[tuple[int, Part], StandInShape],
    params: StandInParams,
) -> str:  # fmt: skip
    """Tell fits apart whose results differ."""
    asked = {
        "model": fingerprint(file), "text": hashlib.sha256(texts.tobytes()).hexdigest(),
        "extents": list(texts.shape), "shapes": [asdict(shape) for shape in shapes.values()],
        "repair": params.repair, "strengths": params.strengths, "down_type": params.down_type,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


__all__ = [
    "ARCHITECTURES",
    "StandInParams",
    "StandInShape",
    "StandInTensor",
    "StandIns",
    "fit_plan",
    "steps_of",
]
