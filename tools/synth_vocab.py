"""Small but real tokenizers for synthetic models: byte-level BPE, and SentencePiece-like.

Both cover every byte, so any text can be encoded, and both have the control tokens and
the chat template that their model family is known by.
"""

from dataclasses import dataclass
from typing import Final

from gguf import GGUFWriter, TokenType

_TEXT: Final = (
    "the and ing in er re on at en es or is it he an ed of to ou ar as ion that for you with "
    "this was have not are from what when one all can will there their which about time would"
)
_WORDS: Final = _TEXT.split()

CHATML_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


_ENDINGS: Final = ("<|endoftext|>", "<|im_end|>", "<eos>", "<end_of_turn>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthVocab:
    """A vocabulary as GGUF stores it; `merges` for BPE, `scores` for SPM."""

    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    chat_template: str
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int | None
    add_bos: bool
    merges: list[str] | None = None
    scores: list[float] | None = None

    def ending_ids(self) -> list[int]:
        """Return the tokens at which llama.cpp ends an answer."""
        return [self.tokens.index(token) for token in _ENDINGS if token in self.tokens]

    def write(self, writer: GGUFWriter) -> None:
        """Add the tokenizer's keys to a file that is being written."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.token_types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_bos_token_id(self.bos_id)
        writer.add_eos_token_id(self.eos_id)
        writer.add_pad_token_id(self.pad_id)
        if self.unk_id is not None:
            writer.add_unk_token_id(self.unk_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_space_prefix(False)
        writer.add_chat_template(self.chat_template)


def bpe_vocab(n_vocab: int, pre: str) -> SynthVocab:
    """Return a byte-level BPE vocabulary of exactly `n_vocab` tokens.

    Ids 0 to 2 are `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`, id 3 the user-defined
    `<tool>`; then 256 bytes, merged pieces, and reserved control tokens to fill up.
    """
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    types = [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED]
    tokens += byte_characters()
    types += [TokenType.NORMAL] * 256
    merges: list[str] = []
    for word in _WORDS:
        _merge_word("Ġ" + word, tokens, merges, limit=n_vocab)
    types += [TokenType.NORMAL] * len(merges)
    _fill(tokens, types, n_vocab)
    return SynthVocab(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        token_types=[int(token_type) for token_type in types],
        merges=merges,
        chat_template=CHATML_TEMPLATE,
        bos_id=1,
        eos_id=2,
        pad_id=0,
        unk_id=None,
        add_bos=False,
    )


def spm_vocab(n_vocab: int) -> SynthVocab:
    """Return a SentencePiece-like vocabulary of exactly `n_vocab` tokens, as Gemma has.

    Ids 0 to 3 are `<pad>`, `<eos>`, `<bos>` and `<unk>`, then `<start_of_turn>`,
    `<end_of_turn>`, 256 byte tokens, characters, pieces by falling score, and fillers.
    """
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    types = [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN] + [TokenType.CONTROL] * 2
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [TokenType.BYTE] * 256
    n_fixed = len(tokens)
    pieces = ["\n", "▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'"]
    for word in _WORDS:
        text = "▁" + word
        pieces += [text[:end] for end in range(2, len(text) + 1) if text[:end] not in pieces]
    pieces = pieces[: n_vocab - n_fixed]
    tokens += pieces
    types += [TokenType.NORMAL] * len(pieces)
    scores = [0.0] * n_fixed + [-float(rank) for rank in range(len(pieces))]
    _fill(tokens, types, n_vocab)
    scores += [0.0] * (n_vocab - len(scores))
    return SynthVocab(
        model="llama",
        pre="default",
        tokens=tokens,
        token_types=[int(token_type) for token_type in types],
        scores=scores,
        chat_template=GEMMA_TEMPLATE,
        bos_id=2,
        eos_id=1,
        pad_id=0,
        unk_id=3,
        add_bos=True,
    )


def byte_characters() -> list[str]:
    """Return the printable character that byte-level BPE uses for each byte, 0 to 255.

    Source: Radford et al. 2019 (GPT-2): printable bytes stand for themselves, the others
    for the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, next_free = [], 256
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(next_free))
            next_free += 1
    return characters


def _merge_word(word: str, tokens: list[str], merges: list[str], *, limit: int) -> None:
    """Add the left-to-right merges that build `word`, while there is room."""
    known = set(tokens)
    for end in range(2, len(word) + 1):
        if len(tokens) == limit:
            return
        if word[:end] not in known:
            merges.append(f"{word[: end - 1]} {word[end - 1]}")
            tokens.append(word[:end])
            known.add(word[:end])


def _fill(tokens: list[str], types: list[TokenType], n_vocab: int) -> None:
    for index in range(n_vocab - len(tokens)):
        tokens.append(f"<|reserved_{index}|>")
        types.append(TokenType.CONTROL)
