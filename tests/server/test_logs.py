"""What is written, what never is, and that no client can write a line of its own."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from edgeroute.server import logs
from edgeroute.server.logs import JobLog, JsonLines, PlainLines, log, log_failure, plain
from edgeroute.server.records import Job

EVIL = 'a\r\n{"level": "info", "event": "forged"}\x1b[2J\u202e\x00\ud800'


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """JSON lines in memory."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines())
    logs.LOGGER.addHandler(handler)
    before = logs.LOGGER.level
    logs.LOGGER.setLevel(logging.DEBUG)
    yield out
    logs.LOGGER.setLevel(before)
    logs.LOGGER.removeHandler(handler)


def the_line(out: io.StringIO) -> dict[str, object]:
    (line,) = out.getvalue().splitlines()
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_a_line_has_time_level_event_and_fields(lines: io.StringIO) -> None:
    log(logging.INFO, "request", path="/x", status=200, nothing=None)
    line = the_line(lines)
    assert set(line) == {"time", "level", "event", "path", "status"}
    assert (line["level"], line["event"], line["status"]) == ("info", "request", 200)


def test_every_line_has_the_id_of_its_request(lines: io.StringIO) -> None:
    token = logs.REQUEST_ID.set("req-7")
    try:
        log(logging.INFO, "request")
    finally:
        logs.REQUEST_ID.reset(token)
    assert the_line(lines)["request_id"] == "req-7"


def test_a_clients_text_stays_in_its_line(lines: io.StringIO) -> None:
    log(logging.INFO, "request", path=EVIL)
    assert str(the_line(lines)["path"]).startswith("a\\r\\n{")


def test_a_clients_text_stays_in_its_field_on_a_terminal() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "request", None, None)
    setattr(record, logs.FIELDS, {"path": EVIL + " status=200", "status": 404})
    text = PlainLines().format(record)
    assert text.count("\n") == 0
    assert text.isprintable()
    assert text.endswith(" status=404")
    assert text.count(" status=") == 2  # of which one is inside quotes
    assert '"a\\\\r' in text


def test_long_texts_are_cut() -> None:
    assert len(plain("x" * 10_000)) == logs.MAX_TEXT


def test_a_failure_has_its_traceback_and_its_cause(lines: io.StringIO) -> None:
    try:
        try:
            raise KeyError("inner\nforged")
        except KeyError as error:
            raise RuntimeError("x" * 5000) from error
    except RuntimeError as error:
        log_failure("a request failed", error)
    line = the_line(lines)
    assert str(line["error"]).startswith("RuntimeError: xxx")
    assert len(str(line["error"])) < 300
    told = line["traceback"]
    assert isinstance(told, list)
    assert any("test_logs.py" in frame for frame in told)
    assert any("KeyError" in frame and "cause" in frame for frame in told)


def test_a_record_of_another_library_is_one_line_too(lines: io.StringIO) -> None:
    child = logs.LOGGER.getChild("other")
    child.warning("%s went wrong\n%d", "it", 3)
    assert the_line(lines)["event"] == "it went wrong\\n3"
    broken = logging.LogRecord("x", logging.INFO, "", 0, "%d", ("no number",), None)
    assert json.loads(JsonLines().format(broken))["event"] == "%d"


def test_a_jobs_line_has_its_figures(lines: io.StringIO) -> None:
    job = Job(id="req-1", endpoint="chat", model="base", created=10.0, first_token=10.5,
              ended=12.0, n_prompt=7, n_generated=3, status=200)  # fmt: skip
    JobLog().ended(job)
    line = the_line(lines)
    del line["time"]
    assert line == {
        "level": "info", "event": "answered", "request_id": "req-1", "endpoint": "chat",
        "model": "base", "status": 200, "seconds": 2.0, "ttft_s": 0.5, "n_prompt": 7,
        "n_generated": 3, "streaming": False,
    }  # fmt: skip


def test_a_job_that_failed_is_a_warning(lines: io.StringIO) -> None:
    job = Job(id="a", endpoint="chat", model="base", status=503, error="no room\nnow")
    JobLog().began(job)
    lines.truncate(0)
    lines.seek(0)
    JobLog().ended(job)
    line = the_line(lines)
    assert (line["level"], line["why"]) == ("warning", "no room\\nnow")


@pytest.fixture
def _restored() -> Iterator[None]:
    before = {}
    for name in logs.SERVERS:
        logger = logging.getLogger(name)
        before[name] = (list(logger.handlers), logger.level, logger.propagate)
    yield
    for name, (handlers, level, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("as_json", [True, False])
def test_setup_writes_to_stderr_once_however_often_it_is_called(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        logs.setup(json_lines=as_json, level="INFO")
    log(logging.INFO, "one", status=1)
    log(logging.DEBUG, "hidden")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    told = capsys.readouterr()
    assert told.out == ""
    first, second = told.err.splitlines()
    assert first.startswith("{") is as_json
    assert "one" in first
    assert "Invalid HTTP request" in second


@pytest.mark.usefixtures("_restored")
def test_setup_chooses_json_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup()
    log(logging.INFO, "one")
    assert json.loads(capsys.readouterr().err)["event"] == "one"
