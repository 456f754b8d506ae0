"""How model families write calls to tools, and what a chat template makes of tools.

Sources: the chat templates that the families publish in their model files, and llama.cpp
docs/function-calling.md. What a template can do is found out by rendering it.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from edgeroute.runtime.errors import TemplateError
from edgeroute.runtime.template import render

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """One syntax of calls: `marker begin (before NAME middle ARGUMENTS after)... end`.

    Attributes:
        marker: what a call cannot be without, and free text is without; empty: the answer
            begins with a call, known by the name of a function in the right place.
        begin, end: around all calls; without a marker the end may be missing.
        before, middle, after: around each call's name and arguments.
        between: between two calls; None where an answer has one call at most.
        tagged: whether each argument has a tag of its own, see `tool_tags`; else they are JSON.
        shown: control tokens that vocabularies may have for parts of it.
        also: others, without a marker, that models of the family slip into when they are free;
            they differ in how they begin only.
    """

    marker: str
    before: str
    middle: str
    after: str
    between: str | None
    begin: str = ""
    end: str = ""
    tagged: bool = False
    shown: tuple[str, ...] = ()
    also: tuple["Style", ...] = ()

    @property
    def free(self) -> tuple["Style", ...]:
        """Those without a marker among this and the others."""
        return self.also if self.marker else (self, *self.also)


_NAME: Final = '{"name": "'
_ARGUMENTS: Final = '", "arguments": '
_BARE: Final = tuple(
    Style(marker="", begin=begin, before=_NAME, middle=_ARGUMENTS, after="}", between="\n",
          end="\n```")
    for begin in ("", "```json\n", "```\n")
)  # fmt: skip

HERMES: Final = Style(
    marker="<tool_call>", before=f"\n{_NAME}", middle=_ARGUMENTS, after="}\n</tool_call>",
    between="\n<tool_call>", shown=("<tool_call>", "</tool_call>"), also=_BARE,
)  # fmt: skip
TAGGED: Final = Style(
    marker="<tool_call>", before="\n<function=", middle=">\n", after="\n</tool_call>",
    between="\n<tool_call>", tagged=True, shown=("<tool_call>", "</tool_call>"),
)  # fmt: skip
MISTRAL: Final = Style(
    marker="[TOOL_CALLS]", begin="[", before=_NAME, middle=_ARGUMENTS, after="}",
    between=", ", end="]", shown=("[TOOL_CALLS]",),
)  # fmt: skip
MISTRAL_ARGS: Final = Style(
    marker="[TOOL_CALLS]", before="", middle="[ARGS]", after="", between="[TOOL_CALLS]",
    shown=("[TOOL_CALLS]", "[ARGS]"),
)  # fmt: skip
LLAMA: Final = Style(marker="", before=_NAME, middle='", "parameters": ', after="}", between=None)


def parts_of(syntax: str) -> list[str]:
    """Cut syntax into parts between which white space may stand."""
    return re.findall(r'\[\w+\]|"\w+"|[{}\[\]:,"]|[^\s{}\[\]:,"]+', syntax)


def style_of(template: str) -> Style | None:
    """Return the syntax that a template's text tells the model to use, if it is one of these."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:  # others put names of keys inside
        if "<function=" in template and "<parameter=" in template:
            return TAGGED
        other = ("<function=", "<arg_key>", "<parameter")
        is_hermes = "arguments" in template and not any(word in template for word in other)
        return HERMES if is_hermes else None
    if "<|start_header_id|>" in template and re.search(r'\{\\?"name\\?": ', template):
        return LLAMA if "parameters" in template else None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a chat template makes of messages.

    Attributes:
        style: syntax of its calls; None: it knows no tools, or calls in an unknown syntax, so
            that tools and calls are to be written into plain messages.
        wants_objects: whether arguments of calls are to be data, not JSON text.
        short_ids: whether ids of calls must be of nine letters and digits.
        has_system: whether it takes a system message.
    """

    style: Style | None
    wants_objects: bool = False
    short_ids: bool = False
    has_system: bool = True


PROBE_ID: Final = "call_0123456789abcdef01234567"
SHORT_ID: Final = "a1b2c3d4e"
_NEEDLE: Final = "needle_5f0c"
_USER: Final[Message] = {"role": "user", "content": "Hello"}
_TOOL: Final[Mapping[str, Any]] = {
    "type": "function",
    "function": {
        "name": _NEEDLE,
        "description": "finds",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}


@functools.lru_cache(maxsize=32)
def traits_of(template: str | None) -> Traits:
    """Find out what a template does with tools, calls and system messages; cached by its text.

    It is rendered up to eight times, each within the limits that any rendering has.
    """
    if template is None:
        return Traits(style=None)
    system = [{"role": "system", "content": _NEEDLE}, _USER]
    has_system = _NEEDLE in _try(template, system)
    style = style_of(template)
    if style is None or _NEEDLE not in _try(template, [_USER], [_TOOL]):
        return Traits(style=None, has_system=has_system)
    for call_id, wants_objects in (
        (PROBE_ID, False), (PROBE_ID, True), (SHORT_ID, False), (SHORT_ID, True),
    ):  # fmt: skip
        if _tells_calls(template, style, call_id, wants_objects):
            short = call_id == SHORT_ID
            return Traits(
                style=style, wants_objects=wants_objects, short_ids=short, has_system=has_system
            )
    return Traits(style=None, has_system=has_system)


def _tells_calls(template: str, style: Style, call_id: str, wants_objects: bool) -> bool:
    """Whether a call's arguments come out in its syntax, and its result at all."""
    arguments = {_NEEDLE: 1} if wants_objects else f'{{"{_NEEDLE}": 1}}'
    call = {
        "id": call_id,
        "type": "function",
        "function": {"name": "probe", "arguments": arguments},
    }
    found = _try(template, [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "probe", "tool_call_id": call_id, "content": "result_5f0c"},
    ], [_TOOL])  # fmt: skip
    told = f"<parameter={_NEEDLE}>\n1\n</parameter>" if style.tagged else f'{{"{_NEEDLE}":'
    return told in found and "result_5f0c" in found


def _try(
    template: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """Render; nothing comes out where the template refuses that."""
    try:
        return render(template, messages, bos_token="<s>", eos_token="</s>", tools=tools)
    except TemplateError:
        return ""
