"""What a line that begins with a slash does."""

import difflib
from collections.abc import Callable
from pathlib import Path

from edgeroute.commands.chat_session import SETTABLE, ChatSession
from edgeroute.commands.generate_shared import budget_of, stats_line
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import format_bytes


class LeaveChat(Exception):
    """The user asked to leave."""


def run(session: ChatSession, line: str) -> None:
    """Run one command line, slash included.

    Raises:
        LeaveChat: it was /exit.
        EdgerouteError: it cannot be done; the message says why.
    """
    name, _, argument = line[1:].partition(" ")
    name = _ALIASES.get(name, name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        raise UsageError(f"there is no command /{name}; {hint} (// begins a message with a slash)")
    try:
        COMMANDS[name][2](session, argument.strip())
    except OSError as error:
        raise UsageError(f"/{name}: {error}") from error


def _help(session: ChatSession, argument: str) -> None:
    width = max(len(usage) for usage, _, _ in COMMANDS.values())
    for usage, text, _ in COMMANDS.values():
        session.note(f"{usage:<{width}}  {text}")
    session.note("A backslash at the end of a line continues the message on the next one.")


def _exit(session: ChatSession, argument: str) -> None:
    raise LeaveChat


def _reset(session: ChatSession, argument: str) -> None:
    n = len(session.turns)
    session.turns.clear()
    session.note(f"{n} messages forgotten" + ("; the system message stays" * bool(session.system)))


def _system(session: ChatSession, argument: str) -> None:
    if argument:
        session.system = None if argument.lower() == "none" else argument
    session.note(f"system: {session.system if session.system is not None else '(none)'}")


def _save(session: ChatSession, argument: str) -> None:
    path = _path("save", argument)
    session.save(path)
    session.note(f"{len(session.messages)} messages saved to {path}")


def _load(session: ChatSession, argument: str) -> None:
    path = _path("load", argument)
    session.load(path)
    session.note(f"{len(session.messages)} messages loaded from {path}")


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise UsageError(f"/{name} needs the name of a file")
    return Path(argument).expanduser()


def _stats(session: ChatSession, argument: str) -> None:
    if session.last is not None:
        session.note(stats_line(session.last, budget_of(session.runtime)))
    stats = session.runtime.stats()
    parts = stats["memory"]
    if isinstance(parts, dict):
        listed = ", ".join(f"{owner} {format_bytes(n)}" for owner, n in parts.items())
        session.note(f"memory: {listed}")
    session.note(
        f"{session.n_answers} answers, {session.n_generated} tokens; "
        f"{stats['reused_cells']} prompt tokens not computed again; "
        f"{session.n_dropped} messages dropped"
    )


def _retry(session: ChatSession, argument: str) -> None:
    session.retry()


def _undo(session: ChatSession, argument: str) -> None:
    n = session.undo()
    session.note(f"{n} messages taken back" if n else "there is nothing to take back")


def _adapter(session: ChatSession, argument: str) -> None:
    if argument:
        asked = None if argument == "none" else argument
        session.runtime.check_adapter(asked)
        session.adapter = asked
    session.note(f"adapter = {session.adapter or 'none'}")


def _set(session: ChatSession, argument: str) -> None:
    key, _, value = argument.replace("=", " ", 1).partition(" ")
    key = key.replace("-", "_")
    if key and key not in SETTABLE:
        near = difflib.get_close_matches(key, SETTABLE, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETTABLE)}"
        raise UsageError(f"there is no option {key!r}; {hint}")
    if key and value.strip():
        session.set(key, value.strip())
    for name in (key,) if key else SETTABLE:
        value_now = session.options.get(name)
        session.note(f"{name} = {'none' if value_now is None else value_now}")


_Action = Callable[[ChatSession, str], None]

COMMANDS: dict[str, tuple[str, str, _Action]] = {
    "help": ("/help", "list the commands", _help),
    "exit": ("/exit", "leave (also Ctrl-D, or Ctrl-C twice)", _exit),
    "reset": ("/reset", "forget the conversation, not the system message", _reset),
    "system": ("/system TEXT", "show or set the system message; none removes it", _system),
    "adapter": (
        "/adapter NAME",
        "show or set the adapter that answers: a name, auto or none",
        _adapter,
    ),
    "save": ("/save FILE", "write the conversation as JSON", _save),
    "load": ("/load FILE", "go on with a saved conversation", _load),
    "stats": ("/stats", "say what the last answer and the conversation took", _stats),
    "retry": ("/retry", "answer the last message again", _retry),
    "undo": ("/undo", "take the last message and its answer back", _undo),
    "set": ("/set KEY VALUE", f"show or set {', '.join(SETTABLE)}", _set),
}
_ALIASES = {"quit": "exit", "q": "exit", "?": "help", "h": "help"}
