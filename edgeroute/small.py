"""A smaller model beside a large one: one budget, and all of the small one in memory."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from edgeroute.config import RunParams
from edgeroute.models.pull import resolve
from edgeroute.opening import Opening
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from edgeroute.loaded import LoadedModel

N_UBATCH: Final = 128
"""Prompt tokens that a small model computes at once, between two tokens of the large one."""
_TOKENS: Final = "tokenizer.ggml.tokens"
"""What token numbers mean. One model's list may be longer, by numbers that no text has."""
_KINDS: Final = ("tokenizer.ggml.model", "tokenizer.ggml.pre")


def open_small(
    opening: Opening, params: RunParams, wake: Callable[[], None] = lambda: None
) -> "LoadedModel":
    """Open the small model that `params` names, for the model that is being opened.

    It shares the large one's vocabulary where that is the same. Another one is only of use where
    answers are written in steps.

    Args:
        opening: the large model's.
        params: settings of both.
        wake: called from another thread when one of its adapters has arrived.

    Raises:
        UsageError: it has another vocabulary, and is to draft.
        CatalogueError: there is no such model.
        ModelFileError, UnsupportedModelError: its file cannot be used.
        AdapterFileError: one of its adapters cannot be used with it.
        CapacityError: it does not fit the budget; nothing stays allocated.
    """
    from edgeroute.loaded import LoadedModel  # which opens a small model itself

    path = small_file(params)
    beside = open_beside(path, opening, must_share=not params.steps_on)
    small = LoadedModel(path, small_params(params), beside, wake)
    if small.layers is not None or small.experts is not None:
        taken = format_bytes(small.ledger.budget_bytes)
        small.close()
        raise CapacityError(
            f"the small model {path.name} does not fit the budget of {taken} by itself; raise "
            "the memory budget, or take no small model"
        )
    return small


def small_file(params: RunParams) -> "Path":
    """Return the file of the small model that `params` names.

    Raises:
        CatalogueError: there is no such model.
    """
    return resolve(str(params.small))


def small_params(params: RunParams) -> RunParams:
    """Return the settings of the small model beside one that has these."""
    n_ubatch = params.n_ubatch if params.steps_on else N_UBATCH
    adapters = params.small_adapters if params.steps_on else None
    return dataclasses.replace(
        params, small=None, speculate="off", adapters=adapters, small_adapters=None,
        adapter_slots=None if adapters is None else params.adapter_slots, adapter_state="off",
        n_kv=None, n_ubatch=n_ubatch, max_batch=1, policy="auto", prefetch="auto", trace=None,
        steps="off", depth="full", depth_file=None, sessions=None, drop_misses=0.0,
        prefer_resident=0.0, degrade_misses=0.0,
    )  # fmt: skip


def small_entries(small: "LoadedModel") -> dict[str, int]:
    """Return a small model's ledger entries, for the large one's."""
    return {f"small model, {entry.owner}": entry.n_bytes for entry in small.ledger.entries()}


def small_devices(small: "LoadedModel") -> dict[str, int]:
    """Return what a small model takes of each device's own memory, by the devices' names."""
    return {
        name: ledger.used_bytes for name, ledger in small.ledgers.items()
        if ledger is not small.ledger
    }  # fmt: skip


def open_beside(path: "Path", first: Opening, *, must_share: bool) -> Opening:
    """Open a second file, with the vocabulary of the first where that is the same.

    Raises:
        UsageError: it must be the same, and is another.
        ModelFileError: the file cannot be read.
    """
    file = GGUFFile.open(path)
    try:
        why = other_vocabulary(file, first.file)
        if why is None:
            return _Beside(file, first)
        if must_share:
            raise UsageError(why)
    except BaseException:
        file.close()
        raise
    file.close()
    return Opening(path)


class _Beside(Opening):
    """A second file with the vocabulary of the first."""

    def __init__(self, file: GGUFFile, first: Opening) -> None:
        self._first = first
        self.file = file

    @property
    def tokenizer(self) -> Tokenizer:
        """The first file's, which closes it."""
        return self._first.tokenizer

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def other_vocabulary(small: GGUFFile, large: GGUFFile) -> str | None:
    """Say why token numbers mean something else to a small model; None if they do not."""
    for key in _KINDS:
        theirs, ours = (file.metadata.get_str(key, "") for file in (small, large))
        if theirs != ours:
            return (
                f"{small.path.name} cannot draft for {large.path.name}: its {key} is "
                f"{theirs or 'missing'!r}, not {ours!r}; choose a smaller model of the same family"
            )
    theirs_raw, ours_raw = (
        file.metadata.array_bytes(_TOKENS) if _TOKENS in file.metadata else b""
        for file in (small, large)
    )
    n = min(len(theirs_raw), len(ours_raw))
    if not n or theirs_raw[:n] != ours_raw[:n]:
        return (
            f"{small.path.name} cannot draft for {large.path.name}: they have other tokens; "
            "choose a smaller model of the same family"
        )
    return None
