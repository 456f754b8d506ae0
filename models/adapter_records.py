"""Records of an adapter's file: which weights it adapts, and where its numbers are.

An adapter is a set of LoRA pairs: a weight W of the base model acts as W + scale * B A.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from edgeroute.models.adapter_data import Stored, open_data
from edgeroute.runtime.errors import AdapterFileError

MAX_RANK: Final = 512
"""Far above any adapter in use; a rank near the weight's own width saves nothing."""

MAX_ALPHA: Final = 1e6
"""Bounds alpha, so that no scale overflows; training uses 1 to a few hundred."""

RESERVED_NAMES: Final = frozenset({"auto", "none"})
"""Words that mean something else where an adapter is named."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")

F16Array = npt.NDArray[np.float16]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShapes:
    """What an adapter must fit: a base model's matrices.

    `linears` maps the stem of every weight that `Builder.linear` multiplies with, such as
    "blk.3.attn_q", to its extents (n_in, n_out). The output head is not among them.
    """

    arch: str
    n_head: int
    n_head_kv: int
    n_layer: int
    n_expert: int
    linears: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTensor:
    """One adapted weight.

    Attributes:
        name: stem of the base weight as `Builder.linear` knows it, without ".weight".
        n_in, n_out: extents of the base weight.
        rank: inner width of the pair.
        scale: factor on B A: alpha / rank, or alpha / sqrt(rank) where rank-stabilised.
    """

    name: str
    n_in: int
    n_out: int
    rank: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Where one weight's A (rank, n_in) and B (n_out, rank) lie in the data file.

    `n_head` is the number of heads whose rows of B must be brought into the base's rotary
    order; 0 where they are in it.
    """

    tensor: LoraTensor
    a: Stored
    b: Stored
    n_head: int = 0


class Triple(NamedTuple):
    """One adapted weight with its numbers: A (rank, n_in) and B (n_out, rank)."""

    tensor: LoraTensor
    a: F16Array
    b: F16Array


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter whose header fits its base model; its numbers are still on disk.

    Attributes:
        name: file or folder stem, safe as a name.
        path: what was opened: a folder or a file.
        format: how it is stored.
        tensors: the adapted weights, sorted by name.
        n_bytes: bytes of A and B in the file.
        description: what the file says about itself, one line, "" if nothing.
        data_path: the file with the numbers.
        identity: its (size, mtime in ns, inode, device) when it was checked.
        pairs: where the numbers are, in the order of `tensors`.
    """

    name: str
    path: Path
    format: Literal["peft", "gguf"]
    tensors: tuple[LoraTensor, ...]
    n_bytes: int
    description: str
    data_path: Path
    identity: tuple[int, int, int, int]
    pairs: tuple[Pair, ...]

    def read(self) -> Iterator[Triple]:
        """Read the numbers, one weight at a time, in the order of `tensors`.

        Yields:
            The weight, A (rank, n_in) and B (n_out, rank): F16, C-contiguous, in the base
            model's row order, not scaled. Values below F16's range round to zero.

        Raises:
            AdapterFileError: the file changed since it was opened, or while it is read; it is
                truncated; a number is NaN, infinite or beyond F16. What was yielded before
                must then not be used.
        """
        with open_data(self.data_path, self.identity) as data:
            matrices = [matrix for pair in self.pairs for matrix in (pair.a, pair.b)]
            end = max(matrix.offset + matrix.nbytes for matrix in matrices)
            data.expect(min(matrix.offset for matrix in matrices), end)
            for pair in self.pairs:
                a, b = data.read(pair.a), data.read(pair.b)
                yield Triple(pair.tensor, a, interleave(b, pair.n_head) if pair.n_head else b)


def interleave(b: npt.NDArray[T], n_head: int) -> npt.NDArray[T]:
    """Reorder rows of B (n_out, rank) from half-split to interleaved rotation.

    Hugging Face rotates element i of a head with i + n/2, ggml's NORMAL mode with i + 1, so
    converters reorder the rows of q and k of such models, and an adapter must follow.
    Source: llama.cpp, conversion/llama.py, LlamaModel.permute.
    """
    n_out, rank = b.shape
    halves = b.reshape(n_head, 2, n_out // n_head // 2, rank)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(n_out, rank))


def check_name(name: str, path: Path) -> str:
    """Return an adapter's name if it is safe in paths, logs and command lines.

    Raises:
        AdapterFileError: it is not, or it is a word that means something else.
    """
    if not _NAME.fullmatch(name):
        raise AdapterFileError(
            f"the adapter {str(path)!r} would be named {name[:80]!r}; a name has 1 to 64 letters, "
            "digits, '.', '_' or '-' and does not start with '.'; rename it"
        )
    if name in RESERVED_NAMES:
        raise AdapterFileError(
            f"the adapter {str(path)!r} would be named {name!r}, which has a meaning of its own "
            "where adapters are named; rename it"
        )
    return name
