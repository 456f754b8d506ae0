"""Calibrates drafts: bridges over the layers that stream, for those that stay to draft with.

A bridge is one map of low rank, in closed form, from the stream before a block of layers, and
the stream behind it at the token before, to what the block adds. One is fitted for every block
that memory may leave out; where torch is there, those over most of the layers are trained on by
what their guesses are worth (`train_bridges`). They are judged by drafting on text that was kept
apart: how often the first guess is the full model's own. Writes them as a drafts file, which
`edgeroute.bridges` reads.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from gguf import GGMLQuantizationType

from edgeroute.bridges import SUFFIX, BridgeFile, bridge_layers
from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.base import Hparams
from edgeroute.models.depth_file import depth_paths, fingerprint, first_writable
from edgeroute.models.standins import tensor_name
from edgeroute.paging_layers import FIRST_KEPT
from edgeroute.runtime import machine
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.errors import UnsupportedModelError, UsageError
from edgeroute.runtime.extras import check_extra
from edgeroute.skippers.plan import DepthPlan
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.depth_probe import Floats, costs_of
from edgeroute.tools.depth_texts import N_CHECK, calibration_texts
from edgeroute.tools.draft_streams import (
    CHECKED_ONE_IN,
    GUESSES,
    N_WRITTEN,
    SIDE_BY_SIDE,
    DraftProbe,
    Streams,
    draft_texts,
)
from edgeroute.tools.standin_records import StandInTensor

Progress = Callable[[str, int, int], None]
"""Takes a phase, how much of it is done, and of how much."""

RANK: Final = 1024
N_FIT: Final = 80
"""Windows to fit to, at most."""
MEMORY_PART: Final = 0.2
"""Of the memory that is free, what the streams of all windows may take."""
TRAINED_FROM: Final = 0.5
"""Of the layers: shorter blocks stream too little for drafts to pay much, and are not trained."""
N_JUDGING, N_JUDGED = 6, 4
"""Windows to judge by, and bridges that are judged by guesses."""
LEAST_SHARE: Final = 0.25
"""Of the layers, in the shortest block: where less streams, a pass over k tokens costs k."""
READ_PART: Final = 0.5
"""Of the time, what computing the text may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftsParams:
    """What to calibrate.

    Attributes:
        files: text to fit to; none for what comes with Python.
        budget_minutes: about how long it may take.
        threads: compute threads.
        out: the drafts file; None is beside the model or in the user's folder.
        n_window: tokens of a window.
        rank: of the maps; no more than the model's width.
    """

    files: tuple[Path, ...] = ()
    budget_minutes: float = 20.0
    threads: int = 1
    out: Path | None = None
    n_window: int = 256
    rank: int = RANK


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A bridge over layers `first` to `end`.

    Attributes:
        plan: what a draft computes.
        tensors: its stand-in's, by their names in the file.
        error: what the map leaves unexplained of what the block adds, on text kept apart.
    """

    first: int
    end: int
    plan: DepthPlan
    tensors: Mapping[str, StandInTensor]
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """How often the first guess of a draft was the full model's, with a bridge and without."""

    first: int
    end: int
    error: float
    right: float | None = None
    right_without: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftsReport:
    """What was found; `n_guesses` each judged bridge was judged by.

    `n_trained` bridges guess better than least squares made them; `untrained_because` none was
    tried to.
    """

    path: Path
    model: str
    bridges: tuple[Judged, ...]
    n_trained: int
    n_fitted: int
    n_guesses: int
    n_bytes: int
    seconds: float
    untrained_because: str = ""

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        return asdict(self) | {"path": str(self.path), "seconds": round(self.seconds, 1)}


