"""Grammars and JSON schemas: bad ones refused before generation, good ones obeyed."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.runtime import gbnf, gbnf_check
from edgeroute.runtime.errors import GrammarError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.grammar import Grammar
from edgeroute.runtime.json_keywords import KNOWN
from edgeroute.runtime.json_schema import to_gbnf
from edgeroute.runtime.records import SamplingParams
from edgeroute.runtime.sampler import Sampler
from edgeroute.runtime.tokenizer import Tokenizer
from tests.runtime.grammar_lab import accepts


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Iterator[Tokenizer]:
    with GGUFFile.open(smollm2_path) as file, Tokenizer.open(file) as opened:
        yield opened


def write(tokenizer: Tokenizer, seed: int, **constraint: Any) -> str:
    """Let noise write under a constraint, with a growing wish to end."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    params = SamplingParams(temperature=1.0, seed=seed, **constraint)
    quote, brace = (tokenizer.encode(c, add_special=False, parse_special=False)[0] for c in '"}')
    with Sampler(params, tokenizer) as sampler:
        for step in range(400):
            logits = rng.standard_normal(tokenizer.n_vocab, dtype=np.float32)
            logits[[quote, brace, tokenizer.eos or 0]] += 5 + step / 4
            token_id = sampler.sample(logits)
            sampler.accept(token_id)
            if tokenizer.is_eog(token_id):
                return tokenizer.decode(ids)
            ids.append(token_id)
    raise AssertionError(f"no end: {tokenizer.decode(ids)[-200:]!r}")


def chain(n: int, body: str) -> str:
    """n rules, each made from the next one's name; the last is a letter."""
    rules = [f"r{i} ::= {body.format(f'r{i + 1}')}" for i in range(n)]
    return "\n".join(["root ::= r0", *rules, f'r{n} ::= "a"'])


HOSTILE: dict[str, tuple[str, str]] = {
    "60,000 groups": ("root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000, "nested more than"),
    "open groups": ("root ::= " + "(" * 60_000, "nested more than"),
    "a million repetitions": ('root ::= "a"{1000000}', "limit of 2000"),
    "a long number": ('root ::= "a"{' + "9" * 5000 + "}", "limit of 2000"),
    "an upper bound too high": ('root ::= "a"{1,2001}', "limit of 2000"),
    "bounds reversed": ('root ::= "a"{3,2}', "is empty"),
    "expansion": ('root ::= "' + "a" * 1000 + '"{2000}', "expands to more than"),
    "left recursion": ('root ::= root "a" | "b"', "begin with itself"),
    "hidden left recursion": (
        'root ::= b root "x" | "q"\nb ::= c\nc ::= "" | "z"', "begin with itself"
    ),
    "empty repeated": ('root ::= ("a"*)*', "begin with itself"),
    "paths in left recursion check": (chain(60, "{0} | {0}"), "begin with each other"),
    "deep leftmost chain": (chain(5000, "{0}"), "begin with each other"),
    "exponential parses": (
        'root ::= "x" root "a" | "x" root "b" | "x" root "c" | "y"', "too many parses"
    ),
    "exponential parses by turns": (
        'root ::= "a" s\ns ::= "a" t "1" | "a" t "2" | "z"\nt ::= "b" s "1" | "b" s "2" | "z"',
        "too many parses",
    ),
    "undefined rule": ("root ::= nowhere", "does not define"),
    "no root": ('start ::= "a"', "no rule named"),
    "nothing": ("", "no rule named"),
    "comment only": ("# root", "no rule named"),
    "defined twice": ('root ::= "a"\nroot ::= "b"', "defined twice"),
    "never ends": ('root ::= "a" root', "never be completed"),
    "NUL": ('root ::= "a"\0 | anything', "NUL"),
    "lone surrogate": ('root ::= "\ud800"', "surrogate"),
    "surrogate escape": (r'root ::= "\uD800"', "not a character"),
    "beyond Unicode": (r'root ::= "\U00110000"', "not a character"),
    "short escape": (r'root ::= "\x4"', "hexadecimal"),
    "unknown escape": (r'root ::= "\q"', "unknown escape"),
    "open literal": ('root ::= "abc', "ends inside"),
    "open class": ("root ::= [abc", "ends inside"),
    "empty class": ("root ::= []", "empty"),
    "range reversed": ("root ::= [z-a]", "is empty"),
    "nothing to repeat": ("root ::= *", "nothing to repeat"),
    "unbalanced": ('root ::= "a")', "expected a new line"),
    "no ::=": ('root = "a"', "::="),
    # libllama admits this token, then throws while accepting it and ends the process
    "token reference": ('root ::= "a" <[5]>', "token references"),
    "negated token": ("root ::= !<[5]>", "token references"),
    "too long": ("#" * (gbnf.MAX_CHARS + 1), "limit is"),
    "too many rules": ("root ::= " + '("a") ' * 10_001, "more than 10000"),
}  # fmt: skip


@pytest.mark.parametrize(("grammar", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_grammars_are_refused_in_time(grammar: str, reason: str) -> None:
    began_s = time.thread_time()
    with pytest.raises(GrammarError, match=reason):
        gbnf_check.check(gbnf.parse(grammar))
    assert time.thread_time() - began_s < 5  # measured: 0.5 s at most


@settings(deadline=None)
@given(st.text(alphabet='root:= "ab[]()|*+?{},0129\\-^.#\n', max_size=80))
def test_any_text_is_a_grammar_or_a_grammar_error(text: str) -> None:
    with contextlib.suppress(GrammarError):
        gbnf_check.check(gbnf.parse("root ::= " + text))


@settings(deadline=None)
@given(st.text(alphabet='ab"[]()|*+?{}12,-^. ', max_size=30))
def test_what_passes_the_check_llama_cpp_accepts(tokenizer: Tokenizer, text: str) -> None:
    try:
        gbnf_check.check(gbnf.parse("a ::= [x]\nb ::= [y]\nroot ::= " + text))
    except GrammarError:
        return
    with Grammar(tokenizer, "a ::= [x]\nb ::= [y]\nroot ::= " + text) as grammar:
        grammar.mask(np.zeros(tokenizer.n_vocab, dtype=np.float32))


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["maybe", "ye", "yesno", ""]),
        ("root ::= [a-c]{2,3}", ["ab", "abc"], ["a", "abca", "ad"]),
        ('root ::= ("a" "b"?)+ # comment\n', ["a", "ab", "aab"], ["b", "abb"]),
        (r'root ::= "\x41\u00e9\U0001F600\n\t\"\\"', ['Aé😀\n\t"\\'], ["Aé"]),
        ('root ::= [^a] . "é"', ["bcé", "日本é"], ["acé", "bce"]),
        ('root ::= a\na ::= "(" a ")" |\n  "x"', ["x", "((x))"], ["((x)", "(x))"]),
    ],
)
def test_matching(tokenizer: Tokenizer, grammar: str, good: list[str], bad: list[str]) -> None:
    assert [t for t in good if not accepts(tokenizer, grammar, t)] == []
    assert [t for t in bad if accepts(tokenizer, grammar, t)] == []


