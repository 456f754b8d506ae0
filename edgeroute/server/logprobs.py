"""Log-probabilities in the shapes of both endpoints."""

from collections.abc import Sequence
from typing import Any, Final

from edgeroute.runtime.records import TokenLogprob
from edgeroute.runtime.tokenizer import Tokenizer

LEAST: Final = -9999.0
"""What stands for a probability of nothing, as OpenAI has it: JSON knows no infinity."""


class Spelling:
    """Spells the tokens of one vocabulary.

    Lifetime: the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Return `logprobs` of a chat answer, or of a piece of one; None for no tokens."""
        if not found:
            return None
        content = []
        for each in found:
            top = [self._entry(token_id, value) for token_id, value in each.top]
            content.append(self._entry(each.token_id, each.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def text(self, found: Sequence[TokenLogprob], offset: int) -> tuple[dict[str, Any] | None, int]:
        """Return `logprobs` of a completion's piece, and where the next one begins.

        Args:
            found: its tokens.
            offset: characters of the answer's tokens before it.
        """
        if not found:
            return None, offset
        tokens = [self._word(each.token_id) for each in found]
        offsets = []
        for each in found:
            offsets.append(offset)
            offset += len(self._bytes(each.token_id).decode(errors="replace"))
        top: list[dict[str, float]] | None = [
            {self._word(token_id): _bounded(value) for token_id, value in each.top}
            for each in found
        ]
        if not any(each.top for each in found):
            top = None
        return {
            "tokens": tokens,
            "token_logprobs": [_bounded(each.logprob) for each in found],
            "top_logprobs": top,
            "text_offset": offsets,
        }, offset

    def _entry(self, token_id: int, value: float) -> dict[str, Any]:
        raw = self._bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": _bounded(value),
                "bytes": list(raw)}  # fmt: skip

    def _word(self, token_id: int) -> str:
        """A token's text; where it is part of a character, its bytes, so that keys stay unique."""
        raw = self._bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes(self, token_id: int) -> bytes:
        return self._tokenizer.piece(token_id, special=True)


def joined(pieces: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Put the log-probabilities of an answer's pieces together; None where there are none."""
    told = [each for each in pieces if each is not None]
    if not told:
        return None
    whole: dict[str, Any] = {}
    for name in told[0]:
        lists = [each[name] for each in told if each[name] is not None]
        whole[name] = [item for part in lists for item in part] if lists else None
    return whole


def _bounded(value: float) -> float:
    return max(LEAST, value)
