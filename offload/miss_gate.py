"""Whether the processor computes what a device misses: by measured costs, and by measured tokens.

An expert that a device has not may be uploaded, or computed by the processor from the DRAM tier.
One upload is dear and may serve later tokens as well; what is only computed never hits later.
So costs per page decide a lease, what a cache would have hit decides between uploading and
computing, and where the two come close, tokens of both ways are timed in turn. Nothing here
reads a clock but the one it is given.
"""

import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from statistics import median
from typing import Final, Literal

from edgeroute.offload.miss_budget import BudgetParams, Budgets
from edgeroute.offload.miss_cost import Cost
from edgeroute.offload.miss_counts import MissCounts, Misses, Step
from edgeroute.offload.miss_report import MissReport
from edgeroute.offload.miss_trial import Trial, TrialParams
from edgeroute.runtime.errors import UsageError

HostExpertsMode = Literal["auto", "on", "off"]
PROBE_SHARE: Final = 0.005
"""Share of the time that measuring the cost of the other way may take, a lease now and then."""
DOUBT_SHARE: Final = 0.02
"""The same, once its latest sample was far off."""
MOST_EXTRA: Final = 4.0
"""What the device spends on an uploaded page besides is at most so many times the dearer way."""
TINY_S: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class MissParams:
    """How the gate estimates and tries.

    At first what is missed is computed where that costs less than `start_ratio` times its upload,
    since the device computes what is uploaded besides. The other way is taken where its steps are
    estimated to cost less than (1 - `min_gain_ratio`) of the present one's, with what a trial has
    measured. No trial is made of what is estimated to cost over `doubt_ratio` times the present
    way, or over `first_doubt_ratio` before there was any, nor what `budgets` refuse; what is
    estimated to cost so many times less is taken without one. Estimates are looked at every
    `review_steps`. The first trial is after `first_wait_steps`, later ones wait `wait_growth`
    times longer each, up to `max_wait_steps`;
    a change of mind begins anew, and what seems to gain `early_gain_ratio` waits no longer than
    the first.

    Raises:
        UsageError: a value outside its range.
    """

    trial: TrialParams = field(default_factory=TrialParams)
    budgets: BudgetParams = field(default_factory=BudgetParams)
    start_ratio: float = 1.15
    min_gain_ratio: float = 0.02
    doubt_ratio: float = 1.5
    first_doubt_ratio: float = 3.0
    review_steps: int = 8
    early_gain_ratio: float = 0.04
    first_wait_steps: int = 16
    wait_growth: float = 4.0
    max_wait_steps: int = 4096

    def __post_init__(self) -> None:
        good = (
            0 <= self.min_gain_ratio < 1
            and 1 < self.doubt_ratio <= self.first_doubt_ratio
            and 0 <= self.early_gain_ratio < 1
            and self.review_steps >= 1
            and self.start_ratio > 0
            and 1 <= self.first_wait_steps <= self.max_wait_steps
            and self.wait_growth >= 1
        )
        if not good:
            raise UsageError(f"miss gate settings contradict each other: {self}")


