"""What the last bits of a computation depend on, beside the model and its input."""

import functools
import hashlib
import os
from collections.abc import Collection

from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.lib import libraries

_PART_BYTES = 1 << 20


def numerics(device: Device, repacked: Collection[str], plain: Collection[str] = ()) -> str:
    """Return a short text: where it is equal, equal computations give equal bits.

    Args:
        device: what computes.
        repacked: names of the weights that are not in the file's layout.
        plain: names of those of them that prompts are computed from in the file's layout.
    """
    info = device.info
    facts = [_library(), info.name, info.description, *sorted(repacked)]
    if plain:
        facts += ["plain for prompts", *sorted(plain)]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=16).hexdigest()


@functools.cache
def _library() -> str:
    """Tell ggml's version, and the contents of its library of kernels where that is one file."""
    found = libraries()
    if found.cpu is None or not os.path.isfile(found.cpu._name):
        return found.version
    digest = hashlib.blake2b(digest_size=16)
    with open(found.cpu._name, "rb") as file:
        while part := file.read(_PART_BYTES):
            digest.update(part)
    return f"{found.version} {digest.hexdigest()}"