def test_an_inadmissible_token_is_an_error_and_not_an_abort(tokenizer: Tokenizer) -> None:
    yes, no = (tokenizer.encode(t, add_special=False, parse_special=False)[0] for t in ("yes", "x"))
    with Grammar(tokenizer, 'root ::= "yes"') as grammar:
        for token_id in (no, tokenizer.eos or 0, 1):
            with pytest.raises(GrammarError, match="does not admit"):
                grammar.accept(token_id)
        grammar.accept(yes)
        assert grammar.allows(tokenizer.eos or 0)
        grammar.accept(tokenizer.eos or 0)
        assert not grammar.allows(yes)


def test_control_tokens_are_never_admitted(tokenizer: Tokenizer) -> None:
    with Grammar(tokenizer, "root ::= .+") as grammar:
        assert not grammar.allows(1)
        logits = np.zeros(tokenizer.n_vocab, dtype=np.float32)
        grammar.mask(logits)
        assert not np.isfinite(logits[tokenizer.hidden_ids]).any()
        assert not np.isfinite(logits[sorted(tokenizer.eog_ids)]).any()  # not empty yet


def test_control_tokens_that_are_shown_are_admitted_where_their_text_is(
    tokenizer: Tokenizer,
) -> None:
    mark, other = (
        tokenizer.encode(t, add_special=False, parse_special=True)[0]
        for t in ("<file_sep>", "<filename>")
    )
    shown = ["<file_sep>", "<|im_end|>", "no such token"]
    with Grammar(tokenizer, 'root ::= "<file_sep>" [a-z]+', shown) as grammar:
        logits = np.zeros(tokenizer.n_vocab, dtype=np.float32)
        grammar.mask(logits)
        assert np.isfinite(logits[mark]) and not np.isfinite(logits[other])
        assert grammar.allows(mark) and not grammar.allows(other)
        grammar.accept(mark)
        assert not grammar.allows(mark) and not grammar.allows(tokenizer.eos or 0)
    assert tokenizer.pieces(shown)(mark) == b"<file_sep>"
    assert tokenizer.pieces(shown)(other) == tokenizer.pieces(())(mark) == b""


