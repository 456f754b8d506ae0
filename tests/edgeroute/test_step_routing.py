"""Answers written by two models: each alone where it writes all, and sums that come out even."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime, step_routing
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.stats import Generation
from edgeroute.tools import synth

PARAMS: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1, "speculate": "off"}
PROMPTS = ["One two three, and so on until the end of the world. ", "x" * 90, "Why?"]
SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2, "seed": 3, "top_p": 0.95},
    {"temperature": 0.8, "seed": 4, "repeat_penalty": 1.3, "presence_penalty": 0.2},
]
POLICIES = [
    "small", "large", "random:0.5", "glimpse:5.0", "glimpse20:2.5", "query:5.0", "judge:4.5",
    "verify:-9:-12", "verify:-5.5:-6.2", "verify:-5.5:-6.2:12", "verify:-5.5:-6.2:0:1",
    "agree:0:20", "agree:0.1:0:2:0.004", "target:0.4", "pace:0.01", "accuracy:0.8",
]  # fmt: skip
N_TOKENS = 40
SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}},
          "required": ["a"]}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A large model, a small one of its vocabulary, and one of another."""
    folder = tmp_path_factory.mktemp("pair")
    llama, qwen2 = synth.ARCHITECTURES["llama"], synth.ARCHITECTURES["qwen2"]
    specs = {
        "large": replace(llama, n_layer=3),
        "small": replace(qwen2, n_layer=2, pre=llama.pre),
        "other": replace(llama, n_layer=2, vocab="spm", n_vocab=512),
    }
    for name, spec in specs.items():
        synth.write(spec, folder / f"{name}.gguf")
    return {name: folder / f"{name}.gguf" for name in specs}


@pytest.fixture(scope="module")
def pair(paths: dict[str, Path]) -> Iterator[Runtime]:
    with Runtime(paths["large"], small=paths["small"], **PARAMS) as runtime:
        yield shorten(runtime)


@pytest.fixture(scope="module")
def strangers(paths: dict[str, Path]) -> Iterator[Runtime]:
    with Runtime(paths["large"], small=paths["other"], **PARAMS) as runtime:
        yield shorten(runtime)


def shorten(runtime: Runtime) -> Runtime:
    """Let steps be short: random models write no blank lines."""
    routing = runtime._scheduler.steps
    assert routing is not None
    routing.new_bounds = lambda: StepBounds(min_tokens=2, max_tokens=7)
    return runtime


def check_sums(generation: Generation) -> None:
    """Every token and every evaluation is in exactly one part; steps come in order."""
    parts = generation.stats.steps
    assert parts is not None
    n_end = int(generation.finish_reason == "stop" and sum(p.n_tokens for p in parts)
                > generation.stats.n_generated)  # fmt: skip
    assert sum(part.n_tokens for part in parts) == generation.stats.n_generated + n_end
    assert [part.index for part in parts] == sorted(part.index for part in parts)
    assert all(part.seconds >= 0 for part in parts)


@pytest.mark.parametrize("options", SAMPLED)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_writer_is_that_model_alone(
    paths: dict[str, Path], pair: Runtime, prompt: str, options: dict[str, Any]
) -> None:
    for who in ("large", "small"):
        with Runtime(paths[who], **PARAMS) as alone:
            expected = alone.generate(prompt, max_tokens=N_TOKENS, **options)
        found = pair.generate(prompt, max_tokens=N_TOKENS, steps=who, prefix="off", **options)
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        assert found.finish_reason == expected.finish_reason
        check_sums(found)
        assert {part.model for part in found.stats.steps or ()} == {who}


def test_one_writer_leaves_the_other_model_idle(pair: Runtime) -> None:
    large = pair.generate(PROMPTS[0], max_tokens=12, steps="large", prefix="off").stats.steps
    small = pair.generate(PROMPTS[0], max_tokens=12, steps="small", prefix="off").stats.steps
    assert large and not any(part.read_small for part in large)
    assert small and not any(part.read_large for part in small)


