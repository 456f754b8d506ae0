"""Matrices that lie side by side, multiplied as one.

ggml's processor backend meets at a barrier before and after each product, and quantises the
input anew for each. Gate and up of a feed-forward, and often queries, keys and values, read one
input and follow each other in the file or in a repacked buffer: a descriptor over all of their
rows costs nothing, and each row's product keeps its bits.
"""

from collections.abc import Mapping
from typing import NamedTuple

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.ggml.structs import TensorStruct
from edgeroute.runtime.tensor import Descriptors, is_placed, new_tensor, shape


class Joint(NamedTuple):
    """Matrices of one input as one: `tensor` has the rows of `names`, in this order."""

    tensor: Tensor
    names: tuple[str, ...]


class Joints(Closing):
    """Descriptors over neighbours. Lifetime: valid until `close`, and while the memory is."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], Joint] = {}
        self._known: dict[tuple[str, ...], list[Joint]] = {}  # by what was asked for
        self._owned: list[Descriptors] = []

    def find(self, tensors: Mapping[str, Tensor]) -> list[Joint]:
        """Join what is side by side of these placed matrices of equal input.

        Args:
            tensors: by name, each [n_in, n_out].

        Returns:
            Each name once; those of one matrix alone have its own tensor.
        """
        asked = tuple(tensors)
        known = self._known.get(asked)
        if known is not None:
            return known
        runs: list[list[str]] = []
        for name in sorted(tensors, key=lambda name: _place(tensors[name])):
            if runs and _follows(tensors[runs[-1][-1]], tensors[name]):
                runs[-1].append(name)
            else:
                runs.append([name])
        found = [self._join(run, tensors) for run in runs]
        if all(is_placed(tensor) for tensor in tensors.values()):  # they do not move any more
            self._known[asked] = found
        return found

    def _join(self, names: list[str], tensors: Mapping[str, Tensor]) -> Joint:
        first = tensors[names[0]]
        if len(names) == 1:
            return Joint(first, (names[0],))
        key = tuple(names)
        if key not in self._found:
            struct = TensorStruct.from_address(first)
            n_out = sum(shape(tensors[name])[1] for name in names)
            descriptors = Descriptors(1)
            self._owned.append(descriptors)
            whole = new_tensor(descriptors, struct.type, (struct.ne[0], n_out), names[0])
            if ggml().ggml_backend_tensor_alloc(struct.buffer, whole, struct.data) != 0:
                raise CapacityError("ggml refused a second view of weights that it holds")
            self._found[key] = Joint(whole, key)
        return self._found[key]

    def close(self) -> None:
        """Free the descriptors; safe to call twice."""
        self._found.clear()
        self._known.clear()
        for descriptors in self._owned:
            descriptors.free()
        self._owned.clear()


def _place(tensor: Tensor) -> tuple[int, int]:
    struct = TensorStruct.from_address(tensor)
    return struct.buffer or 0, struct.data or 0


def _follows(a: Tensor, b: Tensor) -> bool:
    """Whether matrix `b` begins where `a` ends, with equal type, input and way of being stored."""
    one, two = TensorStruct.from_address(a), TensorStruct.from_address(b)
    alike = (one.type, one.buffer, one.ne[0], one.extra) == (
        two.type, two.buffer, two.ne[0], two.extra,
    )  # fmt: skip
    if not alike or one.data is None or two.data is None:
        return False
    return bool(one.data + ggml().ggml_nbytes(a) == two.data)
