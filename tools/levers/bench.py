"""`edgeroute bench levers`: each lever of a model against off, with a verdict that is kept."""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from edgeroute.config import RunParams
from edgeroute.lever_choice import AUTO
from edgeroute.lever_proofs import Fingerprint, Proof, fingerprint, save_proofs
from edgeroute.loaded import budget_bytes
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, plain
from edgeroute.tools.levers.candidates import LEVERS, Candidate, Facts, candidates
from edgeroute.tools.levers.gain import Gain, gain_of
from edgeroute.tools.levers.measure import Bench, LeverParams, Outcome, Progress, proof_of

AT_ONCE: Final = 2
"""Candidates that take turns with one run of their off."""
MOST_SLOWER: Final = 0.97
"""Speed of the default over the best single configuration's, at least."""
DEFAULT: Final = "the default"


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedLevers:
    """What of a model's levers is measured.

    Attributes:
        measure: how.
        only: names of levers; none is all that the model has.
        controls: also what must lose, such as prefetch by chance.
        exhaustive: measure the default configuration against every single one as well.
        store: keep the proofs for Runtimes.
    """

    measure: LeverParams = field(default_factory=LeverParams)
    only: tuple[str, ...] = ()
    controls: bool = False
    exhaustive: bool = False
    store: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in LEVERS]
        if unknown:
            raise UsageError(f"there is no lever {unknown[0]!r}; there are {', '.join(LEVERS)}")


@dataclass(slots=True)
class Found:
    """What was measured so far; `interrupted` where Ctrl-C ended it."""

    facts: Facts
    made_for: Fingerprint
    outcomes: list[Outcome] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    against: list[tuple[Candidate, Gain]] = field(default_factory=list)
    confirmed: tuple[Candidate, Gain] | None = None
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
    found = Found(facts=bench.ask("facts"), made_for=_made_for(params, wanted.measure))
    bench.paged = found.facts.pages is not None
    listed = [each for each in candidates(found.facts, controls=wanted.controls)
              if not wanted.only or each.lever in wanted.only]  # fmt: skip
    missing = set(wanted.only) - {each.lever for each in listed}
    if missing:
        raise UsageError(f"{params.path.name} has no lever {sorted(missing)[0]!r} at this budget; "
                         "give another --memory, or --small, or calibrate it")  # fmt: skip
    progress(f"{len(listed)} candidates; budget {found.made_for.budget}, "
             f"{found.facts.pages or 'nothing'} paged")  # fmt: skip
    try:
        for outcome in _measured(bench, listed):
            proof = proof_of(outcome, int(time.time()))
            found.outcomes.append(outcome)
            found.proofs.append(proof)
            if wanted.store:  # as it comes: what was measured stays, whatever ends the rest
                save_proofs(found.made_for, [proof])
        if wanted.exhaustive:
            _against_all(bench, found)
    except KeyboardInterrupt:
        found.interrupted = True
    return _report(params, wanted, found, bench.note), found.interrupted


def _made_for(params: BenchParams, how: LeverParams) -> Fingerprint:
    with GGUFFile.open(params.path) as file:
        return fingerprint(file, budget_bytes(RunParams(memory=how.settings.get("memory"))))


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


def _against_all(bench: Bench, found: Found) -> None:
    """Measure every single lossless configuration against the default, the best one again.

    The best of many noisy figures is too good; measured again, it is not.
    """
    names = [each for each in found.outcomes if each.candidate.quality == "same"
             and not each.candidate.options and not each.error]  # fmt: skip
    default = {"levers": "proven"}
    singles = [replace(each.candidate, off=default, lever="single") for each in names]
    singles += [replace(each.candidate, settings=dict(each.candidate.off), off=default,
                        lever="single") for each in _one_per_off(names)]  # fmt: skip
    for group in _chunks(singles):
        for outcome in bench.measure(group):
            if outcome.decode is not None:
                found.against.append((outcome.candidate, outcome.decode))
    if not found.against:
        return
    best, _ = max(found.against, key=lambda pair: pair[1].value)
    twice = Bench(bench.path, replace(bench.params, pairs=2 * bench.params.pairs), bench.say)
    twice.paged = bench.paged
    for outcome in twice.measure([best]):
        if outcome.decode is not None:  # of the default, seen from the best one
            found.confirmed = best, gain_of(outcome.on_s, outcome.off_s)


def _one_per_off(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Take one candidate of each off that is not what the default does anyway."""
    found = {
        repr(each.candidate.off): each
        for each in outcomes
        if any(AUTO.get(name) != value for name, value in each.candidate.off.items())
    }
    return list(found.values())


def _report(params: BenchParams, wanted: WantedLevers, found: Found, note: str) -> Report:
    criteria: tuple[Criterion, ...] = ()
    notes = [note, f"verdicts {'kept' if wanted.store else 'not kept'}; they hold for a budget of "
             f"{found.made_for.budget} of the file's bytes"]  # fmt: skip
    if found.confirmed is not None:
        best, gain = found.confirmed
        what = f"speed of the default over the best single configuration, {best.name}"
        criteria = (Criterion(what=what, value=1 + gain.value, limit=MOST_SLOWER),)
        notes.append(f"the default over {best.name}: {1 + gain.value:.3f} "
                     f"[{1 + gain.low:.3f} to {1 + gain.high:.3f}]")  # fmt: skip
    if found.interrupted:
        notes.append("interrupted: what is above was measured and kept")
    pairs = zip(found.outcomes, found.proofs, strict=True)
    return Report(
        bench="levers", params=replace(params, reps=wanted.measure.pairs, warmup=0),
        columns=("lever", "setting", "off, ms/token", "on, ms/token", "gain", "95 %",
                 "prompts", "KL, nats", "verdict", "note"),
        rows=tuple(_row(outcome, proof) for outcome, proof in pairs),
        results=[_result(outcome, proof) for outcome, proof in
                 zip(found.outcomes, found.proofs, strict=True)]
                + [{"lever": "single", "setting": single.name, "over_default": _gain(gain)}
                   for single, gain in found.against],
        criteria=criteria, notes=tuple(notes),
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
        "gain": _gain(outcome.decode), "prefill_gain": _gain(outcome.prefill),
        "judged_by": "prefill" if outcome.candidate.prefill else "decode",
        "off_s": [plain(s) for s in outcome.off_s], "on_s": [plain(s) for s in outcome.on_s],
        "kl_nats": outcome.kl, "same_answers": outcome.same, "n_noisy": outcome.n_noisy,
        "verdict": proof.verdict, "note": proof.note,
    }  # fmt: skip


def _gain(gain: Gain | None) -> dict[str, float | None] | None:
    if gain is None:
        return None
    return {"value": plain(gain.value), "low": plain(gain.low), "high": plain(gain.high)}
