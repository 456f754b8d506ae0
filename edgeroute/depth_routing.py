"""A prompt computed layer by layer while routers decide what becomes of each layer.

The decision is made once, from the first batch of a prompt. Further batches and every token
that follows are computed with the steps that it gave.
"""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.depth import Step, Steps
from edgeroute.runtime.errors import ComputeError, DepthFileError
from edgeroute.skippers.depth_router import DepthRouter, choose, from_arrays, steps_of

Arrays = Mapping[str, npt.NDArray[np.generic]]

MAX_ROUTER_BYTES: Final = 1 << 29
"""Of a file. A router of 128 hidden values for each of 64 layers of width 8192 takes 268 MB."""

MODEL: Final = "router/model"
"""I32 [8]: the fingerprint of the model file."""

_TYPES: Final = ("<f4", "<f2", "<i4")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """What routers decided, and the logits of the batch that they decided it from.

    Attributes:
        steps: what this request computes, from now on, frozen.
        logits: F32 (n_out, n_vocab).
    """

    steps: Steps
    logits: npt.NDArray[np.float32]


def route_prefill(
    forward: Forward, piece: Piece, router: DepthRouter, *, borrow: bool = False
) -> Routed | None:
    """Compute the first batch of a prompt, and decide the steps of the request.

    A layer that is skipped is neither computed nor read. Repetitions are left out where the KV
    cache has no rows for them.

    Args:
        forward: the model, all layers of it in memory or behind a pager.
        piece: the prompt's first tokens, from position 0.
        router: of this model.
        borrow: as in `Forward.run`.

    Returns:
        None when the device's abort callback stopped it; the piece's cells are undefined then.

    Raises:
        ComputeError: ggml failed, the piece is not the beginning, or a router is for another
            model.
    """
    router = _fitting(forward, piece, router)
    quiet, n_tokens = piece._replace(n_out=0), len(piece.tokens)
    taken: Steps = ()
    waiting: list[Step] = []  # decided, but not computed before somebody looks at what they leave
    embed = True
    for il in range(router.n_layer):
        if router.sees(il):
            if waiting or embed:
                span = Span(tuple(waiting), embed=embed, output=False)
                if forward.run([quiet], [span]) is None:
                    return None
            waiting, embed = [], False
            states = forward.residual(n_tokens)
            new = steps_of(il, choose(router, il, states, taken), taken)
        else:
            new = steps_of(il, "run", taken)
        taken += new
        waiting += [step for step in new if step.reads]
    last = Span(tuple(waiting), embed=embed, output=bool(piece.n_out))
    logits = forward.run([piece], [last], borrow=borrow)
    return None if logits is None else Routed(steps=taken, logits=logits)


def _fitting(forward: Forward, piece: Piece, router: DepthRouter) -> DepthRouter:
    """Refuse what does not fit; return the router with no more repetitions than there are rows."""
    hparams = forward.model.hparams
    if piece.pos:
        raise ComputeError(
            f"routers decide from a prompt's first token on, these tokens begin at {piece.pos}"
        )
    if (router.n_layer, router.n_embd) != (hparams.n_layer, hparams.n_embd):
        raise ComputeError(
            f"the router is for {router.n_layer} layers of {router.n_embd} values, the model has "
            f"{hparams.n_layer} of {hparams.n_embd}"
        )
    rows = forward.kv.shape.n_repeat
    limits = router.limits._replace(max_repeats=min(router.limits.max_repeats, rows))
    return replace(router, limits=limits)


def load_router(path: Path, n_layer: int, n_embd: int, model: str | None = None) -> DepthRouter:
    """Read routers that `tools/train_depth_router` wrote.

    Args:
        path: an .npz file, which nobody vouches for: pickles are refused, and no array is made
            before its size has been compared with the bytes that are there.
        n_layer, n_embd: of the model.
        model: its fingerprint, which the file must name; None does not ask.

    Raises:
        DepthFileError: it is no such file, or its routers are not for such a model.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = _read_members(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DepthFileError(f"{path} holds no depth routers: {str(error)[:120]}") from error
    stamp = found.pop(MODEL, None)
    if model is not None and (stamp is None or not np.array_equal(stamp, stamp_of(model))):
        raise DepthFileError(
            f"{path.name} holds depth routers of another model than this one; train some for it "
            "with edgeroute.tools.train_depth_router"
        )
    return from_arrays(found, n_layer, n_embd)


def stamp_of(model: str) -> npt.NDArray[np.int32]:
    """Return a fingerprint in hex as the numbers that a file of routers holds: I32 [8]."""
    return np.frombuffer(bytes.fromhex(model), np.int32)


def _read_members(archive: zipfile.ZipFile) -> dict[str, npt.NDArray[np.generic]]:
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > MAX_ROUTER_BYTES:
        raise ValueError(f"{total} bytes are more than {MAX_ROUTER_BYTES}")
    found: dict[str, npt.NDArray[np.generic]] = {}
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or not member.filename.endswith(".npy"):
            raise ValueError(f"{member.filename[:60]!r} is not a stored array")
        name = member.filename.removesuffix(".npy")
        if name in found:
            raise ValueError(f"{name[:60]!r} is there twice")
        with archive.open(member) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{name[:60]!r} is of another version of the format")
            shape, by_column, kind = np.lib.format.read_array_header_1_0(file)
            if by_column or kind.str not in _TYPES:
                raise ValueError(f"{name[:60]!r} is of type {kind}, or stored by column")
            data = file.read()
        if math.prod(shape) * kind.itemsize != len(data):
            raise ValueError(f"{name[:60]!r} has {len(data)} bytes for the shape {shape}")
        found[name] = np.frombuffer(data, kind).reshape(shape)
    return found
