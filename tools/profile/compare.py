"""Two profiles side by side: hits with equal memory, locality, skew, and who uses which expert."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgeroute.offload.trace import MAGIC
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import MIB, format_bytes
from edgeroute.tools.profile.analyse import About, analyse
from edgeroute.tools.profile.correlate import pearson, spearman
from edgeroute.tools.profile.record import Progress
from edgeroute.tools.profile.records import HitRates, Locality, Skew, Subject
from edgeroute.tools.profile.table import Row, Section
from edgeroute.tools.profile.view import view_of

MAX_PROFILE_BYTES: Final = 64 * MIB
SHARES: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
"""Of all experts, at which hits are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two, with the sections that a comparison needs."""

    name: str
    subject: Subject
    hits: HitRates
    locality: Locality
    skew: Skew


@dataclass(frozen=True, slots=True, kw_only=True)
class HitPair:
    """A policy's hit ratios with equal shares of the experts in memory."""

    policy: str
    share: float
    n_slots: tuple[int, int]
    hit_ratios: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What both have. `load_*` correlate loads expert by expert; None for unlike models."""

    names: tuple[str, str]
    models: tuple[str, str]
    hits: tuple[HitPair, ...]
    srp: dict[int, tuple[float, float]]
    cliff_slots: tuple[int, int]
    n_page: tuple[int, int]
    top10_share: tuple[float, float]
    load_pearson: float | None
    load_spearman: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain JSON types."""
        return {"format": "edgeroute-comparison", "version": 1, **asdict(self)}

    def sections(self) -> list[Section]:
        """Return titles and rows."""
        a, b = self.names
        rows: list[Row] = [("", f"{a[-20:]:>20}  {b[-20:]:>20}")]
        rows += [
            (f"{each.policy}, {each.share:.0%} held",
             f"{each.hit_ratios[0]:>20.1%}  {each.hit_ratios[1]:>20.1%}")
            for each in self.hits
        ]  # fmt: skip
        rows += [(f"SRP, {m} tokens", f"{x:>20.1%}  {y:>20.1%}")
                 for m, (x, y) in self.srp.items()]  # fmt: skip
        pairs: tuple[tuple[str, tuple[float, float], str], ...] = (
            ("busiest 10 % take", self.top10_share, ">20.0%"),
            ("LRU cliff, experts", self.cliff_slots, ">20"),
            ("experts in all", self.n_page, ">20"),
        )
        rows += [(name, f"{x:{form}}  {y:{form}}") for name, (x, y), form in pairs]
        found = [("Compared", rows)]
        if self.load_pearson is not None:
            alike = "the same experts" if self.load_pearson > 0.5 else "other experts"
            text = (f"correlation {self.load_pearson:.3f}, of ranks {self.load_spearman:.3f}: "
                    f"they keep {alike} busy")  # fmt: skip
            found.append(("Loads", [("by expert", text)]))
        return found


def read_side(path: Path, progress: Progress) -> Side:
    """Read a profile's JSON, or analyse a trace.

    Raises:
        UsageError: it is neither, malformed, too large, or lacks a section.
    """
    try:
        with path.open("rb") as file:
            is_trace = file.read(len(MAGIC)) == MAGIC
        if is_trace:
            facts: Any = json.loads(json.dumps(analyse(path, About(), progress).to_dict()))
        else:
            facts = _read_json(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    view = view_of(facts)
    if not (view.subject and view.hits and view.hits.pooled and view.locality and view.skew):
        raise UsageError(f"{path.name} lacks what a comparison needs; record it again")
    return Side(name=path.name, subject=view.subject, hits=view.hits, locality=view.locality,
                skew=view.skew)  # fmt: skip


def _read_json(path: Path) -> Any:
    n_bytes = path.stat().st_size
    if n_bytes > MAX_PROFILE_BYTES:
        raise UsageError(f"{path.name} has {format_bytes(n_bytes)}; a profile has at most "
                         f"{format_bytes(MAX_PROFILE_BYTES)}")  # fmt: skip
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
        facts = json.loads(
            lines[-1] if len(lines) > 1 and lines[-1][:1] == "{" else "\n".join(lines)
        )
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path.name} is neither a trace nor a profile (--json) of edgeroute: {error}"
        ) from error
    if not isinstance(facts, dict):
        raise UsageError(f"{path.name} is no profile: it holds no object")
    return facts


def compare(a: Side, b: Side) -> Comparison:
    """Compare two sides; curves are read between their sizes by straight lines."""
    policies = [c.policy for c in a.hits.pooled
                if any(c.policy == other.policy for other in b.hits.pooled)]  # fmt: skip
    pairs = tuple(_pair((a, b), policy, share) for policy in policies for share in SHARES)
    loads = _loads(a.skew, b.skew)
    return Comparison(
        names=(a.name, b.name), models=(a.subject.model, b.subject.model), hits=pairs,
        srp={m: (found.value, b.locality.srp[m].value)
             for m, found in a.locality.srp.items() if m in b.locality.srp},
        cliff_slots=(a.hits.cliff_slots, b.hits.cliff_slots),
        n_page=(a.subject.n_page, b.subject.n_page),
        top10_share=(_top10(a), _top10(b)),
        load_pearson=None if loads is None else pearson(*loads),
        load_spearman=None if loads is None else spearman(*loads),
    )  # fmt: skip


def _pair(sides: tuple[Side, Side], policy: str, share: float) -> HitPair:
    a, b = sides
    return HitPair(
        policy=policy, share=share, n_slots=(_slots(a, share), _slots(b, share)),
        hit_ratios=(_hit_ratio(a, policy, share), _hit_ratio(b, policy, share)),
    )  # fmt: skip


def _slots(side: Side, share: float) -> int:
    return round(share * side.subject.n_page)


def _hit_ratio(side: Side, policy: str, share: float) -> float:
    curve = next(each for each in side.hits.pooled if each.policy == policy)
    return float(np.interp(_slots(side, share), curve.n_slots, curve.hit_ratios))


def _top10(side: Side) -> float:
    shares = side.skew.top_shares.get(10, ())
    return sum(shares) / len(shares) if shares else 0.0


def _loads(a: Skew, b: Skew) -> tuple[list[float], list[float]] | None:
    """Loads of all experts in one list per side; None where the models are of unlike shape."""
    shapes = [[len(row) for row in each.loads] for each in (a, b)]
    if a.layers != b.layers or shapes[0] != shapes[1] or sum(shapes[0]) < 2:
        return None
    first, second = ([float(n) for row in each.loads for n in row] for each in (a, b))
    return first, second
