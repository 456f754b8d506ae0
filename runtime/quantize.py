"""Numbers into ggml's blocks, by ggml's own quantiser."""

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.gguf_types import GGMLType


def quantize(values: npt.NDArray[np.float32], kind: GGMLType) -> npt.NDArray[np.uint8]:
    """Quantise rows of numbers; any thread, and several at once.

    Args:
        values: F32 (n_rows, n_per_row), C-contiguous, rows of whole blocks.
        kind: a type that needs no importance matrix.

    Returns:
        U8 (n_rows, bytes of a row).

    Raises:
        ComputeError: a number is not finite, or ggml wrote other bytes than were expected.
    """
    n_rows, n_per_row = values.shape
    assert values.flags.c_contiguous and n_per_row % kind.block_size == 0
    if not np.isfinite(values).all():
        raise ComputeError(f"a weight is not finite, and {kind.name} has no place for that")
    found = np.empty((n_rows, kind.row_size(n_per_row)), np.uint8)
    n = ggml().ggml_quantize_chunk(
        kind, values.ctypes.data, found.ctypes.data, 0, n_rows, n_per_row, None
    )
    if n != found.nbytes:
        raise ComputeError(f"ggml wrote {n} bytes of {kind.name}, not {found.nbytes}")
    return found
