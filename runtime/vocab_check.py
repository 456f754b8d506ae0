"""Checks a file's vocabulary before llama.cpp is allowed to load it.

llama.cpp aborts the process, or throws through its C interface, on vocabularies that it
did not expect; a file could also make it allocate without bound. Each rule here closes one
such path of the two tokenizers that are supported, byte-level BPE (`gpt2`) and
SentencePiece (`llama`). Character maps (`precompiled_charsmap`) belong to a third one.

Source: llama-vocab.cpp, llama_vocab::impl::load, byte_to_token, token_to_byte,
token_to_piece and the tokenizer sessions; llama-model-loader.cpp, its constructor.
"""

import re
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import EdgerouteError, ModelFileError, UnsupportedModelError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.gguf_metadata import Metadata, quote
from edgeroute.runtime.gguf_strings import LENGTH_BYTES, SEPARATOR, join_strings, string_starts

MAX_TOKENS: Final = 1 << 20
"""Four times the largest published vocabulary."""
MAX_TOKEN_BYTES: Final = 1 << 16
MAX_SPECIAL_TOKENS: Final = 1 << 16
"""Each is searched for in every prompt; Gemma 3 has 6,418."""
MAX_DECODED_BYTES: Final = 16 << 20
"""What foreign characters in byte-level tokens may grow to in llama.cpp's piece cache."""

_TOKENS: Final = "tokenizer.ggml.tokens"
_TYPES: Final = "tokenizer.ggml.token_type"
_SCORES: Final = "tokenizer.ggml.scores"
_MERGES: Final = "tokenizer.ggml.merges"
_SUPPRESS: Final = "tokenizer.ggml.suppress_tokens"

# Ids that generation uses; out of range they are refused.
_ID_KEYS: Final = ("bos", "eos", "eot", "eom", "unknown")
# Ids that llama.cpp ignores when they are out of range, as fine-tunes often leave them.
_SPARE_ID_KEYS: Final = (
    *("seperator", "padding", "mask", "prefix", "suffix", "middle"),
    *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
)
_BOOL_KEYS: Final = (
    *("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix"),
    *("remove_extra_whitespaces", "normalizer.lowercase", "normalizer.strip_accents"),
)
# What llama.cpp assumes where the file names no id: (bos, eos).
_DEFAULT_IDS: Final = {"gpt2": (11, 11), "llama": (1, 2)}
# Pre-tokenizers that are not byte-level; `whitespace` leaves words on which llama.cpp aborts.
_RAW_PRE: Final = frozenset({"gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"})

_BYTE_TYPE: Final = 6
_SPECIAL_TYPES: Final = (2, 3, 4)
_BYTE_TEXT: Final = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
_PHI3_TOKENS: Final = (b"</s>", b"<unk>", b"<s>", b"<|endoftext|>")


def check_vocab(file: GGUFFile) -> None:
    """Check that llama.cpp can load and use the vocabulary of `file` safely.

    Raises:
        ModelFileError: the vocabulary is malformed.
        UnsupportedModelError: its tokenizer is none that this version runs.
    """
    check_vocab_metadata(file.metadata)


def check_vocab_metadata(metadata: Metadata) -> None:
    """Do what `check_vocab` does, given only the metadata."""
    _Check(metadata).run()


