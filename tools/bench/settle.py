"""How long a rate takes to become steady after something changed."""

from collections.abc import Sequence

TOLERANCE = 0.1
WINDOW_S = 0.5
TAIL_RATIO = 0.5


def settle_s(stamps: Sequence[tuple[float, int]], changed_at: float) -> float:
    """Seconds after a change until tokens arrive within 10 % of their final rate.

    Args:
        stamps: (time, tokens that arrived then), all after the change.
        changed_at: when the change was.

    Returns:
        The smallest time from which on both the next half second and all that follows are at
        least 0.9 of the final rate (that of the second half); the whole span where none is.
    """
    if len(stamps) < 3:
        return stamps[-1][0] - changed_at if stamps else float("inf")
    end = stamps[-1][0]
    middle = changed_at + (1 - TAIL_RATIO) * (end - changed_at)
    final = _rate(stamps, middle, end)
    for at in (changed_at, *(time for time, _ in stamps)):
        if at >= middle:
            break
        near = _rate(stamps, at, min(end, at + WINDOW_S))
        if min(near, _rate(stamps, at, end)) >= (1 - TOLERANCE) * final:
            return at - changed_at
    return middle - changed_at


def _rate(stamps: Sequence[tuple[float, int]], start: float, end: float) -> float:
    """Tokens per second in (start, end]."""
    if end <= start:
        return 0.0
    return sum(n for at, n in stamps if start < at <= end) / (end - start)
