"""Matrices that lie side by side, multiplied as one.

ggml's processor backend meets at a barrier before and after each product, and quantises the
input anew for each. Gate and up of a feed-forward, and often queries, keys and values, read one
input and follow each other in the file or in a repacked buffer: a descriptor over all of their
rows costs nothing, and each row's product keeps its bits.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.ggml.structs import TensorStruct
from edgeroute.runtime.tensor import Descriptors, is_placed, new_tensor, shape


class Joint(NamedTuple):
    """Matrices of one input as one: `tensor` has the rows of `names`, in this order.

    `bias` is added to their product; None where they have none, or one each.
    """

    tensor: Tensor
    names: tuple[str, ...]
    bias: Tensor | None = None


class Joints(Closing):
    """Descriptors over neighbours. Lifetime: valid until `close`, and while the memory is."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], list[Joint]] = {}  # by what was asked for
        self._owned: list[Descriptors] = []

    def find(self, names: Sequence[str], get: Callable[[str], Tensor | None]) -> list[Joint]:
        """Join what is side by side of placed matrices of equal input.

        Args:
            names: of the matrices, each [n_in, n_out].
            get: gives them, and their biases F32 [n_out] where they have some.

        Returns:
            Each name once; those of one matrix alone have its own tensor.
        """
        asked = tuple(names)
        known = self._known.get(asked)
        if known is not None:
            return known
        tensors = {name: tensor for name in names if (tensor := get(name)) is not None}
        runs: list[list[str]] = []
        for name in sorted(tensors, key=lambda name: _place(tensors[name])):
            if runs and _follows(tensors[runs[-1][-1]], tensors[name]):
                runs[-1].append(name)
            else:
                runs.append([name])
        found = [self._join(run, tensors, get) for run in runs]
        if all(is_placed(tensor) for tensor in tensors.values()):  # they do not move any more
            self._known[asked] = found
        return found

    def _join(
        self, names: list[str], tensors: Mapping[str, Tensor], get: Callable[[str], Tensor | None]
    ) -> Joint:
        first = tensors[names[0]]
        if len(names) == 1:
            return Joint(first, (names[0],))
        n_out = sum(shape(tensors[name])[1] for name in names)
        whole = self._over(first, (shape(first)[0], n_out), names[0])
        stems = [name.removesuffix(".weight") for name in names]
        own = [bias for stem in stems if (bias := get(f"{stem}.bias")) is not None]
        pairs = itertools.pairwise(own)
        if len(own) < len(names) or not all(_is_next(one, other) for one, other in pairs):
            return Joint(whole, tuple(names))
        return Joint(whole, tuple(names), self._over(own[0], (n_out,), f"{names[0]}.bias"))

    def _over(self, first: Tensor, ne: tuple[int, ...], name: str) -> Tensor:
        """Describe the memory of a tensor, and what lies behind it, anew."""
        struct, descriptors = TensorStruct.from_address(first), Descriptors(1)
        self._owned.append(descriptors)
        whole = new_tensor(descriptors, struct.type, ne, name)
        if ggml().ggml_backend_tensor_alloc(struct.buffer, whole, struct.data) != 0:
            raise CapacityError("ggml refused a second view of weights that it holds")
        return whole

    def close(self) -> None:
        """Free the descriptors; safe to call twice."""
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
    return (one.type, one.ne[0], one.extra) == (two.type, two.ne[0], two.extra) and _is_next(a, b)


def _is_next(a: Tensor, b: Tensor) -> bool:
    """Whether a tensor's memory begins where another's ends."""
    one, two = TensorStruct.from_address(a), TensorStruct.from_address(b)
    if one.buffer != two.buffer or one.data is None or two.data is None:
        return False
    return bool(one.data + ggml().ggml_nbytes(a) == two.data)
