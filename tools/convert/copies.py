"""Copies of a model's experts in fewer bits, beside it: what a miss of little weight may read.

Source: HOBBIT (arXiv 2411.01433). Each slice is dequantised and quantised anew by ggml's own
quantiser, without an importance matrix.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

from edgeroute.offload.disk import read_range
from edgeroute.offload.sidecar import COPIES, COPY_TYPES, Part, copy_bytes
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import TensorInfo
from edgeroute.runtime.gguf_types import GGMLType
from edgeroute.runtime.quantize import quantize
from edgeroute.tools.convert.pack import (
    Layout,
    PackReport,
    Progress,
    Slice,
    expert_layers,
    opened,
    write_sidecar,
)

MOST_RATIO: Final = 0.6
"""Bytes of a copy over those of the original, at most, where no type is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What was written: `types` of the parts, and `ratio` their bytes over the experts' own."""

    pack: PackReport
    types: tuple[str, ...]
    ratio: float


def write_copies(
    model: Path, *, kind: GGMLType | None = None, replace: bool = False, n_threads: int = 2,
    progress: Progress | None = None,
) -> CopyReport:  # fmt: skip
    """Write copies of a model's experts, beside it.

    Args:
        model: a GGUF file.
        kind: their type; None is the best of `MOST_RATIO` of the bytes, for each tensor.
        replace: whether copies that exist may be replaced.
        n_threads: threads that quantise.
        progress: called in this thread after each page.

    Raises:
        ModelFileError: the file cannot be read, or was changed meanwhile.
        UsageError: it has no experts, none of its types can be made smaller, or the copies exist.
        CapacityError: the disk has no room.
        ComputeError: a weight is not finite.
    """
    with opened(model) as (disk, file), ThreadPoolExecutor(n_threads) as threads:
        layers = expert_layers(file)
        chosen = {info.name: copy_type(info, kind) for infos in layers.values() for info in infos}

        def slice_of(info: TensorInfo, n_expert: int) -> Slice:
            found = copy_bytes(info, chosen[info.name])
            assert found is not None
            return chosen[info.name].name, found

        def make(part: Part, expert: int) -> bytes:
            info = file.tensors[part.tensor]
            nbytes = info.nbytes // info.ne[2]
            data = read_range(disk, info.offset + expert * nbytes, nbytes)
            rows = np.frombuffer(data, np.uint8).reshape(info.ne[1], -1)
            blocks = np.array_split(rows, n_threads)
            return b"".join(threads.map(lambda some: _copied(some, info, part.type), blocks))

        layout = Layout(COPIES, layers, slice_of)
        report = write_sidecar((disk, file), layout, make, replace=replace, progress=progress)
        before = sum(info.nbytes for infos in layers.values() for info in infos)
    return CopyReport(pack=report, types=tuple(sorted({each.name for each in chosen.values()})),
                      ratio=report.n_bytes / before)  # fmt: skip


def copy_type(info: TensorInfo, asked: GGMLType | None) -> GGMLType:
    """Choose the type of a tensor's copies.

    Raises:
        UsageError: none of the types is smaller, or not the one that is asked for.
    """
    own = info.nbytes // info.ne[2]
    most = MOST_RATIO * own if asked is None else own - 1
    for kind in COPY_TYPES if asked is None else (asked,):
        nbytes = copy_bytes(info, kind)
        if nbytes is not None and nbytes <= most:
            return kind
    wanted = "no type has copies of" if asked is None else f"{asked.name} has no copies of"
    raise UsageError(
        f"{wanted} {info.name}, {info.type.name} in rows of {info.ne[0]}, that are whole blocks "
        f"and at most {most / own:.0%} of its bytes; "
        + ("name one with --type" if asked is None else "name another --type, or none")
    )


def _copied(rows: npt.NDArray[np.uint8], info: TensorInfo, kind: str) -> bytes:
    """Turn rows of a tensor into rows of another type."""
    values = quants.dequantize(rows, GGMLQuantizationType(int(info.type)))
    flat = np.ascontiguousarray(values, np.float32).reshape(len(rows), info.ne[0])
    return quantize(flat, GGMLType[kind]).tobytes()
