"""Calibrates depth plans of a model: what to leave out, what stands in for it, what it costs.

Measures what each sub-block is worth, searches plans, fits stand-ins, and measures every plan
on text that neither search nor fit has seen, and its speed against the full model's. Writes
them as a depth file. All results are kept as they come, so that a stopped run goes on.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.depth_file import DepthFile, depth_paths, fingerprint, first_writable
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.errors import UnsupportedModelError, UsageError
from edgeroute.runtime.extras import check_extra
from edgeroute.skippers import auto
from edgeroute.skippers.plan import DepthPlan
from edgeroute.skippers.static import Choice, Costs, Protect, Signals, leave_out
from edgeroute.tools.calibrate_report import CalibrateReport, Measured
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.depth_fits import (
    Fits,
    FittedPlan,
    can_fit,
    low_rank_shapes,
    numpy_gflop_s,
)
from edgeroute.tools.depth_probe import Probe, Score, Window, costs_of
from edgeroute.tools.depth_search import SearchParams, points_of, search
from edgeroute.tools.depth_signals import Lab, measure_signals
from edgeroute.tools.depth_speed import N_PROMPT, Speed, measure_speed, measure_times
from edgeroute.tools.depth_texts import N_WINDOW, Texts, calibration_texts
from edgeroute.tools.depth_work import FILE_SUFFIX, Work
from edgeroute.tools.standin_records import StandInTensor

Progress = Callable[[str, int, int], None]
"""Takes a phase, how much of it is done, and of how much."""

SEARCH_PART, FIT_PART, CHECK_PART = 0.3, 0.55, 0.15
"""How the time is shared out."""
N_FITTED: Final = 4
"""A plan is fitted in one of so many parts of that time, and trained in another."""
MARGIN: Final = 1.15
"""Plans are sought until they compute so much less than a wanted speed asks for: time is
saved a little less than compute."""
WORST_KL: Final = 6.0
"""Times the wanted divergence at which skipping more is no use, whatever stands in for it."""
N_DECODED: Final = 24
"""Tokens decoded in each half of a pair that speed is measured by."""
MIN_WINDOW: Final = N_PROMPT + 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateParams:
    """What to calibrate.

    Attributes:
        files: text to calibrate on; none for what comes with Python.
        target_speed: a gain in decoding speed that some plan should reach.
        max_kl: divergence that the user accepts, mean nats.
        budget_minutes: about how long it may take.
        threads: compute threads.
        out: the depth file; None is beside the model or in the user's folder.
        fits: whether to fit stand-ins.
        n_window: tokens of a window.
        protect: layers that always run.
    """

    files: tuple[Path, ...] = ()
    target_speed: float | None = None
    max_kl: float | None = None
    budget_minutes: float = 50.0
    threads: int = 1
    out: Path | None = None
    fits: bool = True
    n_window: int = N_WINDOW
    protect: Protect = field(default_factory=Protect)

    def __post_init__(self) -> None:
        if self.target_speed is not None and not 1 < self.target_speed <= 4:
            raise UsageError(f"a target speed must be above 1 and at most 4 times the full "
                             f"model's, got {self.target_speed}")  # fmt: skip
        if self.max_kl is not None and not 0 < self.max_kl <= 10:
            raise UsageError(f"a divergence limit must be above 0 and at most 10 nats, got "
                             f"{self.max_kl}")  # fmt: skip
        if not 0 < self.budget_minutes <= 1 << 16:
            raise UsageError(f"a time budget must be positive, got {self.budget_minutes} minutes")
        if not MIN_WINDOW <= self.n_window <= 1 << 14:
            raise UsageError(f"windows of {MIN_WINDOW} to {1 << 14} tokens are wanted, got "
                             f"{self.n_window}")  # fmt: skip


def calibrate(model: Path, params: CalibrateParams, progress: Progress) -> CalibrateReport:
    """Calibrate a model and write its depth file.

    Raises:
        UsageError: too little text, or nowhere to write.
        CapacityError: the model does not fit memory as a whole.
        ModelFileError, UnsupportedModelError: the model cannot be loaded.
    """
    began = time.monotonic()
    n_cells = round_cells(max(params.n_window, N_PROMPT + N_DECODED))
    settings = RunParams(n_ctx=n_cells, n_ubatch=n_cells, threads=params.threads)
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(contextlib.closing(LoadedModel(model, settings)))
        loaded.device.set_threads(params.threads)
        probe = stack.enter_context(contextlib.closing(Probe(loaded)))
        texts = calibration_texts(probe.encode, params.files, params.n_window)
        out = params.out or first_writable(*depth_paths(loaded.file))
        work = stack.enter_context(Work(out.with_name(out.name + ".work"), {
            "model": fingerprint(loaded.file), "data": texts.digest, "window": params.n_window,
            "threads": params.threads, "protect": [params.protect.first, params.protect.last],
            "budget": params.budget_minutes, "version": 3,
        }))  # fmt: skip
        run = _Run(loaded, probe, texts, work, _Asked(params, progress, began))
        found = run.plans()
        measured = run.measure(found)
        report = run.write(out, found, measured, began)
        work.finish()
    return report


@dataclass(frozen=True, slots=True)
class _Asked:
    params: CalibrateParams
    progress: Progress
    began: float


class _Run:
    """The phases of one calibration."""

    def __init__(
        self, loaded: LoadedModel, probe: Probe, texts: Texts, work: Work, asked: _Asked
    ) -> None:
        self._loaded, self._probe, self._texts, self._work = loaded, probe, texts, work
        self._params, self._progress = asked.params, asked.progress
        self._search_until = time.monotonic() + 60 * self._params.budget_minutes * SEARCH_PART
        self._fit_until = asked.began + 60 * self._params.budget_minutes * (1 - CHECK_PART)
        self._costs: Costs = costs_of(loaded)
        self._notes: list[str] = []
        self._pass_s = cast(float, work.value("seconds of a window", self._time_pass))
        times = cast(dict[str, Any], work.value("times", self._time_parts))
        self._times = Costs(attn=tuple(times["attn"]), ffn=tuple(times["ffn"]), head=times["head"])

    # what there is to measure

    def plans(self) -> list[FittedPlan]:
        """Search plans that skip, and fit those with stand-ins."""
        lab = Lab(self._probe, self._search_texts(), self._work)
        free = self._params.protect.layers(self._probe.n_layer)
        signals = measure_signals(lab, free, self._phase("each sub-block left out"),
                                  whole=self._n_search(3) >= 2)  # fmt: skip
        choices = search(lab, signals, self._times, self._search_params(), self._phase("search"))
        found = [FittedPlan(plan=self._skipping(choice), tensors={}) for choice in choices]
        del lab
        return found + self._fits(choices, signals)

    def _search_params(self) -> SearchParams:
        points, params = points_of(self._probe.n_layer, self._params.protect), self._params
        if params.target_speed is not None:
            enough = (1 - 1 / params.target_speed) * MARGIN / self._times.layer_share
            n_free = len(params.protect.layers(self._probe.n_layer))
            points = sorted({*(n for n in points if n < enough), min(-(-enough // 1), n_free)})
        return SearchParams(
            points=points, protect=params.protect,
            max_kl=float("inf") if params.max_kl is None else WORST_KL * params.max_kl,
            go_on=self._go_on,
        )  # fmt: skip

    def _skipping(self, choice: Choice) -> DepthPlan:
        layers = leave_out(choice.units, self._probe.n_layer)
        name = f"skip-{100 * self._costs.share(choice.units):.1f}"
        return DepthPlan(name=name, layers=layers, compute=self._costs.compute(layers))

    def _fits(self, choices: Sequence[Choice], signals: Signals) -> list[FittedPlan]:
        hparams, found = self._loaded.model.hparams, list[FittedPlan]()
        if not self._params.fits:
            return found
        if not can_fit(hparams):
            self._notes.append(f"stand-ins cannot be fitted for {hparams.arch} yet: plans only "
                               "skip")  # fmt: skip
            return found
        return self._fit_all(Fits(
            model=self._loaded.file.path, hparams=hparams, costs=self._costs,
            times=self._times, kl=signals.kl, texts=self._texts.fit, folder=self._work.subfolder,
            progress=self._progress, threads=self._params.threads, train_s=self._train_s(),
        ), choices)  # fmt: skip

    def _train_s(self) -> float:
        """Return the seconds to train a plan's stand-ins in; 0, and a note, where torch lacks."""
        try:
            check_extra("training stand-ins", "torch")
            from edgeroute.tools.torch_llama import check_trainable

            check_trainable(self._loaded.file)
        except (UsageError, UnsupportedModelError) as error:
            self._notes.append(f"stand-ins were fitted, not trained: {error}")
            return 0.0
        return 60 * self._params.budget_minutes * FIT_PART / N_FITTED

    def _fit_all(self, fits: Fits, choices: Sequence[Choice]) -> list[FittedPlan]:
        """Fit plans, the most wanted first, as long as there is time."""
        hparams, found = fits.hparams, list[FittedPlan]()
        wanted = low_rank_shapes(hparams, self._times, choices)
        speed = cast(float, self._work.value(
            "numpy's speed", lambda: numpy_gflop_s(hparams.n_embd, hparams.n_ff)
        ))  # fmt: skip
        seconds = 60 * self._params.budget_minutes * FIT_PART / N_FITTED
        if fits.n_affordable(seconds, speed, narrow=True):
            wanted = fits.narrow() | wanted
        for name, shapes in wanted.items():
            late = bool(found) and time.monotonic() > self._fit_until
            time_for = 0 if late else fits.n_affordable(seconds, speed,
                                                        narrow=shapes[0].width > 0)  # fmt: skip
            n_windows = self._decided(f"windows for {name}", time_for)
            if not n_windows:
                self._notes.append(f"{name} was not fitted for lack of time; raise "
                                   "--budget-minutes")  # fmt: skip
                continue
            found.append(fits.fit(name, shapes, n_windows))
        return found

    # figures

    def measure(self, found: Sequence[FittedPlan]) -> list[Measured]:
        """Measure divergence and speed of all plans."""
        with self._standing_in(found):
            scores = self._check(found)
            return [self._measured(each.plan, score, i, len(found))
                    for i, (each, score) in enumerate(zip(found, scores, strict=True))]  # fmt: skip

    def _check(self, found: Sequence[FittedPlan]) -> list[Score]:
        texts, done = self._check_texts(len(found)), self._phase("plans on text kept apart")
        scores: list[list[Score]] = [[] for _ in found]
        for i, text in enumerate(texts):
            keys = [f"check {i} {each.plan.name} {each.plan.key}" for each in found]
            window = None
            for j, (each, key) in enumerate(zip(found, keys, strict=True)):
                if window is None and not self._work.has(key):
                    window = self._probe.window(text)

                def score(plan: DepthPlan = each.plan, window: Window | None = window) -> object:
                    assert window is not None
                    return _plain(self._probe.score(window, plan.steps(), plan.name))

                scores[j].append(_score(cast(list[list[float]], self._work.value(key, score))))
                done(i * len(found) + j + 1, len(texts) * len(found))
        return [Score.join(parts) for parts in scores]

    def _measured(self, plan: DepthPlan, score: Score, i: int, n: int) -> Measured:
        text = self._texts.check[0].tolist()

        def time_it() -> object:
            n_tokens = min(N_DECODED, len(text) - N_PROMPT)
            speed = measure_speed(self._probe, plan.steps(), plan.name, text, n_tokens=n_tokens)
            return [list(speed.full_s), list(speed.plan_s)]

        key = f"speed {plan.name} {plan.key}"
        full_s, plan_s = cast(list[list[float]], self._work.value(key, time_it))
        self._phase("speed")(i + 1, n)
        speed = Speed(full_s=tuple(full_s), plan_s=tuple(plan_s))
        return Measured(
            plan=replace(plan, speed=round(speed.gain, 4), kl=round(score.mean_kl, 6),
                         kl_error=round(score.kl_error, 6), ppl_ratio=round(score.ppl_ratio, 5)),
            top1=round(score.top1, 4), speed=speed,
        )  # fmt: skip

    @contextlib.contextmanager
    def _standing_in(self, found: Sequence[FittedPlan]) -> Iterator[None]:
        """Load all stand-ins, as the engine loads them: from a depth file."""
        tensors = _all_tensors(found)
        if not tensors:
            yield
            return
        path = self._work.folder / f"plans{FILE_SUFFIX}"
        self._write(path, [each.plan for each in found], tensors)
        loaded = self._loaded
        with DepthFile(path, loaded.file, loaded.model.hparams) as file, \
                self._probe.standing_in(file, [each.plan for each in found]):  # fmt: skip
            yield

    # the file

    def write(
        self, out: Path, found: Sequence[FittedPlan], measured: Sequence[Measured], began: float
    ) -> CalibrateReport:
        """Write the plans that no other plan beats, and report all."""
        good = {plan.name for plan in auto.pareto([each.plan for each in measured])}
        measured = sorted((replace(each, kept=each.plan.name in good) for each in measured),
                          key=lambda each: -each.plan.compute)  # fmt: skip
        plans = [each.plan for each in measured if each.kept]
        self._write(out, plans, _all_tensors([each for each in found if each.plan.name in good]))
        params = self._params
        if params.target_speed is not None:
            best = auto.at_speed(plans, params.target_speed)
        else:
            best = auto.fastest(plans, params.max_kl or auto.MAX_KL)
        return CalibrateReport(
            path=out, model=self._loaded.file.path.name, plans=tuple(measured), best=best,
            n_checked=len(self._check_texts(len(found))) * (self._params.n_window - 1),
            n_bytes=out.stat().st_size, seconds=time.monotonic() - began,
            notes=tuple(self._notes),
        )  # fmt: skip

    def _write(
        self, path: Path, plans: Sequence[DepthPlan], tensors: Mapping[str, StandInTensor]
    ) -> None:  # fmt: skip
        write_depth_file(path, DepthContent(
            model=fingerprint(self._loaded.file), data=self._texts.digest, plans=plans,
            tensors=tensors,
        ))  # fmt: skip

    # time

    def _time_pass(self) -> float:
        began = time.monotonic()
        self._probe.window(self._texts.search[0].tolist())
        return time.monotonic() - began

    def _time_parts(self) -> object:
        text, sizes = self._texts.check[0].tolist(), costs_of(self._loaded, lambda t: t.nbytes)
        n_tokens = min(N_DECODED, len(text) - N_PROMPT)
        return asdict(measure_times(self._probe, sizes, text, n_tokens=n_tokens))

    def _decided(self, what: str, now: int) -> int:
        """Keep what the clock decided: a run that goes on must decide the same."""
        return cast(int, self._work.value(what, lambda: now))

    def _go_on(self, n: float) -> bool:
        return bool(self._decided(f"time for {n:g} layers", time.monotonic() < self._search_until))

    def _n_search(self, n_each: int) -> int:
        """Return how many windows there is time to search with, if so many are each layer's."""
        n_scores = 0.55 * n_each * self._probe.n_layer + 40
        return int(60 * self._params.budget_minutes * SEARCH_PART / (n_scores * self._pass_s))

    def _search_texts(self) -> list[list[int]]:
        n = max(2, self._n_search(3 if self._n_search(3) >= 2 else 2))
        return [list(map(int, text)) for text in self._texts.search[:n]]

    def _check_texts(self, n_plans: int) -> list[list[int]]:
        """Return as many windows as there is time to check with."""
        n_scores = 0.7 * max(1, n_plans)
        n = int(60 * self._params.budget_minutes * CHECK_PART / (n_scores * self._pass_s))
        return [list(map(int, text)) for text in self._texts.check[: max(2, n)]]

    def _phase(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(name, done, total)


def _all_tensors(found: Sequence[FittedPlan]) -> dict[str, StandInTensor]:
    return {name: tensor for each in found for name, tensor in each.tensors.items()}


def _plain(score: Score) -> list[list[float]]:
    arrays = (score.kl, score.nats_full, score.nats, score.same)
    return [[round(float(value), 6) for value in array] for array in arrays]


def _score(rows: list[list[float]]) -> Score:
    kl, nats_full, nats, same = (np.array(row, np.float32) for row in rows)
    return Score(kl=kl, nats_full=nats_full, nats=nats, same=same)