def test_the_end_does_not_split_a_character(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("\U0001f9ff", add_special=False, parse_special=False)
    assert len(whole) > 1, "this test needs a character of several tokens"
    with Grammar(tokenizer, "root ::= .*") as grammar:
        grammar.accept(whole[0])
        assert not grammar.allows(tokenizer.eos or 0)
        logits = np.zeros(tokenizer.n_vocab, dtype=np.float32)
        grammar.mask(logits)
        assert not np.isfinite(logits[tokenizer.eos or 0])
        for token_id in whole[1:]:
            grammar.accept(token_id)
        assert grammar.allows(tokenizer.eos or 0)


def test_mask_and_allows_agree(tokenizer: Tokenizer) -> None:
    with Grammar(tokenizer, 'root ::= "the " [a-z]+ | [0-9]{3}') as grammar:
        logits = np.zeros(tokenizer.n_vocab, dtype=np.float32)
        grammar.mask(logits)
        sampled = [*np.flatnonzero(np.isfinite(logits))[:300], *range(0, tokenizer.n_vocab, 97)]
        assert any(np.isfinite(logits))
        for token_id in map(int, sampled):
            assert grammar.allows(token_id) == bool(np.isfinite(logits[token_id]))


def test_grammars_are_bad_before_generation_begins(tokenizer: Tokenizer) -> None:
    for params in (SamplingParams(grammar="root ::= ("), SamplingParams(json_schema="{")):
        with pytest.raises(GrammarError):
            Sampler(params, tokenizer)
    assert issubclass(GrammarError, UsageError)


NODE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def is_node(value: Any) -> bool:
    return (
        isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and set(value) <= {"name", "children"}
        and len(value.get("children", [])) <= 2
        and all(map(is_node, value.get("children", [])))
    )


SCHEMAS: dict[str, tuple[Mapping[str, Any], Callable[[Any], bool]]] = {
    "anything": ({}, lambda v: True),
    "string": ({"type": "string"}, lambda v: isinstance(v, str)),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 4}, lambda v: 2 <= len(v) <= 4),
    "integer": ({"type": "integer", "minimum": -7, "maximum": 123}, lambda v: -7 <= v <= 123),
    "exclusive": (
        {"type": "integer", "exclusiveMinimum": 98, "exclusiveMaximum": 1003},
        lambda v: 98 < v < 1003,
    ),
    "number": ({"type": "number", "minimum": 0}, lambda v: v >= 0),
    "types": ({"type": ["null", "boolean"]}, lambda v: v is None or isinstance(v, bool)),
    "enum": ({"enum": ['a"b\\', "é\n", 7, None, {"k": [1]}]},
             lambda v: v in ['a"b\\', "é\n", 7, None, {"k": [1]}]),
    "const": ({"const": "\t\u2028"}, lambda v: v == "\t\u2028"),
    "enum with type": ({"type": "string", "enum": ["a", 1]}, lambda v: v == "a"),
    "date": ({"type": "string", "format": "date"}, lambda v: len(v) == 10 and v[4] == "-"),
    "pattern": (
        {"type": "string", "pattern": r'^[A-C]{2}-\d+(x|"\\y)?$'},
        lambda v: v[0] in "ABC" and v[2] == "-",
    ),
    "array": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        lambda v: 1 <= len(v) <= 3,
    ),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "null"}, {"const": 2}]},
        lambda v: v == [None, 2],
    ),
    "map": (
        {"type": "object", "additionalProperties": {"type": "boolean"}},
        lambda v: all(isinstance(x, bool) for x in v.values()),
    ),
    "optional": (
        {"properties": {k: {"type": "null"} for k in "abcd"}, "required": ["c"]},
        lambda v: "c" in v and set(v) <= set("abcd"),
    ),
    "required unnamed": ({"type": "object", "required": ["x"]}, lambda v: "x" in v),
    "closed": ({"type": "object", "additionalProperties": False}, lambda v: v == {}),
    "tagged": (
        {"oneOf": [
            {"properties": {"t": {"const": "a"}, "n": {"type": "null"}}, "required": ["t", "n"]},
            {"properties": {"t": {"const": "b"}}, "required": ["t"]},
        ]},
        lambda v: v in ({"t": "a", "n": None}, {"t": "b"}),
    ),
    "recursive": ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, is_node),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "is_valid"), SCHEMAS.values(), ids=SCHEMAS.keys())
