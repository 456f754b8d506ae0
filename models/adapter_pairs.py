"""Puts the A and B matrices of a file together and checks each pair against the base model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from edgeroute.models.adapter_data import Stored
from edgeroute.models.adapter_records import MAX_RANK, BaseShapes, LoraTensor, Pair
from edgeroute.runtime.errors import AdapterFileError
from edgeroute.runtime.gguf_metadata import quote


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One matrix, and which side of which base weight it is.

    `module` is the weight's name in the file, which settings refer to.
    """

    stem: str
    side: Literal["A", "B"]
    module: str
    stored: Stored


ScaleOf = Callable[[Part, int], float]
"""Gives the scale of a weight from its A matrix and rank; raises AdapterFileError."""

HeadsOf = Callable[[str], int]
"""Gives `Pair.n_head` of a stem."""


def make_pairs(
    label: str, parts: Iterable[Part], base: BaseShapes, scale_of: ScaleOf, heads_of: HeadsOf
) -> tuple[Pair, ...]:
    """Pair matrices up, sorted by the weight's name.

    Raises:
        AdapterFileError: nothing is adapted; a matrix is missing, there twice, or of an extent
            or rank that does not fit.
    """
    sides: dict[str, dict[str, Part]] = {}
    for part in parts:
        pair = sides.setdefault(part.stem, {})
        if part.side in pair:
            raise AdapterFileError(
                f"{label}: tensors {quote(pair[part.side].stored.name)} and "
                f"{quote(part.stored.name)} are both the {part.side} matrix of {part.stem}"
            )
        pair[part.side] = part
    if not sides:
        raise AdapterFileError(f"{label}: it adapts no weight at all; fetch or train it again")
    pairs = []
    for stem in sorted(sides):
        a, b = sides[stem].get("A"), sides[stem].get("B")
        if a is None or b is None:
            there, lacks = (b, "A") if a is None else (a, "B")
            assert there is not None
            raise AdapterFileError(
                f"{label}: tensor {quote(there.stored.name)} has no {lacks} matrix beside it; the "
                "file is incomplete"
            )
        rank = _check_shapes(label, a, b, base.linears[stem])
        n_in, n_out = base.linears[stem]
        tensor = LoraTensor(name=stem, n_in=n_in, n_out=n_out, rank=rank, scale=scale_of(a, rank))
        pairs.append(Pair(tensor=tensor, a=a.stored, b=b.stored, n_head=heads_of(stem)))
    return tuple(pairs)


def _check_shapes(label: str, a: Part, b: Part, linear: tuple[int, int]) -> int:
    """Return the rank of a pair that fits a weight of (n_in, n_out)."""
    (rank, n_in), (n_out, rank_b) = a.stored.shape, b.stored.shape
    for part, wanted in ((a, 0), (b, 1)):
        if not 1 <= part.stored.shape[wanted] <= MAX_RANK:
            raise AdapterFileError(
                f"{label}: tensor {quote(part.stored.name)} has rank "
                f"{part.stored.shape[wanted]}; 1 to {MAX_RANK} are supported"
            )
    if rank != rank_b:
        raise AdapterFileError(
            f"{label}: tensor {quote(a.stored.name)} has rank {rank}, but "
            f"{quote(b.stored.name)} has rank {rank_b}"
        )
    for part, what, found, wanted in (
        (a, "inputs", n_in, linear[0]),
        (b, "outputs", n_out, linear[1]),
    ):
        if found != wanted:
            raise AdapterFileError(
                f"{label}: tensor {quote(part.stored.name)} has {found} {what}, but {part.stem} of "
                f"the model has {wanted}; the adapter is for another base model"
            )
    return rank
