"""Tensors put together from random pieces of rows: as fast as copying, in any block type."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edgeroute.tools.synth_weights import random_weight

_POOL_ROWS: Final = 1024
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Columns or rows of a matrix whose values have one scale.

    `alike` columns are the same in all rows, and in all tensors of one scale and type.
    """

    width: int
    std: float = 1.0
    alike: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MosaicTensor:
    """One tensor to be written: a mosaic of `outs` x `columns`, or ready data.

    `outs` repeats `n_expert` times; `zeroed` are rows of zeros.
    """

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    seed: int
    outs: tuple[Region, ...] = ()
    columns: tuple[Region, ...] = ()
    ready: npt.NDArray[np.float32] | None = None
    zeroed: tuple[int, ...] = ()

    @property
    def is_expert(self) -> bool:
        return len(self.shape) == 3

    @property
    def nbytes(self) -> int:
        block_size, type_size = GGML_QUANT_SIZES[self.qtype]
        return int(np.prod(self.shape, dtype=np.int64)) // block_size * type_size

    def rows(self) -> Iterator[npt.NDArray[np.generic]]:
        """Yield the tensor's bytes in file order, an expert (or a whole matrix) at a time."""
        if self.ready is not None:
            yield self.ready
            return
        rng = generator(self.name, self.seed)
        pools: dict[tuple[int, float], Bytes] = {}
        for _ in range(self.shape[0] if self.is_expert else 1):
            for out in self.outs:
                made = self._mosaic(rng, pools, out)
                if self.zeroed:
                    made[list(self.zeroed)] = 0
                yield made

    def _mosaic(
        self, rng: np.random.Generator, pools: dict[tuple[int, float], Bytes], out: Region
    ) -> Bytes:
        pieces = []
        for column in self.columns:
            width, std = column.width, column.std * out.std
            if column.alike:
                one = self._random("alike", 1, width, std)
                pieces.append(np.broadcast_to(one, (out.width, one.size)))
                continue
            if (width, std) not in pools:
                pools[width, std] = self._random(self.name, _POOL_ROWS, width, std)
            pieces.append(pools[width, std][rng.integers(0, _POOL_ROWS, out.width)])
        return np.concatenate(pieces, axis=1)

    def _random(self, name: str, n_rows: int, width: int, std: float) -> Bytes:
        """Return pieces of rows, uint8 (n_rows, bytes of `width` columns)."""
        data = random_weight(f"{name} {width} {std:.6g}", (n_rows, width), std,
                             weight_type=self.qtype.name, seed=self.seed)  # fmt: skip
        return data.view(np.uint8).reshape(n_rows, -1)


def generator(name: str, seed: int) -> np.random.Generator:
    """Return a generator per tensor, so that adding a tensor to a model changes no other."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
