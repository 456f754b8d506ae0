"""The ceiling of decoding: the bytes a token needs over what memory delivers."""

from pathlib import Path

from edgeroute.config import RunParams
from edgeroute.loaded import kv_shape
from edgeroute.models.registry import describe
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.measure import memory_bandwidth


def bytes_per_token(path: Path, n_past: int) -> int:
    """Count the bytes that one decoded token reads: weights once, keys and values so far.

    A row of the embedding is negligible; a tied embedding counts, because the head reads it.
    """
    with GGUFFile.open(path) as file:
        model = describe(file)
        weights = sum(
            file.tensors[spec.file_name].nbytes
            for spec in model.specs()
            if spec.use != "get_rows" and spec.file_name in file.tensors
        )
        return weights + n_past * kv_shape(model.hparams, RunParams()).bytes_per_cell


def read_bandwidth(threads: int) -> float:
    """Measure what `threads` cores read from memory together, bytes per second."""
    return memory_bandwidth(threads).read_bytes_s
