"""Text to token ids and back, through the vocabulary inside a GGUF file."""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from edgeroute.runtime import vocab_stamp
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import ClosedError, ContextError, ModelFileError, UsageError
from edgeroute.runtime.ggml import llama as lib
from edgeroute.runtime.ggml.llama import last_errors, llama
from edgeroute.runtime.records import SamplingParams

if TYPE_CHECKING:
    from edgeroute.runtime.fence import Fence
    from edgeroute.runtime.gguf import GGUFFile
    from edgeroute.runtime.grammar import Grammar

MAX_TEXT_BYTES = 1 << 30
"""libllama counts bytes in an int32; this leaves room for what it adds."""

BOUND_FROM_BYTES = 1 << 16
"""Shorter texts are encoded at once: that costs less than the bound would."""

_NONE: frozenset[int] = frozenset()
_NO_DEVICES = (ctypes.c_void_p * 1)(None)
_LETTERS = bytes(b for b in range(256) if b >= 0x80 or chr(b).isalnum())
_SPACES = b" \t\r\n\v\f"
_SPECIAL = lib.ATTR_CONTROL | lib.ATTR_UNKNOWN


class Tokenizer(Closing):
    """A vocabulary and its special tokens; use it as a context manager.

    Text is encoded with `parse_special=False` unless the caller wrote it: what a user
    typed never becomes a control token.

    Lifetime: owns the C vocabulary until `close()`; grammars made from it must be freed
    first. Encoding and decoding are safe from several threads; those that do not own the model
    hold it `in_use`, which texts and pieces of tokens and what is encoded do by themselves.
    """

    def __init__(self, model: int) -> None:
        self._lib = llama()
        self._gate = threading.Condition()
        self._n_users = 0
        self._model: int | None = model
        vocab = self._lib.llama_model_get_vocab(model)
        if vocab is None or self._lib.llama_vocab_type(vocab) == lib.VOCAB_NONE:
            self.close()
            raise ModelFileError("the model file has no vocabulary; use a file with a tokenizer")
        self._vocab = vocab
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(vocab)
        self.bos = _optional(self._lib.llama_vocab_bos(vocab))
        self.eos = _optional(self._lib.llama_vocab_eos(vocab))
        self.eot = _optional(self._lib.llama_vocab_eot(vocab))
        self.add_bos: bool = self._lib.llama_vocab_get_add_bos(vocab)
        self.add_eos: bool = self._lib.llama_vocab_get_add_eos(vocab)
        template = self._lib.llama_model_chat_template(model, None)
        self.chat_template = None if template is None else template.decode(errors="replace")
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def open(cls, file: "GGUFFile") -> Self:
        """Load the vocabulary of an opened model file; its weights are not read.

        Raises:
            ModelFileError: the file's vocabulary is malformed or missing.
        """
        mark = vocab_stamp.stamp(file)
        if not vocab_stamp.is_known(mark):
            from edgeroute.runtime.vocab_check import check_vocab

            check_vocab(file)
            vocab_stamp.remember(mark)
        return cls.open_unchecked(str(file.path))

    @classmethod
    def open_unchecked(cls, path: str) -> Self:
        """Load a vocabulary from a file that is known to be well-formed.

        A hostile file may end the process: libllama asserts. `open` checks first.

        Raises:
            ModelFileError: libllama refused the file; the message carries its reason.
        """
        library = llama()
        params = library.llama_model_default_params()
        params.vocab_only = True
        params.n_gpu_layers = 0
        params.load_mode = lib.LOAD_MODE_MMAP
        params.lazy_mode = lib.LAZY_MODE_OFF
        params.devices = ctypes.addressof(_NO_DEVICES)
        last_errors()
        model = library.llama_model_load_from_file(path.encode(errors="surrogateescape"), params)
        if model is None:
            reason = last_errors() or "no reason was given"
            raise ModelFileError(f"cannot read the vocabulary of {path}: {reason}")
        return cls(model)

    def close(self) -> None:
        """Free the vocabulary, once no other thread has it `in_use`; twice is fine.

        Whoever asked for an answer may have left, and his model be closed, while a thread still
        encodes his prompt.
        """
        with self._gate:
            model, self._model = self._model, None
            while self._n_users:
                self._gate.wait()
        if model is not None:
            self._lib.llama_model_free(model)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[int]:
        """Let nobody free the C vocabulary, whose address it gives; for threads that do not own it.

        Raises:
            ClosedError: the tokenizer was closed; also meanwhile, by what is asked of it.
        """
        with self._gate:
            vocab = self.vocab
            self._n_users += 1
        try:
            yield vocab
        finally:
            with self._gate:
                self._n_users -= 1
                self._gate.notify_all()

    @property
    def vocab(self) -> int:
        """The C vocabulary's address.

        Raises:
            ClosedError: the tokenizer was closed.
        Lifetime: valid until `close()`.
        """
        if self._model is None:
            raise ClosedError("the tokenizer is closed")
        return self._vocab

    def is_eog(self, token_id: int) -> bool:
        """Whether a token ends generation."""
        return self._lib.llama_vocab_is_eog(self.vocab, self._check(token_id))

    def is_control(self, token_id: int) -> bool:
        """Whether a token is a control token, which no plain text encodes to."""
        return self._lib.llama_vocab_is_control(self.vocab, self._check(token_id))

    @functools.cached_property
    def eog_ids(self) -> frozenset[int]:
        """Every token that ends generation."""
        is_eog, vocab = self._lib.llama_vocab_is_eog, self.vocab
        return frozenset(i for i in range(self.n_vocab) if is_eog(vocab, i))

    @functools.cached_property
    def hidden_ids(self) -> list[int]:
        """Tokens that stand for no text and do not end generation."""
        return [i for i in self._with_attr(_SPECIAL) if i not in self.eog_ids]

    def shown_ids(self, texts: Sequence[str]) -> frozenset[int]:
        """Control tokens with one of these texts, without those that end generation."""
        wanted = frozenset(texts)
        return frozenset(i for i in self.hidden_ids if self.text(i) in wanted) if wanted else _NONE

    def pieces(self, shown: Sequence[str]) -> Callable[[int], bytes]:
        """Return what gives a token's bytes, control tokens of these texts included."""
        ids = self.shown_ids(shown)
        return (lambda i: self.piece(i, special=i in ids)) if ids else self.piece

    def constraint(self, params: SamplingParams) -> "Grammar | None":
        """Compile the grammar or JSON schema of a request, if it has one.

        Raises:
            GrammarError: it cannot be used.
        """
        if params.grammar is None and params.json_schema is None:
            return None
        from edgeroute.runtime.grammar import compile_constraint

        return compile_constraint(self, params)

    def text(self, token_id: int) -> str:
        """A token as the vocabulary spells it, special tokens included."""
        with self.in_use() as vocab:
            raw = self._lib.llama_vocab_get_text(vocab, self._check(token_id))
            return (raw or b"").decode(errors="replace")

    def encode(
        self, text: str, *, add_special: bool, parse_special: bool, max_tokens: int | None = None
    ) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any text that UTF-8 can carry; NUL characters are text too.
            add_special: add what the model expects around a prompt, such as BOS.
            parse_special: read control tokens out of the text; never for user text.
            max_tokens: refuse a longer result, and hopelessly long text before encoding it.

        Raises:
            UsageError: the text has lone surrogates or is larger than 1 GiB.
            ContextError: more than `max_tokens` tokens.
        """
        data = encode_utf8(text)
        self._refuse_hopeless(data, max_tokens)
        ids = self._tokenize(data, add_special=add_special, parse_special=parse_special)
        refuse_above(len(ids), max_tokens)
        return ids

    def encode_more(self, text: str) -> list[int]:
        """Encode text that continues another: nothing is put before it, no control token read.

        Raises:
            UsageError: as `encode`.
        """
        data = encode_utf8(text)
        self._refuse_hopeless(data, None)
        return self._tokenize_span(data, parse_special=False, first=False)

    def encode_fenced(
        self, rendered: str, fence: "Fence", *, add_bos: bool, max_tokens: int | None = None
    ) -> list[int]:
        """Encode a rendered chat template whose user text was guarded by `fence`.

        Control tokens of the template are parsed; a control token's text that contains any
        guarded character stays text. Without such a text the result is exactly that of
        encoding the plain rendering with `parse_special=True`.

        Raises:
            UsageError, ContextError: as `encode`.
        """
        spans = fence.split(rendered)
        self._refuse_hopeless(b"".join(encode_utf8(text) for text, _ in spans), max_tokens)
        ids: list[int] = []
        for i, (text, is_user) in enumerate(spans):
            ids += self._tokenize_span(encode_utf8(text), parse_special=not is_user, first=i == 0)
        if add_bos and self.bos is not None:
            ids = [self.bos, *ids]
        refuse_above(len(ids), max_tokens)
        return ids

    def refuse_long(self, texts: Sequence[str], max_tokens: int | None) -> None:
        """Refuse texts that together cannot fit, before anything is done with them.

        Raises:
            UsageError, ContextError: as `encode`.
        """
        self._refuse_hopeless(b"".join(map(encode_utf8, texts)), max_tokens)

    def fence(self, *texts: str) -> "Fence":
        """Make a fence for one rendering; `texts` are all strings that it will see."""
        # A plain prompt should not wait for this import.
        from edgeroute.runtime.fence import Fence

        return Fence(self._control_texts, texts)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Turn token ids into text; invalid UTF-8 becomes U+FFFD.

        Args:
            ids: tokens of this vocabulary.
            special: render control tokens too.
        """
        data = b"".join(self.piece(i, special=special) for i in ids)
        return data.decode(errors="replace")

    def piece(self, token_id: int, *, special: bool = False) -> bytes:
        """The bytes that one token stands for; a control token's are empty unless asked.

        Raises:
            UsageError: the id is outside the vocabulary.
        """
        key = ~token_id if special else token_id
        known = self._pieces.get(key)
        if known is None:
            known = self._pieces[key] = self._render(self._check(token_id), special)
        return known

    def _check(self, token_id: int) -> int:
        if not 0 <= token_id < self.n_vocab:
            raise UsageError(
                f"token id {token_id} is outside the vocabulary of {self.n_vocab} tokens"
            )
        return token_id

    def _render(self, token_id: int, special: bool) -> bytes:
        size = 64
        with self.in_use() as vocab:
            while True:
                buffer = ctypes.create_string_buffer(size)
                n = self._lib.llama_token_to_piece(vocab, token_id, buffer, size, 0, special)
                if n >= 0:
                    return buffer.raw[:n]
                size = -n

    def _tokenize(self, data: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        with self.in_use() as vocab:
            return self._tokens(vocab, data, add_special, parse_special)

    def _tokens(self, vocab: int, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
        room = len(data) + 16
        while True:
            buffer = (ctypes.c_int32 * room)()
            n = self._lib.llama_tokenize(
                vocab, data, len(data), buffer, room, add_special, parse_special
            )
            if n >= 0:
                return buffer[:n]
            if -n <= room:  # INT32_MIN, or a library that contradicts itself
                raise UsageError(f"libllama cannot encode a text of {len(data)} bytes")
            room = -n

    def _tokenize_span(self, data: bytes, *, parse_special: bool, first: bool) -> list[int]:
        """Encode a part of a text without the space that SPM puts before a whole one."""
        plain = self._tokenize(data, add_special=False, parse_special=parse_special)
        if first or not plain or self._lib.llama_vocab_type(self.vocab) != lib.VOCAB_SPM:
            return plain
        guard = self._tokenize(b"\n", add_special=False, parse_special=False)
        guarded = self._tokenize(b"\n" + data, add_special=False, parse_special=parse_special)
        return guarded[len(guard) :] if guarded[: len(guard)] == guard else plain

    def _refuse_hopeless(self, data: bytes, max_tokens: int | None) -> None:
        """Refuse text that cannot fit, in time proportional to a few scans of its bytes."""
        if len(data) > MAX_TEXT_BYTES:
            raise UsageError(f"the text has {len(data)} bytes, the limit is {MAX_TEXT_BYTES}")
        if max_tokens is None or len(data) <= max(max_tokens, BOUND_FROM_BYTES):
            return
        n_any, n_letter, n_space = self._longest
        bound = -(-len(data) // n_any)
        if n_letter:
            bound = max(bound, -(-_count(data, _LETTERS) // n_letter))
        if n_space:
            bound = max(bound, -(-_count(data, _SPACES) // n_space))
        refuse_above(bound, max_tokens, at_least=True)

    @functools.cached_property
    def _longest(self) -> tuple[int, int, int]:
        """The most bytes, letter bytes and space bytes that one token can cover."""
        pieces = self._all_pieces()
        starts = np.cumsum([0, *map(len, pieces[:-1])])
        data = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        longest = max(map(len, pieces))
        if self._lib.llama_vocab_type(self.vocab) not in (lib.VOCAB_SPM, lib.VOCAB_BPE):
            return max(longest, 256), 0, 0  # other kinds fold spaces and unknown words
        n_letter, n_space = (_most(data, starts, members) for members in (_LETTERS, _SPACES))
        if self._with_attr(lib.ATTR_LSTRIP | lib.ATTR_RSTRIP):  # these swallow spaces
            return max(longest, 256), n_letter, 0
        return longest, n_letter, n_space

    def _all_pieces(self) -> list[bytes]:
        """Every token's bytes, at least one each so that numpy can tell them apart."""
        render, vocab, buffer = self._lib.llama_token_to_piece, self.vocab, bytearray(256)
        raw = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        pieces = []
        for i in range(self.n_vocab):
            n = render(vocab, i, raw, len(buffer), 0, True)
            pieces.append(bytes(buffer[:n]) if n > 0 else self._render(i, True) or b"-")
        return pieces

    @functools.cached_property
    def _attrs(self) -> NDArray[np.int32]:
        attr, vocab = self._lib.llama_vocab_get_attr, self.vocab
        return np.array([attr(vocab, i) for i in range(self.n_vocab)], dtype=np.int32)

    def _with_attr(self, bits: int) -> list[int]:
        return [int(i) for i in np.flatnonzero(self._attrs & bits)]

    @functools.cached_property
    def _control_texts(self) -> Sequence[str]:
        """The texts that `parse_special` turns into tokens that plain text never gives."""
        return tuple(sorted({self.text(i) for i in self._with_attr(_SPECIAL)} - {""}))


def encode_utf8(text: str) -> bytes:
    """Encode text for the C library.

    Raises:
        UsageError: not a str, or it has lone surrogates; the message gives the place.
    """
    if not isinstance(text, str):
        raise UsageError(f"text must be a str, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}; replace it, for instance with text.encode(errors='replace')"
        ) from None


def refuse_above(n_tokens: int, max_tokens: int | None, *, at_least: bool = False) -> None:
    """Refuse a prompt with more tokens than there is room for.

    Raises:
        ContextError: n_tokens > max_tokens; the message gives both.
    """
    if max_tokens is not None and n_tokens > max_tokens:
        amount = f"at least {n_tokens}" if at_least else str(n_tokens)
        raise ContextError(
            f"the prompt has {amount} tokens, but there is room for {max_tokens}; "
            "shorten the prompt or raise n_ctx"
        )


def _count(data: bytes, members: bytes) -> int:
    return len(data) - len(data.translate(None, members))


def _most(data: NDArray[np.uint8], starts: NDArray[np.int64], members: bytes) -> int:
    """The most bytes out of `members` in one of the pieces that begin at `starts`."""
    is_member = np.zeros(256, dtype=np.int32)
    is_member[list(members)] = 1
    return int(np.add.reduceat(is_member[data], starts).max())


def _optional(token_id: int) -> int | None:
    return None if token_id == lib.TOKEN_NULL else token_id
