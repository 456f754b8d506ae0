"""Chat templates: messages in, the text or tokens that the model was trained on out."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.exceptions import SecurityError

from edgeroute.runtime.errors import TemplateError, UsageError
from edgeroute.runtime.template_guard import METER, GuardedEnvironment, LimitError, Meter

if TYPE_CHECKING:
    from edgeroute.runtime.tokenizer import Tokenizer

MAX_SOURCE_CHARS = 1 << 17
MAX_SOURCE_TOKENS = 10_000
"""Jinja takes some 50 us per token to compile. Of the 70 templates that llama.cpp keeps as
samples the longest has 3,770."""

MAX_MESSAGES = 10_000
MAX_DATA_DEPTH = 32
MAX_DATA_VALUES = 100_000
MAX_DATA_CHARS = 1 << 23

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")
EXTRA_KEYS = frozenset(("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking"))

Message = Mapping[str, Any]


def render(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Render a chat template as Hugging Face does.

    Args:
        template: Jinja2 source, from a model file: not trusted.
        messages: role and content each; content is a text or a list of text parts.
        bos_token: text of the token that begins a sequence.
        eos_token: text of the token that ends one.
        add_generation_prompt: end where the assistant's answer begins.
        tools: functions that the model may call, as JSON schemas.

    Raises:
        UsageError: the messages are malformed.
        TemplateError: the template is malformed, refuses these messages, or goes beyond a
            limit of size, steps or time.
    """
    values = {
        "messages": check_messages(messages),
        "tools": None if tools is None else _check_data(list(tools), "tools"),
        "documents": None,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
    }
    with_meter = METER.set(Meter())
    try:
        compiled = _compile(template)
        METER.set(Meter())
        return "".join(compiled.generate(values))
    except TemplateError:
        raise
    except LimitError as error:
        raise TemplateError(f"the chat template is refused: {error}") from None
    except SecurityError as error:
        raise TemplateError(f"the chat template is refused, it is not safe: {error}") from None
    except (RecursionError, MemoryError) as error:
        raise TemplateError(
            f"the chat template nests or grows too far ({type(error).__name__})"
        ) from None
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template refused the messages: {error}") from None
    except Exception as error:  # a template may fail in as many ways as Python can
        raise TemplateError(
            f"the chat template failed: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    finally:
        METER.reset(with_meter)


def encode_chat(
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_tokens: int | None = None,
) -> list[int]:
    """Render messages with the model's template and encode them.

    Texts inside messages and tools never become control tokens, whatever they contain.

    Args:
        tokenizer: the model's.
        messages: as `render`.
        template: used instead of the one in the model file.
        add_generation_prompt: as `render`.
        tools: as `render`.
        max_tokens: refuse a longer result.

    Raises:
        UsageError: the messages are malformed.
        ContextError: more than `max_tokens` tokens.
        TemplateError: as `render`, or the model has no template.
    """
    source = template if template is not None else tokenizer.chat_template
    if source is None:
        raise TemplateError(
            "this model has no chat template; pass a plain prompt, or a template of your own"
        )
    data = check_messages(messages)
    extra = None if tools is None else _check_data(list(tools), "tools")
    tokenizer.refuse_long(list(_strings([m.get("content") for m in data])), max_tokens)
    fence = tokenizer.fence(source, *_strings(data), *_strings(extra))
    guarded = [
        {"role": m["role"], **{k: fence.guard_all(v) for k, v in m.items() if k != "role"}}
        for m in data
    ]
    bos = "" if tokenizer.bos is None else tokenizer.text(tokenizer.bos)
    eos = "" if tokenizer.eos is None else tokenizer.text(tokenizer.eos)
    rendered = render(
        source,
        guarded,
        bos_token=bos,
        eos_token=eos,
        add_generation_prompt=add_generation_prompt,
        tools=None if extra is None else fence.guard_all(extra),  # type: ignore[arg-type]
    )
    has_bos = bool(bos) and rendered.startswith(bos)
    return tokenizer.encode_fenced(
        rendered, fence, add_bos=tokenizer.add_bos and not has_bos, max_tokens=max_tokens
    )


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Return messages whose content is one text each.

    Raises:
        UsageError: the message's number and what is wrong with it.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError("messages must be a list of {'role': ..., 'content': ...}, not empty")
    if len(messages) > MAX_MESSAGES:
        raise UsageError(f"{len(messages)} messages were given, the limit is {MAX_MESSAGES}")
    _check_data(list(messages), "messages")
    return [_check_message(message, i) for i, message in enumerate(messages)]


def _check_message(message: object, i: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"message {i} must be a dict, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise UsageError(f"message {i}: role must be among {', '.join(ROLES)}, got {role!r}")
    unknown = sorted(str(key) for key in message.keys() - EXTRA_KEYS - {"role", "content"})
    if unknown:
        raise UsageError(f"message {i} has unknown keys: {', '.join(unknown)[:200]}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, i) for part in content)
    if not isinstance(content, str):
        raise UsageError(f"message {i}: content must be a text, got {type(content).__name__}")
    return {**message, "role": role, "content": content}


def _part(part: object, i: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise UsageError(f"message {i}: content parts must be {{'type': 'text', 'text': ...}}")


def _check_data(value: Any, name: str) -> Any:
    """Bound JSON-like data from a caller before anything recurses into it."""
    todo: list[tuple[Any, int]] = [(value, 0)]
    n_values = n_chars = 0
    while todo:
        item, depth = todo.pop()
        n_values += 1
        if isinstance(item, str):
            n_chars += len(item)
        elif isinstance(item, Mapping):
            todo += [(v, depth + 1) for pair in item.items() for v in pair]
        elif isinstance(item, list | tuple):
            todo += [(v, depth + 1) for v in item]
        elif not isinstance(item, int | float | None):
            raise UsageError(f"{name} contain a {type(item).__name__}, which is not JSON")
        if depth > MAX_DATA_DEPTH or n_values > MAX_DATA_VALUES or n_chars > MAX_DATA_CHARS:
            raise UsageError(
                f"{name} are too large: the limits are {MAX_DATA_VALUES} values, "
                f"{MAX_DATA_CHARS} characters and {MAX_DATA_DEPTH} levels"
            )
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """Compile once per source; a template that does not compile harms nothing but chat."""
    if len(template) > MAX_SOURCE_CHARS:
        raise TemplateError(
            f"the chat template has {len(template)} characters, the limit is {MAX_SOURCE_CHARS}"
        )
    try:
        n_tokens = sum(1 for _ in _environment().lex(template))
        if n_tokens > MAX_SOURCE_TOKENS:
            raise TemplateError(
                f"the chat template has {n_tokens} tokens of Jinja, the limit is "
                f"{MAX_SOURCE_TOKENS}"
            )
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is malformed, line {error.lineno}: {error.message}"
        ) from None
    except SyntaxError as error:
        raise TemplateError(f"the chat template cannot be compiled: {error.msg}") from None


@functools.cache
def _environment() -> GuardedEnvironment:
    return GuardedEnvironment()
