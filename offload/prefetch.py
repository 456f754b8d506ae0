"""Which pages the next layers will ask for: predictors as plug-ins behind one protocol.

Whether prefetch pays at all is decided in `prefetch_gate`; a prediction moves no byte.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgeroute.offload.eviction import MAX_PAGES
from edgeroute.runtime.errors import UsageError

MAX_GUESSES = 32
"""Guesses per layer by predictors that score every expert; more are never worth reading."""

LEARNED = "learned:"
"""What a path to a trained predictor is given behind, as its name."""

_EPSILON = 1e-8


class Guess(NamedTuple):
    """A page that may be asked for, and how likely: comparable within one answer only."""

    page: int
    score: float


class Predictor(Protocol):
    """Learns from what layers choose and names pages of the layers to come."""

    name: str

    def begin_step(self) -> None:
        """A token of decode begins."""

    def predict(
        self, layer: int, ids: Sequence[int], guess: Sequence[int] | None
    ) -> Sequence[Guess]:
        """Learn what a layer chose, and rank pages of the next layer, most likely first.

        Args:
            ids: experts that `layer` chose, [n_tokens * n_expert_used].
            guess: experts that layer + 1's gate ranks highest on this layer's state, each
                token's best first, [n_tokens * n]; None where the graph computed none.
        """

    def end_sequence(self) -> None:
        """An answer is complete; what follows is about something else."""


class NoPredictor:
    """Names nothing: prefetch is off."""

    name = "none"

    def __init__(self, n_layer: int, n_expert: int) -> None:
        check_size(n_layer, n_expert)

    def begin_step(self) -> None:
        """Nothing to prepare."""

    def predict(
        self, layer: int, ids: Sequence[int], guess: Sequence[int] | None
    ) -> Sequence[Guess]:
        return ()

    def end_sequence(self) -> None:
        """Nothing was learnt."""


class GateReuse(NoPredictor):
    """Layer l + 1's gate on layer l's state, computed inside the graph; ranked here.

    An expert's score is the number of tokens that guess it, the earlier rank first.
    Source: mixtral-offloading 2023, section on speculative loading.
    """

    name = "gate"

    def __init__(self, n_layer: int, n_expert: int) -> None:
        super().__init__(n_layer, n_expert)
        self._n_layer, self._n_expert = n_layer, n_expert

    def predict(
        self, layer: int, ids: Sequence[int], guess: Sequence[int] | None
    ) -> Sequence[Guess]:
        if guess is None or layer + 1 >= self._n_layer:
            return ()
        votes: dict[int, int] = {}
        for expert in guess:
            votes[expert] = votes.get(expert, 0) + 1
        base = (layer + 1) * self._n_expert
        ranked = sorted(votes.items(), key=lambda vote: -vote[1])  # stable: rank breaks ties
        n = len(guess)
        return [
            Guess(base + expert, count - rank / (n + 1))
            for rank, (expert, count) in enumerate(ranked)
        ]


class Frequency(NoPredictor):
    """How often each expert was chosen so far, old choices fading by `decay` a token.

    The prior that a cleverer predictor must beat at the same number of pages.
    """

    name = "frequency"
    decay = 0.995

    def __init__(self, n_layer: int, n_expert: int) -> None:
        super().__init__(n_layer, n_expert)
        self._base = n_expert
        self._counts = np.zeros((n_layer, n_expert))

    def begin_step(self) -> None:
        self._counts *= self.decay

    def predict(
        self, layer: int, ids: Sequence[int], guess: Sequence[int] | None
    ) -> Sequence[Guess]:
        np.add.at(self._counts[layer], ids, 1.0)
        if layer + 1 >= len(self._counts):
            return ()
        return rank_row((layer + 1) * self._base, self._counts[layer + 1])


class Eam(NoPredictor):
    """Expert activation matrices: past sequences that chose alike predict what comes.

    One matrix of counts (layers x experts) grows with the sequence; the nearest of those
    kept, by cosine, gives the next layers' shares. Three traps of the published code are
    avoided: layers run so far do take part in the match; in a sequence's first token only
    they do, since the others are still zero; and when nothing is kept, or nothing has run,
    the sequence's own counts answer. A full collection gives up one of its two most similar
    matrices, so that it stays diverse.

    Source: MoE-Infinity 2024, sections on tracing and on prefetching (score = share *
    (1 - distance / (n_layer + 1))).
    """

    name = "eam"
    capacity = 128
    n_ahead = 1

    def __init__(self, n_layer: int, n_expert: int) -> None:
        super().__init__(n_layer, n_expert)
        self._n_layer, self._n_expert = n_layer, n_expert
        self._counts: npt.NDArray[np.float32] = np.zeros((n_layer, n_expert), np.float32)
        # One row of all kept matrices per (layer, expert), so that a choice adds whole rows.
        self._kept: npt.NDArray[np.float32] = np.zeros((n_layer, n_expert, 0), np.float32)
        self._norms: npt.NDArray[np.float32] = np.zeros((n_layer, 0), np.float32)
        self._dots: npt.NDArray[np.float32] = np.zeros(0, np.float32)
        self._likeness: npt.NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._n_steps = 0

    def begin_step(self) -> None:
        self._n_steps += 1

    def predict(
        self, layer: int, ids: Sequence[int], guess: Sequence[int] | None
    ) -> Sequence[Guess]:
        chosen = np.asarray(ids, np.intp)
        np.add.at(self._counts[layer], chosen, 1.0)
        if self._dots.size:
            self._dots += self._kept[layer, chosen].sum(axis=0)
        shares = self._nearest(layer)
        found: list[Guess] = []
        for ahead in range(1, min(self.n_ahead, self._n_layer - 1 - layer) + 1):
            weight = 1 - ahead / (self._n_layer + 1)
            row = (shares[layer + ahead] + _EPSILON) * weight
            found += rank_row((layer + ahead) * self._n_expert, row, _EPSILON)
        return sorted(found, key=lambda guess: -guess.score)

    def _nearest(self, layer: int) -> npt.NDArray[np.float32]:
        """The kept matrix most like this sequence so far, else the sequence's own."""
        if not self._dots.size:
            return _shares(self._counts)
        seen = layer if self._n_steps <= 1 else self._n_layer - 1
        similarity = self._dots / (self._norms[seen] + _EPSILON)
        return self._kept[:, :, int(similarity.argmax())]

    def end_sequence(self) -> None:
        if self._counts.any():
            self._keep(_shares(self._counts))
        self._counts[:] = 0
        self._dots = np.zeros(self._kept.shape[2], np.float32)
        self._n_steps = 0

    def _keep(self, shares: npt.NDArray[np.float32]) -> None:
        """Add a matrix; when full, in the place of one of the two most similar."""
        norms = np.sqrt((shares**2).sum(axis=1).cumsum())
        likeness = np.tensordot(shares, self._kept, axes=2) / (self._norms[-1] * norms[-1])
        n_kept = likeness.size
        if n_kept < self.capacity:
            at = n_kept
            self._kept = np.concatenate([self._kept, shares[:, :, None]], axis=2)
            self._norms = np.concatenate([self._norms, norms[:, None]], axis=1)
            self._likeness = np.pad(self._likeness, (0, 1))
        else:
            at = self._redundant(likeness)
            self._kept[:, :, at] = shares
            self._norms[:, at] = norms
        self._likeness[at, :n_kept] = self._likeness[:n_kept, at] = likeness
        self._likeness[at, at] = -1

    def _redundant(self, likeness: npt.NDArray[np.float32]) -> int:
        """Which kept matrix to give up: the nearest to the new one, or one of a nearer pair."""
        nearest = int(likeness.argmax())
        one, _ = divmod(int(self._likeness.argmax()), likeness.size)
        return one if self._likeness.max() > likeness[nearest] else nearest