def calibrate_drafts(model: Path, params: DraftsParams, progress: Progress) -> DraftsReport:
    """Fit a model's bridges, judge some, and write its drafts file.

    Raises:
        UsageError: no layers of this model could be bridged, there is too little text, or
            nowhere to write.
        CapacityError: the model does not fit memory as a whole.
        ModelFileError, UnsupportedModelError: the model cannot be loaded.
    """
    began = time.monotonic()
    n_cells = round_cells(params.n_window)
    settings = RunParams(n_ctx=n_cells, n_ubatch=n_cells, n_kv=SIDE_BY_SIDE * n_cells,
                         threads=params.threads, speculate="off")  # fmt: skip
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(contextlib.closing(LoadedModel(model, settings)))
        ends = block_ends(loaded.model.hparams, loaded.file.path.name)
        loaded.device.set_threads(params.threads)
        probe = stack.enter_context(contextlib.closing(DraftProbe(loaded)))
        texts = calibration_texts(probe.encode, params.files, params.n_window, N_FIT + N_CHECK)
        streams = Streams(params.n_window, (FIRST_KEPT, *ends))
        until = began + 60 * params.budget_minutes
        n_texts = min(len(texts.fit) + min(len(texts.fit), N_WRITTEN),
                      _most_windows(loaded, streams, params.n_window))  # fmt: skip
        for i, text in enumerate(itertools.islice(draft_texts(probe, texts.fit), n_texts)):
            streams.read(probe, text)
            progress("text", i + 1, n_texts)
            if i >= CHECKED_ONE_IN and time.monotonic() > began + READ_PART * (until - began):
                break
        training = _Training(loaded, streams, ends, params.threads)
        fitted = []
        for i, end in enumerate(ends):
            fitted.append(_fit(loaded, streams, end, params.rank, training.by(until, ends[i:])))
            progress("bridges", i + 1, len(ends))
        out = params.out or first_writable(*depth_paths(loaded.file, SUFFIX))
        write_depth_file(out, DepthContent(
            model=fingerprint(loaded.file), data=texts.digest,
            plans=[each.plan for each in fitted],
            tensors={name: tensor for each in fitted for name, tensor in each.tensors.items()},
        ))  # fmt: skip
        check = [text.tolist() for text in texts.check[:N_JUDGING]]
        judged = _judge(loaded, probe, (out, fitted), check, progress)
        return DraftsReport(
            path=out, model=loaded.file.path.name, bridges=judged, n_trained=training.n_better,
            n_fitted=streams.n_windows * params.n_window, n_bytes=out.stat().st_size,
            n_guesses=len(check) * min(GUESSES, params.n_window // 2),
            seconds=time.monotonic() - began, untrained_because=training.why_not,
        )  # fmt: skip


def _most_windows(loaded: LoadedModel, streams: Streams, n_window: int) -> int:
    """Return how many windows memory holds the streams of."""
    each = 2 * n_window * loaded.model.hparams.n_embd * len(streams.layers)
    return max(CHECKED_ONE_IN, int(MEMORY_PART * machine.memory().available_bytes) // each)


Refine = Callable[[int, Floats, Floats], tuple[Floats, Floats]]
"""Takes the end of a block and the two halves of a map, and returns better ones."""


class _Training:
    """Trains the bridges over most of the layers, where that can be done here.

    Attributes:
        n_better: bridges that became better.
        why_not: why none is trained; empty where they are.
    """

    def __init__(
        self, loaded: LoadedModel, streams: Streams, ends: Sequence[int], threads: int
    ) -> None:
        self.n_better, self.why_not = 0, ""
        self._streams = streams
        n_layer = loaded.model.hparams.n_layer
        self._ends = [end for end in ends if end >= TRAINED_FROM * n_layer] or [ends[-1]]
        try:
            check_extra("training bridges", "torch")
            from edgeroute.tools.train_bridges import trainer

            self._trainer = trainer(loaded.file, self._ends[0], streams.tokens, threads)
        except (UsageError, UnsupportedModelError) as error:
            self.why_not = str(error)

    def by(self, until: float, left: Sequence[int]) -> Refine:
        """Return what trains the first bridge of `left` in its part of the time until then."""
        n_left = sum(end in self._ends for end in left)

        def refine(end: int, a: Floats, b: Floats) -> tuple[Floats, Floats]:
            if self.why_not or end not in self._ends:
                return a, b
            from edgeroute.tools.train_bridges import Texts

            streams, now = self._streams, time.monotonic()
            texts = Texts(streams.tokens, streams.windows(FIRST_KEPT), streams.windows(end),
                          streams.n_checked)  # fmt: skip
            found = self._trainer.train(end, texts, (a, b), now + (until - now) / n_left)
            self.n_better += found.after < found.before
            return found.a, found.b

        return refine


def block_ends(hparams: Hparams, model: str) -> list[int]:
    """List where blocks behind the first layers may end; none reaches the last layer's end.

    Raises:
        UsageError: nowhere.
    """
    least = FIRST_KEPT + max(1, round(LEAST_SHARE * hparams.n_layer))
    ends = list(range(least, hparams.n_layer))
    if hparams.moe is not None or not ends:
        what = "has experts, and does not draft" if hparams.moe else "has too few layers"
        raise UsageError(f"{model} {what}: there is nothing to calibrate its drafts for")
    return ends


def _fit(loaded: LoadedModel, streams: Streams, end: int, rank: int, refine: Refine) -> Fitted:
    hparams, first = loaded.model.hparams, FIRST_KEPT
    n_embd = hparams.n_embd
    a, b, error = streams.fit(first, end, min(rank, n_embd), hparams.norm_rms_eps)
    a, b = refine(end, a, b)
    name, kind = f"bridge-{first}-{end}", GGMLQuantizationType.Q8_0
    layers = bridge_layers(first, end, hparams.n_layer)
    ones = np.ones(n_embd, np.float32)
    parts = {
        "norm": StandInTensor.vector(ones), "before": StandInTensor.vector(ones),
        "bias": StandInTensor.vector(a[-1] @ b),
        "a": StandInTensor.matrix(np.ascontiguousarray(a[:-1].T), kind),
        "b": StandInTensor.matrix(np.ascontiguousarray(b.T), kind),
    }  # fmt: skip
    n_weights = parts["a"].n_values + parts["b"].n_values
    compute = costs_of(loaded).compute(layers, n_standins=n_weights)
    return Fitted(
        first=first, end=end, error=error,
        plan=DepthPlan(name=name, layers=layers, compute=round(compute, 4)),
        tensors={tensor_name(name, first, "layer", part): tensor
                 for part, tensor in parts.items()},
    )  # fmt: skip


def _judge(
    loaded: LoadedModel, probe: DraftProbe, made: tuple[Path, Sequence[Fitted]],
    texts: Sequence[Sequence[int]], progress: Progress,
) -> tuple[Judged, ...]:  # fmt: skip
    """Draft with some of the bridges, as the engine reads them from the file."""
    out, fitted = made
    some = {fitted[i].end for i in np.linspace(0, len(fitted) - 1, N_JUDGED).astype(int)}
    right: dict[tuple[int, bool], list[bool]] = {}
    with BridgeFile(out, loaded.file, loaded.model.hparams) as bridges:
        for i, text in enumerate(texts):
            window = probe.window(text)
            for end in some:
                bridge = bridges.find(range(FIRST_KEPT, end))
                assert bridge is not None  # it was just written
                with contextlib.closing(bridges.weights(bridge, loaded.device)) as weights:
                    weights.load()
                    probe.standins = weights
                    for crosses in (False, True):
                        found = probe.guess(window, bridge, crosses=crosses)
                        right.setdefault((end, crosses), []).extend(found)
                    probe.graphs.clear()
                    probe.standins = None
            progress("guesses", i + 1, len(texts))
    share = {key: sum(found) / len(found) for key, found in right.items()}
    return tuple(
        Judged(first=each.first, end=each.end, error=round(each.error, 4),
               right=share.get((each.end, True)), right_without=share.get((each.end, False)))
        for each in fitted
    )  # fmt: skip
