"""`edgeroute doctor`: what this machine is, measured, and what is missing."""

import json
from typing import Any

import click

from edgeroute.cli import EXIT_REFUSED
from edgeroute.commands.doctor_device_rows import device_rows
from edgeroute.commands.doctor_table import Row, show
from edgeroute.runtime.units import format_bytes

_EPILOG = """\b
Examples:
  edgeroute doctor
  edgeroute doctor --no-measure
  edgeroute doctor --device orin-nano-8gb-super
  edgeroute doctor --rpc 192.168.1.20:50052 --rpc 192.168.1.21:50052
  edgeroute doctor --prove smollm2-135m-instruct --rpc 192.168.1.20:50052
  edgeroute doctor --json
"""
_CACHE_NOTES = {
    "bypassed": "past the page cache",
    "dropped": "page cache dropped first",
    "possible": "perhaps from the page cache: this system cannot bypass it",
}


@click.command(epilog=_EPILOG)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Measure disk, memory and every device (a few seconds, at most 256 MiB read).",
)
@click.option(
    "--rpc",
    metavar="HOST:PORT",
    multiple=True,
    help="Look at a device of another machine too; more than once for several.",
)
@click.option(
    "--prove",
    metavar="MODEL",
    help="Only compare the answers of every GPU here, and of every --rpc, with the processor's, "
    "on the first layers of this model, and remember what came out.",
)
@click.option("--kv-type", metavar="TYPE", help="Of --prove: how keys and values are kept.")
@click.option(
    "--device",
    metavar="NAME",
    help="Compare with this device's profile (or FILE.toml), not with that of the board here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, **given: Any) -> None:
    """Measure this machine, check the ggml build, and say what is missing.

    Compares what was measured with earlier runs here and with the profile of such a device, and
    names what is throttled. Whatever could not be found out is shown as failed, with its reason.
    Ends with code 3 when ggml cannot be used here, so that no model would run, or when a device
    does not answer like the processor.
    """
    if given["prove"] is not None:
        return _prove(ctx, given, as_json=as_json)
    _look(ctx, given, as_json=as_json)


def _look(ctx: click.Context, given: dict[str, Any], *, as_json: bool) -> None:
    from edgeroute.commands.doctor_compare import compare
    from edgeroute.commands.doctor_facts import gather
    from edgeroute.runtime.board import board
    from edgeroute.tools.forecast.devices import find_device

    profile = None if given["device"] is None else find_device(given["device"])
    before = board()
    facts = gather(measured=given["measure"], rpc=given["rpc"])
    facts |= compare(facts, (before, board()), profile)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        _print(facts)
    if "error" in facts["ggml"]:
        ctx.exit(EXIT_REFUSED)


def _prove(ctx: click.Context, given: dict[str, Any], *, as_json: bool) -> None:
    """Compare devices with the processor on one model."""
    from edgeroute.commands.doctor_prove import proof_rows, prove_devices
    from edgeroute.commands.generate_shared import pick

    found = prove_devices(given["prove"], given["rpc"], pick(given, ("kv_type",)))
    if as_json:
        click.echo(json.dumps({"proofs": found}))
    else:
        show("Devices against the processor", proof_rows(found))
    if not all(each.get("holds") for each in found):
        ctx.exit(EXIT_REFUSED)


def _print(facts: dict[str, Any]) -> None:
    about = facts["edgeroute"]
    show("Machine", [
        ("edgeroute", f"{about['version']} on Python {about['python']}"),
        *_system(facts), *_section(facts, "cpu", _cpu), *_section(facts, "memory", _memory),
    ])  # fmt: skip
    show("Bandwidth", [
        *_section(facts, "memory_bandwidth", _memory_bandwidth),
        *_section(facts, "disk_bandwidth", _disk_bandwidth),
    ])  # fmt: skip
    show("Compared", _compared(facts))
    show("ggml", [*_section(facts, "ggml", _ggml), *_section(facts, "build", _build)])
    show("Devices", _section(facts, "devices", device_rows))
    show("Models", _section(facts, "models", _models))
    rows = [(each["what"], f"{each['why']}\n{each['command']}") for each in facts["missing"]]
    show("Missing", _plain_lines(rows) or [("nothing", "")])


def _compared(facts: dict[str, Any]) -> list[Row]:
    """What is throttled, each with its remedy; or that nothing is."""
    found, about = facts["findings"], facts["comparison"]
    board = facts["board"]
    mode = f", power mode {board['power_mode']}" if board["power_mode"] else ""
    rows = [("board", f"{board['model']} ({board['kind']}{mode})")]
    if about["device"]:
        rows.append(("profile", about["device"]))
    rows += _plain_lines([(each["what"], f"{each['why']}\n{each['remedy']}") for each in found])
    if not found:
        n_known = sum(each["ratio"] is not None for each in about["figures"].values())
        earlier = f"{n_known} figures are as usual" if n_known else "no earlier figures yet"
        rows.append(("throttled", f"nothing is known to be ({earlier})"))
    return rows


def _plain_lines(rows: list[Row]) -> list[Row]:
    """Give the second line of a value a row of its own."""
    lines: list[Row] = []
    for name, value in rows:
        first, _, rest = value.partition("\n")
        lines += [(name, first), ("", rest)]
    return lines


def _section(facts: dict[str, Any], name: str, rows: Any) -> list[Row]:
    """Rows of a section, or the reason why there are none."""
    section = facts.get(name)
    if section is None:
        return []
    if "error" in section:
        return [(name.replace("_", " "), f"failed: {section['error']}")]
    found: list[Row] = rows(section)
    return found


def _system(facts: dict[str, Any]) -> list[Row]:
    def rows(section: dict[str, Any]) -> list[Row]:
        found = [("system", f"{section['os']} ({section['machine']})")]
        return [*found, ("board", section["board"])] if section["board"] else found

    return _section(facts, "system", rows)


def _cpu(cpu: dict[str, Any]) -> list[Row]:
    quota = f", quota of {cpu['quota']:g} cores" if cpu["quota"] else ""
    return [
        ("cores", f"{cpu['logical']} logical, {cpu['physical'] or '?'} physical{quota}"),
        ("usable cores", f"{cpu['usable']} (limit: {cpu['usable_because']})"),
        ("busy with others", f"{cpu['others_busy']:.1f} cores"),
    ]


def _memory(memory: dict[str, Any]) -> list[Row]:
    total, free = memory["total_bytes"], memory["available_bytes"]
    swap = "none"
    if memory["swap_total_bytes"]:
        used, size = memory["swap_used_bytes"], memory["swap_total_bytes"]
        swap = f"{format_bytes(size)}, {format_bytes(used)} used"
    return [
        ("memory", f"{format_bytes(free)} available of {format_bytes(total)}"),
        ("memory limit", memory["limit"]),
        ("swap", swap),
    ]


def _memory_bandwidth(found: dict[str, Any]) -> list[Row]:
    read, copy = _rate(found["read_bytes_s"]), _rate(found["copy_bytes_s"])
    return [("memory", f"read {read}, copy {copy}, by {found['n_threads']} threads")]


def _disk_bandwidth(found: dict[str, Any]) -> list[Row]:
    block = format_bytes(found["block_bytes"])
    return [
        (f"disk, depth {depth}", f"read {_rate(run['bytes_s'])} in blocks of {block}, "
                                 f"{format_bytes(run['n_bytes'])} of {found['file']}")
        for depth, run in found["by_queue_depth"].items()
    ] + [("disk cache", _CACHE_NOTES[found["cache"]])]  # fmt: skip


def _rate(bytes_s: float) -> str:
    return f"{format_bytes(bytes_s)}/s"


def _ggml(ggml: dict[str, Any]) -> list[Row]:
    rows = [
        ("version", f"{ggml['version']} in llama-cpp-python {ggml['llama_cpp_python'] or '?'}"),
        ("folder", ggml["folder"]),
    ]
    return [*rows, ("CPU buffer types", ", ".join(ggml["buffer_types"]))]


def _build(build: dict[str, Any]) -> list[Row]:
    return [
        ("build uses", " ".join(build["features"]) or "no CPU features"),
        ("RPC", "yes" if build["rpc"] else "no"),
    ]


def _models(models: dict[str, Any]) -> list[Row]:
    free, total = models["disk_free_bytes"], models["disk_total_bytes"]
    rows = [
        ("folder", models["folder"]),
        ("disk", f"{format_bytes(free)} free of {format_bytes(total)}"),
    ]
    installed = models["installed"] or [{"name": "none installed", "n_bytes": 0}]
    return rows + [(each["name"], format_bytes(each["n_bytes"])) for each in installed]