@pytest.mark.parametrize("options", SAMPLED[:2])
@pytest.mark.parametrize("spec", POLICIES)
@pytest.mark.parametrize("kind", ["pair", "strangers"])
def test_answers_are_the_same_again_and_sums_come_out_even(
    request: pytest.FixtureRequest, kind: str, spec: str, options: dict[str, Any]
) -> None:
    runtime: Runtime = request.getfixturevalue(kind)
    first, again = (
        runtime.generate(PROMPTS[0], max_tokens=N_TOKENS, steps=spec, prefix="off",
                         **({"seed": 1} | options)) for _ in range(2)
    )  # fmt: skip
    if spec.partition(":")[0] not in ("target", "pace", "accuracy"):  # which learns
        assert first.token_ids == again.token_ids
    for generation in (first, again):
        check_sums(generation)
        assert generation.finish_reason in ("stop", "length")
        assert generation.text == runtime._loaded.tokenizer.decode(generation.token_ids)


def test_reads_are_all_accounted_for(pair: Runtime) -> None:
    def read() -> dict[str, int]:
        stats: Any = pair.stats()["steps"]
        return dict(stats["read"])

    for spec in ("glimpse:5.0", "verify:-5.5:-6.2:12", "judge:4.5"):
        before = read()
        parts = pair.generate(PROMPTS[0], max_tokens=N_TOKENS, steps=spec, prefix="off").stats.steps
        spent = {who: n - before[who] for who, n in read().items()}
        assert parts is not None
        assert sum(part.read_small for part in parts) == spent["small"]
        assert sum(part.read_large for part in parts) == spent["large"]


def test_a_check_that_takes_all_leaves_the_small_model_s_answer(pair: Runtime) -> None:
    """And one that takes nothing leaves it none of the answer."""
    prompt, n = PROMPTS[0], N_TOKENS
    small = pair.generate(prompt, max_tokens=n, steps="small", prefix="off")
    for defer in (0, 20):
        found = pair.generate(prompt, max_tokens=n, steps=f"verify:-1000:-1000:{defer}")
        assert found.token_ids == small.token_ids
        stats = found.stats  # its tokens may have come in one moment: that is no speed
        spent_s = sum(part.seconds for part in stats.steps or ())
        assert stats.decode_tok_s == pytest.approx(stats.n_generated / spent_s)
    refused = pair.generate(prompt, max_tokens=n, steps="verify:0:0").stats.steps
    assert refused and {part.model for part in refused} == {"large"}
    assert sum(part.n_refused for part in refused) > 0
    marked = pair.generate(prompt, max_tokens=n, steps="judge:9").stats.steps
    assert marked and {part.model for part in marked} == {"large"}


def test_what_a_check_keeps_is_above_its_limits(pair: Runtime) -> None:
    found = pair.generate(
        PROMPTS[0], max_tokens=N_TOKENS, steps="verify:-5.6:-6.3", logprobs=0, prefix="off"
    )
    at, seen = 0, set()
    for part in found.stats.steps or ():
        for drawn in found.logprobs[at : at + part.n_tokens]:
            assert part.model == "large" or drawn.logprob >= -6.3
        seen.add(part.model)
        at += part.n_tokens
    assert seen == {"small", "large"}, "the limits do not tell these models' tokens apart"


def test_agreeing_to_a_draft_without_a_gap_gives_the_large_model_s_answer(pair: Runtime) -> None:
    """Whatever the draft's length: what it would not have written itself is refused."""
    expected = pair.generate(PROMPTS[0], max_tokens=N_TOKENS, steps="large", logprobs=1)
    gaps = [drawn.top[0][1] for drawn in expected.logprobs]
    assert len(gaps) == N_TOKENS
    for spec in ("agree:0", "agree:0:30", "agree:0:30:1:0.004"):
        found = pair.generate(PROMPTS[0], max_tokens=N_TOKENS, steps=spec, logprobs=1, prefix="off")
        same = [a == b for a, b in zip(found.token_ids, expected.token_ids, strict=True)]
        first = same.index(False) if False in same else N_TOKENS
        # Passes of another width have other last bits: only a near tie may come out otherwise.
        assert (
            first == N_TOKENS
            or abs(found.logprobs[first].logprob - expected.logprobs[first].logprob) < 1e-3
        )
        assert {part.model for part in found.stats.steps or ()} == {"small", "large"}


