"""Benchmarks of what changes answers: adapters, depth, experts left out, short prompts, steps."""

from typing import Any

import click

from edgeroute.commands.bench_shared import bench_params, examples, finish, progress, slowed, timed

MISS_SETTINGS = ("0.05:0", "0.1:0", "0.2:0", "0:0.1", "0:0.3", "0.1:0.1")
ADAPTER_PARTS = ("decode", "mixed", "prefill", "switch", "routing")


@click.command(epilog=examples("adapters", "--part decode --part switch",
                                  "--model NAME --max-cost 0.12"))  # fmt: skip
@timed
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
    finish(bench.run(bench_params(options), progress, wanted), options)


@click.command(epilog=examples("depth", "--model qwen2.5-coder-0.5b-instruct",
                                  "--model NAME --plans my.depth --windows 8 --json"))  # fmt: skip
@timed
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
    finish(bench.run(bench_params(options), progress, wanted), options)


@click.command("expert-count", epilog=examples(
    "expert-count", "--model moe.gguf", "--model moe.gguf --experts 6 --experts 4 --json",
    "--model moe.gguf --limit 2GiB --experts 6 --experts 4 --mass 0.7",
))  # fmt: skip
@timed
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

    params = bench_params(options)
    if limit is None:
        wanted = CountParams(n_check=n_check, budgets=budgets or None)
        finish(bench.run(params, progress, wanted), options)
        return
    timed = bench.TimeParams(
        under=ExpertsParams(limit=limit, memory=memory), n_tokens=options["tokens"],
        rules=bench.rules_of([int(n) for n in budgets], masses),
    )  # fmt: skip
    finish(bench.run_timed(params, progress, timed), options)


@click.command(epilog=examples(
    "misses", "--model moe.gguf --memory 2GiB", "--model moe.gguf --memory 2GiB --setting 0.1:0",
    "--model moe.gguf --memory 2GiB --setting 0:0:0.4",
    "--model moe.gguf --memory 2GiB --setting 0.05:0.1 --windows 8 --reps 3 --json",
))  # fmt: skip
@timed
@click.option("--memory", required=True, metavar="BYTES",
              help="Budget, such as 2GiB: too small for all experts.")  # fmt: skip
@click.option("--setting", "settings", multiple=True, metavar="SHARE:NATS[:SHARE]",
              help="drop_misses:prefer_resident:degrade_misses; may repeat.  [default: several]"
              )  # fmt: skip
@click.option("--windows", "n_windows", default=3, show_default=True, type=click.IntRange(1, 64),
              help="Windows of prose, and as many of code.")  # fmt: skip
@click.option("--window", "n_window", default=192, show_default=True, metavar="TOKENS",
              type=click.IntRange(48, 4096), help="Length of one; 32 are its prompt.")  # fmt: skip
def misses(memory: str, settings: tuple[str, ...], **options: Any) -> None:
    """Experts done without because they are not in memory: quality, bytes and time together.

    Divergence and perplexity against all experts on held-out text, with hit ratio, bytes and
    seconds per token, of --drop-misses, --prefer-resident and --degrade-misses.
    """
    from edgeroute.tools.bench import misses as bench

    params = bench_params(options)
    asked = [bench.Setting(*_setting(text)) for text in settings or MISS_SETTINGS]
    wanted = bench.MissesParams(
        memory=memory, n_windows=options["n_windows"], n_window=options["n_window"],
        settings=tuple(asked) if settings else bench.with_copies(params.path, asked),
    )  # fmt: skip
    finish(bench.run(params, progress, wanted), options)


def _setting(text: str) -> tuple[float, ...]:
    parts = text.split(":")
    try:
        if len(parts) in (2, 3):
            return tuple(map(float, parts))
    except ValueError:
        pass  # told below
    raise click.UsageError(f"--setting {text!r}: write SHARE:NATS or SHARE:NATS:SHARE, such as "
                           "0.1:0.2 or 0:0:0.4")  # fmt: skip


@click.command(epilog=examples("prune", "--model qwen2.5-coder-0.5b-instruct",
                                  "--model NAME --keep 40 --first 12 --questions 100"))  # fmt: skip
@timed
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
    finish(bench.run(bench_params(options), progress, wanted), options)


@click.command(
    epilog=examples(
        "steps",
        "--model qwen2.5-coder-1.5b-instruct --small qwen2.5-coder-0.5b-instruct",
        "--model large.gguf --small small.gguf --limit 90% --policies agree:0:48:1:0.5",
    )
)
@timed
@click.option("--small", required=True, metavar="NAME", help="The small model of the pair.")
@click.option("--policies", default="glimpse:0,glimpse:inf", show_default=True, metavar="LIST",
              help="Step policies, with commas between.")  # fmt: skip
@click.option("--limit", metavar="BYTES", help="The kernel's limit: bytes, 1GiB, or a share of "
              "the large file such as 90%.  [default: none, both in memory]")  # fmt: skip
@click.option("--memory", metavar="BYTES", help="edgeroute's own budget.  [default: 98% of the "
              "limit]")  # fmt: skip
@click.option("--questions", "n_questions", default=12, show_default=True,
              type=click.IntRange(1, 1000), help="Questions answered in a run.")  # fmt: skip
@slowed
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
    finish(bench.run(bench_params(options), progress, wanted), options)
