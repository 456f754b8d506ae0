"""Typed libllama functions: a vocabulary and a grammar, nothing else of llama.cpp.

Source: llama.h of the llama.cpp that llama-cpp-python 0.3.36 ships. The layout of
struct llama_model_params is checked at load through its defaults, and in the tests
against llama-cpp-python's own declaration.
"""

# mypy: disable-error-code="empty-body"
# ruff: noqa: E704
import ctypes
import functools
from collections import deque
from typing import Annotated

from edgeroute.runtime.errors import LibraryError
from edgeroute.runtime.ggml.api import I32, Bool, OptPtr, OptStr, Ptr, Str, Struct, bind_stub
from edgeroute.runtime.ggml.lib import REMEDY, libraries

TOKEN_NULL = -1
ATTR_UNKNOWN, ATTR_CONTROL, ATTR_USER_DEFINED = 1 << 0, 1 << 3, 1 << 4
ATTR_LSTRIP, ATTR_RSTRIP = 1 << 7, 1 << 8
VOCAB_NONE, VOCAB_SPM, VOCAB_BPE = 0, 1, 2
LOAD_MODE_MMAP = 1
LAZY_MODE_OFF = 0
LOG_LEVEL_ERROR, LOG_LEVEL_CONT = 4, 5

LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class ModelParams(ctypes.Structure):
    """struct llama_model_params, passed and returned by value."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
    )


class TokenData(ctypes.Structure):
    """struct llama_token_data; TOKEN_DATA_FIELDS is the same layout for numpy."""

    _fields_ = (("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float))


TOKEN_DATA_FIELDS = (("id", "<i4"), ("logit", "<f4"), ("p", "<f4"))


class TokenDataArray(ctypes.Structure):
    """struct llama_token_data_array: candidates in, the same with some logits at -inf out."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


Params = Annotated[ModelParams, ModelParams]


class Llama:
    """The bound functions, called as `lib.llama_tokenize(vocab, ...)`."""

    def llama_log_set(self, callback: Struct, user_data: OptPtr) -> None: ...
    def llama_model_default_params(self) -> Params: ...
    def llama_model_load_from_file(self, path: Str, params: Params) -> OptPtr: ...
    def llama_model_free(self, model: Ptr) -> None: ...
    def llama_model_get_vocab(self, model: Ptr) -> OptPtr: ...
    def llama_model_chat_template(self, model: Ptr, name: OptStr) -> OptStr: ...
    def llama_vocab_type(self, vocab: Ptr) -> I32: ...
    def llama_vocab_n_tokens(self, vocab: Ptr) -> I32: ...
    def llama_vocab_get_text(self, vocab: Ptr, token: I32) -> OptStr: ...
    def llama_vocab_get_attr(self, vocab: Ptr, token: I32) -> I32: ...
    def llama_vocab_is_eog(self, vocab: Ptr, token: I32) -> Bool: ...
    def llama_vocab_is_control(self, vocab: Ptr, token: I32) -> Bool: ...
    def llama_vocab_bos(self, vocab: Ptr) -> I32: ...
    def llama_vocab_eos(self, vocab: Ptr) -> I32: ...
    def llama_vocab_eot(self, vocab: Ptr) -> I32: ...
    def llama_vocab_get_add_bos(self, vocab: Ptr) -> Bool: ...
    def llama_vocab_get_add_eos(self, vocab: Ptr) -> Bool: ...
    def llama_tokenize(
        self, vocab: Ptr, text: Str, text_len: I32, tokens: Struct, n_tokens_max: I32,
        add_special: Bool, parse_special: Bool,
    ) -> I32: ...  # fmt: skip
    def llama_token_to_piece(
        self, vocab: Ptr, token: I32, buf: Struct, length: I32, lstrip: I32, special: Bool
    ) -> I32: ...
    def llama_detokenize(
        self, vocab: Ptr, tokens: Struct, n_tokens: I32, text: Struct, text_len_max: I32,
        remove_special: Bool, unparse_special: Bool,
    ) -> I32: ...  # fmt: skip
    def llama_sampler_init_grammar(self, vocab: Ptr, grammar: Str, root: Str) -> OptPtr: ...
    def llama_sampler_apply(self, smpl: Ptr, cur_p: Struct) -> None: ...
    def llama_sampler_accept(self, smpl: Ptr, token: I32) -> None: ...
    def llama_sampler_clone(self, smpl: Ptr) -> OptPtr: ...
    def llama_sampler_free(self, smpl: Ptr) -> None: ...


_errors: deque[str] = deque(maxlen=8)
"""The last error lines that the libraries logged, for our own messages."""


def _on_log(level: int, text: bytes | None, _user_data: int | None) -> None:
    if level == LOG_LEVEL_ERROR and text:
        _errors.append(text.decode(errors="replace").strip())


_ON_LOG = LOG_CALLBACK(_on_log)
"""A module global, because the library calls it for as long as the process lives."""


def last_errors() -> str:
    """What the libraries logged as errors since the last call, on one line."""
    lines = []
    while _errors:
        lines.append(_errors.popleft())
    return "; ".join(line for line in lines if line)


@functools.cache
def llama() -> Llama:
    """Bind every function once and silence the library's log.

    Raises:
        LibraryError: a function is missing or the parameter struct has another layout.
    """
    library = libraries().llama
    bound = Llama()
    for name, stub in vars(Llama).items():
        if name.startswith("llama_"):
            setattr(bound, name, bind_stub(library, name, stub))
    bound.llama_log_set(ctypes.cast(_ON_LOG, ctypes.c_void_p), None)
    _check_layout(bound)
    return bound


def _check_layout(bound: Llama) -> None:
    """Compare the library's defaults with where our struct says they are."""
    params = bound.llama_model_default_params()
    good = (
        params.n_gpu_layers == -1
        and params.main_gpu == 0
        and params.tensor_split is None
        and params.kv_overrides is None
        and not params.vocab_only
        and not params.check_tensors
        and params.use_extra_bufts
        and not params.no_alloc
    )
    if not good:
        raise LibraryError(f"llama_model_params has another layout than expected; {REMEDY}")
