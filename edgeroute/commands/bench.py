"""`edgeroute bench`: speeds as ratios against llama.cpp on this machine, and parity with it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeroute.models.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from edgeroute.tools.bench.report import BenchParams, Report

UNDER_LIMIT = ("limit", "memory", "n_prompt", "max_s", "peer", "target")
ADAPTER_PARTS = ("decode", "mixed", "prefill", "switch", "routing")
SERVE_PARTS = ("throughput", "load")
DRAFT_SOURCES = ("lookup", "self", "small", "auto")
_EPILOG = """\b
Examples:
  edgeroute bench decode
  edgeroute bench prefill --model qwen2.5-coder-0.5b-instruct --reps 9
  edgeroute bench contention --reps 5 --seconds 4 --json
  edgeroute bench experts --model moe.gguf --limit 2GiB
  edgeroute bench layers --model qwen2.5-coder-1.5b-instruct
  edgeroute bench speculate --model qwen2.5-coder-1.5b-instruct
  edgeroute bench adapters --model qwen2.5-coder-1.5b-instruct
  edgeroute bench expert-count --model moe.gguf
  edgeroute bench depth --model qwen2.5-coder-0.5b-instruct
  edgeroute bench prune --model qwen2.5-coder-0.5b-instruct
  edgeroute bench serve --part load --seconds 60
  edgeroute bench parity --model gemma3-270m --nmse
