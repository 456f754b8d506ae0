"""The benchmark of experts over three tiers and a slow link."""

from typing import Any

import click

from edgeroute.commands.bench_shared import bench_params, examples, finish, progress, timed


@click.command(epilog=examples("tiers", "--model moe.gguf --link 100MB",
                               "--model moe.gguf --link 1GB --policy all"))  # fmt: skip
@timed
@click.option("--link", "links", multiple=True, default=("1GB", "100MB"), show_default=True,
              metavar="BYTES", help="Bytes a second of the link; may repeat.")  # fmt: skip
@click.option("--dram", default="25%", show_default=True, metavar="PERCENT",
              help="Slots in DRAM, as a share of the experts.")  # fmt: skip
@click.option("--device", default="10%", show_default=True, metavar="PERCENT",
              help="Slots on the device, as a share of the experts.")  # fmt: skip
@click.option("--policy", metavar="NAMES|all",
              help="Eviction policies to count hits under, one after the other.")  # fmt: skip
@click.option("--tokens", default=24, show_default=True, type=click.IntRange(8, 4096),
              help="Tokens to decode in one run.")  # fmt: skip
@click.option("--warm", "n_warm", default=128, show_default=True,
              type=click.IntRange(8, 65536), help="Tokens in which `auto` learns.")  # fmt: skip
@click.option("--target", default=1.05, show_default=True, type=click.FloatRange(1),
              help="Demanded: time of `auto` over the better fixed choice's.")  # fmt: skip
def tiers(
    links: tuple[str, ...], dram: str, device: str, policy: str | None, **options: Any
) -> None:
    """Experts from disk over DRAM to a device, whose link is slowed: who computes its misses.

    The device is a process on this machine behind ggml's RPC. Misses are uploaded (off),
    computed by the processor (on), or one or the other as it has measured (auto), in turn.
    """
    from edgeroute.runtime.units import parse_bytes
    from edgeroute.tools.bench import tiers as bench

    wanted = bench.TiersParams(
        links_bytes_s=tuple(parse_bytes(link) for link in links),
        dram_ratio=bench.parse_share(dram), device_ratio=bench.parse_share(device),
        policies=bench.parse_policies(policy), n_warm=options["n_warm"],
        most_ratio=options["target"],
    )  # fmt: skip
    finish(bench.run(bench_params(options), progress, wanted), options)
