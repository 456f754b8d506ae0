"""What a calibration found: every plan with its figures, and the one that was asked for."""

from dataclasses import dataclass
from pathlib import Path

from edgeroute.skippers.plan import DepthPlan
from edgeroute.tools.depth_speed import Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A plan with its figures, and those that a depth file does not hold."""

    plan: DepthPlan
    top1: float
    speed: Speed
    kept: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateReport:
    """What a calibration found; `best` is the plan that was asked for, if there is one."""

    path: Path
    model: str
    plans: tuple[Measured, ...]
    best: DepthPlan | None
    n_checked: int
    n_bytes: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        plans = [
            {key: value for key, value in each.plan.to_json().items() if key != "layers"}
            | {"key": each.plan.key, "top1": each.top1, "speed_quartiles": each.speed.quartiles,
               "kept": each.kept}
            for each in self.plans
        ]  # fmt: skip
        return {
            "model": self.model, "path": str(self.path), "bytes": self.n_bytes, "plans": plans,
            "best": self.best.name if self.best else None, "n_tokens_checked": self.n_checked,
            "seconds": round(self.seconds, 1), "notes": list(self.notes),
        }  # fmt: skip