class MissGate:
    """Decides how many missing experts of a lease the processor computes. Not thread-safe.

    Of a pass: `begin`, then for every lease `away`, `uploaded` and `computed`, then `end`.
    """

    def __init__(
        self,
        n_slots: int,
        mode: HostExpertsMode = "auto",
        params: MissParams | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin without any cost known.

        Args:
            n_slots: device slots that a layer has on average.
            mode: `on` and `off` have all computed, and none.
            params: see MissParams.
            clock: seconds, from any moment on.
        """
        self.params = params or MissParams()
        self.mode = mode
        self.computing = mode == "on"
        """Whether the processor computes what is missed; what the latest decision was."""
        self.upload, self.compute = Cost(), Cost()
        self._prompt = Cost()  # per pair: several of a prompt's tokens read an expert once
        self._clock, self._n_slots = clock, max(1, n_slots)
        self._counts = MissCounts(n_slots)
        self._prefill = True
        self._began = 0.0
        self._recent: deque[float] = deque(maxlen=self.params.review_steps)
        self._trial: Trial | None = None
        self._until_review = self.params.review_steps
        self._wait = self._until_trial = self.params.first_wait_steps
        self.extra_s = 0.0
        """What a page costs that is uploaded, and not computed here, beside its upload: the device
        computes it then. As trials measured it."""
        self._n_usual = 1
        self._known: dict[bool, float] = {}
        self._since_probe_s = 0.0
        self._budgets = Budgets(self.params.budgets)
        self._started, self._n_free = False, 0
        self.n_leases = self.n_computed_leases = self.n_pairs = 0
        self.n_trials = self.n_changes = 0

    @property
    def state(self) -> str:
        """The state as a word, for `stats`."""
        if self.mode != "auto":
            return self.mode
        if self._trial is not None:
            return "trial"
        return "compute" if self.computing else "upload"

    # a pass over the model

    def begin(self, *, prefill: bool) -> None:
        """Begin a pass: a token per sequence, or a ubatch of a prompt."""
        self._prefill = prefill
        self._counts.step = Step()
        self._began = self._clock()

    def away(
        self, il: int, experts: Collection[int], n_missing: int, n_free: int = 0,
        n_pairs: int | None = None,
    ) -> int:  # fmt: skip
        """Return how many of a lease's missing experts the processor computes.

        Args:
            il: layer.
            experts: all that the lease asks for, distinct.
            n_missing: how many of them are not on the device.
            n_free: slots there that nothing is in; forced computing fills them all the same.
            n_pairs: of a prompt, pairs of those and their tokens; None where a token or two
                compute with each.
        """
        if self.mode == "off":
            return 0
        if self.mode == "on":
            n_away = max(0, n_missing - n_free)
            self.n_leases += n_away > 0
        elif self._prefill:
            return n_missing if n_missing and self._computes_prompt(n_missing, n_pairs) else 0
        else:
            self.n_leases += n_missing > 0
            self._counts.enter(il, list(experts), n_missing)
            self._n_free = n_free
            if self.computing:
                self._budgets.hit(len(experts) - n_missing, self.compute)
            n_away = self._choose(n_missing, n_free) if n_missing else 0
        self.n_computed_leases += n_away > 0
        return n_away

    def uploaded(self, n_pages: int, seconds: float) -> None:
        """Enter what an upload of pages took, until they were there."""
        self.upload.add(n_pages, seconds)

    def computed(self, n_pages: int, n_pairs: int, seconds: float) -> None:
        """Enter what computing pages' pairs took, rows to and from the device included."""
        self.compute.add(n_pages, seconds, counts=not self._prefill)
        if self._prefill:
            self._prompt.add(n_pairs, seconds)
        self.n_pairs += n_pairs

    def end(self, elsewhere_s: float = 0.0) -> None:
        """End a pass, of which `elsewhere_s` seconds were lost waiting for the disk."""
        if self._prefill or self.mode != "auto":
            return
        self._prefill = True
        seconds = max(0.0, self._clock() - self._began - elsewhere_s)
        if self._trial is not None:
            step = self._counts.keep(computing=self._trial.computing)
            if self._trial.end_step(seconds, step):
                self._end_trial(self._trial)
            return
        step = self._counts.keep(computing=self.computing)
        self._budgets.end_step(seconds, elsewhere_s, step.missed)
        self._since_probe_s += seconds
        self._recent.append(seconds)
        self._until_trial -= 1
        self._until_review -= 1
        if self._until_review <= 0:
            self._review()

    # one lease

    def _choose(self, n_missing: int, n_free: int) -> int:
        if not self.compute.is_known:
            return n_missing
        if not self.upload.is_known:
            return 0
        self._start(n_missing)
        if self._trial is not None:
            return n_missing if self._trial.computing else 0
        computing = self.computing and self._pays_at_once(n_missing)
        if self._may_probe(computing, n_missing):
            return n_missing - 1 if computing else n_missing
        return n_missing - self._n_filled(min(n_missing, n_free)) if computing else 0

    def _n_filled(self, n_most: int) -> int:
        hits = self._counts.hits_per_page
        return self._budgets.n_filled(n_most, self.upload, self.compute, hits)

    def _start(self, n_missing: int) -> None:
        """Choose a way for the first time, by what is supposed of the costs."""
        if self._started:
            return
        self._started = True
        self._n_usual = n_missing
        most_s = self.params.start_ratio * self.upload.of(n_missing)
        self.computing = self.compute.of(n_missing) < most_s

    def _computes_prompt(self, n_missing: int, n_pairs: int | None) -> bool:
        """Whether the processor computes a prompt's pages: they hardly serve later tokens."""
        if not (self.compute.is_known and self.upload.is_known):
            return False
        self._start(n_missing)
        if n_pairs is None:
            return self.computing and self._pays_at_once(n_missing)
        cost = self.compute.fixed_s + n_pairs * self.compute.each_s  # if each pair is a page's
        if self._prompt.is_known:
            cost = self._prompt.of(n_pairs)
        return cost < self.upload.of(n_missing)

    def _may_probe(self, computing: bool, n_missing: int) -> bool:
        """Whether to measure the other way's cost on this lease: it has been long enough."""
        cost = self.upload if computing else self.compute
        share = DOUBT_SHARE if cost.is_doubtful else PROBE_SHARE
        price = cost.of(1 if computing else n_missing)
        if self._since_probe_s * share < price:
            return False
        self._since_probe_s = 0.0
        return True

    def _pays_at_once(self, n_missing: int) -> bool:
        """Whether computing is quicker now; where it is not, uploading wins in any case.

        That it pays with as many pages as leases usually miss has been decided. With fewer, what
        it costs each time may weigh more.
        """
        usual = self._n_usual
        least_s = (self.compute.of(usual) - self.upload.of(usual)) / usual
        extra_s = n_missing * max(self.extra_s, least_s)
        return self.compute.of(n_missing) <= self.upload.of(n_missing) + extra_s + TINY_S

    # deciding between the two ways

    def _costs(self, misses: Misses) -> dict[bool, float]:
        """Return what a step's misses cost if uploaded (False), and if computed here (True)."""
        uploading = self.upload.on_average(misses.n_leases, misses.uploading)
        return {False: max(0.0, uploading + misses.uploading * self.extra_s),
                True: self.compute.on_average(misses.n_leases, misses.computing)}  # fmt: skip

    def _review(self) -> None:
        """Look at the estimates: change at once, begin a trial, or leave it."""
        self._until_review = self.params.review_steps
        misses = self._counts.average()
        if misses is None or not (self.upload.is_known and self.compute.is_known):
            return
        present = misses.computing if self.computing else misses.uploading
        self._n_usual = max(1, round(present / misses.n_leases))
        if not self.computing:
            self._counts.freeze()
        costs = self._costs(misses)
        rest = max(0.0, median(self._recent) - costs[self.computing])
        self._known = {way: rest + cost for way, cost in costs.items()}
        here, there = self._known[self.computing], self._known[not self.computing]
        params, due = self.params, self._until_trial <= 0
        doubt = params.doubt_ratio if self.n_trials else params.first_doubt_ratio
        if there * doubt < here:
            self._change()
        elif (due and there < here * doubt) or self._is_early(here, there):
            self._try(there - here)
        elif due:
            self._postpone()

    def _try(self, loss_s: float) -> None:
        """Begin a trial, if what it costs may be spent."""
        if self._budgets.may_try(loss_s, self._n_free * self.upload.each_s):
            self._trial = Trial(self.computing, self._n_skip, self.params.trial)

    def _is_early(self, here: float, there: float) -> bool:
        """Whether what was tried last seems no longer so, and a trial should not wait."""
        params = self.params
        since = self._wait - self._until_trial
        return (
            self.n_trials > 0
            and since >= params.first_wait_steps
            and there < (1 - params.early_gain_ratio) * here
        )

    @property
    def _n_skip(self) -> int:
        """Steps after which most of what the cache holds has come since."""
        return min(self.params.trial.max_skip_steps, 1 + -(-self._n_slots // self._n_usual))

    def _change(self) -> None:
        self.computing = not self.computing
        self.n_changes += 1
        self._recent.clear()
        self._wait = self._until_trial = self.params.first_wait_steps
        self._counts.freeze()

    def _postpone(self) -> None:
        self._wait = min(int(self._wait * self.params.wait_growth), self.params.max_wait_steps)
        self._until_trial = self._wait

    def _end_trial(self, trial: Trial) -> None:
        """Decide by what steps cost beside their misses, and what steps miss in the long run.

        Compared as they are, a few steps would tell more of their routes than of the two ways.
        """
        self._trial = None
        self.n_trials += 1
        rest = {way: median(self._rests(trial, way)) for way in (False, True)}
        missed = [step.missed for step in trial.steps[False]]
        if any(missed):
            extra = (rest[False] - rest[True]) * len(missed) / sum(missed)
            most = MOST_EXTRA * max(self.upload.each_s, self.compute.each_s)
            self.extra_s = min(most, max(-self.upload.each_s / 2, extra))
        misses = self._counts.average()
        if misses is None:
            return
        self._known = {way: rest[True] + cost for way, cost in self._costs(misses).items()}
        here, there = self._known[self.computing], self._known[not self.computing]
        if there < (1 - self.params.min_gain_ratio) * here:
            self._change()
        else:
            self._recent.clear()
            self._postpone()

    def _rests(self, trial: Trial, way: bool) -> list[float]:
        """Return what each step of a trial took beside its misses."""
        cost = self.compute if way else self.upload
        return [
            seconds - cost.on_average(step.leases, step.missed)
            for seconds, step in zip(trial.costs[way], trial.steps[way], strict=True)
        ]

    def report(self) -> MissReport:
        """What it did and knows, for `stats`."""
        return MissReport(
            state=self.state, n_leases=self.n_leases, n_computed_leases=self.n_computed_leases,
            n_uploaded=self.upload.n_pages, uploaded_s=self.upload.seconds,
            n_computed=self.compute.n_pages, n_pairs=self.n_pairs,
            computed_s=self.compute.seconds, upload=self.upload.report(),
            compute=self.compute.report(), upload_step_s=self._known.get(False),
            compute_step_s=self._known.get(True), n_trials=self.n_trials,
            n_changes=self.n_changes,
        )  # fmt: skip
