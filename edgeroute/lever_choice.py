"""Which levers a Runtime uses: those asked for, and for the others what was proven to win."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from edgeroute.config import RunParams
from edgeroute.lever_proofs import Proof, any_proofs, fingerprint, load_proofs
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile

AUTO: Final[Mapping[str, object]] = {
    "prefetch": "auto", "policy": "auto", "overlap": "auto", "speculate": "auto",
    "run_ahead": "auto", "threads": None, "io_threads": None, "read_bytes": None, "direct_io": None,
    "sidecar": "auto",
}  # fmt: skip
"""Settings that a proof may decide, and their values that leave it to it."""
OFF: Final[Mapping[str, Any]] = {
    "prefetch": "off", "policy": "lru", "overlap": "off", "speculate": "off", "depth": "full",
    "run_ahead": "off",
    "steps": "off", "drop_misses": 0.0, "prefer_resident": 0.0, "degrade_misses": 0.0,
}  # fmt: skip
"""What `levers="off"` sets."""
EQUAL_GAIN: Final = 0.01
"""Gains that are no further apart are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levers:
    """What a Runtime runs with.

    Attributes:
        params: the settings, proofs applied.
        proofs: those that hold here and now, by lever: the best one each.
        most_threads: compute threads that were proven to be enough; None is all cores. Unlike
            RunParams.threads, fewer may be used on a busy machine.
    """

    params: RunParams
    proofs: Mapping[str, Proof] = field(default_factory=dict)
    most_threads: int | None = None


def choose_levers(file: GGUFFile, params: RunParams, budget_bytes: int) -> Levers:
    """Decide how a model is run, before anything of it is loaded.

    Args:
        file: the model.
        params: as they were given.
        budget_bytes: memory for all of it.
    """
    if params.levers == "off":
        return Levers(params=dataclasses.replace(params, **OFF))
    if params.levers == "asked" or not any_proofs():
        return Levers(params=params)
    return apply_proofs(params, load_proofs(fingerprint(file, budget_bytes)))


def apply_proofs(params: RunParams, proofs: Sequence[Proof]) -> Levers:
    """Set what was left open to what was proven to win, and to off what was proven to lose.

    Lossy levers are never switched on by a proof: they change answers, so somebody must ask.
    """
    best: dict[str, Proof] = {}
    chosen, most_threads = params, None
    for lever in dict.fromkeys(proof.lever for proof in proofs):
        proof = _best([each for each in proofs if each.lever == lever])
        if proof is None:
            continue
        wanted = proof.settings if proof.verdict == "wins" else proof.off
        if not _is_open(params, wanted):
            continue
        threads = wanted.get("threads")
        changes = {name: value for name, value in wanted.items() if name != "threads"}
        try:
            dataclasses.replace(params, threads=threads)
            chosen = dataclasses.replace(chosen, **changes)
        except UsageError:  # out of range, or excluded by what was given
            continue
        best[lever] = proof
        most_threads = threads if params.threads is None and threads else most_threads
    return Levers(params=chosen, proofs=best, most_threads=most_threads)


def _best(proofs: Iterable[Proof]) -> Proof | None:
    """Return the winner whose gain is surest, or a loser where all lose; None if neither.

    Of equals the one that measures itself (`auto`) is taken: it follows what changes. It is no
    equal where its interval merely reaches the other's: it searches anew in each process, and a
    short answer pays for that.
    """
    tried = [proof for proof in proofs if proof.verdict != "failed" and proof.kl == 0]
    wins = [proof for proof in tried if proof.verdict == "wins"]
    if wins:
        top = max(wins, key=lambda proof: proof.low)
        itself = (each for each in wins if _is_auto(each) and each.gain >= top.gain - EQUAL_GAIN)
        return next(itself, top)
    if tried and all(proof.verdict == "loses" for proof in tried):
        return tried[0]
    return None


def _is_auto(proof: Proof) -> bool:
    return all(AUTO.get(name, _NOTHING) == value for name, value in proof.settings.items())


_NOTHING: Final = object()


def _is_open(params: RunParams, wanted: Mapping[str, Any]) -> bool:
    """Whether the settings that a proof names were left to it, or say the same."""
    return all(
        getattr(params, name, _NOTHING) == value
        or (name in AUTO and getattr(params, name) == AUTO[name])
        for name, value in wanted.items()
    )
