"""Which feed-forwards to narrow, and by how much: every layer's marginal cost, in one pass.

Each layer alone is narrowed by a quarter, and all these variants advance side by side to the
logits: their divergence from the full model is what a layer's error costs. Between widths it
is taken to grow with the squared error, which is known for every width.
"""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.convert.moe_activations import ROWS_AT_ONCE, Array, DenseModel
from edgeroute.tools.standin_data import Windows, check_windows
from edgeroute.tools.standin_fit import by_energy, makes_first_state, token_weights
from edgeroute.tools.standin_records import Progress, StandInShape
from edgeroute.tools.standin_work import Work
from edgeroute.tools.standins import n_weights_of_model, open_dense

N_CHECK_TOKENS: Final = 512
"""Tokens whose predictions the variants are judged by."""
LOGITS_ONE_IN: Final = 2
REFERENCE_DROPPED: Final = 0.25
LEAST_WIDTH_RATIO: Final = 0.375
"""What is left of a feed-forward at least: deeper cuts cost more than one layer's study tells."""
_STEP: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStudy:
    """One layer's feed-forward.

    Attributes:
        lost: squared error of dropping 0, 1, ... steps of neurons, over the power of what the
            feed-forward adds.
        kl_nats: divergence with a quarter of the neurons dropped and nothing refitted.
        must_run: whether it makes or removes position 0's state, so that nothing may stand in.
    """

    lost: tuple[float, ...]
    kl_nats: float
    must_run: bool = False


