"""The peer: raw llama.cpp through llama-cpp-python's low-level API, as fast as Python drives it.

One context, batches allocated once, logits read where llama.cpp left them.
"""

import contextlib
import importlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import ComputeError, ModelFileError

Logits = npt.NDArray[np.float32]

_GGML_TYPES = {"f16": 1, "q8_0": 8}  # Source: ggml.h, enum ggml_type
LOG_LEVEL_ERROR = 4  # Source: ggml.h, enum ggml_log_level


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerParams:
    """Settings of one llama.cpp context; flash attention is always on.

    Attributes:
        n_ctx: cells in all; without `kv_unified` each sequence has its equal share.
        n_seq: sequences that decode together.
        kv_type: `f16` or `q8_0`, keys and values alike.
        repack: whether weights may be copied into a faster layout; without, they stay mapped.
    """

    n_ctx: int
    threads: int
    n_ubatch: int = 512
    n_seq: int = 1
    kv_unified: bool = False
    kv_type: str = "f16"
    repack: bool = True


class Peer(Closing):
    """A loaded model with one context. Not thread-safe.

    Raises:
        ModelFileError: llama.cpp cannot load the file, or make such a context of it.
    """

    def __init__(self, path: Path, params: PeerParams) -> None:
        self.params = params
        self._lib: Any = load_library()
        self._owned = contextlib.ExitStack()
        try:
            self._open(path)
        except BaseException:
            self._owned.close()
            raise

    def _open(self, path: Path) -> None:
        lib, own = self._lib, self._owned
        params = lib.llama_model_default_params()
        params.use_extra_bufts = self.params.repack
        model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise ModelFileError(f"llama.cpp cannot load {path}, so there is no peer: {_why()}")
        own.callback(lib.llama_model_free, model)
        self._ctx = lib.llama_init_from_model(model, self._context_params())
        if not self._ctx:
            raise ModelFileError(f"llama.cpp cannot make a context of {path}: {_why()}")
        own.callback(lib.llama_free, self._ctx)
        self._memory = lib.llama_get_memory(self._ctx)
        self._vocab = lib.llama_model_get_vocab(model)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        self._batch = _Batch(lib, max(self.params.n_ubatch, self.params.n_seq))
        own.callback(self._batch.close)

    def _context_params(self) -> Any:
        lib, params = self._lib, self.params
        found = lib.llama_context_default_params()
        found.n_ctx = params.n_ctx
        found.n_batch = found.n_ubatch = params.n_ubatch
        found.n_seq_max = params.n_seq
        found.n_threads = found.n_threads_batch = params.threads
        found.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        found.type_k = found.type_v = _GGML_TYPES[params.kv_type]
        found.kv_unified = params.kv_unified
        return found

    def decode(self, tokens: Sequence[int], pos: int, *, seq: int = 0, n_out: int = 1) -> Logits:
        """Decode up to `n_ubatch` tokens of one sequence.

        Returns:
            F32 (n_out, n_vocab), a copy: logits of the last `n_out` tokens.
        """
        self._batch.fill(tokens, range(pos, pos + len(tokens)), [seq] * len(tokens), n_out)
        return self._decode(n_out).copy()

    def step(self, token: int, pos: int) -> Logits:
        """Decode one token of sequence 0. Lifetime: the row is valid until the next decode."""
        self._batch.one(token, pos)
        row: Logits = self._decode(1)[0]
        return row

    def step_all(self, tokens: Sequence[int], pos: int) -> Logits:
        """Decode one token of each sequence, all at `pos`.

        Returns:
            F32 (n_seq, n_vocab), valid until the next decode.
        """
        n = len(tokens)
        self._batch.fill(tokens, [pos] * n, range(n), n)
        return self._decode(n)

    def prefill(self, tokens: Sequence[int], *, seq: int = 0) -> Logits:
        """Decode a prompt in batches of `n_ubatch`; return its last row, a copy."""
        row: Logits = np.empty((0, self.n_vocab), np.float32)
        for start in range(0, len(tokens), self.params.n_ubatch):
            row = self.decode(tokens[start : start + self.params.n_ubatch], start, seq=seq)
        last: Logits = row[0]
        return last

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._memory, True)

    def set_threads(self, threads: int) -> None:
        """Compute with this many threads from the next decode on."""
        self._lib.llama_set_n_threads(self._ctx, threads, threads)

    def is_end(self, token: int) -> bool:
        """Tell whether a token ends the generation."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free batch, context and model; safe to call twice."""
        self._owned.close()

    def _decode(self, n_out: int) -> Logits:
        status = self._lib.llama_decode(self._ctx, self._batch.struct)
        if status:
            raise ComputeError(f"llama_decode returned {status} under {self.params}: {_why()}")
        pointer = self._lib.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(pointer, (n_out, self.n_vocab))


class _Batch:
    """A llama_batch seen as numpy arrays."""

    def __init__(self, lib: Any, n_tokens: int) -> None:
        self._lib = lib
        self.struct = lib.llama_batch_init(n_tokens, 0, 1)
        struct, shape = self.struct, (n_tokens,)
        self._token = np.ctypeslib.as_array(struct.token, shape)
        self._pos = np.ctypeslib.as_array(struct.pos, shape)
        self._logits = np.ctypeslib.as_array(struct.logits, shape)
        np.ctypeslib.as_array(struct.n_seq_id, shape)[:] = 1
        self._seqs: list[int | None] = [None] * n_tokens

    def fill(
        self, tokens: Sequence[int], pos: Sequence[int], seqs: Sequence[int], n_out: int
    ) -> None:
        n = self.struct.n_tokens = len(tokens)
        self._token[:n] = tokens
        self._pos[:n] = pos
        self._logits[:n] = 0
        self._logits[n - n_out : n] = 1
        for i, seq in enumerate(seqs):
            if self._seqs[i] != seq:
                self._seqs[i] = seq
                self.struct.seq_id[i][0] = seq

    def one(self, token: int, pos: int) -> None:
        self.struct.n_tokens = 1
        self._token[0] = token
        self._pos[0] = pos
        self._logits[0] = 1
        if self._seqs[0] != 0:
            self._seqs[0] = 0
            self.struct.seq_id[0][0] = 0

    def close(self) -> None:
        self._lib.llama_batch_free(self.struct)


_errors: deque[str] = deque(maxlen=8)
_log_callback: Any = None  # llama.cpp keeps the pointer: it must live as long as we do


def load_library() -> Any:
    """Import llama_cpp, the whole package, and keep its log to errors, for our own messages."""
    global _log_callback
    lib = importlib.import_module("llama_cpp")
    if _log_callback is None:
        _log_callback = lib.llama_log_callback(_note_error)
        lib.llama_log_set(_log_callback, None)
    return lib


def _note_error(level: int, text: bytes, _user_data: object) -> None:
    if level == LOG_LEVEL_ERROR:
        _errors.append(text.decode(errors="replace").strip())


def _why() -> str:
    return "; ".join(_errors) or "it logged no reason"


def default_threads() -> int:
    """What llama_context_default_params says."""
    return int(load_library().llama_context_default_params().n_threads)
