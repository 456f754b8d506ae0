"""Whether reading a saved session is worth it, by what both ways took in this process."""

from typing import Final

NEWEST_SHARE: Final = 0.5
"""Weight of a new measurement beside all before it."""
MIN_TOKENS: Final = 64
"""Shorter prompts say little about the speed of longer ones."""
RETRY: Final = 8
"""After so many refusals in a row one is read anyway: disks and machines change."""


class RestoreGauge:
    """Measures reading and computing, and decides between them. The engine thread owns it."""

    def __init__(self) -> None:
        self.read_bytes_s: float | None = None
        self.prefill_tok_s: float | None = None
        self.n_refused = 0
        self._in_a_row = 0

    def saw_read(self, n_bytes: int, seconds: float) -> None:
        """Note what reading, checking and copying of a session took."""
        self.read_bytes_s = _blend(self.read_bytes_s, n_bytes / max(seconds, 1e-6))

    def saw_prefill(self, n_tokens: int, seconds: float) -> None:
        """Note what computing (a part of) a prompt took."""
        if n_tokens >= MIN_TOKENS and seconds > 0:
            self.prefill_tok_s = _blend(self.prefill_tok_s, n_tokens / seconds)

    def why_not(self, n_tokens: int, n_bytes: int) -> str | None:
        """Say why reading would not pay; None where it does, or nobody knows yet.

        Args:
            n_tokens: that need not be computed then.
            n_bytes: to read.
        """
        compute_s = self.compute_s(n_tokens)
        if self.read_bytes_s is None or compute_s is None:
            return None
        read_s = n_bytes / self.read_bytes_s
        if read_s < compute_s or self._in_a_row >= RETRY:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        self.n_refused += 1
        return f"reading it takes about {read_s:.2f} s, computing those tokens {compute_s:.2f} s"

    def compute_s(self, n_tokens: int) -> float | None:
        """Estimate what computing tokens takes; None where nothing was computed yet."""
        return None if self.prefill_tok_s is None else n_tokens / self.prefill_tok_s


def _blend(before: float | None, now: float) -> float:
    return now if before is None else before + NEWEST_SHARE * (now - before)
