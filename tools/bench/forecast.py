"""Forecasts against measurements: decode speed of models under the kernel's memory limit.

Every cell is forecast first, from the file's header, this machine's calibration and, of models
with experts, one trace of another prompt at one budget; then it is measured.
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from edgeroute.config import RunParams
from edgeroute.engine import Settings
from edgeroute.loaded import RESERVE_MIN_BYTES, RESERVE_RATIO
from edgeroute.offload.trace import Trace, read_trace
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.runtime.units import format_bytes, parse_bytes
from edgeroute.tools.bench.experts_engines import Life, LifePlan, Paged
from edgeroute.tools.bench.layers import Streamed
from edgeroute.tools.bench.limit import MemoryLimit, drop_page_cache
from edgeroute.tools.bench.pairs import Progress
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, plain
from edgeroute.tools.bench.text import text_tokens
from edgeroute.tools.bench.workers import Worker
from edgeroute.tools.forecast.calibrate import CalibrateParams, calibrate
from edgeroute.tools.forecast.forecast import Ask, forecast
from edgeroute.tools.forecast.hits import hit_model, with_pace
from edgeroute.tools.forecast.model_cost import ModelCost, model_cost
from edgeroute.tools.forecast.placement import Placement, place
from edgeroute.tools.forecast.records import Forecast, HitModel, Speeds

BUDGETS: Final = ("25%", "40%", "60%", "110%")
GOOD_SHARE: Final = 10 / 12
"""Of the cells, as many must be forecast within the tolerance."""
ROOM: Final = 1.04
"""Budgets below the smallest that would do are raised to so many times that."""
N_WARM: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastParams:
    """What this benchmark is told beyond BenchParams.

    Attributes:
        models: their files.
        budgets: shares of what a model needs resident (`40%`), or sizes.
        n_prompt: tokens of the prompt before the tokens that count.
        max_s: longest decoding of one run.
        tolerance: what a forecast may be off by, as a share of what was measured.
        fresh: measure this machine anew, whatever is remembered of it.
    """

    models: tuple[Path, ...]
    budgets: tuple[str, ...] = BUDGETS
    n_prompt: int = 64
    max_s: float = 10.0
    tolerance: float = 0.2
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A model under a budget: what was forecast, and what runs then measured, tok/s."""

    model: str
    placed: Placement
    forecast: Forecast
    measured: tuple[float, ...]
    hit_ratio: float | None
    read_bytes_token: float

    @property
    def tok_s(self) -> float:
        """Median of the runs."""
        return statistics.median(self.measured)

    @property
    def ratio(self) -> float:
        """Forecast over measured."""
        assert self.forecast.decode_tok_s is not None
        return self.forecast.decode_tok_s.likely / self.tok_s

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        return {
            "model": self.model,
            "budget_bytes": self.placed.budget_bytes,
            "needed_bytes": self.placed.needed_bytes,
            "n_slots": self.placed.n_slots,
            "n_pages": self.placed.n_pages,
            "n_streamed": len(self.placed.streamed),
            "forecast": asdict(self.forecast),
            "measured_tok_s": [plain(value) for value in self.measured],
            "measured_hit_ratio": self.hit_ratio,
            "measured_read_bytes_token": plain(self.read_bytes_token),
            "ratio": plain(self.ratio),
        }


