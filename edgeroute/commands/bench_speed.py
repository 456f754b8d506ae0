"""Benchmarks of a model in memory: decoding, prompts, starting, batches, a busy machine, parity."""

from typing import Any

import click

from edgeroute.commands.bench_shared import (
    bench_params,
    examples,
    finish,
    progress,
    shared,
    timed,
    tokens,
)


@click.command(epilog=examples("decode", "", "--tokens 256 --threads 1"))
@timed
@tokens
def decode(**options: Any) -> None:
    """Greedy decoding of one sequence, after 64 and after 1024 tokens."""
    from edgeroute.tools.bench import decode as bench

    finish(bench.run(bench_params(options), progress), options)


@click.command(epilog=examples("prefill", "", "--reps 9 --json"))
@timed
def prefill(**options: Any) -> None:
    """A prompt of 512 tokens in one batch."""
    from edgeroute.tools.bench import prefill as bench

    finish(bench.run(bench_params(options), progress), options)


@click.command(epilog=examples("load", "", "--model qwen2.5-coder-1.5b-instruct"))
@timed
def load(**options: Any) -> None:
    """From process start to the first token, and peak memory; page cache warm."""
    from edgeroute.tools.bench import load as bench

    finish(bench.run(bench_params(options), progress), options)


@click.command(epilog=examples("batch", "", "--tokens 256"))
@timed
@tokens
def batch(**options: Any) -> None:
    """Four sequences decoding together, in sum; and what one alone does."""
    from edgeroute.tools.bench import batch as bench

    finish(bench.run(bench_params(options), progress), options)


@click.command(epilog=examples("contention", "", "--reps 5 --seconds 4"))
@timed
@click.option("--seconds", "window_s", default=4.0, show_default=True,
              type=click.FloatRange(0.5, 600), help="Length of one counted window.")  # fmt: skip
def contention(**options: Any) -> None:
    """Decoding beside 0, 1 and 2 busy processes, and settling when load comes and goes.

    The busy processes are this command's own and end with it.
    """
    from edgeroute.tools.bench import contention as bench

    finish(bench.run(bench_params(options), progress), options)


@click.command(epilog=examples("parity", "", "--model gemma3-270m --nmse --positions 256"))
@shared
@tokens
@click.option("--positions", default=512, show_default=True, type=click.IntRange(2, 8192),
              help="Positions whose logits are compared.")  # fmt: skip
@click.option("--prompts", default=20, show_default=True, type=click.IntRange(1, 20),
              help="Prompts answered greedily by both.")  # fmt: skip
@click.option("--exact/--nmse", default=True, show_default=True,
              help="Demand llama.cpp's bits, or an error within llama.cpp's own.")  # fmt: skip
def parity(positions: int, prompts: int, exact: bool, **options: Any) -> None:
    """Compare logits and greedy answers with llama.cpp's; status 1 if they differ."""
    from edgeroute.tools.bench import parity as bench

    wanted = bench.ParityParams(n_positions=positions, n_prompts=prompts,
                                n_greedy=options["tokens"], exact=exact)  # fmt: skip
    report = bench.run(bench_params(options | {"reps": 1}), progress, wanted)
    finish(report, options | {"check": True})
