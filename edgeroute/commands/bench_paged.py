"""Benchmarks of models larger than memory, under the kernel's limit."""

from pathlib import Path
from typing import Any

import click

from edgeroute.commands.bench_shared import (
    bench_params,
    examples,
    finish,
    phases,
    progress,
    slowed,
    timed,
)

UNDER_LIMIT = ("limit", "memory", "n_prompt", "max_s", "peer", "target")
DRAFT_SOURCES = ("lookup", "self", "small", "auto")


@click.command(epilog=examples("experts", "--model moe.gguf --limit 2GiB --target 25",
                                  "--model moe.gguf --limit 40% --reps 3 --json"))  # fmt: skip
@timed
@click.option("--limit", required=True, metavar="BYTES|PERCENT",
              help="Memory limit by the kernel: 2GiB, or a share of the file, 40%.")  # fmt: skip
@click.option("--memory", metavar="BYTES",
              help="edgeroute's own budget; default: 0.92 of the limit.")  # fmt: skip
@click.option("--policy", help="Eviction policy; default: the Runtime's own choice.")
@click.option("--prefetch", help="`auto`, `off` or a predictor; default: the Runtime's.")
@phases(tokens=64, n_prompt=512, max_s=20.0, target=15.0)
def experts(policy: str | None, prefetch: str | None, **options: Any) -> None:
    """A model larger than memory, under a limit by the kernel, against llama.cpp's mmap.

    Ceilings of this disk and this processor are printed beside it, and the hit rate that
    every eviction policy would have had. Needs a system with control groups.
    """
    from edgeroute.tools.bench import experts as bench

    given = {name: options[name] for name in UNDER_LIMIT}
    settings = {"policy": policy, "prefetch": prefetch}
    if policy or prefetch:  # what is measured is not to be switched off
        settings["levers"] = "asked"
    wanted = bench.ExpertsParams(**given, settings=settings)
    finish(bench.run(bench_params(options), progress, wanted), options)


@click.command(epilog=examples("prefetch", "--model moe.gguf --limit 2GiB --limit 1GiB",
                                  "--model moe.gguf --limit 40% --prefetch gate"))  # fmt: skip
@timed
@click.option("--limit", "limits", required=True, multiple=True, metavar="BYTES|PERCENT",
              help="Memory limit by the kernel: 2GiB, or a share of the file; may repeat."
              )  # fmt: skip
@click.option("--prefetch", "predictors", multiple=True, metavar="NAME",
              help="`auto` or a predictor; may repeat.  [default: auto, gate, eam and frequency]"
              )  # fmt: skip
@click.option("--tokens", default=96, show_default=True, type=click.IntRange(8, 4096),
              help="Tokens to decode in one run.")  # fmt: skip
@click.option("--seconds", "max_s", default=8.0, show_default=True,
              type=click.FloatRange(0.5, 600), help="Longest phase of decoding.")  # fmt: skip
def prefetch(limits: tuple[str, ...], predictors: tuple[str, ...], **options: Any) -> None:
    """Prefetch against none, for every budget and predictor: it may cost 2 % at most.

    Paired runs under a limit by the kernel. Prefetch switches itself off where it loses, as it
    does by default. Needs a system with control groups.
    """
    from edgeroute.tools.bench import prefetch as bench

    wanted = bench.PrefetchParams(limits=limits, max_s=options["max_s"],
                                  predictors=predictors or bench.PREDICTORS)  # fmt: skip
    finish(bench.run(bench_params(options), progress, wanted), options)


@click.command(epilog=examples("layers", "--model qwen2.5-coder-1.5b-instruct",
                                  "--model dense.gguf --limit 2GiB --reps 3 --json"))  # fmt: skip
@timed
@click.option("--limit", default="60%", show_default=True, metavar="BYTES|PERCENT",
              help="Memory limit by the kernel: 2GiB, or a share of the file.")  # fmt: skip