class Rival(NamedTuple):
    """A stand-in that may be taken in place of narrower feed-forwards.

    kl_nats is what leaving its sub-block out costs; n_weights and time are what it saves.
    """

    shape: StandInShape
    kl_nats: float
    n_weights: int
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What narrowing each feed-forward costs.

    Attributes:
        n_ff, n_embd: of the model.
        n_model: weights that every token is multiplied with.
        step: neurons that widths differ by.
        layers: by layer.
    """

    n_ff: int
    n_embd: int
    n_model: int
    step: int
    layers: tuple[LayerStudy, ...]

    def shapes(
        self, saved_ratio: float, ffn_times: Sequence[float] = (), rivals: Sequence[Rival] = ()
    ) -> tuple[StandInShape, ...]:
        """Choose what saves so much of the compute at least expected divergence per time saved.

        Args:
            saved_ratio: of the weights multiplied per token, 0 to what narrow layers can save.
            ffn_times: of each feed-forward, in any unit; none for all alike.
            rivals: what else may be taken; their times are in the same unit.

        Raises:
            UsageError: it cannot be saved.
        """
        wanted = saved_ratio * self.n_model
        per_step = 3 * self.n_embd * self.step
        most = int(self.n_ff * (1 - LEAST_WIDTH_RATIO)) // self.step
        free = [il for il, layer in enumerate(self.layers) if not layer.must_run]
        if not 0 < wanted <= most * per_step * len(free):
            raise UsageError(
                f"narrow feed-forwards cannot save {saved_ratio:.3f} of the compute; at most "
                f"{most * per_step * len(free) / self.n_model:.3f} of it here"
            )
        times = [t * self.step / self.n_ff for t in ffn_times or [1.0] * len(self.layers)]
        dropped, taken = [0] * len(self.layers), list[StandInShape]()
        queue = [(self._marginal(il, 0) / times[il], il, -1) for il in free]
        queue += [(rival.kl_nats / rival.time, rival.shape.il, i)
                  for i, rival in enumerate(rivals)]  # fmt: skip
        heapq.heapify(queue)
        while wanted > 0:
            _, il, i = heapq.heappop(queue)
            if i >= 0:
                wanted -= rivals[i].n_weights
                taken.append(rivals[i].shape)
                continue
            wanted -= per_step
            dropped[il] += 1
            if dropped[il] < most:
                heapq.heappush(queue, (self._marginal(il, dropped[il]) / times[il], il, -1))
        taken += [StandInShape(il=il, part="ffn", width=self.n_ff - n * self.step)
                  for il, n in enumerate(dropped) if n]  # fmt: skip
        return tuple(sorted(taken, key=lambda shape: (shape.il, shape.part)))

    def _marginal(self, il: int, n_dropped: int) -> float:
        """Divergence that the next step of neurons of a layer costs."""
        layer = self.layers[il]
        scale = layer.kl_nats / max(layer.lost[reference(self.n_ff, self.step)], 1e-12)
        return scale * (layer.lost[n_dropped + 1] - layer.lost[n_dropped])


def reference(n_ff: int, step: int) -> int:
    """Steps of neurons that the variants do without."""
    return max(1, round(n_ff * REFERENCE_DROPPED / step))


def step_of(n_ff: int) -> int:
    """Neurons that widths differ by: blocks of quantised types should fit."""
    return _STEP if n_ff >= 8 * _STEP else max(1, n_ff // 8)


def study(
    model_path: Path, texts: Windows, *, work: Path | None = None,
    progress: Progress | None = None,
) -> Study:  # fmt: skip
    """Measure what narrowing each feed-forward costs.

    Args:
        model_path: a dense model of one of standins.ARCHITECTURES.
        texts: token ids (n_windows, n_window); the last N_CHECK_TOKENS judge. 2,500 are enough.
        work: folder for what is done, so that a stopped study goes on.
        progress: told after each layer.

    Raises:
        UsageError: too little text.
        UnsupportedModelError, ModelFileError: see standins.fit_plan.
    """
    with GGUFFile.open(model_path) as file:
        model = open_dense(file)
        check_windows(texts, model.hparams.n_vocab)
        key = hashlib.sha256(texts.tobytes() + repr(texts.shape).encode()
                             + fingerprint(file).encode()).hexdigest()  # fmt: skip
        return _Study(model, texts, Work(work, key)).run(progress)


class _Study:
    """The pass: the full model's stream, and a variant's for each layer passed so far."""

    def __init__(self, model: DenseModel, texts: Windows, work: Work) -> None:
        self._model, self._work = model, work
        self._n_window = int(texts.shape[1])
        n_check = min(max(1, N_CHECK_TOKENS // self._n_window), len(texts) - 1)
        self._at = (len(texts) - n_check) * self._n_window
        self._x = model.embed(texts.reshape(-1))
        n_layer, n_embd = model.hparams.n_layer, model.hparams.n_embd
        self._variants = np.zeros((n_layer, len(self._x) - self._at, n_embd), np.float32)
        self._step = step_of(model.hparams.n_ff)
        self._lost: list[tuple[float, ...]] = []
        self._must_run: list[bool] = []

    def run(self, progress: Progress | None) -> Study:
        n_layer = self._model.hparams.n_layer
        for il in range(self._restore(), n_layer):
            self._layer(il)
            self._work.write("study.npz", {
                "lost": np.array(self._lost), "must_run": np.array(self._must_run),
                "x": self._x, "variants": self._variants[: il + 1],
            })  # fmt: skip
            if progress is not None:
                progress("influence", il + 1, n_layer)
        hp = self._model.hparams
        found = zip(self._lost, self._divergences(), self._must_run, strict=True)
        layers = [LayerStudy(lost=lost, kl_nats=kl, must_run=must) for lost, kl, must in found]
        return Study(n_ff=hp.n_ff, n_embd=hp.n_embd, n_model=n_weights_of_model(self._model),
                     step=self._step, layers=tuple(layers))  # fmt: skip

    def _restore(self) -> int:
        found = self._work.read("study.npz")
        if found is None:
            return 0
        self._lost = [tuple(float(v) for v in row) for row in found["lost"]]
        self._must_run = [bool(v) for v in found["must_run"]]
        self._x[...] = found["x"]
        self._variants[: len(self._lost)] = found["variants"]
        return len(self._lost)

    def _layer(self, il: int) -> None:
        """Pass a layer with the full stream and the variants so far, and begin its own."""
        model, at = self._model, self._at
        passed = self._variants[:il].reshape(-1, self._x.shape[1])
        ff = model.feed_forward(il)
        for x in (self._x, passed):
            model.add_attention(il, x, self._n_window)
        for first in range(0, len(passed), ROWS_AT_ONCE):
            part = np.s_[first : first + ROWS_AT_ONCE]
            passed[part] += ff.hidden(model.norm(f"blk.{il}.ffn_norm", passed[part])) @ ff.down.T
        acts = ff.hidden(model.norm(f"blk.{il}.ffn_norm", self._x))
        down = np.ascontiguousarray(ff.down.T)
        weights = token_weights(self._x, self._n_window)
        order = by_energy(acts[:at], weights[:at], down)
        lost, without = self._drop((acts[at:], down), order, weights[at:])
        self._lost.append(lost)
        self._variants[il] = self._x[at:] + without
        self._variants[il, :: self._n_window] = self._x[at :: self._n_window]
        added = acts @ down
        self._must_run.append(makes_first_state(self._x, added, self._n_window))
        self._x += added

    def _drop(
        self, neurons: tuple[Array, Array], order: np.ndarray, weights: Array
    ) -> tuple[tuple[float, ...], Array]:
        """Drop steps of neurons, least energy first.

        Returns:
            The errors (see LayerStudy), and what the reference's neurons add (n, n_embd).
        """
        acts, down = neurons
        w = weights[:, None]
        whole = acts @ down
        power = max(float((w * whole**2).sum()), 1e-20)
        gone, lost = np.zeros_like(whole), [0.0]
        at_reference = whole
        for n in range(1, len(order) // self._step + 1):
            mine = order[len(order) - n * self._step : len(order) - (n - 1) * self._step]
            gone += acts[:, mine] @ down[mine]
            lost.append(float((w * gone**2).sum()) / power)
            if n == reference(len(order), self._step):
                at_reference = whole - gone
        return tuple(lost), at_reference

    def _divergences(self) -> list[float]:
        """Divergence of each variant's predictions from the full model's, nats per token."""
        n = len(self._x) - self._at
        rows = np.flatnonzero(np.arange(n) % self._n_window)[::LOGITS_ONE_IN]
        head = Head(self._model)
        wanted = head.logs(self._x[self._at :][rows])
        power = np.exp(wanted)
        found = []
        for variant in self._variants:
            logs = head.logs(variant[rows])
            found.append(float(np.einsum("ij,ij->", power, wanted - logs)) / len(rows))
        return found


class Head:
    """A model's output matrix, decoded once. Holds n_vocab * n_embd floats."""

    def __init__(self, model: DenseModel) -> None:
        self._model = model
        self._matrix = model.matrix("token_embd.weight" if model.hparams.tied else "output.weight")

    def logs(self, x: Array) -> Array:
        """Return log-probabilities of the next token, F32 (n_tokens, n_vocab)."""
        found: Array = self._model.norm("output_norm", x) @ self._matrix.T
        found -= found.max(axis=1, keepdims=True)
        found -= np.log(np.exp(found).sum(axis=1, keepdims=True, dtype=np.float64)).astype(
            np.float32
        )
        return found
