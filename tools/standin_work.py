"""What a fit has done so far, in a folder, so that a stopped one goes on after its last layer."""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.standin_data import Streams
from edgeroute.tools.standin_records import StandInTensor

LAYOUT: Final = 2
"""Of the files; those of another are written over."""

_STATE: Final = "streams.npz"
_EXPLAINED: Final = "explained/"
_STRENGTH: Final = "strength/"


@dataclass(slots=True)
class Done:
    """What a fit has found so far.

    Attributes:
        tensors: by name without a plan.
        explained: explained_ratio by sub-block, such as `blk.3.ffn`.
        strengths: of the ridges, likewise.
    """

    tensors: dict[str, StandInTensor] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)


class Work:
    """A folder of one fit; without a folder nothing is kept.

    Args:
        folder: made if it is not there.
        key: tells fits apart: what another one left is written over.

    Raises:
        UsageError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder, self._key = folder, f"{LAYOUT}:{key}"
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"cannot keep work in {folder}: {error.strerror}") from error

    def restore(self, streams: Streams, done: Done) -> int:
        """Bring back what was saved; return the first layer that is yet to do."""
        state = self.read(_STATE)
        if state is None:
            return 0
        n_done = int(state["n_done"])
        layers = [self.read(f"blk.{il}.npz") for il in range(n_done)]
        if None in layers:
            return 0
        for found in filter(None, layers):
            done.tensors |= _tensors(found)
            done.explained |= _numbers(found, _EXPLAINED)
            done.strengths |= _numbers(found, _STRENGTH)
        streams.full[...], streams.ours[...] = state["full"], state["ours"]
        streams.diverged = bool(state["diverged"])
        return n_done

    def save(self, il: int, streams: Streams, done: Done) -> None:
        """Keep layer `il`, which was just done, and the streams after it."""
        stem = f"blk.{il}."
        mine: dict[str, npt.NDArray[Any] | np.generic] = {}
        mine |= _arrays({name: tensor for name, tensor in done.tensors.items()
                         if name.startswith(stem)})  # fmt: skip
        for prefix, numbers in ((_EXPLAINED, done.explained), (_STRENGTH, done.strengths)):
            for name, value in numbers.items():
                if name.startswith(stem):
                    mine[f"{prefix}{name}"] = np.float64(value)
        self.write(f"{stem}npz", mine)
        self.write(_STATE, {
            "n_done": np.int64(il + 1), "full": streams.full, "ours": streams.ours,
            "diverged": np.bool_(streams.diverged),
        })  # fmt: skip

    def read_tensors(self, name: str) -> dict[str, StandInTensor] | None:
        """Read tensors that `write_tensors` wrote; None where `read` finds nothing."""
        found = self.read(name)
        return None if found is None else _tensors(found)

    def write_tensors(self, name: str, tensors: Mapping[str, StandInTensor]) -> None:
        """Replace a file by these tensors.

        Raises:
            UsageError: it cannot be written.
        """
        self.write(name, _arrays(tensors))

    def read(self, name: str) -> dict[str, npt.NDArray[Any]] | None:
        """Read a file of this fit; None where there is none, or another fit's, or half a file."""
        if self._folder is None or not (self._folder / name).is_file():
            return None
        try:
            with (self._folder / name).open("rb") as raw, np.load(raw, allow_pickle=False) as found:
                arrays = dict(found)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile):
            return None
        return arrays if str(arrays.pop("key", "")) == self._key else None

    def write(self, name: str, arrays: Mapping[str, npt.NDArray[Any] | np.generic]) -> None:
        """Replace a file as a whole.

        Raises:
            UsageError: it cannot be written.
        """
        if self._folder is None:
            return
        part = self._folder / f"{name}.part.npz"
        try:
            np.savez(part, allow_pickle=False, key=np.str_(self._key), **arrays)
            os.replace(part, self._folder / name)
        except OSError as error:
            raise UsageError(
                f"cannot keep work in {self._folder}: {error.strerror}; name another folder"
            ) from error


def _tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, StandInTensor]:
    found = {}
    for name, rows in arrays.items():
        kind, _, tensor = name.partition("/")
        if kind in GGMLQuantizationType.__members__:
            found[tensor] = StandInTensor(rows=rows, kind=GGMLQuantizationType[kind])
    return found


def _arrays(tensors: Mapping[str, StandInTensor]) -> dict[str, npt.NDArray[Any] | np.generic]:
    return {f"{tensor.kind.name}/{name}": tensor.rows for name, tensor in tensors.items()}


def _numbers(arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): float(value) for name, value in arrays.items()
            if name.startswith(prefix)}  # fmt: skip