class _Check:
    """The rules over one file's metadata; each `_check_*` method passes or raises."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._model = ""
        self._tokens: list[bytes] = []

    def run(self) -> None:
        self._check_model()
        self._read_tokens()
        self._check_types()
        self._check_scores()
        self._check_ids()
        if self._model == "gpt2":
            self._check_merges()
        else:
            self._check_byte_tokens()
        self._check_name()

    def _check_model(self) -> None:
        metadata = self._metadata
        n_files = metadata.get_int("split.count", 1)
        if n_files > 1:
            raise self._unsupported(f"it is one of {n_files} parts; join them into one file first")
        self._model = metadata.get_str("tokenizer.ggml.model")
        if self._model not in _DEFAULT_IDS:
            raise self._unsupported(
                f"its tokenizer is {quote(self._model)}; this version runs 'gpt2' and 'llama'"
            )
        pre = metadata.get_str("tokenizer.ggml.pre", "")
        if self._model == "gpt2" and pre in _RAW_PRE:
            raise self._unsupported(f"its pre-tokenizer {quote(pre)} is not byte-level")
        metadata.get_u32("tokenizer.ggml.token_type_count", None)
        for key in _BOOL_KEYS:
            metadata.get_bool(f"tokenizer.ggml.{key}", None)
        if _SUPPRESS in metadata:
            self._want_type(_SUPPRESS, "ARRAY of INT32")

    def _read_tokens(self) -> None:
        """Read the token texts; they must be text, distinct, and of bounded size."""
        raw, n = self._strings(_TOKENS)
        if not 1 <= n <= MAX_TOKENS:
            raise self._error(f"it has {n} tokens; 1 to {MAX_TOKENS} are allowed")
        lengths = np.diff(np.append(string_starts(raw, n), len(raw))) - LENGTH_BYTES
        if lengths.max() > MAX_TOKEN_BYTES:
            token = int(lengths.argmax())
            raise self._error(f"token {token} has {lengths[token]} bytes, over {MAX_TOKEN_BYTES}")
        joined = self._text(_TOKENS, raw, n)
        self._tokens = joined.split(SEPARATOR)[1:]
        self._check_distinct()
        if self._model == "gpt2":
            self._check_decoded_size(joined, lengths)

    def _check_distinct(self) -> None:
        """Refuse two tokens with one text, on which llama.cpp aborts.

        It renames an empty token to `[EMPTY_<id>]`, so that text counts as taken.
        """
        texts = set(self._tokens)
        if b"" not in texts and len(texts) == len(self._tokens):
            return
        first: dict[bytes, int] = {}
        for token, text in enumerate(self._tokens):
            name = text or f"[EMPTY_{token}]".encode()
            other = first.setdefault(name, token)
            if other != token:
                raise self._error(f"tokens {other} and {token} are both {quote(name)}")

    def _check_decoded_size(self, joined: bytes, lengths: npt.NDArray[np.int64]) -> None:
        """Bound what llama.cpp makes of characters outside the byte-level alphabet.

        For each such character it repeats the whole token, so one long token could fill
        the memory.
        """
        data = np.frombuffer(joined, dtype=np.uint8)
        before = np.concatenate(([np.uint8(0)], data[:-1]))
        # The alphabet in UTF-8: 21-7E; C2 A1-AC, C2 AE to C4 BF; C5 80-83.
        foreign = (data != 0) & (data < 0x21) | (data == 0x7F) | (data >= 0xC6)
        foreign |= (before == 0xC2) & ((data <= 0xA0) | (data == 0xAD))
        foreign |= (before == 0xC5) & (data > 0x83)
        at = np.flatnonzero(foreign)
        ends = np.cumsum(lengths + LENGTH_BYTES)
        token_of = np.searchsorted(ends, at, side="right")
        # Per character: the token's text and "[UNK_BYTE_0x" with up to eight digits and "]".
        decoded = int(np.sum(lengths[token_of] + 24))
        if decoded > MAX_DECODED_BYTES:
            raise self._error(
                f"{at.size} characters of its tokens are not byte-level and would take "
                f"{decoded} bytes; at most {MAX_DECODED_BYTES} are allowed"
            )

    def _check_types(self) -> None:
        if _TYPES not in self._metadata:
            return
        self._want_type(_TYPES, "ARRAY of INT32")
        self._want_length(_TYPES)
        types = self._metadata.get_array(_TYPES, int)
        if types.min() < 0 or types.max() > _BYTE_TYPE:
            wrong = int(np.flatnonzero((types < 0) | (types > _BYTE_TYPE))[0])
            raise self._error(f"token {wrong} has type {types[wrong]}; 0 to {_BYTE_TYPE} exist")
        n_special = int(np.count_nonzero(np.isin(types, _SPECIAL_TYPES)))
        if n_special > MAX_SPECIAL_TOKENS:
            raise self._error(f"it has {n_special} special tokens, over {MAX_SPECIAL_TOKENS}")
        for token in np.flatnonzero(types == _BYTE_TYPE):
            if not _BYTE_TEXT.fullmatch(self._tokens[token]):
                text = quote(self._tokens[token])
                raise self._error(f"byte token {token} is {text}; '<0x00>' to '<0xFF>' exist")

    def _check_scores(self) -> None:
        if _SCORES not in self._metadata:
            return
        if self._metadata.type_name(_SCORES) != "ARRAY of INT32":
            self._want_type(_SCORES, "ARRAY of FLOAT32")
            scores = self._metadata.get_array(_SCORES, float)
            if np.isnan(scores).any():
                # Merges are taken from a heap ordered by score, which NaN disorders.
                raise self._error(f"{quote(_SCORES)} contains NaN")
        self._want_length(_SCORES)

    def _check_ids(self) -> None:
        n_tokens = len(self._tokens)
        ids = {}
        for name in _ID_KEYS:
            key = f"tokenizer.ggml.{name}_token_id"
            ids[name] = self._metadata.get_u32(key, None, high=n_tokens - 1)
        for name in _SPARE_ID_KEYS:
            self._metadata.get_u32(f"tokenizer.ggml.{name}_token_id", None)
        default_bos, default_eos = _DEFAULT_IDS[self._model]
        # A missing flag may mean that a beginning is added; an end only if the file says so.
        if self._metadata.get_bool("tokenizer.ggml.add_bos_token", True):
            self._check_default("bos", ids["bos"], default_bos)
        if self._metadata.get_bool("tokenizer.ggml.add_eos_token", False):
            self._check_default("eos", ids["eos"], default_eos)

    def _check_default(self, name: str, token: int | None, default: int) -> None:
        if token is None and default >= len(self._tokens):
            raise self._error(
                f"'tokenizer.ggml.{name}_token_id' is missing, and its default {default} is "
                f"beyond the {len(self._tokens)} tokens"
            )

    def _check_merges(self) -> None:
        """Check that each merge is two non-empty texts with one space between them."""
        raw, n = self._strings(_MERGES)
        if n == 0:
            return
        joined = np.frombuffer(self._text(_MERGES, raw, n), dtype=np.uint8)
        starts = string_starts(raw, n)
        ends = np.append(starts[1:], len(raw))
        spaces = np.flatnonzero(joined == ord(" "))
        if spaces.size != n:
            raise self._error(f"{quote(_MERGES)} has {n} merges but {spaces.size} spaces")
        wrong = (spaces <= starts + LENGTH_BYTES) | (spaces >= ends - 1)
        if wrong.any():
            merge = int(np.flatnonzero(wrong)[0])
            text = raw[starts[merge] + LENGTH_BYTES : ends[merge]]
            raise self._error(f"merge {merge} is {quote(text)}; two texts and a space are needed")

    def _check_byte_tokens(self) -> None:
        """Check that every byte has a token, which SentencePiece falls back to unasked."""
        texts = set(self._tokens)
        for byte in range(256):
            if f"<0x{byte:02X}>".encode() not in texts and bytes([byte]) not in texts:
                raise self._error(f"no token stands for the byte 0x{byte:02X}")

    def _check_name(self) -> None:
        """Check the tokens that llama.cpp looks up in any model whose name has phi-3 in it."""
        name = self._metadata.get_str("general.name", "").lower()
        if "phi-3" not in name and "phi3" not in name:
            return
        for text in _PHI3_TOKENS:
            if text not in self._tokens:
                raise self._error(f"it is named {quote(name)} but lacks the token {quote(text)}")

    def _strings(self, key: str) -> tuple[bytes, int]:
        self._want_type(key, "ARRAY of STRING")
        return self._metadata.array_bytes(key), self._metadata.array_len(key)

    def _text(self, key: str, raw: bytes, n: int) -> bytes:
        """Return the strings joined by SEPARATOR, once they are UTF-8 without zero bytes."""
        joined = join_strings(raw, n)
        if joined is None:
            # llama.cpp reads C strings: what follows the zero byte would be lost.
            raise self._error(f"{quote(key)} contains a zero byte")
        try:
            joined.decode("utf-8")
        except UnicodeDecodeError as error:
            where = joined[max(error.start - 8, 0) : error.start + 8].strip(b"\0")
            raise self._error(f"{quote(key)} is not UTF-8 near {quote(where)}") from None
        return joined

    def _want_type(self, key: str, wanted: str) -> None:
        found = self._metadata.type_name(key)
        if found != wanted:
            raise self._error(f"{quote(key)} is {found}, but {wanted} is wanted")

    def _want_length(self, key: str) -> None:
        n, n_tokens = self._metadata.array_len(key), len(self._tokens)
        if n != n_tokens:
            raise self._error(f"{quote(key)} has {n} elements for {n_tokens} tokens")

    def _error(self, message: str) -> EdgerouteError:
        return ModelFileError(f"{self._metadata.label}: {message}")

    def _unsupported(self, message: str) -> EdgerouteError:
        return UnsupportedModelError(f"{self._metadata.label}: {message}")
