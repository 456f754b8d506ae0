"""A Jinja environment in which a hostile chat template cannot hang or fill the memory.

The sandbox of Jinja keeps a template from reaching Python; it does not bound work. Here
every loop step, call, operator, literal, filter and piece of output passes a meter that
counts steps, characters and processor time, so that no single step can grow large before
it is refused.
"""

import functools
import json
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.filters import FILTERS, do_indent
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

MAX_STEPS = 2_000_000
MAX_ITEMS = 100_000
MAX_CPU_S = 0.5
MAX_OUTPUT_CHARS = 1 << 24
MAX_VALUE_CHARS = 1 << 24

ALLOWED_FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items last length lower "
    "map max min reject rejectattr reverse round safe select selectattr sort title trim unique "
    "upper"
)
STR_METHODS = (
    "strip lstrip rstrip split rsplit splitlines startswith endswith lower upper title "
    "capitalize swapcase replace join find rfind index count partition rpartition removeprefix "
    "removesuffix isdigit isdecimal isnumeric isalpha isalnum isspace islower isupper"
)
_STR_METHODS = frozenset(STR_METHODS.split())


class LimitError(Exception):
    """A template went beyond a limit; not an error that a template can catch."""


class Meter:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.n_steps = 0
        self.n_chars = 0
        self.deadline_s = time.thread_time() + MAX_CPU_S

    def step(self, n: int = 1) -> None:
        self.n_steps += n
        if self.n_steps > MAX_STEPS:
            raise LimitError(f"it takes more than {MAX_STEPS} steps")
        if time.thread_time() > self.deadline_s:
            raise LimitError(f"it takes more than {MAX_CPU_S} s of processor time")

    def emit(self, n_chars: int) -> None:
        self.n_chars += n_chars
        if self.n_chars > MAX_OUTPUT_CHARS:
            raise LimitError(f"it writes more than {MAX_OUTPUT_CHARS} characters")

    def grow(self, n_chars: int) -> None:
        """Refuse a text before it is made."""
        self.step()
        if n_chars > MAX_VALUE_CHARS:
            raise LimitError(f"it makes a text of more than {MAX_VALUE_CHARS} characters")


METER: ContextVar[Meter] = ContextVar("METER")


