"""What a profile says of a model without experts: its speed, and what of it streams."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from edgeroute.models.base import Hparams
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.profile.record import Recorded
from edgeroute.tools.profile.table import Section
from edgeroute.tools.profile.where import this_machine

FORMAT: Final = "edgeroute-profile-dense"
VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseProfile:
    """Figures of one recorded run. A layer is always followed by the next: it has no routes.

    `layers_streamed` is 0 where all weights were in memory; the head counts as a layer.
    `read_bytes_token` are bytes of layers that came from the disk, prompts' included, over all
    decoded tokens.
    """

    model: str
    arch: str
    n_layer: int
    file_bytes: int
    n_prompt_token: int
    n_decode_token: int
    budget_bytes: int
    memory_bytes: int
    threads: int
    layers_resident: int
    layers_streamed: int
    read_bytes_token: float
    stall_s: float
    decode_tok_s: float
    prefill_tok_s: float
    joules_token: float | None
    energy_source: str | None
    energy_estimated: bool | None
    machine: str
    when: str
    forecasts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain JSON types, with the format's name and version."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def dense_profile(
    path: Path, hparams: Hparams, run: Recorded, notes: tuple[str, ...]
) -> DenseProfile:
    """Sum a run's answers up."""
    layers, n = run.layers or {}, max(1, run.n_decode_token)
    return DenseProfile(
        model=path.name, arch=hparams.arch, n_layer=hparams.n_layer,
        file_bytes=path.stat().st_size, n_prompt_token=run.n_prompt_token,
        n_decode_token=run.n_decode_token, budget_bytes=run.budget_bytes,
        memory_bytes=run.memory_bytes, threads=run.threads,
        layers_resident=int(layers.get("resident", hparams.n_layer + 1)),
        layers_streamed=int(layers.get("streamed", 0)),
        read_bytes_token=run.layer_bytes / n, stall_s=float(layers.get("stall_s", 0.0)),
        decode_tok_s=run.decode_tok_s, prefill_tok_s=run.prefill_tok_s,
        joules_token=run.joules / n if run.energy_source else None,
        energy_source=run.energy_source, energy_estimated=run.energy_estimated,
        machine=this_machine(), when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        notes=notes,
    )  # fmt: skip


def sections(found: DenseProfile) -> Iterator[Section]:
    """Yield titles and rows."""
    n_unit = found.layers_resident + found.layers_streamed
    held = f"all {n_unit} layers, the head counted as one, are in memory"
    if found.layers_streamed:
        held = (f"{found.layers_streamed} of {n_unit} layers streamed (the head counts as one): "
                f"{format_bytes(round(found.read_bytes_token))} read for each decoded token, "
                f"{found.stall_s:.1f} s waited in all")  # fmt: skip
    yield found.model, [
        ("architecture", f"{found.arch}, {found.n_layer} layers, {format_bytes(found.file_bytes)}"),
        ("experts", "none: every token uses all weights, so there are no routes, no hit rates and "
                    "no policy to choose"),
        ("recorded", f"{found.n_prompt_token} tokens of prompts and {found.n_decode_token} "
                     "decoded"),
        ("memory", f"{format_bytes(found.memory_bytes)} of a budget of "
                   f"{format_bytes(found.budget_bytes)}"),
        ("layers", held),
        ("speed", f"decode {found.decode_tok_s:.1f} tok/s, prompts {found.prefill_tok_s:.0f} "
                  f"tok/s, {found.threads} thread{'' if found.threads == 1 else 's'}"),
        *_energy(found),
        ("machine", found.machine),
    ]  # fmt: skip
    if found.notes:
        yield "Notes", [("", note) for note in found.notes]


def _energy(found: DenseProfile) -> list[tuple[str, str]]:
    if found.joules_token is None:
        return []
    how = "estimated" if found.energy_estimated else "measured"
    return [("energy", f"{found.joules_token:.2f} J per decoded token, prompts included, {how} "
                       f"({found.energy_source})")]  # fmt: skip