class RandomGuess(NoPredictor):
    """Experts of the next layer by chance: the control that a predictor must beat.

    Forced, it reads for nothing; what watches prefetch must find that out.
    """

    name = "random"

    def __init__(self, n_layer: int, n_expert: int) -> None:
        super().__init__(n_layer, n_expert)
        self._n_layer, self._n_expert = n_layer, n_expert
        self._random = random.Random(0)

    def predict(
        self, layer: int, ids: Sequence[int], guess: Sequence[int] | None
    ) -> Sequence[Guess]:
        if layer + 1 >= self._n_layer:
            return ()
        first, n = (layer + 1) * self._n_expert, min(len(ids), self._n_expert, MAX_GUESSES)
        return [Guess(first + e, 1.0) for e in self._random.sample(range(self._n_expert), n)]


def _shares(counts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Normalise each layer's counts to sum 1; a layer without any stays 0."""
    totals: npt.NDArray[np.float32] = np.maximum(counts.sum(axis=1, keepdims=True), np.float32(1))
    return counts / totals


def rank_row(base: int, row: npt.NDArray[np.floating], above: float = 0.0) -> list[Guess]:
    """Name the best experts of one layer that score above a floor; ties to the lower number."""
    order = np.argsort(-row, kind="stable")[:MAX_GUESSES]
    pairs = zip(order.tolist(), row[order].tolist(), strict=True)
    return [Guess(base + expert, score) for expert, score in pairs if score > above]


def check_size(n_layer: int, n_expert: int) -> None:
    """Refuse a size that no model has."""
    if n_layer < 1 or n_expert < 1 or n_layer * n_expert > MAX_PAGES:
        raise UsageError(
            f"a predictor needs 1 or more layers and experts, at most {MAX_PAGES} pages; "
            f"got {n_layer} x {n_expert}"
        )


PREDICTORS: dict[str, Callable[[int, int], Predictor]] = {
    predictor.name: predictor for predictor in (NoPredictor, GateReuse, Eam, Frequency, RandomGuess)
}


def make_predictor(name: str, n_layer: int, n_expert: int) -> Predictor:
    """Make a predictor that has learnt nothing yet; `learned:FILE` is one that was trained.

    Raises:
        ModelFileError: the file is not a predictor for this size.
        UsageError: there is none of that name, or the size is none of a model's.
    """
    if name.startswith(LEARNED):
        from edgeroute.offload import prefetch_learned  # builds on this module

        return prefetch_learned.load(name.removeprefix(LEARNED), n_layer, n_expert)
    if name not in PREDICTORS:
        raise UsageError(
            f"no predictor is called {name!r}; take one of {sorted(PREDICTORS)}, or "
            f"{LEARNED}FILE of train_routes"
        )
    return PREDICTORS[name](n_layer, n_expert)
