"""Trains bridges by what their guesses are worth, from the maps that least squares gave.

Least squares makes every error of the stream behind a block equally bad; what counts is which
tokens the layers behind it then find likely. So a draft is computed in torch as the engine
computes it, from the bridge on, and the divergence of its predictions from the full model's goes
back into the bridge. A draft sees the exact keys and values of all tokens before it, and, at its
second guess, those that it made itself at its first. Needs the extra `train`.
Source: Li et al. 2024, "EAGLE" (a draft from the states before, trained on the model's own).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.torch_llama import TorchLlama, Turn
from edgeroute.tools.torch_training import Pace, Predictions, divergence, quicker_type, train

Floats = npt.NDArray[np.float32]

N_GUESSES: Final = 2
GUESS_WEIGHT: Final = (1.0, 0.5)
"""Of each guess's divergence: the second counts only where the first was right."""
RATE: Final = 5e-4
MOST_EPOCHS: Final = 1.5
"""More of the same text teaches a bridge that text alone."""
N_SHUT: Final = 2
"""Tokens at a window's beginning that are not judged: position 0 has a state of its own."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What bridges over a block are trained on.

    Attributes:
        tokens: int32 (n_windows, n_window).
        near: the stream before the block, (n_windows, n_window, n_embd), any float type.
        far: the stream behind it, likewise.
        n_checked: of the last windows, those kept apart.
    """

    tokens: npt.NDArray[np.int32]
    near: npt.NDArray[np.generic]
    far: npt.NDArray[np.generic]
    n_checked: int


@dataclass(frozen=True, slots=True)
class Trained:
    """A bridge, as `calibrate_drafts.Streams.fit` gives it, and its divergence on text kept apart
    before and after, nats a guess. Where training did not help it is the one that was given."""

    a: Floats
    b: Floats
    before: float
    after: float


class BridgeTrainer:
    """Trains the bridges of one model.

    Args:
        model: its layers behind the shortest block, in bfloat16 where that is quick.
        vocabulary: tokens that predictions are compared over: those of the text.
        eps: of the norms.
    """

    def __init__(self, model: TorchLlama, vocabulary: npt.NDArray[np.int32], eps: float) -> None:
        self._model, self._eps = model, eps
        self._predictions = Predictions(model, vocabulary)

    def train(self, end: int, texts: Texts, given: tuple[Floats, Floats], until: float) -> Trained:
        """Train the bridge to layer `end` until a time of `time.monotonic`.

        Args:
            end: the layer behind the block.
            texts: see Texts.
            given: a (2 n_embd + 1, rank), whose last row takes a 1, and b (rank, n_embd).
            until: when it ends, if not after MOST_EPOCHS.
        """
        a, b = (torch.from_numpy(np.ascontiguousarray(each, np.float32)) for each in given)
        maps = [each.clone().requires_grad_() for each in (a, b)]
        n_fit, n_window = len(texts.tokens) - texts.n_checked, texts.tokens.shape[1]
        before = self._checked(end, texts, maps)
        train(maps, lambda windows: self._loss(end, texts, windows, maps), (n_fit, n_window),
              Pace(RATE, MOST_EPOCHS, until))  # fmt: skip
        after = self._checked(end, texts, maps)
        if not after < before:
            return Trained(*given, before, before)
        return Trained(maps[0].detach().numpy(), maps[1].detach().numpy(), before, after)

    def _checked(self, end: int, texts: Texts, maps: list[Tensor]) -> float:
        """Return the divergence on the windows kept apart."""
        n = len(texts.tokens)
        with torch.no_grad():
            losses = [self._loss(end, texts, np.array([i]), maps).item()
                      for i in range(n - texts.n_checked, n)]  # fmt: skip
        return float(np.mean(losses))

    def _loss(
        self, end: int, texts: Texts, windows: npt.NDArray[np.int64], maps: list[Tensor]
    ) -> Tensor:
        """Return the divergence of drafts from the full model, nats a guess."""
        near, far = (torch.from_numpy(each[windows].astype(np.float32))
                     for each in (texts.near, texts.far))  # fmt: skip
        drafts = _Drafts(self._model, end, far)
        wanted = self._predictions(drafts.full[:, N_SHUT:])
        total = torch.zeros(())
        for weight, stream in zip(GUESS_WEIGHT, self._guesses(drafts, near, far, maps),
                                  strict=True):  # fmt: skip
            found = self._predictions(stream[:, N_SHUT:])
            total = total + weight * divergence(found, wanted)
        return total / sum(GUESS_WEIGHT)

    def _guesses(
        self, drafts: "_Drafts", near: Tensor, far: Tensor, maps: list[Tensor]
    ) -> Iterator[Tensor]:
        """Give the normed stream of every first guess, then of every second, and so on."""
        before = _later(far)
        for _ in range(N_GUESSES):
            ones = torch.ones(*near.shape[:2], 1)
            inputs = torch.cat([self._unit(near), self._unit(before), ones], -1)
            made = near + _low_rank(inputs, maps, self._model.dtype)
            yield drafts.finish(made)
            before = _later(made)

    def _unit(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self._eps)


