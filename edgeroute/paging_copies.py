"""Copies of experts in fewer bits, as settings ask: found, checked, and given room of their own."""

import contextlib
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from edgeroute.offload.disk import DiskFile
from edgeroute.offload.expert_copies import COPIES_FILE
from edgeroute.offload.expert_pool import ExpertLayer, PoolPlan, plan_pools
from edgeroute.offload.sidecar import COPIES, Sidecar, read_sidecar, sidecar_path
from edgeroute.offload.throttle import ThrottledDisk, throttled
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile

COPIES_RATIO: Final = 0.125
"""Share of the bytes for experts that copies get: they serve the misses that weigh least."""


def copies_bytes(left: int, one: int, least: int) -> tuple[int, int]:
    """Return the bytes that copies get, and those that they get of the smallest legal budget.

    Args:
        left: bytes for experts and copies.
        one: of an expert's slot in every pool; a copy takes less.
        least: of the experts that one token uses in a layer.
    """
    smallest = max(one, math.ceil(least / (1 - COPIES_RATIO)) - least)
    return max(one, int(COPIES_RATIO * left)), smallest


class CopiesFile(NamedTuple):
    """The open file that copies are read from, and the plans of their pools."""

    disk: DiskFile | ThrottledDisk
    pools: Sequence[PoolPlan]


def open_copies(
    own: contextlib.ExitStack, file: GGUFFile, layers: Sequence[ExpertLayer], *, direct: bool
) -> CopiesFile:
    """Open what `edgeroute convert copies` wrote beside a model; `own` closes it.

    Raises:
        UsageError: there is none.
        ModelFileError: it cannot be used with this model.
    """
    path = sidecar_path(file.path, COPIES)
    if not path.exists():
        raise UsageError(f"degrade_misses needs copies of the experts, and there is no {path}; "
                         f"write it with `{COPIES.command} {file.path.name}`")  # fmt: skip
    disk = throttled(DiskFile.open(path, direct=direct))
    own.callback(disk.close)
    with DiskFile.open(file.path) as model:
        sidecar = read_sidecar(disk, model, file, COPIES)
    return CopiesFile(disk, copied_pools(layers, sidecar))


def copied_pools(layers: Sequence[ExpertLayer], sidecar: Sidecar) -> list[PoolPlan]:
    """Group layers by the shapes and types of their experts' copies.

    Raises:
        ModelFileError: some have none.
    """
    moved = [ExpertLayer(il, sidecar.moved(il, infos)) for il, infos in layers]
    return plan_pools(moved, sidecar.header.n_expert, sidecar, COPIES_FILE)