def test_a_correction_of_one_token_leaves_more_to_the_small_model(pair: Runtime) -> None:
    whole = pair.generate(PROMPTS[0], max_tokens=N_TOKENS, steps="verify:-5.5:-6.2")
    one = pair.generate(PROMPTS[0], max_tokens=N_TOKENS, steps="verify:-5.5:-6.2:0:1")

    def refused(generation: Generation) -> int:
        return sum(part.n_refused > 0 for part in generation.stats.steps or ())

    def written(generation: Generation) -> int:
        parts = generation.stats.steps or ()
        return sum(part.n_tokens for part in parts if part.model == "large")

    assert 0 < written(one) < written(whole)
    assert refused(one) and refused(whole)


@pytest.mark.parametrize("spec", ["random:0.5", "glimpse:5.0", "verify:-5.5:-6.2", "small"])
@pytest.mark.parametrize("kind", ["pair", "strangers"])
def test_a_grammar_holds_across_the_models(
    request: pytest.FixtureRequest, kind: str, spec: str
) -> None:
    import json

    runtime: Runtime = request.getfixturevalue(kind)
    grammar = 'root ::= "{" [a-z] ": " ([0-9]+ ", "){3} "}"'
    found = runtime.generate(PROMPTS[2], max_tokens=90, steps=spec, grammar=grammar)
    if found.finish_reason == "stop":
        assert found.text.startswith("{") and found.text.endswith("}")
    schema = {"enum": ["left of it", "right of it"]}
    answer = runtime.generate(PROMPTS[2], max_tokens=90, steps=spec, json_schema=schema)
    assert answer.finish_reason == "stop"
    assert json.loads(answer.text) in schema["enum"]
    check_sums(answer)


def test_answers_that_run_together_are_those_of_each_alone(pair: Runtime) -> None:
    specs = ["verify:-5.5:-6.2", "glimpse:5.0", "large"]
    alone = [
        pair.generate(PROMPTS[0], max_tokens=12, steps=spec, prefix="off").token_ids
        for spec in specs
    ]
    streams = [pair.stream(PROMPTS[0], max_tokens=12, steps=spec, prefix="off") for spec in specs]
    for stream, expected in zip(streams, alone, strict=True):
        *_, last = stream
        assert last.generation is not None and last.generation.token_ids == expected


def test_chunks_say_who_wrote_them(pair: Runtime) -> None:
    chunks = list(pair.stream(PROMPTS[0], max_tokens=N_TOKENS, steps="random:0.5", seed=2))
    writers = {chunk.model for chunk in chunks if chunk.text}
    parts = chunks[-1].generation.stats.steps if chunks[-1].generation else None
    assert writers == {part.model for part in parts or ()} == {"small", "large"}
    plain = list(pair.stream(PROMPTS[0], max_tokens=4, steps="off"))
    assert {chunk.model for chunk in plain} == {None}


def test_stop_and_cancel_end_an_answer_in_steps(pair: Runtime) -> None:
    whole = pair.generate(PROMPTS[0], max_tokens=N_TOKENS, steps="verify:-5.5:-6.2")
    stop = whole.text[4:6]
    cut = pair.generate(PROMPTS[0], max_tokens=N_TOKENS, steps="verify:-5.5:-6.2", stop=[stop])
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    stream = pair.stream(PROMPTS[0], max_tokens=150, steps="random:0.5", seed=2)
    next(stream)
    stream.cancel()
    *_, last = stream
    assert last.finish_reason == "cancelled" and last.generation is not None
    check_sums(last.generation)
    late = pair.generate(PROMPTS[0], max_tokens=150, steps="small", timeout_s=0.01)
    assert late.finish_reason == "timeout"
    assert pair.generate(PROMPTS[2], max_tokens=2, steps="small").finish_reason == "length"


def test_nothing_stays_behind(pair: Runtime) -> None:
    for spec in ("small", "verify:-5.5:-6.2"):
        pair.generate(PROMPTS[0], max_tokens=N_TOKENS, steps=spec)
    routing = pair._scheduler.steps
    assert routing is not None and routing._other is not None
    for prefix in (pair._scheduler.prefix, routing._other.prefix):
        prefix.clear()
    small = pair._loaded.small
    assert small is not None
    for kv in (pair._loaded.kv, small.kv):
        assert kv.n_free_cells == kv.n_cells


