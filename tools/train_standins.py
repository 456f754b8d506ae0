"""Trains a plan's stand-ins together, from what least squares made of each by itself.

A closed form makes each stand-in explain its own sub-block; what counts is the divergence of the
whole plan's predictions from the full model's. It goes back through all layers into what the
stand-ins put out: the down projections of narrow feed-forwards, by a change of low rank that is
merged into them, and the outer halves and constants of linear maps. Nothing becomes larger or
slower by it. Needs the extra `train`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.standin_data import Windows
from edgeroute.tools.standin_records import Part, StandInTensor
from edgeroute.tools.standins import StandIns
from edgeroute.tools.torch_llama import TorchLlama
from edgeroute.tools.torch_training import Pace, Predictions, divergence, quicker_type, train

RANK: Final = 64
"""Of the change of a down projection."""
RATE: Final = 1e-3
MOST_EPOCHS: Final = 3.0
CHECKED_ONE_IN: Final = 10
MOST_CHECKED: Final = 8
"""Windows kept apart, at most: they tell whether training helped."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """A plan's stand-ins, and the plan's divergence on text kept apart before and after, nats.

    Where training did not help they are those that were given.
    """

    standins: StandIns
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class _StandIn:
    """One stand-in in torch: see models/standins.py. Matrices are (n_out, n_in)."""

    norm: Tensor
    fixed: Mapping[str, Tensor]
    learnt: Mapping[str, Tensor]

    def outputs(self, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Return what it adds to the stream `x`; nothing at position 0."""
        h = F.rms_norm(x, (x.shape[-1],), self.norm, eps).to(dtype)
        y = torch.zeros_like(x)
        if "a" in self.fixed:
            y = y + F.linear(F.linear(h, self.fixed["a"]), self.learnt["b"].to(dtype))
        if "gate" in self.fixed:
            act = F.silu(F.linear(h, self.fixed["gate"])) * F.linear(h, self.fixed["up"])
            inner = F.linear(act, self.learnt["down_a"].to(dtype))
            y = (
                y
                + F.linear(act, self.fixed["down"])
                + F.linear(inner, self.learnt["down_b"].to(dtype))
            )
        if "bias" in self.learnt:
            y = y + self.learnt["bias"]
        return torch.cat([torch.zeros_like(y[:, :1]), y[:, 1:]], 1)

    def tensors(self, given: Mapping[str, StandInTensor]) -> dict[str, StandInTensor]:
        """Return the tensors that training changed, stored as those that were given."""
        found: dict[str, Tensor] = {}
        if "a" in self.fixed:
            found["b"] = self.learnt["b"]
        if "gate" in self.fixed:
            change = self.learnt["down_b"] @ self.learnt["down_a"]
            found["down"] = torch.from_numpy(given["down"].decode().copy()) + change
        if "bias" in self.learnt:
            found["bias"] = self.learnt["bias"]
        values = {name: each.detach().float().numpy() for name, each in found.items()}
        return {
            name: StandInTensor.vector(each) if each.ndim == 1
            else StandInTensor.matrix(each, given[name].kind)
            for name, each in values.items()
        }  # fmt: skip


