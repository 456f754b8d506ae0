"""Tokens in, text out: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Callable, Sequence

from edgeroute.runtime.errors import UsageError

MAX_STOPS = 64
MAX_STOP_CHARS = 1024


class TextStream:
    """Turn one sequence's tokens into text that can be shown at once.

    Text that could still become a stop string is held back; when a stop string is
    complete, the stream ends before it. Of several, the one that begins first wins, and
    of those the longest that the same token completed.

    Args:
        piece: gives a token's bytes, as `Tokenizer.piece` does.
        stop: texts that end the generation and are not part of it.

    Raises:
        UsageError: a stop string is empty, too long or not a str, or there are too many.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self._piece = piece
        self._stops = check_stops(stop)
        self._first = {text[0] for text in self._stops}
        self._longest = max(map(len, self._stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False
        self.stop_text: str | None = None
        """The stop string that ended the stream."""

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now, perhaps none."""
        return self.push_bytes(self._piece(token_id))

    def push_bytes(self, data: bytes) -> str:
        """Add a token's bytes; return the text that is certain now, perhaps none."""
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(data))

    def flush(self) -> str:
        """End the stream: return what was held back; half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, *, final: bool = False) -> str:
        text = self._held + text
        if not self._stops:
            return text
        found = [(at, -len(s), s) for s in self._stops if (at := text.find(s)) >= 0]
        hold = len(text) if final else self._hold_from(text)
        if found and min(found)[0] <= hold:
            at, _, self.stop_text = min(found)
            self.stopped = True
            self._held = ""
            return text[:at]
        self._held = text[hold:]
        return text[:hold]

    def _hold_from(self, text: str) -> int:
        """Where the earliest tail begins that could still become a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] not in self._first:
                continue
            tail = text[start:]
            if any(stop.startswith(tail) and len(stop) > len(tail) for stop in self._stops):
                return start
        return len(text)


def check_stops(stop: Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings once they are known to be usable.

    Raises:
        UsageError: one is empty, too long or not a str, or there are too many.
    """
    if isinstance(stop, str):
        raise UsageError(f"stop must be a list of texts, got the text {stop[:40]!r}")
    if len(stop) > MAX_STOPS:
        raise UsageError(f"{len(stop)} stop strings were given, the limit is {MAX_STOPS}")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise UsageError(f"a stop string must be a text that is not empty, got {text!r}")
        if len(text) > MAX_STOP_CHARS:
            raise UsageError(
                f"a stop string has {len(text)} characters, the limit is {MAX_STOP_CHARS}"
            )
    return tuple(stop)