class Planner:
    """Plans in a process under the same limit: what it counts is then as large as an engine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def place(self, params: RunParams) -> Placement:
        """Plan the model."""
        from edgeroute.engine import Runtime  # an engine has this loaded when it looks at itself

        assert Runtime is not None
        with GGUFFile.open(self._path) as file:
            return place(file, params)

    def close(self) -> None:
        """Nothing stays open."""


class Bench:
    """The cells of one model."""

    def __init__(
        self, path: Path, params: BenchParams, wanted: ForecastParams, progress: Progress
    ) -> None:
        self._path, self._params, self._wanted = path, params, wanted
        self._progress = progress
        tokens = _tokens(path, 2 * wanted.n_prompt)
        self._plan = LifePlan(
            prompts=(tuple(tokens[: wanted.n_prompt]), tuple(tokens[wanted.n_prompt :])),
            n_warm=N_WARM, n_tokens=params.tokens, n_after=2, max_s=wanted.max_s,
        )  # fmt: skip
        with GGUFFile.open(path) as file:
            self.cost: ModelCost = model_cost(file)
        self._engine = Streamed if self.cost.pages is None else Paged

    def cells(self) -> list[Cell]:
        """Forecast each cell, then measure it.

        The disk is measured right before, as its speed changes within minutes.
        """
        placed = [self._place(self._budget(text)) for text in self._wanted.budgets]
        hits = self._hits(placed)
        ask = Ask(n_prompt=self._wanted.n_prompt,
                  n_past=self._wanted.n_prompt + N_WARM + self._params.tokens // 2)  # fmt: skip
        found = []
        for number, each in enumerate(placed):
            said = forecast(each, self.cost, self._speeds(fresh=not number), hits, ask)
            self._progress(f"forecast {self._path.name} {_said(each, said)}")
            found.append(self._measure(each, said))
        return found

    def _budget(self, text: str) -> int:
        """Turn a share of what the model needs, or a size, into bytes.

        Raises:
            UsageError: it is neither.
        """
        share = text.strip().removesuffix("%")
        if share == text.strip():
            return parse_bytes(text)
        if not share.replace(".", "", 1).isdigit() or not 0 < float(share) <= 1000:
            raise UsageError(f"a budget of {text!r} is no share of a model; write it like 40%")
        needed = self._place(1 << 50).needed_bytes
        return int(float(share) / 100 * needed)

    def _place(self, budget: int) -> Placement:
        """Plan under a budget; one that is too small is raised to the least that would do."""
        with Worker(Planner, self._path) as worker:
            placed = cast(Placement, worker.call("place", self._run_params(budget)))
            if placed.verdict == "REFUSED":
                least = int(ROOM * placed.smallest_bytes)
                self._progress(f"{format_bytes(budget)} are too little for {self._path.name}; "
                               f"taking {format_bytes(least)}")  # fmt: skip
                placed = cast(Placement, worker.call("place", self._run_params(least)))
        if placed.verdict == "REFUSED":
            raise EdgerouteError(f"{self._path.name} does not go into {format_bytes(least)}")
        return placed

    def _run_params(self, budget: int) -> RunParams:
        return RunParams(**cast(dict[str, Any], self._settings(budget)))

    def _settings(self, budget: int, **more: object) -> Settings:
        found: dict[str, Any] = {
            "threads": self._params.threads, "n_ctx": max(256, self._plan.n_ctx),
            "n_ubatch": 128, "max_batch": 1, "memory": budget, "speculate": "off",
        }  # fmt: skip
        return cast(Settings, found | more)

    def _speeds(self, *, fresh: bool) -> Speeds:
        params = CalibrateParams(
            types=self.cost.weight_types, path=self._path, fresh=fresh and self._wanted.fresh,
            fresh_disk=True,
        )  # fmt: skip
        return calibrate(self._params.threads, params, self._progress)

    def _hits(self, placed: Sequence[Placement]) -> HitModel | None:
        """Record another prompt's routes at the first budget that pages experts."""
        first = next((each for each in placed if each.pages == "experts"), None)
        if first is None or self.cost.pages is None:
            return None
        self._progress(f"a trace of {self._path.name} with another prompt")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "forecast.trace"
            one, other = self._plan.prompts
            plan = replace(self._plan, prompts=(other, one), n_warm=1)
            self._live(first, plan, trace=str(path))
            trace, pages = read_trace(path), self.cost.pages
            model = hit_model(_first_answer(trace), pages, self.cost.arch)
            return with_pace(model, trace, pages)

    def _measure(self, placed: Placement, said: Forecast) -> Cell:
        lives = [self._live(placed, self._plan) for _ in range(self._params.reps)]
        life = lives[-1]
        counted = life.decode.experts
        hits: float | None = None
        if placed.pages == "experts":
            asked = counted["hits"] + counted["late"] + counted["misses"]
            hits = counted["hits"] / asked if asked else None
        cell = Cell(
            model=self._path.name, placed=placed, forecast=said, hit_ratio=hits,
            measured=tuple(each.decode.tok_s for each in lives),
            read_bytes_token=life.decode.moved_bytes / life.decode.n_tokens,
        )  # fmt: skip
        self._progress(f"measured {cell.tok_s:.2f} tok/s, forecast over that {cell.ratio:.2f}")
        return cell

    def _live(self, placed: Placement, plan: LifePlan, **more: object) -> Life:
        """Run an engine once under the kernel's limit."""
        drop_page_cache(self._path)
        settings = self._settings(placed.budget_bytes, **more)
        # The limit under which an engine that is given no budget would take this one.
        reserve = max(RESERVE_MIN_BYTES, int(RESERVE_RATIO * placed.budget_bytes))
        with MemoryLimit(placed.budget_bytes + reserve) as limit:
            factory = limit.factory(self._engine, self._path, settings)
            with limit.explaining(self._path.name), Worker(*factory) as worker:
                return cast(Life, worker.call("live", plan))


