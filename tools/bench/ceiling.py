"""The ceiling of decoding: the bytes a token needs over what memory delivers."""

import functools
import importlib
import importlib.util
import threading
import time
from pathlib import Path

import numpy as np

from edgeroute.config import RunParams
from edgeroute.loaded import kv_shape
from edgeroute.models.registry import describe
from edgeroute.runtime import machine
from edgeroute.runtime.gguf import GGUFFile

_BUFFER_BYTES = 256 << 20  # far above any cache


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


def decode_ceiling(path: Path, n_past: int) -> float:
    """Tokens per second if nothing but reading took time."""
    return measured_bandwidth() / bytes_per_token(path, n_past)


@functools.cache
def measured_bandwidth() -> float:
    """Measure reading from memory once, bytes per second."""
    if importlib.util.find_spec("edgeroute.tools.measure") is not None:
        measure = importlib.import_module("edgeroute.tools.measure")
        return float(measure.memory_bandwidth())
    return _read_bandwidth(machine.usable_cores())


def _read_bandwidth(n_threads: int, n_rounds: int = 4) -> float:
    """Read a large buffer with every core at once; the best of a few rounds, bytes/s."""
    parts = np.array_split(np.ones(_BUFFER_BYTES // 8, np.uint64), n_threads)
    best = 0.0
    for _ in range(n_rounds):
        # A reduction by OR is one load and one cheap operation per value, without Python's lock.
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, _BUFFER_BYTES / (time.perf_counter() - began))
    return best
