"""The residual stream between two graphs of one pass."""

from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.tensor import F32, Descriptors, new_tensor, place_all


class Stream:
    """The residual stream between spans: F32 [n_embd, n_tokens] in a buffer of its own."""

    def __init__(self, device: Device, n_embd: int, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self._descriptors = Descriptors(1)
        self.tensor = new_tensor(self._descriptors, F32, (n_embd, n_tokens), "stream")
        try:
            self._buffer: Buffer = place_all([self.tensor], device)
        except BaseException:
            self._descriptors.free()
            raise

    def close(self) -> None:
        """Free the buffer."""
        self._buffer.free()
        self._descriptors.free()
