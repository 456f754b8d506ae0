"""`edgeroute chat`: turns, commands, what is kept and dropped, Ctrl-C."""

import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import edgeroute
from edgeroute.cli import cli
from edgeroute.commands import chat_commands, chat_input, chat_session, generate_shared
from edgeroute.commands.chat_session import ChatSession
from edgeroute.runtime.errors import ClosedError, EdgerouteError, UsageError

posix = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal and SIGINT")


def run(model: Path, *lines: str, flags: tuple[str, ...] = ()) -> Result:
    arguments = ["chat", "-m", str(model), "-n", "6", *flags]
    return CliRunner().invoke(cli, arguments, input="".join(line + "\n" for line in lines))


def talk(model: Path, *lines: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON object at the end of a conversation without errors."""
    result = run(model, *lines, flags=("--json", *flags))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def session(tiny: edgeroute.Runtime, notes: list[str]) -> Iterator[ChatSession]:
    options = {"temperature": 0.0, "max_tokens": 4, "seed": None}
    yield ChatSession(runtime=tiny, model="tiny", options=options, write=lambda text: None,
                      note=notes.append)  # fmt: skip


def roles(found: dict[str, Any]) -> list[str]:
    return [message["role"] for message in found["messages"]]


def test_turns_alternate_and_answers_go_to_standard_output(tiny_path: Path) -> None:
    found = talk(tiny_path, "Hello", "", "And you?", flags=("--system", "Be kind."))
    assert roles(found) == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in found["messages"][:2]] == ["Be kind.", "Hello"]
    assert found["n_answers"] == 2 and found["errors"] == []
    plain = run(tiny_path, "Hello", "And you?", flags=("--system", "Be kind."))
    texts = [m["content"] for m in found["messages"] if m["role"] == "assistant"]
    assert plain.stdout == "".join(t if t.endswith("\n") else t + "\n" for t in texts)


def test_a_conversation_continues_from_its_cells(session: ChatSession) -> None:
    session.ask("Tell me a rather long story about a lighthouse and its keeper, please.")
    assert session.last is not None
    first = session.last.stats["n_prompt"]
    session.ask("Go on.")
    assert session.last.stats["n_cached"] >= first > 0


def test_a_backslash_continues_a_message(tiny_path: Path) -> None:
    found = talk(tiny_path, "one\\", "two\\", "three", "//four")
    assert [m["content"] for m in found["messages"] if m["role"] == "user"] == [
        "one\ntwo\nthree",
        "/four",
    ]


def test_commands_change_the_conversation(tiny_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    found = talk(tiny_path, "/system Be brief.", "A", "B", "/undo", f"/save {file}", "C")
    assert [m["content"] for m in found["messages"] if m["role"] != "assistant"] == [
        "Be brief.", "A", "C"]  # fmt: skip
    saved = json.loads(file.read_text("utf-8"))["messages"]
    assert saved == found["messages"][:3]
    assert talk(tiny_path, "X", f"/load {file}")["messages"] == saved
    assert roles(talk(tiny_path, f"/load {file}", "/reset", "D")) == ["system", "user", "assistant"]
    assert roles(talk(tiny_path, f"/load {file}", "/system none", "/exit", "E")) == [
        "user", "assistant"]  # fmt: skip


def test_retry_answers_the_last_message_again(session: ChatSession, notes: list[str]) -> None:
    with pytest.raises(UsageError, match="nothing to answer again"):
        session.retry()
    session.ask("Hello")
    before = session.messages
    session.retry()
    assert session.messages == before and session.n_answers == 2
    assert any("temperature is 0" in note for note in notes)
    session.set("temperature", "5")
    texts = set()
    for _ in range(5):
        session.retry()
        texts.add(session.messages[-1]["content"])
    assert len(texts) > 1 and len(session.messages) == 2


def test_a_retry_that_says_nothing_keeps_the_old_answer(
    session: ChatSession, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session.ask("Hello")
    before = session.messages
    monkeypatch.setattr(
        chat_session, "listen", lambda *given: replace(generate_shared.listen(*given), text="")
    )
    session.retry()
    assert session.messages == before and "the earlier answer stays" in notes


def test_a_retry_that_is_refused_keeps_the_old_answer(session: ChatSession) -> None:
    session.ask("Hello")
    before = session.messages
    session.runtime.close()
    with pytest.raises(ClosedError):
        session.retry()
    assert session.messages == before


def test_set_changes_options_within_their_ranges(session: ChatSession, notes: list[str]) -> None:
    chat_commands.run(session, "/set temperature 0.7")
    chat_commands.run(session, "/set max-tokens=9")
    chat_commands.run(session, "/set seed none")
    assert session.options == {"temperature": 0.7, "max_tokens": 9, "seed": None}
    for line, words in (("/set temperature hot", "a number"), ("/set temperature -1", "between"),
                        ("/set max_tokens 0", "from 1 on"), ("/set seed 1.5", "a whole number"),
                        ("/set temprature 1", "did you mean temperature")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            chat_commands.run(session, line)
    assert session.options["temperature"] == 0.7
    notes.clear()
    chat_commands.run(session, "/set")
    assert "temperature = 0.7" in notes and "seed = none" in notes


def test_every_command_is_in_the_help_and_can_be_run(
    session: ChatSession, notes: list[str]
) -> None:
    session.ask("Hello")
    chat_commands.run(session, "/help")
    listed = "\n".join(notes)
    for name in chat_commands.COMMANDS:
        assert f"/{name}" in listed
    chat_commands.run(session, "/stats")
    assert any(note.startswith("memory: weights") for note in notes)
    with pytest.raises(chat_commands.LeaveChat):
        chat_commands.run(session, "/quit")


def test_an_unknown_command_is_answered_with_the_nearest(tiny_path: Path) -> None:
    result = run(tiny_path, "/rest", "Hello", flags=("--json",))
    assert result.exit_code == 2
    assert "did you mean /reset?" in result.stderr
    found = json.loads(result.stdout)
    assert found["errors"][0]["type"] == "UsageError" and found["n_answers"] == 1


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"messages": 3}', '[{"role": "tool", "content": "x"}]', "[[[["]
)
def test_a_file_that_is_no_conversation_is_refused(
    session: ChatSession, tmp_path: Path, content: str
) -> None:
    (tmp_path / "x.json").write_text(content)
    session.ask("Hello")
    before = session.messages
    with pytest.raises(EdgerouteError):
        chat_commands.run(session, f"/load {tmp_path / 'x.json'}")
    with pytest.raises(UsageError, match="No such file"):
        chat_commands.run(session, f"/load {tmp_path / 'missing.json'}")
    assert session.messages == before


def test_the_oldest_turns_are_dropped_never_the_system_message(tiny_path: Path) -> None:
    lines = [f"{i}: " + "word " * 12 for i in range(8)]
    result = run(tiny_path, *lines, flags=("--n-ctx", "256", "--system", "Be kind.", "--json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["n_answers"] == 8 and found["n_dropped"] > 0
    assert "the conversation outgrew n_ctx=256" in result.stderr
    assert roles(found)[:2] == ["system", "user"]
    assert found["messages"][-2]["content"].startswith("7: ")


def test_a_message_longer_than_the_context_leaves_the_rest_alone(tiny_path: Path) -> None:
    result = run(tiny_path, "Hello", "word " * 400, "Bye", flags=("--n-ctx", "256", "--json"))
    found = json.loads(result.stdout)
    assert result.exit_code == 2 and found["errors"][0]["type"] == "ContextError"
    assert found["n_answers"] == 2 and found["messages"][-2]["content"] == "Bye"


def test_a_model_without_a_template_does_not_chat(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeroute.commands.chat.has_chat_template", lambda path: False)
    result = run(tiny_path, "Hello")
    assert result.exit_code == 3 and "edgeroute generate --raw" in result.stderr


def test_an_interrupted_answer_is_kept_as_far_as_it_came(
    session: ChatSession, notes: list[str]
) -> None:
    seen: list[str] = []

    def write(text: str) -> None:
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt

    session.write = write
    session.options["max_tokens"] = 400
    session.ask("Hello")
    assert session.last is not None and session.last.finish_reason == "cancelled"
    assert session.messages[-1]["role"] == "assistant"
    assert str(session.messages[-1]["content"]).startswith("".join(seen[:3]))
    assert len("".join(seen)) < 100, "the rest of the answer was not waited for"
    assert any("stopped" in note for note in notes)
    session.ask("Go on.")
    assert len(session.messages) == 4


def test_an_answer_interrupted_before_it_began_takes_the_message_back(
    session: ChatSession, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_shared, "_take", interrupted)
    session.ask("Hello")
    assert session.messages == [] and any("taken back" in note for note in notes)


@posix
def test_on_a_terminal_ctrl_c_stops_the_answer_then_leaves(
    smollm2_path: Path, tmp_path: Path
) -> None:
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path), TERM="dumb")
        arguments = ["chat", "-m", str(smollm2_path), "--n-ctx", "8192", "-n", "8000"]
        os.execv(sys.executable, [sys.executable, "-m", "edgeroute", *arguments])
    try:
        read_until(terminal, b">>> ")
        os.write(terminal, b"Write a very long story.\n")
        read_until(terminal, b"story.\r\n")
        read_until(terminal, b" ")  # the answer began
        os.write(terminal, b"\x03")
        assert b"stopped; what was said is kept" in read_until(terminal, b">>> ")
        os.write(terminal, b"/stats\n")
        assert b"1 answers" in read_until(terminal, b"dropped")
        read_until(terminal, b">>> ")
        press_ctrl_c(terminal, b"Ctrl-C again")
        read_until(terminal, b">>> ")
        press_ctrl_c(terminal, b"\n")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(terminal)
    if chat_input.readline is not None and sys.platform == "linux":
        history = tmp_path / "edgeroute" / "chat_history"
        assert "Write a very long story." in history.read_text()
        assert stat.S_IMODE(history.stat().st_mode) == 0o600


def press_ctrl_c(terminal: int, words: bytes) -> None:
    """Press Ctrl-C at the prompt until it is answered.

    Python's readline misses one that comes between showing the prompt and waiting for a key.
    """
    for _ in range(20):
        os.write(terminal, b"\x03")
        shown = read_until(terminal, words, seconds=2.0, must=False)
        if words in shown:
            return
    raise AssertionError(f"Ctrl-C was not answered by {words!r}")


def read_until(terminal: int, words: bytes, *, seconds: float = 60, must: bool = True) -> bytes:
    """Read a terminal until it shows `words`, for so long at most."""
    shown, end = b"", time.monotonic() + seconds
    while words not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            assert not must, f"{words!r} never came: {shown[-2000:]!r}"
            break
        shown += os.read(terminal, 1)
    return shown


@posix
def test_ctrl_c_while_a_pipe_is_silent_ends_with_130(tiny_path: Path) -> None:
    command = [sys.executable, "-m", "edgeroute", "chat", "-m", str(tiny_path), "-n", "4"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    process.stdout.read(1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err, err
