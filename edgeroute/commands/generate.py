"""`edgeroute generate`: one prompt, one answer, streamed."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import click

from edgeroute.cli import EXIT_INTERRUPTED
from edgeroute.commands.adapters_part import read_adapter, read_small_adapter
from edgeroute.commands.foreseen import foreseen
from edgeroute.commands.generate_shared import (
    SAMPLING,
    Answer,
    answer_writer,
    budget_of,
    check_options,
    file_errors,
    find_model,
    has_chat_template,
    listen,
    model_options,
    open_runtime,
    pick,
    sampling_options,
    stats_line,
)

if TYPE_CHECKING:
    from edgeroute.engine import Options

_EPILOG = """\b
Examples:
  edgeroute generate "Why is the sky blue?"
  edgeroute generate --raw "Once upon a time" --temperature 0.8 --seed 7
  edgeroute generate "A colour as JSON" --json-schema colour.json --max-tokens 40
  edgeroute generate "Why is the sky blue?" --device cuda0,rpc:192.168.1.20:50052
  git diff | edgeroute generate --prompt-file - --system "Write a commit message."
  edgeroute generate "What is 17 * 23?" --pool pool.toml
  edgeroute generate "What is 17 * 23?" -m qwen2.5-coder-1.5b-instruct \\
      --small qwen2.5-coder-0.5b-instruct --steps glimpse:1.2 --show-steps
"""


@click.command(epilog=_EPILOG)
@click.argument("prompt", required=False)
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from FILE; - is standard "
              "input.")  # fmt: skip
@click.option("--chat/--raw", "chat", default=None, help="Send the prompt as a chat message, or "
              "continue it as text.  [default: chat if the model has a template]")  # fmt: skip
@click.option("--system", metavar="TEXT", help="System message before the prompt (chat only).")
@click.option("--max-tokens", "-n", type=int, default=256, show_default=True,
              help="Longest answer.")  # fmt: skip
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may repeat.")
@click.option("--grammar-file", metavar="FILE", help="GBNF grammar that the answer obeys.")
@click.option("--json-schema", metavar="FILE", help="JSON schema that the answer obeys.")
@click.option("--timeout", type=float, metavar="SECONDS", help="End the answer after so long.")
@click.option("--pool", metavar="FILE", help="Have the cheapest capable of the models in a TOML "
              "file answer, or the one of them that --model names.")  # fmt: skip
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, **given: Any) -> None:
    """Answer PROMPT, streaming the text as it comes.

    A model with a chat template gets PROMPT as one user message; --raw makes it continue the
    text instead, which is also what a model without a template does. The text goes to
    standard output, one line of statistics to standard error. Ctrl-C ends the answer.
    """
    check_options(given)
    if as_json and given["show_steps"]:
        raise click.UsageError("--show-steps marks text as it comes, and --json prints none of "
                               "it; read stats.steps of the object")  # fmt: skip
    options = _options(given)
    if given["pool"] is not None:
        answer = _ask_pool(options, given, as_json=as_json)
        ctx.exit(EXIT_INTERRUPTED if answer.finish_reason == "cancelled" else 0)
    options["adapter"] = read_adapter(given)
    options["small_adapter"] = read_small_adapter(given)
    prompt = _read_prompt(given["prompt"], given["prompt_file"])
    show = (lambda text: None) if as_json else answer_writer(given)
    path = find_model(given["model"])
    if _as_chat(lambda: has_chat_template(path), given):
        options["messages"] = _messages(prompt, given)
    with open_runtime(path, given) as runtime:
        answer = listen(runtime, None if "messages" in options else prompt, options, show)
        budget_bytes = budget_of(runtime)
        params = runtime.params
    if (expected := foreseen(path, params, budget_bytes, answer.stats)) is not None:
        answer.stats["forecast_tok_s"] = expected
    _report(answer, given["model"] or path.stem, budget_bytes, as_json=as_json)
    if answer.finish_reason == "cancelled":
        ctx.exit(EXIT_INTERRUPTED)


def _ask_pool(options: "Options", given: dict[str, Any], *, as_json: bool) -> Answer:
    """Have a pool answer, and report."""
    from edgeroute.commands.generate_pool import open_pool, pool_answer, pool_chats, route_part

    prompt = _read_prompt(given["prompt"], given["prompt_file"])
    show = (lambda text: None) if as_json else answer_writer(given)
    with open_pool(given) as pool:
        if chat := _as_chat(lambda: pool_chats(pool, given), given):
            options["messages"] = _messages(prompt, given)
        asked = given["model"], options
        answer, route = pool_answer(pool, None if chat else prompt, asked, show)
        budget_bytes = cast(int, pool.stats()["budget_bytes"])
    _report(answer, str(route["model"]), budget_bytes, as_json=as_json, pool=route)
    if not as_json:
        click.echo(f"[{route_part(route)}]", err=True)
    return answer


def _messages(prompt: str, given: dict[str, Any]) -> list[dict[str, str]]:
    system = given["system"]
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": prompt}]


def _report(
    answer: Answer, model: str, budget_bytes: int, *, as_json: bool, **more: object
) -> None:
    if as_json:
        stats = answer.stats | {"budget_bytes": budget_bytes}
        click.echo(json.dumps(asdict(answer) | {"stats": stats, "model": model} | more))
        return
    if not answer.text.endswith("\n"):
        click.echo()
    for each in answer.stats.get("continued", ()):
        click.echo(f"warning: {each}", err=True)
    click.echo(stats_line(answer, budget_bytes), err=True)


def _options(given: dict[str, Any]) -> "Options":
    """Collect what the engine's `stream` takes, files read."""
    options = pick(given, (*SAMPLING, "max_tokens", "session"))
    if given["timeout"] is not None:
        options["timeout_s"] = given["timeout"]
    if given["stop"]:
        options["stop"] = list(given["stop"])
    for name, option in (("grammar_file", "grammar"), ("json_schema", "json_schema")):
        if given[name] is not None:
            options[option] = _read_text("--" + name.replace("_", "-"), given[name])
    return cast("Options", options)


def _read_prompt(prompt: str | None, file: str | None) -> str:
    """Take the prompt from the argument or a file.

    Raises:
        UsageError: both or none were given, or the file cannot be read.
    """
    if (prompt is None) == (file is None):
        both = "not both" if prompt is not None else "there is neither"
        raise click.UsageError(f"give a PROMPT or --prompt-file FILE; {both}")
    return prompt if file is None else _read_text("--prompt-file", file)  # type: ignore[return-value]


def _read_text(option: str, name: str) -> str:
    with file_errors(option, name):
        if name == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        with open(name, encoding="utf-8") as file:
            return file.read()


def _as_chat(has_template: Callable[[], bool], given: dict[str, Any]) -> bool:
    """Decide between a chat message and plain text; a template is looked for where that decides.

    Raises:
        UsageError: a system message was given for plain text.
    """
    chat = given["chat"]
    if chat is None:
        chat = has_template()
    if not chat and given["system"] is not None:
        why = "--raw continues a text" if given["chat"] is False else "this model has no template"
        raise click.UsageError(f"--system needs a chat, but {why}; put the text in PROMPT")
    return bool(chat)
