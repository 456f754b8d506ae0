"""Random weights of every block type, with a chosen standard deviation.

Types that the `gguf` package can quantise are rounded from normal numbers. For the others
random blocks are made directly: every bit pattern of their quants is valid, so only the
half-precision scales have to be set, and those follow from the wanted deviation.
"""

import zlib
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

# Per type: byte offset of each float16 in a block, and its value before scaling. Offsets of
# minima are chosen so that the mean is about zero. Source: ggml-common.h, block_* structs.
_SCALES: Final[dict[str, tuple[tuple[int, float], ...]]] = {
    "Q2_K": ((80, 1.0), (82, 1.5)),
    "Q3_K": ((108, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
    "IQ4_NL": ((0, 1.0),),
    "IQ4_XS": ((0, 1.0),),
}
_ROUNDED: Final = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")

WEIGHT_TYPES: Final = (*_ROUNDED, *_SCALES)


def random_vector(
    name: str, n: int, *, mean: float, std: float, seed: int
) -> npt.NDArray[np.float32]:
    """Return a norm's or bias's data, F32 [n]."""
    noise = _generator(name, seed).standard_normal(n, dtype=np.float32)
    return noise * np.float32(std) + np.float32(mean)


def random_weight(
    name: str, shape: tuple[int, ...], std: float, *, weight_type: str, seed: int
) -> npt.NDArray[np.generic]:
    """Return a matrix's data as `GGUFWriter.add_tensor` takes it.

    Args:
        name: the tensor's name.
        shape: numpy order, rows last: (n_out, n_in).
        std: standard deviation of the values.
        weight_type: one of WEIGHT_TYPES.
        seed: the model's seed.
    """
    rng = _generator(name, seed)
    if weight_type in _SCALES:
        return _random_blocks(rng, shape, std, weight_type)
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
    if weight_type == "F32":
        return values
    return quants.quantize(values, GGMLQuantizationType[weight_type])


def _generator(name: str, seed: int) -> np.random.Generator:
    """One generator per tensor, so that adding a tensor to a model changes no other."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _random_blocks(
    rng: np.random.Generator, shape: tuple[int, ...], std: float, weight_type: str
) -> npt.NDArray[np.uint8]:
    qtype = GGMLQuantizationType[weight_type]
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    n_blocks = prod(shape) // block_size
    blocks = rng.integers(0, 256, size=(n_blocks, type_size), dtype=np.uint8)
    # Where nothing is subtracted, blocks of either sign make up for a lopsided codebook.
    has_minimum = len(_SCALES[weight_type]) > 1
    signs = np.ones(n_blocks) if has_minimum else rng.choice([-1.0, 1.0], size=n_blocks)
    # Measured with small scales, so that no float16 saturates, then set for good.
    trial = signs * 2.0**-6
    _set_scales(blocks, weight_type, trial)
    measured = float(np.std(quants.dequantize(blocks, qtype)))
    _set_scales(blocks, weight_type, trial * std / measured)
    return blocks.reshape(*shape[:-1], shape[-1] // block_size * type_size)


def _set_scales(
    blocks: npt.NDArray[np.uint8], weight_type: str, factors: npt.NDArray[np.float64]
) -> None:
    """Write each block's half-precision scales, multiplied by its factor."""
    for offset, relative in _SCALES[weight_type]:
        halves = (relative * factors).astype("<f2").view(np.uint8)
        blocks[:, offset : offset + 2] = halves.reshape(-1, 2)
