"""A smaller model beside a large one: same vocabulary, same budget, all of it in memory."""

import dataclasses
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


def open_small(opening: Opening, params: RunParams) -> "LoadedModel":
    """Open the small model that `params` names, for the model that is being opened.

    Raises:
        UsageError: it has another vocabulary, or experts.
        CatalogueError: there is no such model.
        ModelFileError, UnsupportedModelError: its file cannot be used.
        CapacityError: it does not fit the budget; nothing stays allocated.
    """
    from edgeroute.loaded import LoadedModel  # which opens a small model itself

    path = resolve(str(params.small))
    mine = dataclasses.replace(
        params, small=None, speculate="off", adapters=None, adapter_slots=None, n_kv=None,
        n_ubatch=N_UBATCH, max_batch=1, policy="auto", prefetch="auto", trace=None,
    )  # fmt: skip
    beside = _Beside(path, opening)
    small = LoadedModel(path, mine, beside)
    if small.layers is not None or small.experts is not None:
        taken = format_bytes(small.ledger.budget_bytes)
        small.close()
        raise CapacityError(
            f"the small model {path.name} does not fit the budget of {taken} by itself; raise "
            "the memory budget, or take no small model"
        )
    return small


def small_entries(small: "LoadedModel") -> dict[str, int]:
    """Return a small model's ledger entries, for the large one's."""
    return {f"small model, {entry.owner}": entry.n_bytes for entry in small.ledger.entries()}


class _Beside(Opening):
    """A second file with the vocabulary of the first.

    Raises:
        UsageError: it has another one.
    """

    def __init__(self, path: "Path", first: Opening) -> None:
        self._first = first
        self.file = GGUFFile.open(path)
        try:
            _check_vocabulary(self.file, first.file)
        except BaseException:
            self.file.close()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        """The first file's, which closes it."""
        return self._first.tokenizer

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _check_vocabulary(small: GGUFFile, large: GGUFFile) -> None:
    """Refuse a small model to which token numbers mean something else.

    Raises:
        UsageError: they do.
    """
    for key in _KINDS:
        theirs, ours = (file.metadata.get_str(key, "") for file in (small, large))
        if theirs != ours:
            raise UsageError(
                f"{small.path.name} cannot draft for {large.path.name}: its {key} is "
                f"{theirs or 'missing'!r}, not {ours!r}; choose a smaller model of the same family"
            )
    theirs_raw, ours_raw = (
        file.metadata.array_bytes(_TOKENS) if _TOKENS in file.metadata else b""
        for file in (small, large)
    )
    n = min(len(theirs_raw), len(ours_raw))
    if not n or theirs_raw[:n] != ours_raw[:n]:
        raise UsageError(
            f"{small.path.name} cannot draft for {large.path.name}: they have other tokens; "
            "choose a smaller model of the same family"
        )
