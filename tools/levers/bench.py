"""`edgeroute bench levers`: each lever of a model against off, with a verdict that is kept."""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from edgeroute.config import RunParams
from edgeroute.lever_choice import AUTO
from edgeroute.lever_proofs import Fingerprint, Proof, fingerprint, load_proofs, save_proofs
from edgeroute.loaded import budget_bytes
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, plain
from edgeroute.tools.levers.candidates import LEVERS, Candidate, Facts, candidates
from edgeroute.tools.levers.exhaustive import (
    MOST_SLOWER,
    Contest,
    contest_notes,
    hold,
    plain_gain,
    results_of,
    rows_of,
    singles_of,
)
from edgeroute.tools.levers.measure import (
    KEPT_PAIRS,
    KEPT_SECONDS,
    Bench,
    LeverParams,
    Outcome,
    Progress,
    kept_as,
    proof_of,
)
from edgeroute.tools.levers.race import Race
from edgeroute.tools.levers.turns import DEFAULT, Lives, need_bytes

AT_ONCE: Final = 2
"""Candidates that take turns with one run of their off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedLevers:
    """What of a model's levers is measured.

    Attributes:
        measure: how.
        only: names of levers; none is all that the model has.
        controls: also what must lose, such as prefetch by chance.
        missing: leave out what has a proof already, unless it failed.
        exhaustive: measure the default configuration against every single one as well.
        minutes: that this may take, about.
        store: keep the proofs for Runtimes.
    """

    measure: LeverParams = field(default_factory=LeverParams)
    only: tuple[str, ...] = ()
    controls: bool = False
    missing: bool = False
    exhaustive: bool = False
    minutes: float = 20.0
    store: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in LEVERS]
        if unknown:
            raise UsageError(f"there is no lever {unknown[0]!r}; there are {', '.join(LEVERS)}")


@dataclass(slots=True, kw_only=True)
class Found:
    """What was measured so far.

    Attributes:
        facts, made_for, budget_bytes: what it holds for.
        listed: all candidates.
        before: proofs of some of them that were there already, and were not made again.
        outcomes, measured: of the others, and the proofs made of them.
        contest: the default against all single configurations.
        interrupted: whether Ctrl-C ended it.
    """

    facts: Facts
    made_for: Fingerprint
    budget_bytes: int
    listed: list[Candidate] = field(default_factory=list)
    before: list[Proof] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    measured: list[Proof] = field(default_factory=list)
    contest: Contest | None = None
    interrupted: bool = False


def run(params: BenchParams, progress: Progress, wanted: WantedLevers) -> tuple[Report, bool]:
    """Measure levers, keep the proofs, and report them.

    Returns:
        The report; and whether Ctrl-C ended it, with what was measured until then.

    Raises:
        UsageError: a lever was named that this model has not, or no control group can be made.
        EdgerouteError: the model cannot be run.
    """
    bench = Bench(params.path, wanted.measure, progress)
    found = _found(params, bench, wanted)
    old = [(dict(proof.settings), dict(proof.off)) for proof in found.before]
    todo = [each for each in found.listed if kept_as(each) not in old]
    progress(f"{len(todo)} candidates; budget {found.made_for.budget}, "
             f"{found.facts.pages or 'nothing'} paged")  # fmt: skip
    try:
        for outcome in _measured(bench, todo):
            proof = proof_of(outcome, int(time.time()))
            found.outcomes.append(outcome)
            found.measured.append(proof)
            progress(f"{outcome.candidate.name}: {_in_short(proof)}")
            if wanted.store:  # as it comes: what was measured stays, whatever ends the rest
                save_proofs(found.made_for, [proof])
        if wanted.exhaustive:
            _against_all(bench, found, wanted)
    except KeyboardInterrupt:
        found.interrupted = True
    return _report(params, wanted, found, bench.note), found.interrupted


def _found(params: BenchParams, bench: Bench, wanted: WantedLevers) -> Found:
    """Look which levers there are, and which of them are known.

    Raises:
        UsageError: a lever was named that this model has not.
    """
    n_bytes = budget_bytes(RunParams(memory=wanted.measure.settings.get("memory")))
    with GGUFFile.open(params.path) as file:
        made_for = fingerprint(file, n_bytes)
    found = Found(
        facts=bench.ask("facts", wanted.measure.small), made_for=made_for, budget_bytes=n_bytes
    )
    bench.paged = found.facts.pages is not None
    found.listed = [each for each in candidates(found.facts, controls=wanted.controls)
                    if not wanted.only or each.lever in wanted.only]  # fmt: skip
    missing = set(wanted.only) - {each.lever for each in found.listed}
    if missing:
        raise UsageError(f"{params.path.name} has no lever {sorted(missing)[0]!r} at this budget; "
                         "give another --memory, or --small, or calibrate it")  # fmt: skip
    if wanted.missing:
        listed = [(each.lever, *kept_as(each)) for each in found.listed]
        found.before = [
            proof for proof in load_proofs(made_for) if proof.verdict != "failed"
            and (proof.lever, dict(proof.settings), dict(proof.off)) in listed
        ]  # fmt: skip
    return found


def _in_short(proof: Proof) -> str:
    if proof.verdict == "failed":
        return f"failed: {proof.note}"
    return f"{proof.verdict}, {proof.gain:+.1%} [{proof.low:+.1%} to {proof.high:+.1%}]"


def _measured(bench: Bench, listed: Sequence[Candidate]) -> Iterator[Outcome]:
    """Measure candidates in groups that share their off."""

    def off(each: Candidate) -> str:
        return repr((each.lever, each.off, each.off_options, each.prefill))

    for _, alike in itertools.groupby(listed, off):
        for group in _chunks(alike):
            yield from bench.measure(group)


def _chunks(alike: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    rest = list(alike)
    while rest:
        yield rest[:AT_ONCE]
        del rest[:AT_ONCE]


def _against_all(bench: Bench, found: Found, wanted: WantedLevers) -> None:
    """Measure every single lossless configuration that can be run against the default."""
    dead = [(dict(proof.settings), dict(proof.off))
            for proof in found.measured if proof.verdict == "failed"]  # fmt: skip
    singles = singles_of([each for each in found.listed if kept_as(each) not in dead], AUTO)
    if not singles:
        bench.say("none of these is a lossless configuration to set against the default")
        return
    # One budget for all of them: free memory is another while they live.
    how = replace(bench.params, settings={**bench.params.settings, "memory": found.budget_bytes})
    racing = Bench(bench.path, how, bench.say)
    racing.paged = bench.paged
    need = need_bytes(bench.path.stat().st_size, found.budget_bytes, paged=bench.paged)
    found.contest = Contest(race=Race(singles, 1 / MOST_SLOWER - 1))
    bench.say(f"{len(singles)} single configurations against {DEFAULT}, "
              f"{wanted.minutes:g} minutes at most, about")  # fmt: skip
    try:
        hold(found.contest, Lives(racing, need), singles, 60 * wanted.minutes, bench.say)
    finally:
        bench.note = racing.note


def _report(params: BenchParams, wanted: WantedLevers, found: Found, note: str) -> Report:
    criteria: tuple[Criterion, ...] = ()
    notes = [note, f"{_kept(wanted)}; they hold for a budget of {found.made_for.budget} of the "
             "file's bytes"]  # fmt: skip
    contest = found.contest
    if contest is not None:
        notes += contest_notes(contest)
        if (gain := contest.confirmed) is not None:
            what = f"speed of the default over the best single configuration, {contest.best}"
            criteria = (Criterion(what=what, value=1 + gain.value, limit=MOST_SLOWER),)
    if found.interrupted:
        notes.append("interrupted: what is above was measured and kept")
    pairs = list(zip(found.outcomes, found.measured, strict=True))
    return Report(
        bench="levers", params=replace(params, reps=wanted.measure.pairs, warmup=0),
        columns=("lever", "setting", "off, ms/token", "on, ms/token", "gain", "95 %",
                 "prompts", "KL, nats", "verdict", "note"),
        rows=(*map(_old_row, found.before), *(_row(outcome, proof) for outcome, proof in pairs),
              *rows_of(contest)),
        results=[*({"before": True, **asdict(proof)} for proof in found.before),
                 *(_result(outcome, proof) for outcome, proof in pairs), *results_of(contest)],
        criteria=criteria, notes=tuple(notes),
    )  # fmt: skip


def _kept(wanted: WantedLevers) -> str:
    if wanted.store:
        return "verdicts kept"
    if wanted.measure.says_enough:
        return "verdicts not kept"
    return (f"verdicts not kept: Runtimes shall follow no less than {KEPT_PAIRS} pairs of "
            f"{KEPT_SECONDS:g} s (--store keeps them all the same)")  # fmt: skip


def _old_row(proof: Proof) -> tuple[str, ...]:
    name = ", ".join(f"{name}={value}" for name, value in proof.settings.items())
    return (
        proof.lever, name, "", "", f"{proof.gain:+.1%}", f"{proof.low:+.1%} to {proof.high:+.1%}",
        "", f"{proof.kl:.4f}" if proof.kl else "0", proof.verdict, proof.note or "from before",
    )  # fmt: skip


def _row(outcome: Outcome, proof: Proof) -> tuple[str, ...]:
    name = outcome.candidate.name
    if outcome.gain is None or outcome.prefill is None:
        return proof.lever, name, "", "", "", "", "", "", proof.verdict, proof.note
    kl = "" if outcome.kl is None else f"{outcome.kl:.4f}" if outcome.kl else "0"
    return (
        proof.lever, name, f"{1e3 * statistics.median(outcome.off_s):.3g}",
        f"{1e3 * statistics.median(outcome.on_s):.3g}", f"{proof.gain:+.1%}",
        f"{proof.low:+.1%} to {proof.high:+.1%}", f"{outcome.prefill.value:+.1%}", kl,
        proof.verdict, proof.note,
    )  # fmt: skip


def _result(outcome: Outcome, proof: Proof) -> dict[str, Any]:
    return {
        "lever": proof.lever, "settings": dict(proof.settings), "off": dict(proof.off),
        "gain": plain_gain(outcome.decode), "prefill_gain": plain_gain(outcome.prefill),
        "judged_by": "prefill" if outcome.candidate.prefill else "decode",
        "off_s": [plain(s) for s in outcome.off_s], "on_s": [plain(s) for s in outcome.on_s],
        "kl_nats": outcome.kl, "same_answers": outcome.same, "n_noisy": outcome.n_noisy,
        "verdict": proof.verdict, "note": proof.note,
    }  # fmt: skip
