"""One sequence: its tokens, how many are in the cache, and in which way they were computed.

ggml's CPU kernels give other last bits for other shapes of batch: attention over fewer
than 64 queries takes another path than over more, and rows beyond a multiple of four take
another path in repacked products. A cell's class records the paths its row took, so that a
prefix is reused where a fresh run would have computed the same bits.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.cells import Region

FA_TILE = 64  # Source: ggml-cpu/common.h, GGML_FA_TILE_Q
GEMM_ROWS = 4  # Source: ggml-cpu/repack.cpp, rows of one interleaved product

CLASS_TILED, CLASS_GROUPED, CLASS_SINGLE = 1, 2, 4
CLASS_WIDE = CLASS_TILED | CLASS_GROUPED
"""The only class whose bits do not depend on how large its batch was: narrow batches meet
other tile shapes in every product (seen on Qwen2.5-Coder-0.5B, not on SmolLM2)."""

Classes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Sequence:
    """Tokens of one conversation or prompt. `n_past` of them have cells in `region`."""

    tokens: list[int]
    region: Region
    n_past: int = 0
    classes: bytearray = field(default_factory=bytearray)
    adapter: str | None = None


def chunk_classes(n_tokens: int) -> Classes:
    """Classes of the rows of one prefill batch: uint8 (n_tokens,)."""
    if n_tokens == 1:
        return np.full(1, CLASS_SINGLE, np.uint8)
    found = np.full(n_tokens, CLASS_TILED if n_tokens >= FA_TILE else 0, np.uint8)
    found[: n_tokens - n_tokens % GEMM_ROWS] |= CLASS_GROUPED
    return found


def prefill_classes(n_tokens: int, n_ubatch: int, start: int = 0) -> Classes:
    """Classes of cells `start` to `n_tokens` when prefill begins at `start`.

    Batches end at multiples of `n_ubatch`, wherever they begin.
    """
    parts = [np.empty(0, np.uint8)]
    while start < n_tokens:
        end = next_chunk_end(start, n_tokens, n_ubatch)
        parts.append(chunk_classes(end - start))
        start = end
    return np.concatenate(parts)


def next_chunk_end(start: int, n_tokens: int, n_ubatch: int) -> int:
    """Where the prefill batch that begins at `start` ends."""
    return min(n_tokens, (start // n_ubatch + 1) * n_ubatch)


def common_prefix(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> int:
    """Count the equal leading elements."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def exact_reuse(n_common: int, classes: Classes, n_tokens: int, n_ubatch: int) -> int:
    """Shorten a common prefix to what leaves a fresh run's bits unchanged.

    Args:
        n_common: leading tokens that agree.
        classes: how the stored cells were computed.
        n_tokens: length of the new prompt.
        n_ubatch: prefill batch.

    Returns:
        Cells to reuse, below `n_tokens`: each was computed as a fresh prefill would, and
        the rest of the prefill will be too.
    """
    fresh = prefill_classes(n_tokens, n_ubatch)
    n_common = min(n_common, n_tokens - 1)
    good = (classes[:n_common] == fresh[:n_common]) & (classes[:n_common] == CLASS_WIDE)
    wrong = np.flatnonzero(~good)
    n_same = int(wrong[0]) if len(wrong) else n_common
    reuse = n_same - n_same % GEMM_ROWS
    chunk = reuse // n_ubatch * n_ubatch
    end = next_chunk_end(chunk, n_tokens, n_ubatch)
    start = min(reuse, (end - FA_TILE) // GEMM_ROWS * GEMM_ROWS)
    return max(start, chunk)