def test_off_is_the_large_model_alone_and_auto_is_off_without_calibration(
    paths: dict[str, Path], pair: Runtime
) -> None:
    with Runtime(paths["large"], **PARAMS) as alone:
        expected = alone.generate(PROMPTS[0], max_tokens=12)
    for spec in ("off", "auto", None):
        found = pair.generate(PROMPTS[0], max_tokens=12, steps=spec, prefix="off")
        assert found.token_ids == expected.token_ids and found.stats.steps is None
    stats: Any = pair.stats()["steps"]
    assert not stats["on"] and "calibrate --steps" in stats["why"]


def test_token_level_escalation_changes_the_writer_within_a_step(pair: Runtime) -> None:
    found = pair.generate(PROMPTS[0], max_tokens=N_TOKENS, steps="margin:0.15:0.02", prefix="off")
    check_sums(found)
    parts = found.stats.steps or ()
    assert {part.model for part in parts} == {"small", "large"}


def test_feedback_teaches_a_policy_that_holds_an_accuracy(pair: Runtime) -> None:
    spec = "accuracy:0.9"
    found = pair.generate(PROMPTS[0], max_tokens=12, steps=spec)
    with pytest.raises(UsageError, match="from 0 to 1"):
        pair.feedback(found.id, 2.0)
    pair.feedback(found.id, 1.0)
    for told in (found.id, pair.generate(PROMPTS[0], max_tokens=4, steps="small").id):
        with pytest.raises(UsageError):
            pair.feedback(told, 1.0)


def test_a_small_model_that_runs_out_of_room_leaves_the_rest_to_the_large_one(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers = shorten(Runtime(paths["large"], small=paths["other"], **PARAMS))
    whole = step_routing.open_follower

    def narrow(*given: Any, same: bool) -> Any:
        follower = whole(*given, same=same)
        assert follower is not None
        region = follower.reader.sequence.region
        region.n_cells = len(follower.reader.tokens) + 5
        return follower

    monkeypatch.setattr(step_routing, "open_follower", narrow)
    with strangers:
        found = strangers.generate(PROMPTS[0], max_tokens=N_TOKENS, steps="small", prefix="off")
    parts = found.stats.steps or ()
    assert parts[0].model == "small" and parts[-1].model == "large"
    assert parts[-1].reason == "fallback"
    assert found.stats.n_generated == N_TOKENS or found.finish_reason == "stop"


def test_a_pair_larger_than_the_budget_is_refused_with_numbers(paths: dict[str, Path]) -> None:
    with pytest.raises(CapacityError, match="budget"):
        Runtime(paths["large"], small=paths["small"], **PARAMS, memory=300_000)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("pair", {"steps": "glimps:1"}, "glimpse"),
        ("pair", {"steps": "verify"}, "verify"),
        ("pair", {"steps": "random:2"}, "from 0 to 1"),
        ("strangers", {"steps": "margin:1:2"}, "one vocabulary"),
        ("strangers", {"steps": "small", "logprobs": 2}, "two"),
        ("strangers", {"steps": "small", "logit_bias": {3: 1.0}}, "two"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    request: pytest.FixtureRequest, kind: str, options: dict[str, Any], message: str
) -> None:
    runtime: Runtime = request.getfixturevalue(kind)
    with pytest.raises(UsageError, match=message):
        runtime.generate("x", **options)


def test_settings_that_contradict_each_other_are_refused(paths: dict[str, Path]) -> None:
    for settings, message in (
        ({"steps": "glimpse:1"}, "two models"),
        ({"steps": "glimpse:1", "small": paths["small"], "speculate": "small"}, "either drafts"),
        ({"remote": "http://127.0.0.1:9/v1#m", "small": paths["small"]}, "exclude"),
        ({"steps": "verify:-1:-2", "remote": "http://127.0.0.1:9/v1#m"}, "own logits"),
    ):
        with pytest.raises(UsageError, match=message):
            Runtime(paths["large"], **(PARAMS | settings))  # type: ignore[arg-type]
    with Runtime(paths["large"], **PARAMS) as alone, pytest.raises(UsageError, match="two models"):
        alone.generate("x", steps="small")
    with (
        Runtime(paths["large"], small=paths["other"], **PARAMS, steps="margin:1:2") as strangers,
        pytest.raises(UsageError, match="one vocabulary"),
    ):
        strangers.generate("x")
    wrong = [5, 6, 7]
    with (
        Runtime(paths["large"], small=paths["other"], **PARAMS) as strangers,
        pytest.raises(UsageError, match="two"),
    ):
        strangers.generate(prompt_ids=wrong, steps="small")
