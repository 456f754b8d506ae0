"""Chat templates: rendered as Hugging Face does, and hostile ones refused in time."""

import time
from typing import Any

import pytest

from edgeroute.runtime.errors import TemplateError, UsageError
from edgeroute.runtime.template import (
    MAX_DATA_DEPTH,
    MAX_SOURCE_CHARS,
    check_messages,
    encode_chat,
    render,
)

USER = [{"role": "user", "content": "hi"}]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def show(template: str, messages: Any = None, **options: Any) -> str:
    return render(template, messages or USER, bos_token="<s>", eos_token="</s>", **options)


def test_chatml() -> None:
    assert show(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert show(CHATML, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<é&'} | tojson }}", '{"a": "<é&"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{{ '{}-{b}'.format(1, b='x') }}", "1-x"),
        ("{{ '<' }}{{ missing }}{{ none }}", "<None"),
        ("{{ ' x ' | trim }}{{ 'a,b'.split(',')[-1] }}", "xb"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}{{ ns.n }}", "0True11"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages | map(attribute='content') | join('-') }}", "hi"),
        ("{% macro f(a, b='y') %}{{ a ~ b }}{% endmacro %}{{ f('x') }}", "xy"),
        ("{% set a, b = 1, 2 %}{{ b }}{{ (1, 2) }}", "2(1, 2)"),
        ("{% set x %}in{% endset %}{{ x | upper }}", "IN"),
        ("{{ 'b' in 'abc' and messages is not mapping and tools is none }}", "True"),
        ("{{ 'yes' if messages[0].content is string else 'no' }}", "yes"),
        ("{{ 7 // 2 }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ 'ab' * 2 }}", "383abab"),
    ],
)  # fmt: skip
def test_constructs_that_templates_use(template: str, expected: str) -> None:
    assert show(template) == expected


HANGS = {
    "one long range": "{% for i in range(10**9) %}{% endfor %}",
    "nested ranges": "{% for i in range(100000) %}{% for j in range(100000) %}"
    "{% endfor %}{% endfor %}",
    "nested loops without calls": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}"
    "{% endfor %}{% endfor %}",
    "a product of text": "{{ 'a' * 10**9 }}",
    "a product of lists": "{{ [0] * 10**9 }}",
    "a power": "{{ 2 ** 99999999 }}",
    "powers of powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "doubling by ~": "{% set n = namespace(x='aaaa') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='aaaa') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by blocks": "{% set n = namespace(x='aaaa') %}{% for i in range(99) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubling of lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "doubling of dicts": "{% set n = namespace(x=1) %}{% for i in range(99) %}"
    "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x | tojson }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(90) }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "centre filter": "{{ 'x' | center(10**9) }}",
    "centre method": "{{ 'x'.center(1000000000) }}",
    "percent format": "{{ '%1000000000d' % 1 }}",
    "brace format": "{{ '{:>1000000000}'.format(1) }}",
    "indent": "{{ 'x' | indent(1000000000, true) }}",
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "replace method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "join filter": "{{ range(100000) | list | join('b' * 1000000) }}",
    "join method": "{{ ('b' * 1000000).join(('a' * 1000000) | list) }}",
    "list as text": "{{ ['a' * 1000000] * 100000 }}",
    "long output": "{% for i in range(100000) %}" + "x" * 10000 + "{% endfor %}",
    "format of long texts": "{{ ('{0}' * 10000).format('a' * 1000000) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "nested parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long to compile": "{{a+a+a}}" * 14_000,
    "long to lex": "{##}" * 32_000 + "{{",
    "long source": "x" * (MAX_SOURCE_CHARS + 1),
}


@pytest.mark.parametrize("template", HANGS.values(), ids=HANGS.keys())
def test_bombs_are_refused_in_time(template: str) -> None:
    began_s = time.thread_time()
    with pytest.raises(TemplateError):
        show(template)
    assert time.thread_time() - began_s < 5  # measured: 0.6 s at most


ESCAPES = {
    # CVE-2024-34359: a chat template reached os through a class of warnings
    "subclasses": "{% for x in ().__class__.__base__.__subclasses__() %}"
    "{% if 'warning' in x.__name__ %}"
    "{{ x()._module.__builtins__['__import__']('os').popen('id').read() }}"
    "{% endif %}{% endfor %}",
    "globals": "{{ self.__init__.__globals__.__builtins__ }}",
    "function globals": "{{ raise_exception.__globals__['os'] }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "map attribute": "{{ [''] | map(attribute='__class__') | map(attribute='__mro__') | list "
    "| join(raise_exception('reached')) }}",
    "frames": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "append": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES.keys())
def test_the_sandbox_holds(template: str) -> None:
    with pytest.raises(TemplateError):
        show(template)


@pytest.mark.parametrize("expression", ["raise_exception.__globals__", "lipsum", "cycler"])
def test_nothing_is_there_to_reach(expression: str) -> None:
    assert show("{{ " + expression + " }}") == ""


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(TemplateError):
        show("{% set _ = messages[0].update({'role': 'system'}) %}", messages)
    assert messages == USER


def test_a_template_s_own_refusal_is_shown() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        show("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("template", ["{% nope %}", "{{ x", "{% if %}", "{{ 'a' | nope }}"])
def test_malformed_templates_are_refused(template: str) -> None:
    with pytest.raises(TemplateError, match="malformed"):
        show(template)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert show("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        ["hi"],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "<|im_end|>", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        [{"role": "user", "content": "x", "surprise": 1}],
        [{"role": "user", "content": "x", "tool_calls": object()}],
        [{"role": "user", "content": "x"}] * 10_001,
        [{"role": "user", "content": "x" * (1 << 24)}],
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_messages_are_usage_errors(messages: Any) -> None:
    with pytest.raises(UsageError):
        check_messages(messages)


def test_deep_data_is_a_usage_error() -> None:
    deep: list[Any] = []
    for _ in range(MAX_DATA_DEPTH + 1):
        deep = [deep]
    with pytest.raises(UsageError, match="too large"):
        show("x", tools=[{"a": deep}])


def test_a_model_without_a_template_says_so() -> None:
    class Bare:
        chat_template = None

    with pytest.raises(TemplateError, match="no chat template"):
        encode_chat(Bare(), USER)  # type: ignore[arg-type]
