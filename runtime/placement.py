"""Which device holds what of a model: layers in stretches, the head, the embeddings."""

from collections.abc import Iterator
from dataclasses import dataclass

from edgeroute.runtime.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Layers on devices.

    Token embeddings are always the processor's: few devices look rows of quantised tables up, and
    a row is little to send.

    Attributes:
        cpu: this machine's processor.
        devices: those that hold layers or the head, each once; `cpu` may be among them.
        of_layer: for every layer an index into `devices`.
        of_head: an index into `devices`.
    """

    cpu: Device
    devices: tuple[Device, ...]
    of_layer: tuple[int, ...]
    of_head: int

    def device(self, il: int) -> Device:
        """Return the device of layer `il`; the head is that after the last."""
        return self.devices[self.of_head if il == len(self.of_layer) else self.of_layer[il]]

    def stretches(self) -> Iterator[tuple[int, range]]:
        """List layers that follow each other on one device: its index, and the layers."""
        first = 0
        for il, index in enumerate(self.of_layer):
            if il + 1 == len(self.of_layer) or self.of_layer[il + 1] != index:
                yield index, range(first, il + 1)
                first = il + 1
