"""Writes depth files: plans and their stand-ins as one GGUF file, which models/ reads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from edgeroute.models.depth_file import (
    ARCH,
    KEY_DATA,
    KEY_MODEL,
    KEY_PLANS,
    KEY_VERSION,
    VERSION,
)
from edgeroute.runtime.errors import DepthFileError, UsageError
from edgeroute.skippers.plan import DepthPlan
from edgeroute.skippers.plan_json import plans_from_json, plans_to_json
from edgeroute.tools.depth_work import write_whole
from edgeroute.tools.standin_records import StandInTensor

_HEX: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthContent:
    """What a depth file holds.

    Attributes:
        model: fingerprint of the model file.
        data: sha256 of the text that plans were calibrated on.
        plans: each with a name of its own.
        tensors: stand-ins by the names in models/standins.py.
    """

    model: str
    data: str
    plans: Sequence[DepthPlan]
    tensors: Mapping[str, StandInTensor]


def write_depth_file(path: Path, content: DepthContent) -> None:
    """Write a depth file, whole or not at all.

    Raises:
        DepthFileError: two plans have one name, or differ in layers, or a hash is none.
        UsageError: it cannot be written.
    """
    text = plans_to_json(content.plans)
    if content.plans:
        plans_from_json(text, len(content.plans[0].layers))
    for what, digest in (("model", content.model), ("data", content.data)):
        if not _HEX.fullmatch(digest):
            raise DepthFileError(f"the {what} hash {digest[:80]!r} is no sha256 in hex")

    def write(part: Path) -> None:
        writer = GGUFWriter(part, ARCH)
        try:
            writer.add_uint32(KEY_VERSION, VERSION)
            writer.add_string(KEY_MODEL, content.model)
            writer.add_string(KEY_DATA, content.data)
            writer.add_string(KEY_PLANS, text)
            for name, tensor in content.tensors.items():
                _declare(writer, name, tensor.rows, tensor.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in content.tensors.values():
                writer.write_tensor_data(np.ascontiguousarray(tensor.rows))
        finally:
            writer.close()

    try:
        write_whole(path, write)
    except OSError as error:
        raise UsageError(f"the depth file {path} cannot be written: {error.strerror}; "
                         "name another place") from error  # fmt: skip


def _declare(
    writer: GGUFWriter, name: str, rows: npt.NDArray[np.generic], kind: GGMLQuantizationType
) -> None:
    """Announce a tensor by what it is stored as."""
    writer.add_tensor_info(name, rows.shape, rows.dtype, rows.nbytes, raw_dtype=kind)