class _Drafts:
    """The layers behind a block, for drafts of the next token at every place of some windows.

    Args:
        model: has these layers.
        end: the first of them.
        far: the full model's stream before it (n_seq, n_tokens, n_embd).
    """

    def __init__(self, model: TorchLlama, end: int, far: Tensor) -> None:
        self._model, self._layers = model, range(end, model.hparams.n_layer)
        self._turn: Turn = model.turn(torch.arange(far.shape[1])[None])
        self._group = model.hparams.n_head // model.hparams.n_head_kv
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._drafted: list[tuple[Tensor, Tensor]] | None = None
        """Keys and values of the guess before, at its own places."""
        with torch.no_grad():
            x = far
            for il in self._layers:
                q, k, v = self._heads(il, x)
                self._kept.append((k, v))
                found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + model.project(il, found)
                x = x + model.feed_forward(il, x)
            self.full = model.normed(x)
            """What the full model gives its head."""

    def finish(self, x: Tensor) -> Tensor:
        """Compute guesses from the stream behind the block on; return what the head takes."""
        drafted = []
        for i, il in enumerate(self._layers):
            q, k, v = self._heads(il, x)
            last = None if self._drafted is None else self._drafted[i]
            x = x + self._model.project(il, _attend(q, self._kept[i], (k, v), last))
            x = x + self._model.feed_forward(il, x)
            drafted.append((k, v))
        self._drafted = drafted
        return self._model.normed(x)

    def _heads(self, il: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._model.heads(il, x, self._turn)
        return q, k.repeat_interleave(self._group, 1), v.repeat_interleave(self._group, 1)


def _attend(
    q: Tensor, kept: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor],
    last: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Attend from every place to what the full model kept before it, and to what is drafted.

    Args:
        q: (n_seq, n_head, n_tokens, width), as all others.
        kept: the full model's keys and values.
        own: the draft's at the same place.
        last: those of the guess before, one place earlier; None for a first guess.
    """
    n, scale = q.shape[2], q.shape[3] ** -0.5
    hidden = torch.ones(n, n, dtype=torch.bool).triu(0 if last is None else -1)
    scores = [(q @ kept[0].transpose(-1, -2) * scale).masked_fill(hidden, -math.inf)]
    drafted = [own] if last is None else [own, (_later(last[0], 2), _later(last[1], 2))]
    scores += [(q * k).sum(-1, keepdim=True) * scale for k, _ in drafted]
    weights = torch.cat(scores, -1).softmax(-1)
    found = weights[..., :n] @ kept[1]
    for i, (_, v) in enumerate(drafted):
        found = found + weights[..., n + i : n + i + 1] * v
    return found


def _later(x: Tensor, dim: int = 1) -> Tensor:
    """Give every place what the one before has; the first keeps its own."""
    return torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, x.shape[dim] - 1)], dim)


def _low_rank(x: Tensor, maps: list[Tensor], dtype: torch.dtype) -> Tensor:
    a, b = (each.to(dtype) for each in maps)
    return ((x.to(dtype) @ a) @ b).float()


def trainer(
    file: GGUFFile, first: int, texts: npt.NDArray[np.int32], threads: int
) -> BridgeTrainer:
    """Make the trainer of a model's bridges.

    Args:
        file: the model.
        first: the end of the shortest block.
        texts: all text: predictions are compared over the tokens in it.
        threads: of torch, from now on.

    Raises:
        UnsupportedModelError: torch cannot compute this model.
        ModelFileError: the file is malformed.
    """
    torch.set_num_threads(threads)
    model = TorchLlama(file, quicker_type(), first=first)
    return BridgeTrainer(model, np.unique(texts), model.hparams.norm_rms_eps)