@click.option("--memory", metavar="BYTES",
              help="edgeroute's own budget; default: 0.98 of the limit.")  # fmt: skip
@phases(tokens=24, n_prompt=256, max_s=8.0, target=3.0)
def layers(**options: Any) -> None:
    """A dense model larger than memory, under a limit by the kernel, against llama.cpp's mmap.

    Ceilings of this disk and this processor are printed beside it. Needs a system with
    control groups.
    """
    from edgeroute.tools.bench import layers as bench
    from edgeroute.tools.bench.experts import ExpertsParams

    given = {name: options[name] for name in UNDER_LIMIT}
    finish(bench.run(bench_params(options), progress, ExpertsParams(**given, n_warm=2)), options)


@click.command(epilog=examples("speculate", "--model qwen2.5-coder-1.5b-instruct",
                                  "--model NAME --small NAME --limit 75% --source small",
                                  "--model NAME --source self --disk-rate 1GB",
                                  "--limit none --source auto"))  # fmt: skip
@timed
@click.option("--limit", default="60%", show_default=True, metavar="BYTES|PERCENT|none",
              help="Memory limit by the kernel: 2GiB, or a share of the file.")  # fmt: skip
@click.option("--memory", metavar="BYTES",
              help="edgeroute's own budget; default: 0.98 of the limit.")  # fmt: skip
@click.option("--source", "sources", multiple=True, metavar="NAME",
              type=click.Choice(DRAFT_SOURCES), help=f"{', '.join(DRAFT_SOURCES)}; may repeat.  "
              "[default: lookup, self, auto, and small where there is one]")  # fmt: skip
@click.option("--small", metavar="NAME", help="The small model that drafts.")
@click.option("--prompts", "n_prompts", default=4, show_default=True,
              type=click.IntRange(1, 20), help="Prompts answered in one run.")  # fmt: skip
@slowed
@click.option("--tokens", default=24, show_default=True, type=click.IntRange(8, 4096),
              help="Tokens of an answer.")  # fmt: skip
def speculate(sources: tuple[str, ...], small: str | None, **options: Any) -> None:
    """Drafted tokens verified in one pass, by each source, against plain decoding.

    Texts must be equal. Under one memory limit for all, where what a small model takes is
    missing for the large one's layers; needs a system with control groups, except with --limit
    none.
    """
    from edgeroute.models.pull import resolve
    from edgeroute.tools.bench import speculate as bench

    limit = options["limit"]
    wanted = bench.SpeculateParams(
        limit=None if limit == "none" else limit, memory=options["memory"],
        sources=sources or (*bench.DEFAULT_SOURCES, *(["small"] if small else [])),
        small=None if small is None else resolve(small), n_prompts=options["n_prompts"],
        disk_rate=options["disk_rate"],
        settings={"levers": "asked"},
    )  # fmt: skip
    finish(bench.run(bench_params(options), progress, wanted), options)


@click.command(epilog=examples("replay", "", "--trace routes.trace --share 0.4"))
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Routes of a model; default: some are made up.")  # fmt: skip
@click.option("--events", "n_event", default=1_000_000, show_default=True,
              type=click.IntRange(1000, 100_000_000),
              help="Routing events to make up: what one token chooses in one layer.")  # fmt: skip
@click.option("--share", default=0.25, show_default=True, type=click.FloatRange(0.001, 1),
              help="Slots over experts.")  # fmt: skip
@click.option("--check", is_flag=True, help="Exit with status 1 if a target is missed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def replay(trace: Path | None, n_event: int, share: float, **options: Any) -> None:
    """A trace through eviction policies and Belady's optimum: seconds, and hit rates."""
    from edgeroute.tools.bench import replay as bench
    from edgeroute.tools.bench.report import BenchParams

    name = "made-up routes" if trace is None else trace.name
    params = BenchParams(path=trace or Path(name), name=name, threads=1)
    how = bench.ReplayParams(trace=trace, n_event=n_event, share=share)
    finish(bench.bench(params, how, progress), options)