def run(params: BenchParams, progress: Progress, wanted: ForecastParams) -> Report:
    """Forecast and measure every model under every budget.

    Raises:
        UsageError: no control group can be made here, or a budget cannot be read.
        EdgerouteError: a run failed; where the kernel killed it, the message says so.
    """
    cells: list[Cell] = []
    for path in wanted.models:
        cells += Bench(path, params, wanted, progress).cells()
    return make_report(params, wanted, cells)


def make_report(params: BenchParams, wanted: ForecastParams, cells: Sequence[Cell]) -> Report:
    """Set forecasts beside measurements."""
    low, high = 1 - wanted.tolerance, 1 + wanted.tolerance
    n_good = sum(low <= cell.ratio <= high for cell in cells)
    return Report(
        bench="forecast", params=params,
        columns=("model, budget", "form", "hits, forecast", "hits", "MiB/token, forecast",
                 "MiB/token", "tok/s, forecast", "tok/s", "ratio"),
        rows=tuple(_row(cell) for cell in cells), results=[cell.to_dict() for cell in cells],
        criteria=(
            Criterion(what=f"cells forecast within {wanted.tolerance:.0%}", value=n_good,
                      limit=round(GOOD_SHARE * len(cells))),
        ),
        notes=("budgets are shares of what the model needs resident; each run is a process of its "
               "own under the kernel's limit; without drafts, which a forecast knows nothing of",),
    )  # fmt: skip


def _row(cell: Cell) -> tuple[str, ...]:
    placed, said = cell.placed, cell.forecast
    assert said.decode_tok_s is not None
    form = {
        "experts": f"{placed.n_slots} of {placed.n_pages} experts",
        "layers": f"{len(placed.streamed)} streamed",
        None: "resident",
    }[placed.pages]
    share = placed.budget_bytes / placed.needed_bytes
    return (
        f"{cell.model}, {format_bytes(placed.budget_bytes)} ({share:.0%})", form,
        "" if said.hit_ratio is None else f"{said.hit_ratio.likely:.1%}",
        "" if cell.hit_ratio is None else f"{cell.hit_ratio:.1%}",
        f"{said.read_bytes_token / 2**20:.0f}", f"{cell.read_bytes_token / 2**20:.0f}",
        f"{said.decode_tok_s.likely:.2f}",
        f"{cell.tok_s:.2f} [{min(cell.measured):.2f} to {max(cell.measured):.2f}]",
        f"{cell.ratio:.2f}",
    )  # fmt: skip


def _said(placed: Placement, said: Forecast) -> str:
    assert said.decode_tok_s is not None
    tok_s: Mapping[str, float] = asdict(said.decode_tok_s)
    parts = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in said.parts.items())
    return (f"in {format_bytes(placed.budget_bytes)}: {tok_s['likely']:.2f} tok/s "
            f"[{tok_s['low']:.2f} to {tok_s['high']:.2f}] ({parts})")  # fmt: skip


def _first_answer(trace: Trace) -> Trace:
    """Leave the one-token prompt and the last prompt of a life out: the answer between counts."""
    steps = list(trace.steps)
    begin = next((i for i, step in enumerate(steps) if i and step.prefill), 0)
    return replace(trace, steps=tuple(steps[begin:]))


def _tokens(path: Path, n_tokens: int) -> Sequence[int]:
    """Tokenise the fixed text with the file's vocabulary alone."""
    with GGUFFile.open(path) as file, Tokenizer.open(file) as tokenizer:
        return text_tokens(
            lambda text: tokenizer.encode(text, add_special=True, parse_special=False), n_tokens
        )
