"""Bytes on their way to a device: from host memory into tensors, before a graph reads them."""

import numpy as np

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import Tensor, ggml


class Uploader(Closing):
    """Copies host memory into tensors of one device. Not thread-safe: one thread owns it.

    `send` may return before the bytes are there; `finish` waits for all of them. What a graph
    on the same device computes after `send` sees them in any case.
    """

    def __init__(self, device: Device, staging_bytes: int = 0) -> None:
        """Prepare; at most `staging_bytes` of host memory are held for bytes on their way."""
        self._device = device
        self.n_bytes = 0
        """Bytes sent so far."""

    def send(self, tensor: Tensor, at: int, data: memoryview) -> None:
        """Copy `data` to offset `at` of a tensor; it may be overwritten when this returns."""
        address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        ggml().ggml_backend_tensor_set(tensor, address, at, data.nbytes)
        self.n_bytes += data.nbytes

    def finish(self) -> None:
        """Wait until everything that was sent is there.

        Raises:
            DeviceLostError: the device is gone.
        """
        self._device.check()

    def close(self) -> None:
        """Free the staging memory; safe to call twice."""
