"""The benchmark of `edgeroute serve`."""

from typing import Any

import click

from edgeroute.commands.bench_shared import bench_params, examples, finish, progress, timed

SERVE_PARTS = ("throughput", "load")


@click.command(epilog=examples(
    "serve", "--part load --seconds 60",
    "--python-peer venv/bin/python --llama-server build/bin/llama-server",
))  # fmt: skip
@timed
@click.option("--part", default="throughput", show_default=True,
              type=click.Choice(SERVE_PARTS), help="What is measured.")  # fmt: skip
@click.option("--clients", "clients", multiple=True, type=click.IntRange(1, 256),
              help="Clients at once; for throughput it may repeat.  "
              "[default: 1, 4, 16; for load 32]")  # fmt: skip
@click.option("--seconds", default=600.0, show_default=True, type=click.FloatRange(1, 86_400),
              help="How long the load lasts.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Of what the load's clients do.")
@click.option("--tokens", "n_tokens", default=64, show_default=True,
              type=click.IntRange(8, 4096), help="Tokens of an answer.")  # fmt: skip
@click.option("--python-peer", metavar="PYTHON",
              help="Compare with llama-cpp-python's server of this Python.")  # fmt: skip
@click.option("--llama-server", metavar="FILE", help="Compare with llama.cpp's server, this file.")
@click.option("--max-batch", default=16, show_default=True, type=click.IntRange(1, 256),
              help="Also measure our server with so many sequences in a pass.")  # fmt: skip
def serve(part: str, clients: tuple[int, ...], **options: Any) -> None:
    """`edgeroute serve` under clients of every kind, and its speed beside llama.cpp's servers.

    Load: clients that ask well or badly, leave at any moment and read slowly; statuses, ends of
    streams, memory and what is left behind. Throughput: tokens per second in sum.
    """
    from edgeroute.tools.bench import serve_load, serve_throughput

    params = bench_params(options)
    if part == "throughput":
        speeds = serve_throughput.ThroughputParams(
            n_clients=clients or (1, 4, 16), n_tokens=options["n_tokens"],
            python_peer=options["python_peer"], native_peer=options["llama_server"],
            max_batch=options["max_batch"],
        )  # fmt: skip
        finish(serve_throughput.run(params, progress, speeds), options)
        return
    if len(clients) > 1:
        raise click.UsageError("a load has one number of --clients")
    load = serve_load.LoadParams(n_clients=clients[0] if clients else 32,
                                 seconds=options["seconds"], seed=options["seed"])  # fmt: skip
    finish(serve_load.run(params, progress, load), options)
