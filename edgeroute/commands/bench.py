"""`edgeroute bench`: speeds on this machine, as ratios against another way."""

import click

from edgeroute.commands import (
    bench_levers,
    bench_lossy,
    bench_paged,
    bench_serve,
    bench_speed,
    bench_tiers,
)

_EPILOG = """\b
Examples:
  edgeroute bench levers moe.gguf --memory 2GiB
  edgeroute bench forecast --model moe.gguf --budgets 25%,60%
  edgeroute bench decode
  edgeroute bench prefill --model qwen2.5-coder-0.5b-instruct --reps 9
  edgeroute bench contention --reps 5 --seconds 4 --json
  edgeroute bench experts --model moe.gguf --limit 2GiB
  edgeroute bench prefetch --model moe.gguf --limit 2GiB --limit 1GiB
  edgeroute bench layers --model qwen2.5-coder-1.5b-instruct
  edgeroute bench tiers --model moe.gguf --link 100MB
  edgeroute bench speculate --model qwen2.5-coder-1.5b-instruct
  edgeroute bench adapters --model qwen2.5-coder-1.5b-instruct
  edgeroute bench expert-count --model moe.gguf
  edgeroute bench misses --model moe.gguf --memory 2GiB
  edgeroute bench depth --model qwen2.5-coder-0.5b-instruct
  edgeroute bench prune --model qwen2.5-coder-0.5b-instruct
  edgeroute bench serve --part load --seconds 60
  edgeroute bench parity --model gemma3-270m --nmse
"""


@click.group(epilog=_EPILOG)
def command() -> None:
    """Measure edgeroute on this machine, against llama.cpp or against itself, in turn.

    Every speed is the ratio of two medians over alternating runs, with quartiles, and says
    how many runs were disturbed by other programs. Targets are printed as met or missed.
    """


for _each in (
    bench_levers.levers, bench_levers.forecast, bench_speed.decode, bench_speed.prefill,
    bench_speed.load, bench_speed.batch, bench_speed.contention,
    bench_paged.experts, bench_paged.layers, bench_paged.speculate, bench_paged.replay,
    bench_paged.prefetch,
    bench_lossy.adapters, bench_lossy.depth, bench_lossy.expert_count, bench_lossy.misses,
    bench_lossy.prune, bench_lossy.steps, bench_serve.serve, bench_speed.parity, bench_tiers.tiers,
):  # fmt: skip
    command.add_command(_each)
