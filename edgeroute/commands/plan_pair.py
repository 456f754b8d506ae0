"""What a small and a large model take together: `edgeroute plan LARGE --small SMALL`.

As loading goes: all of the small one is in memory, and the large one gets what is left.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from edgeroute.commands.doctor_table import Row
from edgeroute.commands.plan_forecast import Foreseen, Progress, Where, foresee
from edgeroute.config import RunParams
from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import MIB, format_bytes
from edgeroute.skippers.step_price import ALONE, LEAST_GAIN, PassCost, Workload, predicted_s
from edgeroute.small import other_vocabulary, small_params
from edgeroute.steps_file import Point, StepsFile, find_steps_file
from edgeroute.tools.forecast.plan import plan_file
from edgeroute.tools.forecast.records import Forecast

DRAFT: Final = 48
"""Tokens of the drafts that the forecast is for, as in `agree:0:48`."""
_LEAST_CTX: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSeen:
    """Both models of a pair, planned under one budget.

    Attributes:
        small: with all of the budget.
        large: with what the small one leaves of it.
        n_prompt: tokens of the prompt that was forecast.
        budget_bytes: of both.
        same: whether they have one vocabulary.
        calibrated: what was measured of the pair; None where nobody did.
    """

    small: Foreseen
    large: Foreseen
    n_prompt: int
    budget_bytes: int
    same: bool
    calibrated: StepsFile | None

    @property
    def fits(self) -> bool:
        """Whether loading would be let in, the large model paged if need be."""
        return self.small.plan.is_resident and self.large.plan.fits

    @property
    def small_bytes(self) -> int:
        """What the small model takes, which is all in memory."""
        return self.small.plan.memory.total_bytes

    @property
    def verdict(self) -> str:
        """FITS, PAGES or REFUSED, of both."""
        return self.large.forecast.verdict if self.fits else "REFUSED"


def foresee_pair(
    large: GGUFFile, small: GGUFFile, params: RunParams, where: Where, progress: Progress
) -> PairSeen:
    """Plan two models by their headers, and forecast what each would do.

    Args:
        large, small: their headers are enough.
        params: settings of the large one, which names the small one.
        where: the machine.
        progress: told of what takes a second or more.

    Raises:
        UsageError: they cannot be a pair; and as `foresee`.
        ModelFileError, UnsupportedModelError: a file cannot be used.
        StepsFileError: what was calibrated for the pair cannot be used.
    """
    why = other_vocabulary(small, large)
    if why is not None and not params.steps_on:
        raise UsageError(why)
    beside = replace(where, trace=None, hits=None)
    first = foresee(small, small_params(params), beside, progress)
    budget = first.plan.budget_bytes
    left = replace(params, memory=max(1, budget - first.plan.memory.total_bytes))
    second = foresee(large, left, replace(where, fresh=False), progress)
    return PairSeen(
        small=first, large=second, n_prompt=where.n_prompt, budget_bytes=budget, same=why is None,
        calibrated=_calibrated(large, small, params),
    )  # fmt: skip


def _calibrated(large: GGUFFile, small: GGUFFile, params: RunParams) -> StepsFile | None:
    """Read what was measured of a pair whose files are both here."""
    if not (params.steps_on and large.path.is_file() and small.path.is_file()):
        return None
    path = find_steps_file(large.path, small.path, params.steps_file)
    return None if path is None else StepsFile.read(path, fingerprint(small), fingerprint(large))


def pair_facts(
    large: dict[str, Any], small: dict[str, Any], seen: PairSeen, files: tuple[GGUFFile, GGUFFile]
) -> dict[str, Any]:
    """Return the facts of a pair: those of the large model, where bytes and verdict are of both.

    Args:
        large, small: facts of each, as `edgeroute plan` has them of one model.
        seen: the pair.
        files: the large model's and the small one's.
    """
    parts = {f"small model, {owner}": n for owner, n in small["parts"].items()} | large["parts"]
    return large | {
        "parts": parts,
        "total_bytes": sum(parts.values()),
        "resident_bytes": seen.small_bytes + large["resident_bytes"],
        "budget_bytes": seen.budget_bytes,
        "fits": seen.fits,
        "verdict": seen.verdict,
        "smallest_budget_bytes": seen.small_bytes + large["smallest_budget_bytes"],
        "largest_n_ctx": _largest_n_ctx(files, seen),
        "small": small,
        "pair": {
            "small_bytes": seen.small_bytes,
            "large_budget_bytes": max(0, seen.budget_bytes - seen.small_bytes),
            "shared_vocabulary": seen.same,
            "forecast": _pair_forecast(seen),
        },
    }


def _largest_n_ctx(files: tuple[GGUFFile, GGUFFile], seen: PairSeen) -> int | None:
    """Find the longest context, up to the trained one, with which both are let in."""
    large, small = files
    params = replace(seen.large.plan.params, memory=seen.budget_bytes)

    def fits(n_ctx: int) -> bool:
        changed = replace(params, n_ctx=n_ctx, n_kv=None)
        first = plan_file(small, small_params(changed))
        left = seen.budget_bytes - first.memory.total_bytes
        return left > 0 and plan_file(large, replace(changed, memory=left)).fits

    plans = seen.large.plan, seen.small.plan
    most = max(_LEAST_CTX, min(plan.hparams.n_ctx_train for plan in plans))
    if fits(most):
        return most
    low, high = 0, -(-most // 256)  # bytes grow with whole buckets of cells only
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(256 * middle) else (low, middle)
    return 256 * low or None


def _pair_forecast(seen: PairSeen) -> dict[str, Any] | None:
    """Forecast answers of both models together, from what their passes would take."""
    small, large = (
        pass_cost(each.forecast, seen.n_prompt, each.plan.params.n_ubatch)
        for each in (seen.small, seen.large)
    )
    if not seen.fits or small is None or large is None:
        return None
    drafted = Workload(small_written=DRAFT, large_passes=1.0, large_read=DRAFT)
    found: dict[str, Any] = {
        "draft_tokens": DRAFT,
        "draft_s": DRAFT * small.seconds(1.0),
        "check_s": large.seconds(DRAFT),
        "alone_s": DRAFT * large.seconds(1.0),
        "best_tok_s": DRAFT / predicted_s(drafted, small, large),
        "calibrated": None,
    }
    file = seen.calibrated
    point = None if file is None or file.chosen is None else file.point(file.chosen)
    if file is not None and point is not None:
        found["calibrated"] = _of_policy(file, point, small, large)
    return found


def _of_policy(
    file: StepsFile, point: Point, small: PassCost, large: PassCost
) -> dict[str, object]:
    alone = file.point("large")
    against = ALONE if alone is None else alone.workload
    return {
        "policy": point.spec,
        "accuracy": point.accuracy,
        "large_accuracy": file.large_accuracy,
        "large_share": point.large_share,
        "gain": predicted_s(against, small, large) / predicted_s(point.workload, small, large),
    }


def pass_cost(forecast: Forecast, n_prompt: int, n_ubatch: int) -> PassCost | None:
    """Return what a pass over k tokens would take, from one token and from a prompt.

    Args:
        forecast: of one model.
        n_prompt: tokens of the prompt that it is for.
        n_ubatch: tokens that were computed at once.

    Returns:
        None where nothing is forecast.
    """
    if forecast.decode_tok_s is None or forecast.prefill_tok_s is None:
        return None
    one_s = 1 / forecast.decode_tok_s.likely
    n_passes = math.ceil(n_prompt / n_ubatch)
    if n_prompt <= n_passes:
        return PassCost(base_s=0.0, token_s=one_s)
    whole_s = n_prompt / forecast.prefill_tok_s.likely
    token_s = min(one_s, max(0.0, (whole_s - n_passes * one_s) / (n_prompt - n_passes)))
    return PassCost(base_s=one_s - token_s, token_s=token_s)


# for people


def pair_verdict(found: Mapping[str, Any]) -> str:
    """Say what becomes of both models."""
    small_bytes, left = found["pair"]["small_bytes"], found["pair"]["large_budget_bytes"]
    if not left:
        return (f"REFUSED: the small model alone takes {format_bytes(small_bytes)}, over the "
                f"budget of {format_bytes(found['budget_bytes'])}")  # fmt: skip
    return (f"{format_bytes(small_bytes)} for all of the small model, {format_bytes(left)} left "
            "for the large one")  # fmt: skip


def pair_rows(found: Mapping[str, Any]) -> list[Row]:
    """Show what is said of both models together."""
    small, pair = found["small"], found["pair"]
    rows: list[Row] = [
        ("small model", f"{small['model']}: {small['arch']}, {small['n_layer']} layers, "
                        f"{small['n_params'] / 1e6:.1f} million parameters"),
        ("vocabulary", "one for both" if pair["shared_vocabulary"] else
         "two: what one model wrote is encoded anew for the other where a step ends"),
        ("shares", pair_verdict(found)),
    ]  # fmt: skip
    speed = small["forecast"]["decode_tok_s"]
    if speed is not None:
        rows.append(("small alone", f"{speed['likely']:.1f} tok/s ({speed['low']:.1f} to "
                                    f"{speed['high']:.1f})"))  # fmt: skip
    forecast = pair["forecast"]
    if forecast is None:
        return rows
    n = forecast["draft_tokens"]
    rows += [
        (
            f"{n} tokens",
            f"drafted in {_s(forecast['draft_s'])} and read by the large model in "
            f"{_s(forecast['check_s'])}; written by it in {_s(forecast['alone_s'])}",
        ),
        ("steps at best", f"{forecast['best_tok_s']:.1f} tok/s, where all drafts are kept"),
    ]
    rows.append(("steps", _policy_row(forecast["calibrated"])))
    return rows


def _policy_row(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ("which policy pays is not known: `edgeroute calibrate --steps SMALL LARGE` "
                "measures it")  # fmt: skip
    gain = found["gain"]
    pace = f"{gain:.2f} times the large model's pace" + (
        "" if gain >= LEAST_GAIN else ", so that `auto` leaves it off"
    )
    return (f"{found['policy']}: {pace}; right on {found['accuracy']:.0%}, the large one on "
            f"{found['large_accuracy']:.0%}, when calibrated")  # fmt: skip


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def over_by(found: Mapping[str, Any]) -> str:
    """Say why a pair is refused."""
    missing = found["smallest_budget_bytes"] - found["budget_bytes"]
    return (f"REFUSED, {format_bytes(max(missing, MIB))} too little for both, even with the large "
            "model in its smallest form")  # fmt: skip
