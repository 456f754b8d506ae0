"""The steps of an answer, said on one line."""

from collections.abc import Sequence
from typing import Any


def steps_part(parts: Sequence[dict[str, Any]]) -> str:
    """Say who wrote the steps of an answer, and what that took beside the writing.

    Args:
        parts: `GenerationStats.steps`, in order; not empty.
    """
    steps = {part["index"] for part in parts}
    large = [part for part in parts if part["model"] == "large"]
    n_tokens = sum(part["n_tokens"] for part in parts)
    share = sum(part["n_tokens"] for part in large) / max(1, n_tokens)
    text = (f"steps: {len(steps)}, {len({part['index'] for part in large})} by the large model "
            f"({share:.0%} of tokens)")  # fmt: skip
    if refused := sum(part["n_refused"] for part in parts):
        text += f", {refused} drafted tokens refused"
    read = {who: sum(part[f"read_{who}"] for part in parts) for who in ("small", "large")}
    text += f", read: {read['small']} tokens by the small model, {read['large']} by the large one"
    fallen = {who: len({part["index"] for part in parts
                        if part["reason"] == "fallback" and part["model"] == who})
              for who in ("small", "large")}  # fmt: skip
    if fallen["small"]:
        text += f", {fallen['small']} by the small model because the remote one failed"
    if fallen["large"]:
        text += f", {fallen['large']} by the large model because the small one could not follow"
    return text
