"""`edgeroute chat`: a conversation in the terminal, or over a pipe."""

import json
from pathlib import Path
from typing import Any

import click

from edgeroute.cli import exit_code
from edgeroute.commands import chat_commands
from edgeroute.commands.adapters_part import read_adapter, read_small_adapter
from edgeroute.commands.chat_commands import LeaveChat
from edgeroute.commands.chat_input import LineReader
from edgeroute.commands.chat_session import SETTABLE, ChatSession
from edgeroute.commands.generate_shared import (
    answer_writer,
    check_options,
    find_model,
    has_chat_template,
    model_options,
    open_runtime,
    sampling_options,
)
from edgeroute.runtime.errors import ClosedError, EdgerouteError, TemplateError

_EPILOG = """\b
Examples:
  edgeroute chat
  edgeroute chat --model qwen2.5-coder-0.5b-instruct --system "Answer in one line."
  edgeroute chat -m qwen2.5-coder-1.5b-instruct --small qwen2.5-coder-0.5b-instruct \\
      --steps auto --show-steps
  printf 'My name is Ada.\\nWhat is my name?\\n' | edgeroute chat --json
"""


@click.command(epilog=_EPILOG)
@click.option("--system", metavar="TEXT", help="System message at the head of the conversation.")
@click.option("--max-tokens", "-n", type=int, default=512, show_default=True,
              help="Longest answer.")  # fmt: skip
@sampling_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the conversation as one JSON object "
              "at the end; answers go to standard error.")  # fmt: skip
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, **given: Any) -> None:
    """Talk with a model, turn by turn.

    Lines from a pipe are messages, too. /help lists the commands. Ctrl-C stops an answer and
    keeps what was said; Ctrl-D, or Ctrl-C twice at the prompt, leaves. When the conversation
    outgrows --n-ctx its oldest turns are dropped, never the system message.
    """
    check_options(given)
    adapter, small_adapter = read_adapter(given), read_small_adapter(given)
    path = find_model(given["model"])
    if not has_chat_template(path):
        raise TemplateError(
            f"{path.name} has no chat template: it continues text and does not chat; use "
            "`edgeroute generate --raw`, or an instruct model"
        )
    with open_runtime(path, given) as runtime:
        session = ChatSession(
            runtime=runtime, model=given["model"] or path.stem, system=given["system"],
            options={name: given.get(name) for name in SETTABLE},
            write=answer_writer(given, err=as_json), note=_note, adapter=adapter,
            small_adapter=small_adapter, session=given["session"],
        )  # fmt: skip
        errors = _converse(session, path)
    if as_json:
        click.echo(json.dumps(_summary(session, errors)))
    if errors:
        ctx.exit(exit_code(errors[0]) or 1)


def _note(text: str) -> None:
    click.echo(text, err=True)


def _converse(session: ChatSession, path: Path) -> list[EdgerouteError]:
    """Take messages until the user leaves; return the errors of a pipe's lines."""
    reader = LineReader(_note)
    if reader.interactive:
        _note(f"{path.stem}, n_ctx={session.runtime.params.n_ctx}; /help for commands, "
              "Ctrl-D to leave")  # fmt: skip
    errors: list[EdgerouteError] = []
    leaving = False
    try:
        while True:
            try:
                line = reader.read()
                leaving = False
                if line is None:
                    break
                _take(session, line)
            except LeaveChat:
                break
            except KeyboardInterrupt:
                # From a pipe there is no prompt to come back to.
                if not reader.interactive:
                    raise
                click.echo(err=True)
                if leaving:
                    break
                leaving = True
                _note("Ctrl-C again, or Ctrl-D, leaves")
            except ClosedError:  # nothing can be said any more
                raise
            except EdgerouteError as error:
                _note(f"edgeroute: {error}")
                if not reader.interactive:
                    errors.append(error)
    finally:
        reader.close()
    return errors


def _take(session: ChatSession, line: str) -> None:
    """Run a command or say a message; an empty line is neither."""
    text = line.strip()
    if text.startswith("/") and not text.startswith("//"):
        chat_commands.run(session, text)
    elif text:
        session.ask(line.replace("//", "/", 1) if text.startswith("//") else line)


def _summary(session: ChatSession, errors: list[EdgerouteError]) -> dict[str, object]:
    return {
        "model": session.model,
        "messages": session.messages,
        "n_answers": session.n_answers,
        "n_generated": session.n_generated,
        "n_dropped": session.n_dropped,
        "errors": [{"type": type(e).__name__, "message": str(e)} for e in errors],
    }