"""

F = TypeVar("F", bound=Callable[..., None])


def _examples(name: str, *options: str) -> str:
    lines = [f"  edgeroute bench {name} {option}".rstrip() for option in options]
    return "\b\nExamples:\n" + "\n".join(lines)


def _shared(command: F) -> F:
    """Add the options that every benchmark has."""
    for option in reversed((
        click.option("--model", default=DEFAULT_MODEL, show_default=True,
                     help="Catalogue name, or path of a .gguf file."),
        click.option("--threads", type=click.IntRange(1, 512),
                     help="Compute threads of both engines; default: the usable cores."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object last."),
    )):  # fmt: skip
        command = option(command)
    return command


def _timed(command: F) -> F:
    """Add the options of benchmarks that measure time."""
    for option in reversed((
        _shared,
        click.option("--reps", default=5, show_default=True, type=click.IntRange(1, 1000),
                     help="Counted runs of each engine, alternating, after one uncounted."),
        click.option("--check", is_flag=True, help="Exit with status 1 if a target is missed."),
    )):  # fmt: skip
        command = option(command)
    return command


_tokens = click.option("--tokens", default=128, show_default=True, type=click.IntRange(8, 4096),
                       help="Tokens to decode in one run.")  # fmt: skip


def _phases(*, tokens: int, n_prompt: int, max_s: float, target: float) -> Callable[[F], F]:
    """Add the options of a bench under a memory limit, with their defaults."""
    options = (
        click.option("--tokens", default=tokens, show_default=True, type=click.IntRange(8, 4096),
                     help="Tokens to decode in one run."),
        click.option("--prompt", "n_prompt", default=n_prompt, show_default=True,
                     type=click.IntRange(2, 8192), help="Tokens of a prompt."),
        click.option("--seconds", "max_s", default=max_s, show_default=True,
                     type=click.FloatRange(0.5, 600), help="Longest phase of decoding."),
        click.option("--peer/--no-peer", default=True, show_default=True,
                     help="Measure llama.cpp's mmap as well."),
        click.option("--target", default=target, show_default=True, type=click.FloatRange(0),
                     help="Demanded ratio of decoding speeds."),
    )  # fmt: skip

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group(epilog=_EPILOG)
def command() -> None:
    """Measure edgeroute against llama.cpp, in turn, on this machine.

    Every speed is the ratio of two medians over alternating runs, with quartiles, and says
    how many runs were disturbed by other programs. Targets are printed as met or missed.
    """


@command.command(epilog=_examples("decode", "", "--tokens 256 --threads 1"))
@_timed
@_tokens
def decode(**options: Any) -> None:
    """Greedy decoding of one sequence, after 64 and after 1024 tokens."""
    from edgeroute.tools.bench import decode as bench

    _finish(bench.run(_params(options), _progress), options)


@command.command(epilog=_examples("prefill", "", "--reps 9 --json"))
@_timed
def prefill(**options: Any) -> None:
    """A prompt of 512 tokens in one batch."""
    from edgeroute.tools.bench import prefill as bench

    _finish(bench.run(_params(options), _progress), options)


@command.command(epilog=_examples("load", "", "--model qwen2.5-coder-1.5b-instruct"))
@_timed
def load(**options: Any) -> None:
    """From process start to the first token, and peak memory; page cache warm."""
    from edgeroute.tools.bench import load as bench

    _finish(bench.run(_params(options), _progress), options)


@command.command(epilog=_examples("batch", "", "--tokens 256"))
@_timed
@_tokens
def batch(**options: Any) -> None:
    """Four sequences decoding together, in sum; and what one alone does."""
    from edgeroute.tools.bench import batch as bench

    _finish(bench.run(_params(options), _progress), options)


@command.command(epilog=_examples("contention", "", "--reps 5 --seconds 4"))
@_timed
@click.option("--seconds", "window_s", default=4.0, show_default=True,
              type=click.FloatRange(0.5, 600), help="Length of one counted window.")  # fmt: skip
def contention(**options: Any) -> None:
    """Decoding beside 0, 1 and 2 busy processes, and settling when load comes and goes.

    The busy processes are this command's own and end with it.
    """
    from edgeroute.tools.bench import contention as bench

    _finish(bench.run(_params(options), _progress), options)


@command.command(epilog=_examples("experts", "--model moe.gguf --limit 2GiB --target 25",
                                  "--model moe.gguf --limit 40% --reps 3 --json"))  # fmt: skip
@_timed
@click.option("--limit", required=True, metavar="BYTES|PERCENT",
              help="Memory limit by the kernel: 2GiB, or a share of the file, 40%.")  # fmt: skip
@click.option("--memory", metavar="BYTES",
              help="edgeroute's own budget; default: 0.92 of the limit.")  # fmt: skip
@click.option("--policy", help="Eviction policy; default: the Runtime's own choice.")
@click.option("--prefetch", help="`auto`, `off` or a predictor; default: the Runtime's.")
@_phases(tokens=64, n_prompt=512, max_s=20.0, target=15.0)
def experts(policy: str | None, prefetch: str | None, **options: Any) -> None:
    """A model larger than memory, under a limit by the kernel, against llama.cpp's mmap.

    Ceilings of this disk and this processor are printed beside it, and the hit rate that
    every eviction policy would have had. Needs a system with control groups.
    """
    from edgeroute.tools.bench import experts as bench

    given = {name: options[name] for name in UNDER_LIMIT}
    settings = {"policy": policy, "prefetch": prefetch}
    _finish(bench.run(_params(options), _progress, bench.ExpertsParams(**given, settings=settings)),
            options)  # fmt: skip


@command.command(epilog=_examples("layers", "--model qwen2.5-coder-1.5b-instruct",
                                  "--model dense.gguf --limit 2GiB --reps 3 --json"))  # fmt: skip
@_timed
@click.option("--limit", default="60%", show_default=True, metavar="BYTES|PERCENT",
              help="Memory limit by the kernel: 2GiB, or a share of the file.")  # fmt: skip
@click.option("--memory", metavar="BYTES",
              help="edgeroute's own budget; default: 0.98 of the limit.")  # fmt: skip
@_phases(tokens=24, n_prompt=256, max_s=8.0, target=3.0)
def layers(**options: Any) -> None:
    """A dense model larger than memory, under a limit by the kernel, against llama.cpp's mmap.

    Ceilings of this disk and this processor are printed beside it. Needs a system with
    control groups.
    """
    from edgeroute.tools.bench import layers as bench
    from edgeroute.tools.bench.experts import ExpertsParams

    given = {name: options[name] for name in UNDER_LIMIT}
    _finish(bench.run(_params(options), _progress, ExpertsParams(**given, n_warm=2)), options)


@command.command(epilog=_examples("speculate", "--model qwen2.5-coder-1.5b-instruct",
                                  "--model NAME --small NAME --limit 75% --source small",
                                  "--limit none --source auto"))  # fmt: skip
@_timed
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
    )  # fmt: skip
    _finish(bench.run(_params(options), _progress, wanted), options)


@command.command(epilog=_examples("adapters", "--part decode --part switch",
                                  "--model NAME --max-cost 0.12"))  # fmt: skip
@_timed
@click.option("--part", "parts", multiple=True, metavar="NAME", type=click.Choice(ADAPTER_PARTS),
              help=f"{', '.join(ADAPTER_PARTS)}; may repeat.  [default: all]")  # fmt: skip
@click.option("--rank", default=8, show_default=True, type=click.IntRange(1, 64),
              help="Rank of the adapters that are made for it.")  # fmt: skip
@click.option("--max-cost", default=0.25, show_default=True, type=click.FloatRange(0, 1),
              help="Share of decoding speed that an adapter may cost.")  # fmt: skip
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(8, 4096),
              help="Tokens to decode in one run.")  # fmt: skip
@click.option("--peer/--no-peer", default=True, show_default=True,
              help="Measure llama.cpp's adapters as well.")  # fmt: skip
def adapters(parts: tuple[str, ...], rank: int, max_cost: float, **options: Any) -> None:
    """LoRA adapters: what one costs, eight in a batch, switching, and choosing among 1,000.

    The adapters are random, on all linear layers; the figures do not depend on what they say.
    """
    from edgeroute.tools.bench import adapters as bench

    wanted = bench.AdaptersParams(parts=parts or bench.PARTS, rank=rank, max_cost=max_cost,
                                  peer=options["peer"])  # fmt: skip
    _finish(bench.run(_params(options), _progress, wanted), options)


@command.command(epilog=_examples("depth", "--model qwen2.5-coder-0.5b-instruct",
                                  "--model NAME --plans my.depth --windows 8 --json"))  # fmt: skip
@_timed
@click.option("--plans", metavar="FILE", help="The depth file; default: the model's own.")
@click.option("--windows", "n_windows", default=4, show_default=True, type=click.IntRange(1, 64),
              help="Windows of 256 tokens, of prose and as many of code.")  # fmt: skip
@click.option("--tokens", default=24, show_default=True, type=click.IntRange(8, 4096),
              help="Tokens to decode in one run.")  # fmt: skip
def depth(plans: str | None, n_windows: int, **options: Any) -> None:
    """Depth plans against chance, even spacing and block influence, at the same compute.

    Divergence and perplexity on text that no calibration saw, prose and code apart, and the
    gain in decoding speed. The model must have been calibrated: `edgeroute calibrate`.
    """
    from pathlib import Path

    from edgeroute.tools.bench import depth as bench

    wanted = bench.DepthParams(plans=Path(plans) if plans else None, n_windows=n_windows)
    _finish(bench.run(_params(options), _progress, wanted), options)


@command.command("expert-count", epilog=_examples(
    "expert-count", "--model moe.gguf", "--model moe.gguf --experts 6 --experts 4 --json",
    "--model moe.gguf --limit 2GiB --experts 6 --experts 4 --mass 0.7",
))  # fmt: skip
@_timed
@click.option("--experts", "budgets", multiple=True, type=click.FloatRange(1),
              help="Experts per token and layer; may repeat.  [default: shares]")  # fmt: skip
@click.option("--windows", "n_check", default=6, show_default=True, type=click.IntRange(2, 1000),
              help="Windows of 256 tokens of prose, and as many of code, to judge on.")  # fmt: skip
@click.option("--limit", metavar="BYTES|PERCENT",
              help="Measure time under this limit by the kernel, and no quality.")  # fmt: skip
@click.option("--memory", metavar="BYTES",
              help="With --limit: edgeroute's own budget; default: 0.92 of the limit.")  # fmt: skip
@click.option("--mass", "masses", multiple=True, type=click.FloatRange(0, 1),
              help="With --limit: time the rule top-p with this mass too; may repeat.")  # fmt: skip
@click.option("--tokens", default=48, show_default=True, type=click.IntRange(8, 4096),
              help="With --limit: tokens to decode in one run.")  # fmt: skip
def expert_count(
    budgets: tuple[float, ...], n_check: int, limit: str | None, memory: str | None,
    masses: tuple[float, ...], **options: Any,
) -> None:  # fmt: skip
    """Fewer experts per token: MoDES, top-p, halting and uniform at equal counts.

    Divergence and perplexity against the full model on held-out text. With --limit the time
    and the bytes per token where experts are paged; random weights will do for that.
    """
    from edgeroute.tools.bench import expert_count as bench
    from edgeroute.tools.bench.experts import ExpertsParams
    from edgeroute.tools.expert_count import CountParams

    params = _params(options)
    if limit is None:
        wanted = CountParams(n_check=n_check, budgets=budgets or None)
        _finish(bench.run(params, _progress, wanted), options)
        return
    timed = bench.TimeParams(
        under=ExpertsParams(limit=limit, memory=memory), n_tokens=options["tokens"],
        rules=bench.rules_of([int(n) for n in budgets], masses),
    )  # fmt: skip
    _finish(bench.run_timed(params, _progress, timed), options)


@command.command(epilog=_examples("prune", "--model qwen2.5-coder-0.5b-instruct",
                                  "--model NAME --keep 40 --first 12 --questions 100"))  # fmt: skip
@_timed
@click.option("--keep", default=50, show_default=True, type=click.IntRange(1, 99),
              help="Percent of a prompt's tokens that are computed.")  # fmt: skip
@click.option("--first", type=click.IntRange(0),
              help="First layer that leaves tokens out.  [default: a third down]")  # fmt: skip
@click.option("--questions", "n_questions", default=12, show_default=True,
              type=click.IntRange(1, 1000), help="Questions about long texts.")  # fmt: skip
@click.option("--prompt", "n_tokens", default=1000, show_default=True,
              type=click.IntRange(400, 8192), help="Tokens of a prompt.")  # fmt: skip
@click.option("--batch", "n_ubatch", type=click.IntRange(256, 4096),
              help="Prompt tokens computed at once.  [default: all]")  # fmt: skip
def prune(keep: int, first: int | None, **options: Any) -> None:
    """Prompts of which later layers compute only a part: time, and what answers lose.

    Tokens are chosen by the attention they receive; chance and position are the controls.
    """
    from edgeroute.tools.bench import prune as bench

    given = {name: options[name] for name in ("n_questions", "n_tokens", "n_ubatch")}
    wanted = bench.PruneParams(keep=keep, first=first, **given)
    _finish(bench.run(_params(options), _progress, wanted), options)


@command.command(
    epilog=_examples(
        "steps",
        "--model qwen2.5-coder-1.5b-instruct --small qwen2.5-coder-0.5b-instruct",
        "--model large.gguf --small small.gguf --limit 90% --policies agree:0:48:1:0.5",
    )
)
@_timed
@click.option("--small", required=True, metavar="NAME", help="The small model of the pair.")
@click.option("--policies", default="glimpse:0,glimpse:inf", show_default=True, metavar="LIST",
              help="Step policies, with commas between.")  # fmt: skip
@click.option("--limit", metavar="BYTES", help="The kernel's limit: bytes, 1GiB, or a share of "
              "the large file such as 90%.  [default: none, both in memory]")  # fmt: skip
@click.option("--memory", metavar="BYTES", help="edgeroute's own budget.  [default: 98% of the "
              "limit]")  # fmt: skip
@click.option("--questions", "n_questions", default=12, show_default=True,
              type=click.IntRange(1, 1000), help="Questions answered in a run.")  # fmt: skip
@click.option("--disk-rate", metavar="BYTES", help="Read at most so many bytes a second, as from "
              "a slower disk: 300MB.")  # fmt: skip
@click.option("--remote-latency", "latency_ms", type=click.FloatRange(0, 60_000), metavar="MS",
              help="Put the large model behind an endpoint of this latency.")  # fmt: skip
@click.option("--seed", default=7, show_default=True, help="Of the questions.")
def steps(small: str, policies: str, latency_ms: float | None, **options: Any) -> None:
    """Two models writing answers in steps: right answers, seconds and bytes by policy.

    Each model alone is the measure. `glimpse:0` and `glimpse:inf` leave all to one of the two and
    show what routing itself costs.
    """
    from edgeroute.models.pull import resolve
    from edgeroute.tools.bench import steps as bench

    names = ("limit", "memory", "n_questions", "seed", "disk_rate")
    given = {name: options[name] for name in names}
    given["latency_s"] = None if latency_ms is None else latency_ms / 1e3
    wanted = bench.StepsParams(small=resolve(small), policies=tuple(policies.split(",")), **given)
    _finish(bench.run(_params(options), _progress, wanted), options)


@command.command(epilog=_examples(
    "serve", "--part load --seconds 60",
    "--python-peer venv/bin/python --llama-server build/bin/llama-server",
))  # fmt: skip
@_timed
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

    params = _params(options)
    if part == "throughput":
        speeds = serve_throughput.ThroughputParams(
            n_clients=clients or (1, 4, 16), n_tokens=options["n_tokens"],
            python_peer=options["python_peer"], native_peer=options["llama_server"],
            max_batch=options["max_batch"],
        )  # fmt: skip
        _finish(serve_throughput.run(params, _progress, speeds), options)
        return
    if len(clients) > 1:
        raise click.UsageError("a load has one number of --clients")
    load = serve_load.LoadParams(n_clients=clients[0] if clients else 32,
                                 seconds=options["seconds"], seed=options["seed"])  # fmt: skip
    _finish(serve_load.run(params, _progress, load), options)


@command.command(epilog=_examples("parity", "", "--model gemma3-270m --nmse --positions 256"))
@_shared
@_tokens
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
    _finish(bench.run(_params(options | {"reps": 1}), _progress, wanted), options | {"check": True})


def _params(options: dict[str, Any]) -> "BenchParams":
    from edgeroute.models.pull import pull, resolve
    from edgeroute.runtime import machine
    from edgeroute.runtime.errors import CatalogueError
    from edgeroute.tools.bench.report import BenchParams

    model = options["model"]
    try:
        path = resolve(model)
    except CatalogueError:
        if model != DEFAULT_MODEL:
            raise
        _progress(f"pulling {model}")
        path = pull(model).path
    given = {name: options[name] for name in ("reps", "tokens", "window_s") if name in options}
    return BenchParams(path=path, name=model,
                       threads=options["threads"] or machine.usable_cores(), **given)  # fmt: skip


def _progress(line: str) -> None:
    click.echo(line, err=True)


def _finish(report: "Report", options: dict[str, Any]) -> None:
    """Print table and JSON; leave with status 1 if a target was missed and that was asked."""
    from edgeroute.tools.bench import report as reports

    reports.show(report)
    if options["as_json"]:
        reports.show_json(report)
    if options["check"] and not report.met:
        raise click.exceptions.Exit(1)
