"""`edgeroute convert moe`: a dense model refactored into a mixture of experts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeroute.commands.progress import steps_on_stderr
from edgeroute.runtime.errors import LibraryError
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.tools.convert.moe import MoeReport

_EPILOG = """\b
Examples:
  edgeroute convert moe smollm2.gguf smollm2-moe.gguf
  edgeroute convert moe qwen.gguf qwen-moe.gguf --experts 66 --shared 640 --used 33
  edgeroute convert moe m.gguf out.gguf --text notes.txt --text manual.md --tokens 40000 --json
"""

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=_EPILOG)
@click.argument("dense")
@click.argument("out", type=_FILE)
@click.option(
    "--experts",
    "n_expert",
    type=click.IntRange(2, 1024),
    help="Routed experts of a layer; default: at most 80, of 32 neurons or a double.",
)
@click.option(
    "--shared",
    "n_shared",
    type=click.IntRange(1),
    help="Neurons that always run; default: about an eighth.",
)
@click.option(
    "--used",
    "n_used",
    type=click.IntRange(1),
    help="Experts that run for a token; default: half of them.",
)
@click.option(
    "--tokens",
    "n_tokens",
    default=20480,
    show_default=True,
    type=click.IntRange(1024, 1 << 20),
    help="Calibration tokens.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=_FILE,
    help="A file of calibration text; repeat for more. Default: the documentation and "
    "the standard library of this Python.",
)
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option(
    "--refit/--no-refit",
    "repair",
    default=None,
    help="Repair the down projections for the routing; default: if at most half of "
    "the experts run.",
)
@click.option(
    "--type",
    "weight_type",
    default="q8_0",
    show_default=True,
    type=click.Choice(["q8_0", "f16", "f32"]),
    help="What experts are stored as.",
)
@click.option("--force", "replace", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def command(dense: str, out: Path, as_json: bool, **options: Any) -> None:
    """Refactor the DENSE llama or qwen2 model into a mixture of experts, the file OUT.

    DENSE is a path or a catalogue name. The neurons of each layer become one shared and many
    routed experts with a gate that chooses per token. Nothing is trained: it takes minutes
    for a small model. Fewer experts per token are less work and worse text; the perplexity
    of both files on text that was kept apart is printed. llama.cpp loads OUT as a qwen2moe
    model.
    """
    from edgeroute.models.pull import resolve

    try:
        from edgeroute.tools.convert.moe import MoeParams, convert
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise LibraryError(
            "`convert` writes files with the gguf package, which is missing; "
            "install edgeroute[tools]"
        ) from error
    with steps_on_stderr() as progress:
        report = convert(resolve(dense), out, MoeParams(**options), progress)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    _show(report)


def _show(report: "MoeReport") -> None:
    shape, quality, found = report.shape, report.quality, report.to_dict()
    click.echo(
        f"{report.out}: {format_bytes(report.n_bytes)}, {shape.n_layer} layers of "
        f"{shape.n_ff_shexp} shared neurons and {shape.n_expert} experts of {shape.n_ff_exp}, "
        f"{shape.n_expert_used} of them run"
        f"{', down projections refitted' if report.repaired else ''}"
    )
    click.echo(
        f"perplexity on {quality.n_tokens} tokens kept apart: {found['ppl_dense']:.2f} dense, "
        f"{found['ppl_moe']:.2f} now ({quality.nats_moe - quality.nats_dense:+.3f} nats)"
    )
    click.echo(
        f"fitted to {report.n_fitted} tokens in {report.seconds:.0f} s; the gate finds "
        f"{100 * quality.recall_ratio:.0f} % of the experts that matter most"
    )
