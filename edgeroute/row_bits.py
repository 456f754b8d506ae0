"""What may be computed in one pass without changing bits, by the kernels of a model's weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from edgeroute.memory_plan import MAX_BATCH
from edgeroute.runtime.gguf_types import GGMLType
from edgeroute.runtime.plain_weights import TILED, WIDE_FROM
from edgeroute.runtime.sequence import GEMM_ROWS

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel

TILED_MIN: Final = 8
"""Rows from which on ggml computes plain weights of K- and I-types in tiles, with other bits.
Source: ggml-cpu/tiled/tiled.cpp, ggml_tiled_min_batch."""
FLOATS: Final = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})
"""Types whose products with two rows ggml tiles. Source: ggml-cpu/llamafile."""


class Rows(NamedTuple):
    """When a row of a product has the bits that it has among another number of rows.

    Attributes:
        group: rows are computed by so many, and what is left over one by one.
        tiled: from so many rows on another kernel computes all of them; 0 where none does.
        mixed: the bits of one depend on all.
    """

    group: int = 1
    tiled: int = 0
    mixed: bool = False

    @property
    def max_single(self) -> int:
        """Rows of as many sequences that are computed as each alone would be, at most."""
        if self.mixed:
            return 1
        ends = [n - 1 for n in (self.group, self.tiled) if n > 1]
        return min([MAX_BATCH, *ends])

    def keep(self, widths: Sequence[int]) -> bool:
        """Whether batches of so many rows have the bits of each alone, one behind another."""
        if len(widths) == 1:
            return True
        if self.mixed or min(widths) < self.tiled:
            return False
        return all(n % self.group == 0 for n in widths[:-1])


def rows_of(loaded: "LoadedModel") -> Rows:
    """Return what the bits of a row depend on in a model's products.

    Routers of experts are left out: their models promise less, see README.
    """
    tensors, repacked = loaded.file.tensors, loaded.plan.weights.repacked
    types = set[int]()
    for spec in loaded.model.specs():
        info = tensors.get(spec.source or spec.name)
        matrix = spec.use == "mul_mat" and len(spec.ne) == 2 and "ffn_gate_inp" not in spec.name
        if matrix and info is not None and spec.name not in repacked:
            types.add(info.type)
    return Rows(
        group=GEMM_ROWS if repacked else 1,
        tiled=TILED_MIN if types & TILED else 0,
        mixed=bool(types & FLOATS),
    )


def beside_prompts(loaded: "LoadedModel") -> Rows:
    """Return what prompts in one pass go by: their bits, or speed where `max_batch` asks for it.

    With experts, where the kernel of a row depends on how many chose its expert, any does.
    """
    asked, moe = loaded.params.max_batch, loaded.model.hparams.moe
    if asked is not None and asked > (1 if moe else loaded.max_batch):
        return Rows()
    if moe:
        return Rows(mixed=True)
    if loaded.forward.plain is None:
        return loaded.rows
    weights = loaded.plan.weights
    group = 1 if weights.plain == weights.repacked else loaded.rows.group
    return loaded.rows._replace(group=group, tiled=WIDE_FROM)
