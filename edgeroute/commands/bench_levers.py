"""The benchmarks that are about edgeroute itself: its levers against off, its forecasts."""

from typing import Any

import click

from edgeroute.cli import EXIT_INTERRUPTED
from edgeroute.commands.bench_shared import bench_params, examples, finish, progress
from edgeroute.models.catalogue import DEFAULT_MODEL


@click.command(epilog=examples(
    "levers", "", "moe.gguf --memory 2GiB --only prefetch --only policy",
    "moe.gguf --memory 2GiB --limit 2.5GiB --exhaustive --json",
    "moe.gguf --memory 2GiB --missing --exhaustive --minutes 20",
))  # fmt: skip
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--memory", metavar="BYTES", help="Budget that the levers are measured at; what "
              "wins at one loses at another.  [default: all free memory]")  # fmt: skip
@click.option("--limit", metavar="BYTES", help="The kernel's limit on each run as well.")
@click.option("--only", multiple=True, metavar="NAME", help="Measure this lever; may repeat.  "
              "[default: all that the model has]")  # fmt: skip
@click.option("--pairs", default=6, show_default=True, type=click.IntRange(3, 1000),
              help="Alternating pairs of each, every run a process of its own.")  # fmt: skip
@click.option("--seconds", default=4.0, show_default=True, type=click.FloatRange(0.1, 600),
              help="About how long a run decodes.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 512), help="Compute threads of all runs.  "
              "[default: as the Runtime measures]")  # fmt: skip
@click.option("--small", metavar="NAME", help="A small model, to draft or to write steps.")
@click.option("--adapters", metavar="DIR", help="LoRA adapters, to measure choosing among them.")
@click.option("--controls", is_flag=True, help="Measure also what must lose, such as prefetch by "
              "chance.")  # fmt: skip
@click.option("--exhaustive", is_flag=True, help="Then measure the default against every single "
              "configuration: it should be within 3 % of the best.")  # fmt: skip
@click.option("--minutes", default=20.0, show_default=True, type=click.FloatRange(0.1, 1440),
              help="About how long that may take.")  # fmt: skip
@click.option("--missing", is_flag=True, help="Measure only what has no verdict from before, on "
              "this machine at this budget.")  # fmt: skip
@click.option("--store/--no-store", default=None, help="Keep the verdicts, for Runtimes with "
              "levers=\"proven\".  [default: if there were enough pairs, long enough]")  # fmt: skip
@click.option("--check", is_flag=True, help="Exit with status 1 if a target is missed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
@click.pass_context
def levers(ctx: click.Context, /, **options: Any) -> None:
    """Each lever of MODEL against off, on this machine: gain, cost in quality, verdict.

    Prefetch, cache policies, overlap, speculation, threads, ways to read, layouts, and what
    changes answers: depth plans, steps, shorter keys and values. Runs alternate; intervals are
    of 95 %. A Runtime with levers="proven", the default, uses what won. Ctrl-C keeps what was
    measured.
    """
    from edgeroute.models.pull import resolve
    from edgeroute.runtime.units import parse_bytes
    from edgeroute.tools.levers import bench
    from edgeroute.tools.levers.measure import LeverParams

    settings: dict[str, Any] = {
        name: options[name] for name in ("memory", "threads", "adapters") if options[name]
    }
    small = None if options["small"] is None else str(resolve(options["small"]))
    limit = options["limit"]
    how = LeverParams(
        settings=settings, small=small, pairs=options["pairs"], seconds=options["seconds"],
        limit_bytes=None if limit is None else parse_bytes(limit),
    )  # fmt: skip
    given = {name: options[name] for name in ("controls", "missing", "exhaustive", "minutes")}
    store = how.says_enough if options["store"] is None else options["store"]
    wanted = bench.WantedLevers(measure=how, only=options["only"], store=store, **given)
    params = bench_params(options)
    report, interrupted = bench.run(params, progress, wanted)
    finish(report, options)
    if interrupted:
        ctx.exit(EXIT_INTERRUPTED)


@click.command(epilog=examples(
    "forecast", "--model moe.gguf --model qwen2.5-coder-1.5b-instruct --budgets 25%,60%"
))  # fmt: skip
@click.option("--model", "models", multiple=True, metavar="NAME",
              help="Catalogue name, or path of a .gguf file; may repeat.")  # fmt: skip
@click.option("--budgets", default="25%,40%,60%,110%", show_default=True, metavar="LIST",
              help="Memory limits, with commas between: shares of what a model needs, or "
              "bytes.")  # fmt: skip
@click.option("--prompt", "n_prompt", default=64, show_default=True,
              type=click.IntRange(2, 8192), help="Tokens of a prompt.")  # fmt: skip
@click.option("--seconds", "max_s", default=10.0, show_default=True,
              type=click.FloatRange(0.5, 600), help="Longest phase of decoding.")  # fmt: skip
@click.option("--tolerance", default=0.2, show_default=True, type=click.FloatRange(0.01, 1),
              help="Share by which a forecast may miss.")  # fmt: skip
@click.option("--fresh", is_flag=True, help="Measure this machine anew.")
@click.option("--reps", default=3, show_default=True, type=click.IntRange(1, 1000),
              help="Counted runs of each.")  # fmt: skip
@click.option("--tokens", default=48, show_default=True, type=click.IntRange(8, 4096),
              help="Tokens to decode in one run.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 512), help="Compute threads; default: the "
              "usable cores.")  # fmt: skip
@click.option("--check", is_flag=True, help="Exit with status 1 if a target is missed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def forecast(models: tuple[str, ...], budgets: str, **options: Any) -> None:
    """Decode speed under a memory limit: forecast first, then measured."""
    from edgeroute.models.pull import resolve
    from edgeroute.tools.bench import forecast as bench

    names = models or (DEFAULT_MODEL,)
    params = bench_params(options | {"model": names[0]})
    given = {name: options[name] for name in ("n_prompt", "max_s", "tolerance", "fresh")}
    wanted = bench.ForecastParams(
        models=(params.path, *(resolve(name) for name in names[1:])),
        budgets=tuple(budgets.split(",")), **given,
    )  # fmt: skip
    finish(bench.run(params, progress, wanted), options)
