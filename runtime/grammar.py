"""Constrain sampling to a GBNF grammar or a JSON schema, with llama.cpp's matcher."""

import ctypes
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import ClosedError, GrammarError
from edgeroute.runtime.gbnf import ROOT, parse
from edgeroute.runtime.gbnf_check import check
from edgeroute.runtime.ggml import llama as lib
from edgeroute.runtime.ggml.llama import last_errors, llama
from edgeroute.runtime.records import SamplingParams

if TYPE_CHECKING:
    from edgeroute.runtime.tokenizer import Tokenizer


class Grammar(Closing):
    """A compiled grammar and how far one output has got in it; a context manager.

    libllama ends the process when it is given a token that the grammar does not admit,
    so `accept` asks first. Control tokens are never admitted, except those that end
    generation where the grammar may end: their text would match, but is not shown. Those that
    are shown are admitted where their text is.

    Args:
        tokenizer: the vocabulary that the grammar is matched against.
        gbnf: the grammar's text.
        shown: texts of control tokens that are part of the output's text.

    Raises:
        GrammarError: the grammar is malformed, too large, or libllama refused it.

    Lifetime: holds the tokenizer's vocabulary; close it before the tokenizer.
    """

    def __init__(self, tokenizer: "Tokenizer", gbnf: str, shown: Sequence[str] = ()) -> None:
        if not isinstance(gbnf, str):
            raise GrammarError(f"a grammar must be a text, got {type(gbnf).__name__}")
        _check(gbnf)
        self._lib = llama()
        self._tokenizer = tokenizer
        self._admitted: int | None = None
        self._shown = tokenizer.shown_ids(shown)
        self._hidden = [i for i in tokenizer.hidden_ids if i not in self._shown]
        self._one = np.zeros(1, dtype=np.dtype(list(lib.TOKEN_DATA_FIELDS)))
        last_errors()
        sampler = self._lib.llama_sampler_init_grammar(
            tokenizer.vocab, gbnf.encode(), ROOT.encode()
        )
        if sampler is None:
            reason = last_errors() or "no reason was given"
            raise GrammarError(f"llama.cpp refused the grammar: {reason}")
        self._sampler: int | None = sampler

    def close(self) -> None:
        """Free the grammar; closing twice is fine."""
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            self._lib.llama_sampler_free(sampler)

    def allows(self, token_id: int) -> bool:
        """Whether the output may go on with this token."""
        if self._is_hidden(token_id):
            return False
        self._one["id"], self._one["logit"] = token_id, 1.0
        self._apply(self._one)
        admitted = bool(self._one["logit"][0] > -np.inf)
        self._admitted = token_id if admitted else None
        return admitted

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of all tokens that the output cannot go on with to -inf.

        Args:
            logits: F32 (n_vocab,), changed in place.
        """
        logits[self._hidden] = -np.inf
        ids = np.flatnonzero(logits > -np.inf)
        candidates = np.zeros(len(ids), dtype=self._one.dtype)
        candidates["id"], candidates["logit"] = ids, 1.0
        self._apply(candidates)
        logits[ids[candidates["logit"] == -np.inf]] = -np.inf

    def accept(self, token_id: int) -> None:
        """Advance past a token.

        Raises:
            GrammarError: the grammar does not admit it; nothing has changed.
        """
        if token_id != self._admitted and not self.allows(token_id):
            raise GrammarError(f"the grammar does not admit token {token_id} here")
        self._admitted = None
        self._lib.llama_sampler_accept(self._open(), token_id)

    def _open(self) -> int:
        if self._sampler is None:
            raise ClosedError("the grammar is closed")
        return self._sampler

    def _is_hidden(self, token_id: int) -> bool:
        """Whether a token may not occur whatever the grammar says."""
        if token_id in self._shown:
            return False
        return not (self._tokenizer.piece(token_id) or self._tokenizer.is_eog(token_id))

    def _apply(self, candidates: NDArray[np.void]) -> None:
        array = lib.TokenDataArray(candidates.ctypes.data, candidates.size, -1, False)
        self._lib.llama_sampler_apply(self._open(), ctypes.byref(array))


@functools.lru_cache(maxsize=16)
def _check(gbnf: str) -> None:
    """Refuse a grammar that llama.cpp would not survive; a good one is remembered."""
    check(parse(gbnf))


def compile_constraint(tokenizer: "Tokenizer", params: SamplingParams) -> Grammar | None:
    """Compile what a request asks its output to match; None if it asks for nothing.

    Raises:
        GrammarError: the grammar or schema cannot be used; the message says why.
    """
    if params.grammar is not None:
        return Grammar(tokenizer, params.grammar, params.shown_tokens)
    if params.json_schema is not None:
        from edgeroute.runtime.json_schema import to_gbnf

        return Grammar(tokenizer, to_gbnf(params.json_schema), params.shown_tokens)
    return None
