"""What drafts are calibrated on: texts, some of them the model's own, and its streams over them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.bridges import Bridge
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Piece
from edgeroute.models.standins import fill_before
from edgeroute.runtime.batch_shape import BatchShape
from edgeroute.runtime.built_graph import Graph
from edgeroute.runtime.cells import Region
from edgeroute.runtime.errors import ComputeError
from edgeroute.tools.depth_probe import Floats, Probe, Window
from edgeroute.tools.draft_openings import OPENINGS
from edgeroute.tools.standin_fit import Ridge, Sample, error_ratio, token_weights
from edgeroute.tools.standin_records import STRENGTHS, unit_power

GUESSES: Final = 32
"""Places of a window that a bridge is judged at."""
SIDE_BY_SIDE, PER_WINDOW = 16, 2
"""Texts that the model goes on with at once, and how many of them make a window."""
AT_ONCE: Final = SIDE_BY_SIDE // PER_WINDOW
N_WRITTEN: Final = 3 * len(OPENINGS) // PER_WINDOW
"""Windows that it writes: each text is gone on with in three ways."""
N_RANKED: Final = 8
"""Likeliest tokens, of which the first that ends no text is taken."""
CHECKED_ONE_IN: Final = 8
"""Of the windows to fit to, those that choose the strength."""


class DraftProbe(Probe):
    """A probe that can cross bridges."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        self._before: Floats = np.zeros(loaded.model.hparams.n_embd, np.float32)

    def states(self, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, Floats]:
        """Run the full model over a text; return the streams before some of its layers."""
        found: dict[int, Floats] = {}
        for span in self.by_layer()[:-1]:
            il = span.steps[0].il if span.steps else -1
            if il in layers:
                found[il] = self.residual(len(tokens))
            self._compute(tokens, span)
        last = self.n_layer - 1
        return found | ({last: self.residual(len(tokens))} if last in layers else {})

    def write(self, openings: Sequence[str], n_tokens: int, place: int = 0) -> list[int]:
        """Have the model go on with some texts, side by side, and put them behind each other.

        Each becomes an equal part of `n_tokens`, likeliest token by likeliest token; what would
        end it is passed over.

        Args:
            openings: the texts.
            n_tokens: of all of them together.
            place: of the first token among the likeliest, so that a text goes on in several ways.
        """
        n, width = len(openings), self.region.n_cells // len(openings)
        regions = [Region(self.region.start + i * width, width) for i in range(n)]
        lengths = [n_tokens * (i + 1) // n - n_tokens * i // n for i in range(n)]
        texts = [self.encode(text, True)[: length - 1]
                 for text, length in zip(openings, lengths, strict=True)]  # fmt: skip
        n_read, places = [0] * n, [place] * n
        while left := [i for i in range(n) if len(texts[i]) < lengths[i]]:
            pieces = [Piece(tokens=texts[i][n_read[i] :], pos=n_read[i], region=regions[i])
                      for i in left]  # fmt: skip
            logits = self.run(pieces)
            if logits is None:
                raise ComputeError("the computation was stopped")
            for i, row in zip(left, logits, strict=True):
                n_read[i] = len(texts[i])
                ranked = np.argpartition(row, -N_RANKED)[-N_RANKED:].tolist()
                best = [token for token in sorted(ranked, key=lambda token: -float(row[token]))
                        if not self._tokenizer.is_eog(token)] or ranked  # fmt: skip
                texts[i].append(best[min(places[i], len(best) - 1)])
                places[i] = 0
        return [token for text in texts for token in text]

    def guess(self, window: Window, bridge: Bridge, *, crosses: bool) -> list[bool]:
        """Draft one token at some places of the text that was run last; tell which were right.

        What a draft writes over, the full model writes again.

        Args:
            window: the text.
            bridge: to cross, or else to leave its block out.
            crosses: which of the two.
        """
        n, spans = len(window.tokens), bridge.spans
        if not crosses:
            spans = self.spans([step for span in spans for step in span.steps if step.reads])
        found: list[bool] = []
        for pos in np.linspace(n // 8, n - 2, min(GUESSES, n // 2)).astype(int).tolist():
            self._before = window.states[bridge.end, pos - 1]
            piece = Piece(tokens=window.tokens[pos : pos + 1], pos=pos, region=self.region)
            logits = self.run([piece], spans, borrow=True)
            if logits is not None:
                found.append(bool(logits[0].argmax() == window.logs[pos].argmax()))
            if logits is None or self.run([piece], borrow=True) is None:
                raise ComputeError("the computation was stopped")
        return found

    def _fill(self, graph: Graph, pieces: Sequence[Piece], shape: BatchShape) -> None:
        super()._fill(graph, pieces, shape)
        fill_before(graph.inputs, self._before, shape.n_tokens)


class Streams:
    """What the full model's residual stream was before some layers, over all text to fit to.

    Args:
        n_window: tokens of a window.
        layers: the layers.
    """

    def __init__(self, n_window: int, layers: Sequence[int]) -> None:
        self._n_window, self.layers = n_window, layers
        self._strengths: tuple[float, ...] = STRENGTHS
        self._tokens: list[Sequence[int]] = []
        self._parts: dict[int, list[npt.NDArray[np.float16]]] = {il: [] for il in layers}

    @property
    def n_windows(self) -> int:
        """Windows that were read."""
        return len(self._parts[self.layers[0]])

    def read(self, probe: DraftProbe, text: Sequence[int]) -> None:
        """Add a window, at half precision: what a fit needs, at half the memory."""
        most = np.finfo(np.float16).max
        self._tokens.append(text)
        for il, stream in probe.states(text, self.layers).items():
            self._parts[il].append(np.clip(stream, -most, most).astype(np.float16))

    @property
    def n_checked(self) -> int:
        """Of the last windows, those kept apart."""
        return max(1, self.n_windows // CHECKED_ONE_IN)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """The text: int32 (n_windows, n_window)."""
        return np.array(self._tokens, np.int32)

    def windows(self, il: int) -> npt.NDArray[np.float16]:
        """Return the stream before a layer by windows: F16 (n_windows, n_window, n_embd)."""
        return np.stack(self._parts[il])

    def stream(self, il: int) -> Floats:
        """Return the stream before a layer: F32 (n_tokens, n_embd)."""
        return np.concatenate(self._parts[il]).astype(np.float32)

    def fit(self, first: int, end: int, rank: int, eps: float) -> tuple[Floats, Floats, float]:
        """Fit the map of a bridge. The strength that is best for the first serves all.

        Returns:
            The map in two halves, a (2 n_embd + 1, rank), of which the last row takes a 1, and b
            (rank, n_embd); and the error on windows kept apart.
        """
        near, far = self.stream(first), self.stream(end)
        before = np.zeros_like(far)
        before[1:] = far[:-1]  # position 0 has none, and no weight
        ones = np.ones((len(near), 1), np.float32)
        whole = Sample(
            inputs=np.concatenate([unit_power(near, eps), unit_power(before, eps), ones], axis=1),
            targets=far - near, weights=token_weights(far, self._n_window),
        )  # fmt: skip
        n_fit = (self.n_windows - self.n_checked) * self._n_window
        fit, check = (
            Sample(inputs=whole.inputs[at], targets=whole.targets[at], weights=whole.weights[at])
            for at in (np.s_[:n_fit], np.s_[n_fit:])
        )
        ridge = Ridge(fit, np.zeros((fit.inputs.shape[1], fit.targets.shape[1]), np.float32))
        linear, strength = ridge.best(check, self._strengths)
        self._strengths = (strength,)
        a, b = ridge.split(linear, rank)
        return a, b, error_ratio(check, (check.inputs @ a @ b).astype(np.float32))


def draft_texts(probe: DraftProbe, given: npt.NDArray[np.int32]) -> Iterator[list[int]]:
    """Give the windows of a text, and by turns what the model writes itself."""
    written = _written(probe, given.shape[1])
    for i, text in enumerate(given):
        if i < N_WRITTEN:
            yield next(written)
        yield text.tolist()


def _written(probe: DraftProbe, n_window: int) -> Iterator[list[int]]:
    """Give windows that the model writes: in one way of all openings, then in another."""
    groups = [OPENINGS[at : at + SIDE_BY_SIDE] for at in range(0, len(OPENINGS), SIDE_BY_SIDE)]
    for i in itertools.count():
        place, group = divmod(i, len(groups))
        text = probe.write(groups[group], AT_ONCE * n_window, place)
        yield from (text[at : at + n_window] for at in range(0, len(text), n_window))
