"""What a pool's choice looks at of a chat."""

from collections.abc import Mapping, Sequence


def chat_text(messages: object) -> str:
    """Join what a choice looks at of a chat: its system texts and the last of its others.

    What is no chat gives what text it has; the model refuses it.
    """
    each = (
        [one for one in messages if isinstance(one, Mapping)]
        if isinstance(messages, Sequence)
        else []
    )
    kept = [one for one in each[:-1] if one.get("role") == "system"] + each[-1:]
    return "\n".join(_content(one.get("content")) for one in kept)


def _content(content: object) -> str:
    if isinstance(content, list | tuple):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
