"""What a model would do on a machine under a budget, from its header and the machine's speeds.

Nothing here is fitted to a model: bytes over bandwidths, fixed costs per layer and token, and
what of reading hides behind computing, as the engine runs them one after the other.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.tools.forecast.hits import hit_ratio
from edgeroute.tools.forecast.kernels import N_IN, SHORT_IN, Form, rate_key
from edgeroute.tools.forecast.model_cost import ModelCost, PageShape, Work
from edgeroute.tools.forecast.placement import Placement, from_plan
from edgeroute.tools.forecast.plan import ModelPlan
from edgeroute.tools.forecast.records import Forecast, HitModel, Range, Speeds, StoragePoint
from edgeroute.tools.forecast.stream import Stage, stream_s

MEASURED_SPREAD, COMPUTED_SPREAD = 0.2, 0.35
"""What a speed may be off by, of itself, measured here or computed for another machine."""
FORESEEN: Final = 0.79
"""Of a layer's experts, those that its router names one layer ahead. Source: arXiv 2502.12224,
78.8 % by the input of the gate before; taken to hold for those that miss, too."""
_NO_READS: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is asked of the model: tokens of the prompt, and those before the one forecast."""

    n_prompt: int = 512
    n_past: int = 512
    n_ubatch: int = 512


def forecast(
    plan: Placement | ModelPlan,
    cost: ModelCost,
    speeds: Speeds,
    hits: HitModel | None = None,
    ask: Ask | None = None,
) -> Forecast:
    """Forecast decoding, prefill, first token and energy.

    Args:
        plan: a Placement, or a ModelPlan of `edgeroute plan`.
        cost: of the same model.
        speeds: of the machine.
        hits: of its experts; needed where they are paged, else not looked at.
        ask: the prompt; its length moves little but the first token.
    """
    placed = plan if isinstance(plan, Placement) else from_plan(plan)
    return _Forecaster(placed, cost, speeds, hits, ask or Ask()).run()