def weigh(value: object) -> int:
    """Characters that a value has as text, nearly.

    Raises:
        LimitError: it has more parts or characters than a template may handle at once.
    """
    n_parts = n_chars = 0
    todo = [value]
    while todo:
        item = todo.pop()
        n_parts += 1
        if isinstance(item, str | bytes):
            n_chars += len(item)
        elif isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            if len(todo) + len(item) > 4 * MAX_ITEMS:
                raise LimitError(f"it handles more than {MAX_ITEMS} values at once")
            todo += item
        if n_parts > 4 * MAX_ITEMS or n_chars > MAX_VALUE_CHARS:
            raise LimitError(f"it handles more than {MAX_ITEMS} values at once")
    METER.get().step(1 + n_parts // 64)
    return n_chars + 2 * n_parts


def text_of(value: object) -> str:
    """str(), once the result is known to be of a sane size."""
    if not isinstance(value, str):
        weigh(value)
        return str(value)
    return value


class _Steps:
    """An iterable whose steps are counted; sized when the one below is."""

    def __init__(self, below: Any) -> None:
        self._below = below

    def __iter__(self) -> Iterator[Any]:
        meter = METER.get()
        for item in self._below:
            meter.step()
            yield item

    def __len__(self) -> int:
        return len(self._below)


def _take(values: Iterable[Any]) -> list[Any]:
    """Turn an iterable into a list of bounded length."""
    taken = []
    for item in _Steps(values):
        taken.append(item)
        if len(taken) > MAX_ITEMS:
            raise LimitError(f"it handles more than {MAX_ITEMS} values at once")
    return taken


@pass_context
def _loop(_context: object, value: Any) -> Any:
    return value if isinstance(value, Undefined) else _Steps(value)


@pass_context
def _concat(_context: object, values: list[Any]) -> str:
    parts = [text_of(value) for value in values]
    METER.get().grow(sum(map(len, parts)))
    return "".join(parts)


@pass_context
def _built(_context: object, value: Any) -> Any:
    weigh(value)
    return value


@pass_context
def _emit(_context: object, value: Any) -> str:
    text = text_of(value)
    METER.get().step()
    METER.get().emit(len(text))
    return text


def _join(values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        raise LimitError("it uses join with an attribute, which is not supported")
    parts = [text_of(value) for value in _take(values)]
    METER.get().grow(sum(map(len, parts)) + len(text_of(d)) * len(parts))
    return text_of(d).join(parts)


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    whole, before, after = text_of(text), text_of(old), text_of(new)
    _check_replace(whole, before, after)
    return whole.replace(before, after, -1 if count is None else count)


def _check_replace(whole: str, before: str, after: str) -> None:
    times = whole.count(before)
    METER.get().grow(len(whole) + times * max(0, len(after) - len(before)))


def _format(_text: str, /, *args: Any, **kwargs: Any) -> str:
    fields = list(string.Formatter().parse(_text))
    for _, name, spec, conversion in fields:
        if name is not None and (spec or conversion or not (name.isalnum() or name == "")):
            raise LimitError(f"it formats a field {name!r} with more than its name")
    texts, named = [text_of(a) for a in args], {k: text_of(v) for k, v in kwargs.items()}
    longest = max([*map(len, texts), *map(len, named.values())], default=0)
    METER.get().grow(len(_text) + longest * len(fields))
    return _text.format(*texts, **named)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    whole = text_of(text)
    n = len(width) if isinstance(width, str) else int(width)
    METER.get().grow(len(whole) + (whole.count("\n") + 2) * max(n, 0))
    return do_indent(whole, width, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    weigh(value)
    if indent is not None and not 0 <= indent <= 16:
        raise LimitError(f"it indents JSON by {indent}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _metered(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Count each call of one of Jinja's own filters."""

    def run(*args: Any, **kwargs: Any) -> Any:
        METER.get().step()
        return filter_(*args, **kwargs)

    # Jinja marks there what it wants to pass as first argument.
    run.__dict__.update(getattr(filter_, "__dict__", {}))
    return run


def _raise_exception(message: object = "") -> None:
    raise jinja2.TemplateError(text_of(message)[:1000])


def _strftime_now(form: str) -> str:
    if len(text_of(form)) > 100:
        raise LimitError("it asks for a date of more than 100 characters")
    return datetime.now().strftime(form)


class _Rewriter(NodeTransformer):
    """Put the meter where Jinja's own hooks do not reach."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_loop")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_built")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_built")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_built") if node.ctx == "load" else node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            _filtered(nodes.Const(c.data, lineno=c.lineno), "_emit")
            if isinstance(c, nodes.TemplateData)
            else _filtered(c, "_emit")
            for c in node.nodes
        ]
        return node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks text for training; it renders as if it were not there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face sets it up for chat templates, with every step metered."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            cache_size=0,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        self.filters = {name: _metered(FILTERS[name]) for name in ALLOWED_FILTERS.split()}
        self.filters.update({"_loop": _loop, "_concat": _concat, "_built": _built, "_emit": _emit})
        self.filters.update(
            join=_join, replace=_replace, indent=_indent, tojson=_tojson, string=text_of, list=_take
        )
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        rewritten = _Rewriter().visit(template)
        if not isinstance(rewritten, nodes.Template):
            raise LimitError("it has no body")
        return rewritten

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Let `format` fill plain fields in; widths and attributes could ask for anything."""
        owner, name = getattr(value, "__self__", None), getattr(value, "__name__", "")
        if isinstance(owner, str) and name == "format":
            return functools.partial(_format, owner)
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _STR_METHODS:
            return False
        if isinstance(obj, int | float | bytes | complex):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        METER.get().step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join":
            return _join(args[0] if args else (), owner)
        if isinstance(owner, str) and name == "replace":
            _check_replace(owner, *args[:2])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        METER.get().step()
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if numbers:
            if max(abs(left), abs(right)) > 1e15 or (operator == "**" and abs(right) > 16):
                raise LimitError(f"it computes with numbers as large as {left!s:.20}")
        elif operator == "*":
            _check_product(left, right)
        elif operator == "+":
            METER.get().grow(weigh(left) + weigh(right))
        elif operator == "%" and isinstance(left, str):
            raise LimitError("it formats text with %, which is not supported; use ~")
        return super().call_binop(context, operator, left, right)


def _check_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            if not isinstance(value, str) and len(value) * times > MAX_ITEMS:
                raise LimitError(f"it makes a list of {len(value)} times {times} values")
            METER.get().grow(weigh(value) * max(times, 0))
