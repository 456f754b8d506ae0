"""`edgeroute serve`: a local endpoint for OpenAI clients."""

import json
import time
from typing import TYPE_CHECKING, Any, Final, cast

import click

from edgeroute.commands.generate_shared import (
    SETTINGS,
    check_options,
    find_model,
    pick,
    runtime_options,
)
from edgeroute.runtime.extras import check_extra
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.server.config import ServerConfig
    from edgeroute.server.serve import Built

_NEEDED: Final = ("starlette", "uvicorn", "msgspec", "prometheus_client")
_EPILOG = """\b
Examples:
  edgeroute serve
  edgeroute serve qwen2.5-coder-1.5b-instruct --port 9000 --memory 3GiB
  edgeroute serve --config edgeroute.toml
  EDGEROUTE_API_KEY=$(openssl rand -hex 24) edgeroute serve --host 0.0.0.0

\b
edgeroute.toml, for several models under one budget:
  [server]
  memory = "6GiB"
  [models.coder]
  model = "qwen2.5-coder-1.5b-instruct"
  [models.small]
  model = "qwen2.5-coder-0.5b-instruct"

\b
Then, with any OpenAI client, or:
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "base", "messages": [{"role": "user", "content": "Hello"}]}'
"""


@click.command(epilog=_EPILOG)
@click.argument("model", required=False)
@click.option("--config", metavar="FILE", help="Serve what a TOML file names: several models "
              "under one budget, and any limit; see below.")  # fmt: skip
@click.option("--host", metavar="ADDRESS", help="Address to listen on; any other than loopback "
              "needs an API key.  [default: 127.0.0.1]")  # fmt: skip
@click.option("--port", type=int, metavar="N", help="Port; 0 is any free one.  [default: 8080]")
@click.option("--api-key-file", metavar="FILE", help="File with the API keys, one a line; a key "
              "may also come from EDGEROUTE_API_KEY.")  # fmt: skip
@runtime_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when requests are "
              "taken, and logs as JSON lines.")  # fmt: skip
def command(as_json: bool, **given: Any) -> None:
    """Answer OpenAI clients on a local port, by MODEL or what a configuration names.

    MODEL is a catalogue name, hf:owner/repo/file.gguf or a path; without it the default model.
    Requests call it by its name, or `base`. The dashboard is at /, metrics at /metrics, health at
    /health/ready. SIGTERM or Ctrl-C lets running answers end; a second one does not.
    """
    check_extra("edgeroute serve", *_NEEDED)
    config = _config(given)
    # Imported now: a wrong option should not wait for it.
    from edgeroute.runtime.host_memory import keep_heap_small
    from edgeroute.server.logs import setup
    from edgeroute.server.serve import build, listen, run, urls

    setup(json_lines=True if as_json else None)
    keep_heap_small()
    sockets = listen(config.params.host, config.params.port)
    try:
        built = build(config.params, config.models)
        _open_default(built)
        found = urls(sockets)
        run(built, sockets, lambda: _tell(built, found, as_json))
    finally:
        for each in sockets:
            each.close()


def _config(given: dict[str, Any]) -> "ServerConfig":
    """Read what is to be served.

    Raises:
        UsageError: a value is out of range, or options exclude each other.
    """
    from edgeroute.models.catalogue import DEFAULT_MODEL
    from edgeroute.server.config import one_model, read_config

    own = pick(given, ("host", "port", "api_key_file", "memory"))
    if given["config"] is not None:
        found = pick(given, ("model", *(name for name in SETTINGS if name != "memory")))
        if found:
            name = next(iter(found))
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} and --config exclude each other; write it into the "
                                   "file, under [models.NAME]")  # fmt: skip
        return read_config(given["config"], own)
    check_options(given)
    path = find_model(given["model"])
    return one_model(given["model"] or DEFAULT_MODEL, path, pick(given, SETTINGS), own)


def _open_default(built: "Built") -> None:
    """Open the model that requests get by default, telling how it goes."""
    facts = built.fleet.facts(built.fleet.names[0])
    budget = format_bytes(built.fleet.budget_bytes)
    click.echo(f"opening {facts.name}, {format_bytes(facts.n_bytes)} of {budget} ...", err=True)
    began = time.monotonic()
    built.fleet.load_now(facts.name)
    click.echo(f"opened in {time.monotonic() - began:.1f} s", err=True)
    runtime = built.fleet.peek(facts.name)
    for each in cast("list[str]", [] if runtime is None else runtime.stats()["warnings"]):
        click.echo(f"warning: {each}", err=True)


def _tell(built: "Built", urls: list[str], as_json: bool) -> None:
    """Say where the server is, what it has, and how to call it."""
    names, needs_key = list(built.fleet.names), bool(built.params.api_keys)
    if as_json:
        told = {"url": urls[0], "urls": urls, "models": names, "needs_key": needs_key}
        click.echo(json.dumps(told))
        return
    click.echo(f"serving {', '.join(names)} at {', '.join(urls)}")
    click.echo("an API key is needed" if needs_key else "no API key is needed: only this machine "
               "can call; admin calls are off")  # fmt: skip
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    content = '{"model": "base", "messages": [{"role": "user", "content": "Hello"}]}'
    click.echo(f"try: curl {urls[0]}/v1/chat/completions -H 'Content-Type: application/json'{key}"
               f" \\\n    -d '{content}'")  # fmt: skip
    if built.params.dashboard:
        click.echo(f"dashboard: {urls[0]}/")
