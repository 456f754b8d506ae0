"""Whether a device computes in the host's own memory: the one place where that is decided.

ggml says it in several ways, and not everywhere:

- the processor and its accelerators (BLAS, AMX) have no other memory;
- CUDA, HIP, Vulkan and SYCL report an integrated GPU as a kind of its own, `igpu`;
- Metal reports a GPU that makes buffers of host pointers;
- what is left (OpenCL and others) does not say: the board does, as far as it is known.

A Jetson's CUDA is an integrated GPU by the first of these that applies; where its driver should
not say so, the board does. A device of another machine is never unified, whatever it is there.
"""

import functools
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edgeroute.runtime.board import Board

_TELLS: Final = frozenset({"CUDA", "ROCm", "MUSA", "Vulkan", "SYCL"})
"""Backends that tell integrated GPUs from others. Source: get_device_type of each in ggml/src."""


def shares_memory(
    kind: str, host_pointers: bool, registry: str, here: "Board | None" = None
) -> bool:
    """Decide it for a device of this machine.

    Args:
        kind: as in DeviceInfo.
        host_pointers: whether the device makes buffers of host memory.
        registry: name of its backend, such as `CUDA`.
        here: the board; this machine's if not given, looked at only where nothing else decides.
    """
    if registry.startswith("RPC"):
        return False
    if kind in ("cpu", "accel", "igpu"):
        return True
    if host_pointers:
        return True
    here = here or _board()
    return here.unified and (here.kind == "jetson" or registry not in _TELLS)


@functools.cache
def _board() -> "Board":
    # A model on the processor should not wait for this import.
    from edgeroute.runtime.board import board

    return board()
