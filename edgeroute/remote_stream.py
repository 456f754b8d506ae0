"""The text in a stream of server-sent events, read as if an enemy had written it.

Nothing here does I/O: bytes are pushed in as they arrive, text is taken out.
Source: WHATWG HTML, section 9.2 "Server-sent events"; the streamed answers of OpenAI's
`/completions` and `/chat/completions`.
"""

import re
from collections.abc import Iterator
from typing import Final, Literal

from edgeroute.models.adapter_json import one_line, parse_object
from edgeroute.runtime.errors import AdapterFileError, EdgerouteError
from edgeroute.runtime.untrusted_json import show

Finish = Literal["stop", "length"]

MAX_EVENT_BYTES: Final = 1 << 20
"""Of one line, and of one event's data together."""
MAX_STREAM_BYTES: Final = 32 << 20
"""Of a whole stream, comments and fields that nobody reads included."""
MAX_TEXT_BYTES: Final = 1 << 20
MAX_TOKEN_BYTES: Final = 256
"""More than the longest token of any vocabulary seen; a run of blanks has 128."""
TEXT_ROOM_BYTES: Final = 4096

_END_OF_LINE = re.compile(rb"\r\n|\n|\r")
_FINISH: Final[dict[str, Finish]] = {
    "stop": "stop", "eos": "stop", "eos_token": "stop", "end_turn": "stop", "length": "length",
}  # fmt: skip


class StreamError(EdgerouteError):
    """A remote model's answer is none; the message completes `HOST ...`."""


class AnswerStream:
    """Takes the text out of a streamed answer.

    Attributes:
        finish: why the server ended the answer; None while it has not.
        n_choices: events so far that carried the answer on, empty text included.
        n_texts: those that brought text.
    """

    def __init__(self, *, chat: bool, max_tokens: int) -> None:
        self.finish: Finish | None = None
        self.n_choices = 0
        self.n_texts = 0
        self._chat = chat
        self._room = min(MAX_TEXT_BYTES, max_tokens * MAX_TOKEN_BYTES + TEXT_ROOM_BYTES)
        self._n_bytes = 0
        self._line = bytearray()
        self._after_cr = False
        self._data: list[bytes] = []
        self._n_data = 0
        self._text = bytearray()
        self._half = ""  # the first half of a surrogate pair

    def push(self, chunk: bytes) -> None:
        """Read bytes of the stream, cut anywhere.

        Raises:
            StreamError: it is no such stream; the text before that can still be taken.
        """
        self._n_bytes += len(chunk)
        if self._n_bytes > MAX_STREAM_BYTES:
            raise StreamError(f"sent more than {MAX_STREAM_BYTES >> 20} MiB for one answer")
        for line in self._lines(chunk):
            self._field(line)

    def take(self) -> bytes:
        """Return the text since the last call: UTF-8, whole characters."""
        text = bytes(self._text)
        self._text.clear()
        return text

    def close(self) -> None:
        """Say that the stream ended.

        Raises:
            StreamError: it ended before the answer did.
        """
        self._field(bytes(self._line))  # a last event may lack its blank line
        self._line.clear()
        self._event()
        if self.finish is None:
            raise StreamError("closed the connection in mid-answer")

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        if not chunk:
            return
        ends_in_cr = chunk.endswith(b"\r")
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_cr = ends_in_cr
        *whole, rest = _END_OF_LINE.split(chunk)
        for part in whole:
            self._extend(part)
            yield bytes(self._line)
            self._line.clear()
        self._extend(rest)

    def _extend(self, part: bytes) -> None:
        if len(self._line) + len(part) > MAX_EVENT_BYTES:
            raise StreamError(f"sent a line longer than {MAX_EVENT_BYTES >> 20} MiB")
        self._line += part

    def _field(self, line: bytes) -> None:
        """Take one line; only the field `data` counts, `:` begins a comment."""
        if not line:
            self._event()
            return
        name, _, value = line.partition(b":")
        if name != b"data":
            return
        self._n_data += len(value)
        if self._n_data > MAX_EVENT_BYTES:
            raise StreamError(f"sent an event larger than {MAX_EVENT_BYTES >> 20} MiB")
        self._data.append(value.removeprefix(b" "))

    def _event(self) -> None:
        data = b"\n".join(self._data)
        self._data.clear()
        self._n_data = 0
        if not data or self.finish is not None:
            return
        if data.strip() == b"[DONE]":
            if not self.n_choices:
                raise StreamError("ended the stream without an answer")
            self.finish = "stop"
            return
        try:
            event = parse_object(data, "an event")
        except AdapterFileError as error:
            raise StreamError(f"sent what is no answer: {error}") from None
        self._choice(event)

    def _choice(self, event: dict[str, object]) -> None:
        if event.get("error"):
            raise StreamError(f"broke off: {reason_of(event) or 'an error without a message'}")
        choices = event.get("choices")
        if not isinstance(choices, list):
            raise StreamError("sent what is no answer: an event without choices")
        if not choices:
            return  # of usage only
        choice = choices[0]
        if not isinstance(choice, dict):
            raise StreamError(f"sent what is no answer: its choice is {show(choice)}")
        holder = choice.get("delta") if self._chat else choice
        if holder is not None and not isinstance(holder, dict):
            raise StreamError(f"sent what is no answer: its delta is {show(holder)}")
        text = (holder or {}).get("content" if self._chat else "text")
        if text is not None and not isinstance(text, str):
            raise StreamError(f"sent what is no answer: its text is {show(text)}")
        self.n_choices += 1
        if text:
            self._add(text)
        self._finished(choice.get("finish_reason"))

    def _add(self, text: str) -> None:
        text = self._half + text
        self._half = text[-1] if "\ud800" <= text[-1] <= "\udbff" else ""
        text = text[: len(text) - len(self._half)]
        # JSON may escape half a character; by way of UTF-16 pairs join and strays become U+FFFD.
        pairs = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        raw = pairs.encode()
        self._room -= len(raw)
        if self._room < 0:
            raise StreamError("sent more text than the tokens that were asked for can hold")
        self._text += raw
        self.n_texts += bool(raw)

    def _finished(self, reason: object) -> None:
        if reason is None:
            return
        if not isinstance(reason, str):
            raise StreamError(f"sent what is no answer: its finish_reason is {show(reason)}")
        if reason not in _FINISH:
            raise StreamError(f"ended the answer by {one_line(reason)[:80]!r}")
        self.finish = _FINISH[reason]


def reason_of(reply: dict[str, object]) -> str:
    """What a server's error object says, on one line; empty where it says nothing."""
    error = reply.get("error", reply)
    message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return one_line(message)[:200]