def train_standins(
    file: GGUFFile, given: StandIns, texts: Windows, until: float, threads: int,
    progress: Progress = lambda *_: None,
) -> Trained:  # fmt: skip
    """Train a plan's stand-ins until a time of `time.monotonic`, or for MOST_EPOCHS.

    Args:
        file: the model.
        given: fitted by `standins.fit_plan`.
        texts: token ids (n_windows, n_window); the last, one in CHECKED_ONE_IN, judge.
        until: when it ends.
        threads: of torch, from now on.
        progress: told of every update.

    Raises:
        UnsupportedModelError: torch cannot compute this model.
        ModelFileError: the file is malformed.
    """
    torch.set_num_threads(threads)
    model, vocabulary = TorchLlama(file, quicker_type()), np.unique(texts)
    plan = _Plan(model, given, vocabulary)
    n_checked = min(MOST_CHECKED, max(1, len(texts) // CHECKED_ONE_IN))
    n_fit = len(texts) - n_checked
    before = plan.checked(texts[n_fit:])
    train(plan.learnt, lambda windows: plan.loss(texts[windows]), (n_fit, texts.shape[1]),
          Pace(RATE, MOST_EPOCHS, until), progress)  # fmt: skip
    made = replace(given, tensors={**given.tensors, **plan.tensors()})
    after = _Plan(model, made, vocabulary).checked(texts[n_fit:])  # as it is stored
    return Trained(made, before, after) if after < before else Trained(given, before, before)


class _Plan:
    """A plan over a model, and what of it is learnt."""

    def __init__(
        self, model: TorchLlama, given: StandIns, vocabulary: npt.NDArray[np.int32]
    ) -> None:
        self._model, self._given = model, given
        self._predictions = Predictions(model, vocabulary)
        self._standins = {(shape.il, shape.part): self._standin(f"blk.{shape.il}.{shape.part}.")
                          for shape in given.shapes}  # fmt: skip
        self.learnt = [each for found in self._standins.values() for each in found.learnt.values()]

    def _tensors_of(self, stem: str) -> dict[str, StandInTensor]:
        return {name.removeprefix(stem): tensor for name, tensor in self._given.tensors.items()
                if name.startswith(stem)}  # fmt: skip

    def _standin(self, stem: str) -> _StandIn:
        values = {name: torch.from_numpy(tensor.decode().copy())
                  for name, tensor in self._tensors_of(stem).items()}  # fmt: skip
        learnt: dict[str, Tensor] = {}
        for name in ("b", "bias"):
            if name in values:
                learnt[name] = values.pop(name)
        if "down" in values:
            n_out, n_in = values["down"].shape
            rank = min(RANK, n_out, n_in)
            seeded = torch.Generator().manual_seed(0)
            learnt["down_a"] = torch.randn(rank, n_in, generator=seeded) * n_in**-0.5
            learnt["down_b"] = torch.zeros(n_out, rank)
        norm = values.pop("norm")
        return _StandIn(
            norm=norm, fixed={name: each.to(self._model.dtype) for name, each in values.items()},
            learnt={name: each.clone().requires_grad_() for name, each in learnt.items()},
        )  # fmt: skip

    def tensors(self) -> dict[str, StandInTensor]:
        """Return what training changed, by name without a plan."""
        found: dict[str, StandInTensor] = {}
        for (il, part), standin in self._standins.items():
            stem = f"blk.{il}.{part}."
            made = standin.tensors(self._tensors_of(stem))
            found |= {stem + name: tensor for name, tensor in made.items()}
        return found

    def checked(self, texts: Windows) -> float:
        """Return the divergence on some windows."""
        with torch.no_grad():
            return float(np.mean([self.loss(text[None]).item() for text in texts]))

    def loss(self, texts: Windows) -> Tensor:
        """Return the plan's divergence from the full model, nats a token behind the first."""
        ids = torch.from_numpy(texts).long()
        with torch.no_grad():
            wanted = self._predictions(self._model.hidden(ids)[:, 1:])
        return divergence(self._predictions(self._hidden(ids)[:, 1:]), wanted)

    def _hidden(self, ids: Tensor) -> Tensor:
        """Run the plan; as TorchLlama.hidden."""
        model, x = self._model, self._model.embed(ids)
        turn = model.turn(torch.arange(ids.shape[1])[None])
        for il in range(model.hparams.n_layer):
            if (il, "layer") in self._standins:
                x = x + self._approximate(il, "layer", x)
                continue
            if (il, "attn") in self._standins:
                x = x + self._approximate(il, "attn", x)
            else:
                x = x + model.attention(il, x, turn)
            if (il, "ffn") in self._standins:
                x = x + self._approximate(il, "ffn", x)
            else:
                x = x + model.feed_forward(il, x)
        return model.normed(x)

    def _approximate(self, il: int, part: Part, x: Tensor) -> Tensor:
        standin, model = self._standins[il, part], self._model
        return standin.outputs(x, model.hparams.norm_rms_eps, model.dtype)
