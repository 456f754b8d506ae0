"""What speed was to be expected of an answer, for the line that says what it had."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from edgeroute.config import RunParams

LEAST_TOKENS: Final = 16
"""Fewer tokens say little of a speed."""
_LEVERS: Final = ("speculation", "depth", "steps", "adapters")
"""What changes the speed of decoding and is not forecast."""


def foreseen(
    path: Path, params: "RunParams", budget_bytes: int, stats: dict[str, Any]
) -> dict[str, float] | None:
    """Forecast the speed of an answer from what is remembered of this machine; nothing is measured.

    What the answer had is remembered, too, and corrects the next forecast.

    Args:
        path: the model's file.
        params: settings of the Runtime.
        budget_bytes: what it kept to.
        stats: of the answer.

    Returns:
        `low`, `likely` and `high` in tokens per second; None without a calibration (`edgeroute
        plan` makes one), for a short answer, and where levers are on that no forecast knows.
    """
    if stats["n_generated"] < LEAST_TOKENS or any(stats.get(name) for name in _LEVERS):
        return None
    from edgeroute.tools.forecast import experience
    from edgeroute.tools.forecast.forecast import Ask
    from edgeroute.tools.forecast.predicted import predicted_tok_s

    ask = Ask(n_prompt=stats["n_prompt"], n_past=stats["n_prompt"] + stats["n_generated"] // 2)
    found = predicted_tok_s(path, dataclasses.replace(params, memory=budget_bytes), ask)
    if found is None:
        return None
    before = experience.seen(path, params, found.likely)
    experience.note(path, params, found.likely, stats["decode_tok_s"] or 0.0)
    return dataclasses.asdict(experience.corrected(found, before))
