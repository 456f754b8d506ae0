"""Logs: one line an event, as JSON or for a reader's eye, with the id of its request.

What is written is chosen here: ids, methods, paths without their query, status, times, counts,
names of endpoints and models. Prompts, answers, keys and bodies are never logged; the message of an
unforeseen error is cut short, for it may quote what it failed on. Text that a client chose is
escaped, so that it cannot look like a line of its own or steer a terminal.
"""

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

from edgeroute.server.records import Job

LOGGER: Final = logging.getLogger("edgeroute.server")
REQUEST_ID: Final[ContextVar[str | None]] = ContextVar("edgeroute_request_id", default=None)
"""Of the request that the running task serves."""
FIELDS: Final = "edgeroute_fields"
"""Attribute of a record with what it has beside its message."""
MAX_TEXT: Final = 200
"""Characters of one text in a log."""
MAX_FRAMES: Final = 30
SERVERS: Final = ("edgeroute", "uvicorn")
"""Loggers whose records `setup` sends to its own handler."""
_MARK: Final = "_edgeroute_server_handler"

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def plain(text: str, most: int = MAX_TEXT) -> str:
    """Return a text on one line: what is not printable escaped, what is too long cut."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def log(level: int, event: str, **fields: object) -> None:
    """Write one event with its fields; those that are None are left out."""
    LOGGER.log(level, event, extra={FIELDS: fields})


def log_failure(event: str, error: BaseException, **fields: object) -> None:
    """Write that something unforeseen happened, with its traceback."""
    LOGGER.error(event, extra={FIELDS: fields}, exc_info=error)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; never more than one, and ASCII only."""
        line: dict[str, object] = {
            "time": _stamp(record), "level": record.levelname.lower(), "event": _message(record),
        } | _fields(record)  # fmt: skip
        if record.exc_info and record.exc_info[1] is not None:
            line["error"], line["traceback"] = _failure(record.exc_info[1])
        return json.dumps({key: _clean(value) for key, value in line.items()}, default=str)


class PlainLines(logging.Formatter):
    """For a terminal: time, level, event, fields, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback's lines where there is one."""
        fields = " ".join(f"{key}={_shown(value)}" for key, value in _fields(record).items())
        text = f"{_stamp(record)} {record.levelname.lower():7} {_message(record)} {fields}"
        if record.exc_info and record.exc_info[1] is not None:
            error, frames = _failure(record.exc_info[1])
            text += "".join(f"\n    {frame}" for frame in [*frames, error])
        return text.rstrip()


def setup(*, json_lines: bool | None = None, level: int | str = logging.INFO) -> logging.Handler:
    """Send the server's records, and uvicorn's, to stderr; called twice, it replaces itself.

    Args:
        json_lines: whether as JSON; None: unless stderr is a terminal.
        level: least level that is written.

    Returns:
        The handler.
    """
    as_json = not sys.stderr.isatty() if json_lines is None else json_lines
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    setattr(handler, _MARK, True)
    for name in SERVERS:
        logger = logging.getLogger(name)
        for old in [each for each in logger.handlers if hasattr(each, _MARK)]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    return handler


class JobLog:
    """Writes a line for every request that computed, when it is over. An Observer."""

    def began(self, job: Job) -> None:
        """Write that a request was accepted, for those who look closely."""
        log(logging.DEBUG, "accepted", request_id=job.id, endpoint=job.endpoint, model=job.model)

    def token(self, job: Job, n_tokens: int, seconds: float) -> None:
        """Write nothing: tokens are too many."""

    def ended(self, job: Job) -> None:
        """Write what a request was and what it cost."""
        ended = job.created if job.ended is None else job.ended
        first = None if job.first_token is None else round(job.first_token - job.created, 6)
        level = logging.WARNING if (job.status or 500) >= 500 else logging.INFO
        log(
            level, "answered", request_id=job.id, endpoint=job.endpoint, model=job.model,
            adapter=job.adapter, status=job.status, seconds=round(ended - job.created, 6),
            ttft_s=first, n_prompt=job.n_prompt, n_generated=job.n_generated,
            streaming=job.streaming, why=_why(job.error),
        )  # fmt: skip


def _why(error: str | None) -> str | None:
    return None if error is None else plain(error)


def _stamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _message(record: logging.LogRecord) -> str:
    try:
        return plain(record.getMessage())
    except (TypeError, ValueError):  # its arguments do not fit its text
        return plain(str(record.msg))


def _fields(record: logging.LogRecord) -> dict[str, object]:
    found: dict[str, Any] = getattr(record, FIELDS, {})
    fields = {key: value for key, value in found.items() if value is not None}
    request_id = REQUEST_ID.get()
    if request_id is not None:
        fields.setdefault("request_id", request_id)
    return fields


def _clean(value: object) -> object:
    return plain(value, 4 * MAX_TEXT) if isinstance(value, str) else value


def _shown(value: object) -> str:
    if not isinstance(value, str):
        return plain(str(value))
    # A text with a space or a sign in it could pass for more fields than it is.
    return value if value.isascii() and value.isidentifier() else json.dumps(plain(value))


def _failure(error: BaseException) -> tuple[str, list[str]]:
    """Return what an error is, and where it came from, outermost frame first."""
    frames = traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]
    told = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    if error.__cause__ is not None:
        what, where = _failure(error.__cause__)
        told = [*where, f"{what}, the cause of:", *told]
    return f"{type(error).__name__}: {plain(str(error))}", told
