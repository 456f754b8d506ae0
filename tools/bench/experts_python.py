"""What Python costs per layer and token when every expert is there: a model of next to no
arithmetic, run as the engine runs it, less the time inside ggml.
"""

import contextlib
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from edgeroute.models.forward import Piece
from edgeroute.models.paged import PagedForward
from edgeroute.offload.expert_store import ExpertStore
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import synth
from edgeroute.tools.forecast.fixed_costs import open_paged

N_LAYER: Final = 12
N_TOKENS, N_CELLS = 240, 256
SPEC: Final = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=N_LAYER, n_vocab=384, n_embd=64, n_ff=64,
    n_ff_exp=32, n_head=2, n_head_kv=1, n_embd_head=32, n_expert=64, n_expert_used=8,
)  # fmt: skip
"""As many layers and experts per token as the large shapes have, hardly a number in them."""


class _TimedDevice(Device):
    """Counts the seconds that are spent inside ggml."""

    computing_s = 0.0

    def compute(self, graph: int) -> bool:
        began = time.perf_counter()
        done = super().compute(graph)
        self.computing_s += time.perf_counter() - began
        return done


def python_us_per_layer(n_tokens: int = N_TOKENS) -> float:
    """Measure microseconds of Python per layer with experts and token, the median over tokens
    for which nothing was read; filling the inputs and fetching the logits are in it.

    Raises:
        EdgerouteError: every token had to read.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as own:
        path = Path(folder) / "small.gguf"
        synth.write(SPEC, path)
        forward, store, device = _open(own, path)
        region = forward.kv.allocate(N_CELLS)
        assert region is not None
        found: list[float] = []
        for pos in range(min(n_tokens, N_CELLS)):
            misses, inside = store.spent().misses, device.computing_s
            began = time.perf_counter()
            forward.run([Piece([4 + pos % 300], pos, region)], borrow=True)
            outside = time.perf_counter() - began - (device.computing_s - inside)
            if store.spent().misses == misses:
                found.append(1e6 * outside / SPEC.n_layer)
        forward.kv.release(region)
    if not found:
        raise EdgerouteError(f"all of {n_tokens} tokens read experts; measure more of them")
    return statistics.median(found)


def _open(own: contextlib.ExitStack, path: Path) -> tuple[PagedForward, ExpertStore, _TimedDevice]:
    """Open a file with slots for all its experts; `own` closes everything."""
    file = own.enter_context(GGUFFile.open(path))
    device = own.enter_context(_TimedDevice.open("cpu"))
    device.set_threads(1)
    forward, store = open_paged(own, file, device, N_CELLS)
    return forward, store, device