def rate(rates: Mapping[str, float], weight_type: str, form: Form) -> float:
    """Look a speed up; where this type or form was not measured, the likeliest other.

    A form that is missing is taken for plain, then for dense; a type that is missing for the
    median of those that are there.
    """
    forms: tuple[Form, ...] = (form, "slots" if form == "experts" else "plain", "dense")
    for each in forms:
        found = rates.get(rate_key(weight_type, each))
        if found is not None:
            return found
    others = sorted(value for name, value in rates.items() if "/" not in name)
    return others[len(others) // 2] if others else math.inf


def decode_bytes_s(rates: Mapping[str, float], weight_type: str, form: Form, n_in: int) -> float:
    """Bytes of weights per second for one token, whose rows have `n_in` values.

    What a row takes is linear in its length up to the longest measured; per byte, no row takes
    less than the longest nor more than the shortest. Where only long ones were measured, their
    speed stands for all.
    """
    long = rate(rates, weight_type, form)
    short = rates.get(rate_key(weight_type, form, SHORT_IN))
    if short is None or n_in >= N_IN:
        return long
    share = (n_in - SHORT_IN) / (N_IN - SHORT_IN)
    row_s = (1 - share) * SHORT_IN / short + share * N_IN / long
    return min(max(n_in / row_s, min(short, long)), max(short, long))


def read_s(points: Sequence[StoragePoint], part_bytes: float, n_parts: int) -> float:
    """Seconds until `n_parts` reads of `part_bytes` each have ended, asked for together.

    Between measured sizes and depths the bandwidth is taken for linear in their logarithms.
    """
    if n_parts < 1 or part_bytes <= 0:
        return 0.0
    sizes = sorted({point.read_bytes for point in points})
    if not sizes:
        return math.inf
    low = max((size for size in sizes if size <= part_bytes), default=sizes[0])
    high = min((size for size in sizes if size >= part_bytes), default=sizes[-1])
    below, above = _at_depth(points, low, n_parts), _at_depth(points, high, n_parts)
    bytes_s = below
    if high > low:
        bytes_s += (above - below) * math.log(part_bytes / low) / math.log(high / low)
    return n_parts * part_bytes / bytes_s


def _at_depth(points: Sequence[StoragePoint], size: int, depth: int) -> float:
    """Bandwidth at a measured size."""
    row = sorted((point.depth, point.bytes_s) for point in points if point.read_bytes == size)
    low = max((each for each in row if each[0] <= depth), default=row[0])
    high = min((each for each in row if each[0] >= depth), default=row[-1])
    if high[0] <= low[0]:
        return low[1]
    return low[1] + (high[1] - low[1]) * math.log(depth / low[0]) / math.log(high[0] / low[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    """Seconds of one token by cause, and the bytes that it reads."""

    parts: Mapping[str, float]
    read_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


class _Forecaster:
    def __init__(
        self, placed: Placement, cost: ModelCost, speeds: Speeds, hits: HitModel | None, ask: Ask
    ) -> None:
        self._placed, self._cost, self._speeds = placed, cost, speeds
        self._hits, self._ask = hits, ask
        resident = placed.pages is None
        self._dense: Form = "plain" if placed.pages == "layers" else "dense"
        if resident and not placed.repacks and cost.pages is None:
            self._dense = "plain"
        self._experts: Form = "experts" if resident and placed.repacks else "slots"
        self._notes = list(speeds.notes)

    def run(self) -> Forecast:
        placed, speeds = self._placed, self._speeds
        if placed.verdict == "REFUSED":
            return _refused(placed, speeds)
        self._note_types()
        ratio = self._ratio()
        likely = self._token(None if ratio is None else ratio.likely)
        slow = self._token(None if ratio is None else ratio.low)
        quick = self._token(None if ratio is None else ratio.high)
        spread = self._spread()
        decode = Range(low=(1 - spread) / slow.seconds, likely=1 / likely.seconds,
                       high=(1 + spread) / quick.seconds)  # fmt: skip
        prompt_s = self._prompt_s(None if ratio is None else ratio.likely)
        first_s = prompt_s + likely.parts["token"]
        watts, joules = speeds.active_watts, None
        if watts is not None:
            joules = Range(low=watts / decode.high, likely=watts / decode.likely,
                           high=watts / decode.low)  # fmt: skip
        n = max(1, self._ask.n_prompt)
        return Forecast(
            machine=speeds.name, verdict=placed.verdict, pages=placed.pages,
            budget_bytes=placed.budget_bytes, smallest_bytes=placed.smallest_bytes,
            hit_ratio=ratio, read_bytes_token=likely.read_bytes, decode_tok_s=decode,
            prefill_tok_s=_around(n / prompt_s, 1.5 * spread),
            ttft_s=_around(first_s, 1.5 * spread), joules_token=joules,
            parts={name: each for name, each in likely.parts.items() if each},
            notes=tuple(self._notes),
        )  # fmt: skip

    def _spread(self) -> float:
        origins = set(self._speeds.origins.values())
        return COMPUTED_SPREAD if origins - {"measured"} else MEASURED_SPREAD

    def _note_types(self) -> None:
        known = {re.split("[:/]", name)[0] for name in self._speeds.weight_bytes_s}
        missing = sorted(self._cost.weight_types - known)
        if missing:
            self._notes.append(f"speeds of {', '.join(missing)} are not known for this machine; "
                               "those of other types stand for them")  # fmt: skip

    # one token

    def _ratio(self) -> Range | None:
        """How many of a token's experts are found in memory."""
        placed = self._placed
        if placed.pages != "experts":
            return None
        share = placed.n_slots / max(1, placed.n_pages)
        if self._hits is None:
            self._notes.append("no hit model: experts are taken for routed uniformly")
            return Range(low=share, likely=share, high=share)
        if self._hits.origin == "stated":
            self._notes.append(f"hit ratio of models like it: {self._hits.source}")
        return hit_ratio(self._hits, share)

    def _token(self, ratio: float | None) -> _Token:
        cost, speeds, pages = self._cost, self._speeds, self._cost.pages
        moe = cost.n_moe_layer
        parts = {
            "dense": self._product_s(cost.dense, self._dense),
            "head": self._product_s(cost.head, self._dense),
            "router": self._product_s(cost.router, self._dense),
            "experts": self._product_s(cost.experts, self._experts),
            "attention": self._ask.n_past * cost.attended_cell_bytes / speeds.kv_bytes_s,
            "layers": speeds.layer_s * cost.n_layer,
            "token": speeds.graph_s,
        }
        if ratio is None or pages is None:
            parts["layers"] += speeds.expert_layer_s * moe
            if self._placed.pages == "layers":
                return self._streamed(parts)
            return _Token(parts=parts)
        parts["layers"] += speeds.paged_layer_s * moe
        stall_s, read_bytes = self._stall(pages, ratio, parts)
        return _Token(parts=parts | {"reads": stall_s}, read_bytes=read_bytes)

    def _product_s(self, work: Work, form: Form) -> float:
        rates = self._speeds.weight_bytes_s
        return sum(
            n / decode_bytes_s(rates, name, form, n_in)
            for name, rows in work.row_bytes.items() for n_in, n in rows.items()
        )  # fmt: skip

    def _stall(
        self, pages: PageShape, ratio: float, parts: Mapping[str, float]
    ) -> tuple[float, float]:
        """Seconds that missing experts cost a token, and the bytes of those that it reads.

        Where a run on this machine was recorded, all that its tokens took beyond the arithmetic
        sets the level: threads that fell asleep while they waited must wake again, too. The
        disk's calibration then only says how that changes with what is missing.
        """
        n_bytes = (1 - ratio) * pages.n_expert_used * pages.n_layer * pages.page_bytes
        stall_s = self._wait_s(pages, ratio, parts)
        pace = None if self._hits is None else self._hits.pace
        if pace is not None and self._speeds.origins.get("storage") == "measured":
            then_s, excess_s = self._wait_s(pages, pace[0], parts), pace[1] - sum(parts.values())
            if then_s > 0 and excess_s > 0:
                stall_s *= excess_s / then_s
        return stall_s, n_bytes

    def _wait_s(self, pages: PageShape, ratio: float, parts: Mapping[str, float]) -> float:
        """Seconds of waiting by the disk's calibration.

        A layer asks for all that it misses at once. What it has may be computed meanwhile; and
        what the layer before foresaw is read while that one computes.
        """
        k, speeds = pages.n_expert_used, self._speeds
        there_s = parts["experts"] / max(1, pages.n_layer)
        layer_s = (sum(parts.values()) - parts["head"] - parts["token"]) / max(1, pages.n_layer)
        wait_s = 0.0
        for n_missing, probability in enumerate(_binomial(k, 1 - ratio)):
            if not n_missing or probability < _NO_READS:
                continue
            read = read_s(speeds.storage, pages.part_bytes, n_missing * pages.n_parts)
            hides_s = min(read, there_s * (k - n_missing) / k)
            if self._placed.prefetches:
                hides_s = max(hides_s, min(FORESEEN * read, layer_s))
            wait_s += probability * (read - speeds.overlap_ratio * hides_s)
        return wait_s * pages.n_layer

    def _streamed(self, parts: dict[str, float]) -> _Token:
        """What is left of reading once layers are computed while others are read."""
        stages = self._stages(parts)
        total = stream_s(stages, self._speeds.overlap_ratio)
        compute_s = sum(parts.values())
        n_bytes = sum(stage.n_bytes for stage in stages)
        return _Token(parts=parts | {"reads": max(0.0, total - compute_s)}, read_bytes=n_bytes)

    def _stages(self, parts: Mapping[str, float]) -> list[Stage]:
        """Layers in the order of use, and behind them the head and what follows a pass."""
        cost, speeds, streamed = self._cost, self._speeds, set(self._placed.streamed)
        each_s = (parts["layers"] + parts["attention"]) / cost.n_layer
        found = []
        for number, work in enumerate(cost.layer_work):
            is_head = number == cost.n_layer
            compute_s = self._product_s(work, self._dense) + (0.0 if is_head else each_s)
            n_bytes = work.total_bytes if number in streamed else 0
            wait_s = read_s(speeds.storage, n_bytes, 1) if n_bytes else 0.0
            found.append(Stage(read_s=wait_s, n_bytes=n_bytes, compute_s=compute_s))
        return [*found, Stage(read_s=0.0, n_bytes=0, compute_s=parts["token"])]

    # a prompt

    def _prompt_s(self, ratio: float | None) -> float:
        """Seconds for a whole prompt, ubatch by ubatch."""
        left, past, total = self._ask.n_prompt, 0, 0.0
        while left > 0:
            n = min(left, self._ask.n_ubatch)
            total += self._ubatch_s(n, past, ratio)
            left, past = left - n, past + n
        return max(total, self._speeds.graph_s)

    def _ubatch_s(self, n: int, past: int, ratio: float | None) -> float:
        cost, speeds = self._cost, self._speeds
        compute_s = sum(
            n * flops / rate(speeds.prefill_flops_s, name, form)
            for work, form in ((cost.dense, self._dense), (cost.router, self._dense),
                               (cost.experts, self._experts))
            for name, flops in work.flops.items()
        )  # fmt: skip
        compute_s += n * (past + n / 2) * cost.attended_cell_bytes / speeds.kv_bytes_s / 2
        compute_s += self._product_s(cost.head, self._dense) + speeds.layer_s * cost.n_layer
        wait_s = self._ubatch_reads_s(n, ratio)
        return compute_s + wait_s - speeds.overlap_ratio * min(compute_s, wait_s)

    def _ubatch_reads_s(self, n: int, ratio: float | None) -> float:
        """Reads of a ubatch: every streamed layer once, every expert that any token chose."""
        speeds, pages, placed = self._speeds, self._cost.pages, self._placed
        if placed.pages == "layers":
            work = self._cost.layer_work
            return sum(read_s(speeds.storage, work[i].total_bytes, 1) for i in placed.streamed)
        if ratio is None or pages is None:
            return 0.0
        touched = pages.n_expert * (1 - (1 - pages.n_expert_used / pages.n_expert) ** n)
        missing = touched * (1 - placed.n_slots / max(1, placed.n_pages))
        parts = max(1, round(missing * pages.n_parts))
        return pages.n_layer * read_s(speeds.storage, pages.part_bytes, parts)


def _binomial(n: int, p: float) -> list[float]:
    """Probabilities of 0 to n of n."""
    p = min(1.0, max(0.0, p))
    return [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]


def _around(value: float, spread: float) -> Range:
    return Range(low=value * max(0.0, 1 - spread), likely=value, high=value * (1 + spread))


def _refused(placed: Placement, speeds: Speeds) -> Forecast:
    return Forecast(
        machine=speeds.name, verdict="REFUSED", pages=None, budget_bytes=placed.budget_bytes,
        smallest_bytes=placed.smallest_bytes, hit_ratio=None, read_bytes_token=0.0,
        decode_tok_s=None, prefill_tok_s=None, ttft_s=None, joules_token=None, parts={},
    )  # fmt: skip
