"""OpenAI's fields that one machine has no use for: taken where they change nothing, else refused.

A field is taken silently only if leaving it out could not change the answer: `user`, `metadata`,
`safety_identifier`, `prompt_cache_key` and `prompt_cache_retention` are notes for an operator,
`prediction` is a hint for speed, `stream_options.include_obfuscation` asks for padding against
eavesdroppers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from edgeroute.server.bodies import Body
from edgeroute.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Rule:
    """Values of a field that ask for nothing special, beside null; and why others are refused."""

    taken: tuple[Any, ...]
    why: str


RULES: Final[Mapping[str, Rule]] = {
    "store": Rule((False,), "answers are not stored here"),
    "service_tier": Rule(("auto", "default"), "there is one tier of service here"),
    "modalities": Rule((["text"],), "models here write text only"),
    "audio": Rule((), "models here write text only"),
    "reasoning_effort": Rule(("none",), "models here have no setting for how much they reason"),
    "verbosity": Rule(("medium",), "models here have no setting for how much they say"),
    "web_search_options": Rule((), "models here cannot search the web"),
    "functions": Rule((), "this older form is not supported, pass tools"),
    "function_call": Rule((), "this older form is not supported, pass tool_choice"),
    "suffix": Rule(("",), "text before a given ending cannot be written here"),
}


def check_fields(body: Body) -> None:
    """Refuse what is asked for and cannot be had.

    Raises:
        ApiError: 400, with the field and what it may be.
    """
    for name, rule in RULES.items():
        value = getattr(body, name, None)
        if value is None or value in rule.taken:
            continue
        others = "".join(f" or set it to {each!r}" for each in rule.taken if each != "")
        raise ApiError(
            400, f"{name}={value!r:.80} is not supported: {rule.why}; leave it out{others}",
            param=name, code="unsupported_parameter",
        )  # fmt: skip
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options is only allowed where stream is true", param="stream_options"
        )
