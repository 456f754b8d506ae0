"""The command line: a table of commands, a table of exit codes, and nothing heavy.

A command's module is imported when it is called, so `edgeroute --help` answers at once.
"""

import difflib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from edgeroute import __version__
from edgeroute.runtime.errors import (
    AdapterFileError,
    CapacityError,
    CatalogueError,
    DepthFileError,
    EdgerouteError,
    LibraryError,
    ModelFileError,
    SessionFileError,
    StepsFileError,
    TemplateError,
    UnsupportedModelError,
    UsageError,
)
from edgeroute.runtime.extras import missing_extra

# The hub's client reads this once, when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

EXIT_DONE, EXIT_ERROR, EXIT_USAGE, EXIT_REFUSED, EXIT_CAPACITY = 0, 1, 2, 3, 4
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141
"""What a shell reports of a program that wrote to a closed pipe: 128 + SIGPIPE."""

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (KeyboardInterrupt, EXIT_INTERRUPTED),
    (click.Abort, EXIT_INTERRUPTED),
    (click.ClickException, EXIT_USAGE),
    (CapacityError, EXIT_CAPACITY),
    (UsageError, EXIT_USAGE),  # ContextError and GrammarError are UsageErrors
    (ModelFileError, EXIT_REFUSED),
    (AdapterFileError, EXIT_REFUSED),
    (DepthFileError, EXIT_REFUSED),
    (StepsFileError, EXIT_REFUSED),
    (SessionFileError, EXIT_REFUSED),
    (UnsupportedModelError, EXIT_REFUSED),
    (TemplateError, EXIT_REFUSED),
    (CatalogueError, EXIT_REFUSED),
    (LibraryError, EXIT_REFUSED),
    (EdgerouteError, EXIT_ERROR),
)
"""Exit code by class, the most specific first. What is not here keeps its traceback."""

COMMANDS: dict[str, str] = {
    "generate": "Answer one prompt.",
    "chat": "Talk with a model, turn by turn.",
    "serve": "Answer OpenAI clients on a local port.",
    "rpc-server": "Lend this machine's device to another machine.",
    "pull": "Download a model and check its hash.",
    "models": "List known and installed models.",
    "adapters": "Keep LoRA adapters, and train one.",
    "doctor": "Measure this machine and say what is missing.",
    "plan": "Tell whether a model fits, before loading it.",
    "profile": "Record a model's experts, and say what memory it needs.",
    "convert": "Rewrite models for this engine.",
    "calibrate": "Measure what a model may leave out, or a pair of models.",
    "bench": "Measure speed on this machine.",
}
"""Subcommands, each a module of `edgeroute.commands` that defines `command`."""

_AS_JSON = "edgeroute.as_json"
_EPILOG = """\b
Examples:
  edgeroute generate "Why is the sky blue?"
  edgeroute chat --model qwen2.5-coder-0.5b-instruct
  edgeroute serve --port 8080
  edgeroute doctor

\b
Exit codes: 0 done, 1 failed, 2 usage, 3 model or file refused, 4 does not fit,
130 interrupted. Settings may also come from the environment: EDGEROUTE_MEMORY,
EDGEROUTE_THREADS, EDGEROUTE_N_CTX, EDGEROUTE_KV_TYPE, EDGEROUTE_MODELS.
"""


class LazyGroup(click.Group):
    """Commands by name, imported when called; every error leaves through one door."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's module."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"edgeroute.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a wrong name is answered with the nearest one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note whether errors, too, must end in a JSON object."""
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta[_AS_JSON] = "--json" in options
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and turn what ends it early into a message and an exit code."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except click.exceptions.Exit:
            raise
        except BrokenPipeError:
            _close_stdout()
            ctx.exit(EXIT_NO_READER)
        except ModuleNotFoundError as error:
            _leave(ctx, missing_extra(error) or error)
        except BaseException as error:
            _leave(ctx, error)


def exit_code(error: BaseException) -> int | None:
    """Look an error up in the table; None is an error nobody expected."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), None)


def _leave(ctx: click.Context, error: BaseException) -> NoReturn:
    """Report an error and exit with its code; one that is not in the table is raised again."""
    code = exit_code(error)
    if code is None and not isinstance(error, Exception):
        raise error
    message = _message(error)
    try:
        if code is not None:
            click.echo(f"edgeroute: error: {message}", err=True)
        if ctx.meta.get(_AS_JSON):
            content = {"type": type(error).__name__, "message": message}
            click.echo(json.dumps({"error": content}))
    except BrokenPipeError:
        _close_stdout()
    if code is None:
        raise error
    ctx.exit(code)


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted"
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message().rstrip('.')} (see {error.ctx.command_path} --help)"
    if isinstance(error, click.ClickException):
        return error.format_message()
    return str(error) or type(error).__name__


def _close_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush is quiet."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # not a file of the system's, as in a test: nothing to flush
        return


@click.group(
    cls=LazyGroup,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="edgeroute")
def cli() -> None:
    """Run language models on this machine, also those that do not fit its memory."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        # A console that lacks a character shows a question mark; the answer goes on.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # Windows: a prompt with * or %NAME% is a prompt, not a pattern.
    cli.main(args=args, prog_name="edgeroute", windows_expand_args=False)
    sys.exit(EXIT_DONE)
