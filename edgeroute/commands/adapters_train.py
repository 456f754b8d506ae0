"""`edgeroute adapters train`: a LoRA adapter from a JSONL of prompts and completions."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeroute.commands.progress import steps_on_stderr
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from edgeroute.tools.adapter_train import TrainReport, TrainStep

_EPILOG = """\b
Examples:
  edgeroute adapters train smollm2-135m-instruct robot.jsonl --out loras/robot
  edgeroute adapters train q05.gguf sql.jsonl --out loras/sql --rank 16 --targets q,k,v,o
  edgeroute adapters train m.gguf data.jsonl --out loras/data --steps 500 --seed 7 --json

\b
A line of the JSONL:
  {"prompt": "Roman numeral: 14", "completion": "XIV"}
"""

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.argument("data", type=_FILE)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist."
)
@click.option("--rank", default=8, show_default=True, type=click.IntRange(1, 1024))
@click.option("--alpha", type=float, help="Scale times rank.  [default: twice the rank]")
@click.option(
    "--targets",
    default="q,v",
    show_default=True,
    help="Parts of every layer that are adapted, of q,k,v,o,gate,up,down.",
)
@click.option("--steps", "n_steps", default=200, show_default=True, type=click.IntRange(1))
@click.option(
    "--batch", "n_batch", default=8, show_default=True, help="Examples of a step.",
    type=click.IntRange(1, 4096),
)  # fmt: skip
@click.option("--lr", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option(
    "--warmup",
    "n_warmup",
    type=click.IntRange(0),
    help="Steps until the peak.  [default: a twentieth of all]",
)
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option(
    "--stop", "stop_nats", default=0.0, help="End early once ten steps' mean loss is below this."
)
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option(
    "--hold-out",
    "n_held_out",
    default=32,
    show_default=True,
    type=click.IntRange(0),
    help="Examples kept apart to judge the result.",
)
@click.option(
    "--raw", is_flag=True, help="Prompts are plain text, not messages in the chat template."
)
@click.option(
    "--max-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(2, 1 << 16),
    help="The longest example taken; a longer one is refused, never cut.",
)
@click.option(
    "--base-type",
    "dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "f32", "bf16"]),
    help="Type of the base's weights while training; auto is what this processor multiplies.",
)
@click.option(
    "--type", "store", default="f16", show_default=True, type=click.Choice(["f16", "f32"]),
    help="Type of the written weights.",
)  # fmt: skip
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 512))
@click.option("--license", help="For the model card.  [default: the base's]")
@click.option("--about", help="What the adapter does, for the model card.")
@click.option("--base-name", help="MODEL as owner/name, for PEFT.  [default: what the file says]")
@click.option("--force", "replace", is_flag=True, help="Replace an adapter that is in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def train(model: str, data: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Train a LoRA adapter for MODEL on DATA, a JSONL of prompts and completions.

    MODEL is a path or a catalogue name of a llama or qwen2 file. Only the completions are
    learned, and to end after them. OUT becomes a folder that edgeroute and Hugging Face PEFT
    load. The same seed and number of threads give the same adapter on the same machine. Needs
    torch: pip install edgeroute[train].
    """
    from edgeroute.models.pull import resolve
    from edgeroute.tools import adapter_train

    path = resolve(model)
    params = adapter_train.TrainParams(**_settle(options, path))
    with _progress_on_stderr() as progress:
        report = adapter_train.train(path, data, out, params, progress)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    _show(report)


def _settle(options: dict[str, Any], model: Path) -> dict[str, Any]:
    """Turn what was given into the fields of TrainParams."""
    from edgeroute.runtime.gguf import GGUFFile

    settled = dict(options)
    if settled["alpha"] is None:
        settled["alpha"] = 2.0 * settled["rank"]
    if settled["n_warmup"] is None:
        settled["n_warmup"] = settled["n_steps"] // 20
    settled["targets"] = tuple(name.strip() for name in settled["targets"].split(","))
    raw = settled.pop("raw")
    with GGUFFile.open(model) as file:
        has_template = bool(file.metadata.get_str("tokenizer.chat_template", None))
    return settled | {"chat": has_template and not raw}


def _show(report: "TrainReport") -> None:
    first, last = report.losses[0], report.losses[-1]
    click.echo(
        f"{report.out}: {report.n_params} values, {format_bytes(report.n_bytes)}, "
        f"trained on {report.n_learned} examples in {report.seconds:.0f} s"
    )
    click.echo(f"loss of a step: {first:.3f} nats first, {last:.3f} last")
    if report.base is not None and report.adapter is not None:
        click.echo(
            f"on {report.n_held_out} examples kept apart: {report.base.nats:.3f} nats by the base, "
            f"{report.adapter.nats:.3f} with the adapter; exactly right "
            f"{100 * report.base.accuracy:.0f} % and {100 * report.adapter.accuracy:.0f} %"
        )


@contextmanager
def _progress_on_stderr() -> "Iterator[Callable[[TrainStep], None]]":
    """A callback for `train`: its phases, and the loss while training."""
    with steps_on_stderr() as report:

        def tell(step: "TrainStep") -> None:
            note = "" if step.loss is None else f", loss {step.loss:.3f}"
            report(step.phase, step.n_done, step.n_total, note)

        yield tell