def test_noise_under_a_schema_is_valid(
    tokenizer: Tokenizer, schema: Mapping[str, Any], is_valid: Callable[[Any], bool]
) -> None:
    for seed in range(3):
        text = write(tokenizer, seed, json_schema=schema)
        assert is_valid(json.loads(text)), text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 9), (5, 17), (-12, -3), (99, 101), (-1, 1), (190, 2010)]
)
def test_integer_ranges_are_exact(tokenizer: Tokenizer, low: int, high: int) -> None:
    grammar = to_gbnf({"type": "integer", "minimum": low, "maximum": high})
    near = {low - 1, low, low + 1, high - 1, high, high + 1, (low + high) // 2, 10 * high}
    for n in near:
        assert accepts(tokenizer, grammar, str(n)) == (low <= n <= high), n


def test_optional_properties_may_be_left_out(tokenizer: Tokenizer) -> None:
    schema = {"properties": {k: {"type": "null"} for k in "abc"}, "required": ["b"]}
    grammar = to_gbnf(schema)
    good = ["b", "ab", "bc", "abc"]
    bad = ["", "a", "ac", "ba", "bb"]
    spelt = {n: "{" + ", ".join(f'"{k}": null' for k in n) + "}" for n in good + bad}
    assert [n for n in good if not accepts(tokenizer, grammar, spelt[n])] == []
    assert [n for n in bad if accepts(tokenizer, grammar, spelt[n])] == []
    assert accepts(tokenizer, to_gbnf({**schema, "required": []}), "{}")


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "remote $ref": ({"$ref": "https://example.com/schema"}, "inside the schema"),
    "relative $ref": ({"$ref": "other.json"}, "inside the schema"),
    "dangling $ref": ({"$ref": "#/$defs/x"}, "leads nowhere"),
    "$ref to itself": ({"$ref": "#"}, "begin with itself|never be completed"),
    "unknown keyword": ({"type": "object", "patternProperties": {}}, "patternProperties"),
    "not": ({"not": {"type": "string"}}, "not is not supported"),
    "if": ({"if": {}, "then": {}}, "if is not supported"),
    "false": (False, "can be met"),
    "unknown type": ({"type": "text"}, "type must be"),
    "unknown format": ({"type": "string", "format": "email"}, "format 'email'"),
    "multipleOf": ({"type": "integer", "multipleOf": 2}, "multipleOf"),
    "number range": ({"type": "number", "maximum": 1}, "maximum on a number"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "look-around": ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    "back-reference": ({"type": "string", "pattern": r"(a)\1"}, r"\\1 is not supported"),
    "bad pattern": ({"type": "string", "pattern": "(a"}, "unbalanced"),
    "nested pattern": ({"type": "string", "pattern": "(" * 5000}, "characters|at most|nested"),
    "pattern repetition": ({"type": "string", "pattern": "a{9999999}"}, "repetitions"),
    "long string": ({"type": "string", "maxLength": 10**6}, "maxLength"),
    "overlapping oneOf": ({"oneOf": [{"type": "string"}, {"minLength": 1}]}, "overlap"),
    "allOf": ({"allOf": [{}, {}]}, "allOf"),
    "beside anyOf": ({"anyOf": [{}], "type": "string"}, "beside"),
    "empty range": ({"type": "integer", "minimum": 5, "maximum": 4}, "no integer"),
    "huge range": ({"type": "integer", "minimum": 10**400}, "finite"),
    "huge enum": ({"enum": list(range(2000))}, "at most 1000"),
    "required but closed": (
        {"type": "object", "required": ["x"], "additionalProperties": False}, "not allowed"
    ),
    "not JSON": ("{", "not JSON"),
    "deep JSON": ("[" * 100_000, "not JSON"),
    "deep schema": ('{"items":' * 200 + "{}" + "}" * 200, "too large"),
    "not a schema": ("[]", "can be met"),
    "NaN": ({"const": float("nan")}, "no JSON text"),
    "Python object": ({"const": object()}, "not JSON"),
    "surrogate": ({"const": "\ud800"}, "no JSON text"),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_schemas_are_refused_by_name(schema: Any, reason: str) -> None:
    began_s = time.thread_time()
    with pytest.raises(GrammarError, match=reason):
        gbnf_check.check(gbnf.parse(to_gbnf(schema)))
    assert time.thread_time() - began_s < 5  # measured: 0.1 s at most


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | st.sampled_from(
        ["string", "integer", "object", "array", "#", "#/$defs/a", "^a+$", "date", "a", "[", "^"]
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*sorted(KNOWN - {"$ref"}), "$ref", "a"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(KNOWN)), VALUES, max_size=3))
def test_any_data_is_a_schema_or_a_grammar_error(schema: dict[str, Any]) -> None:
    with contextlib.suppress(GrammarError):
        gbnf_check.check(gbnf.parse(to_gbnf(schema)))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='ab1^$.*+?()[]{},-\\dwsxu0|"é', max_size=20))
def test_any_text_is_a_pattern_or_a_grammar_error(pattern: str) -> None:
    with contextlib.suppress(GrammarError):
        gbnf.parse(to_gbnf({"type": "string", "pattern": pattern}))


def test_annotations_are_ignored(tokenizer: Tokenizer) -> None:
    schema = {"title": "T", "description": "d", "default": 1, "type": "null", "x-own": 1}
    assert write(tokenizer, 1, json_schema=schema) == "null"
    assert write(tokenizer, 1, json_schema=json.dumps(schema)) == "null"
