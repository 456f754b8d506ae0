"""Adapters of the small model of a pair: its steps are what it writes alone with them."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.models.adapter_records import AdapterFileError
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.tools import synth
from tests.edgeroute.adapter_lab import make as make_adapter

PARAMS: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1, "speculate": "off",
                          "adapter_state": "off"}  # fmt: skip
PROMPT = "One two three, and so on until the end of the world. "
N_TOKENS = 32
SAMPLED: list[dict[str, Any]] = [{}, {"temperature": 1.2, "seed": 3, "top_p": 0.95}]
MIXED = ["random:0.5", "verify:-5.5:-6.2:12:1", "agree:0:20", "glimpse:5.0"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A large model, a small one of its vocabulary, one of another, and their adapters."""
    folder = tmp_path_factory.mktemp("adapted")
    llama, qwen2 = synth.ARCHITECTURES["llama"], synth.ARCHITECTURES["qwen2"]
    specs = {
        "large": replace(llama, n_layer=3),
        "small": replace(qwen2, n_layer=2, pre=llama.pre),
        "other": replace(llama, n_layer=2, vocab="spm", n_vocab=512),
    }
    found = {name: folder / f"{name}.gguf" for name in specs}
    for name, spec in specs.items():
        synth.write(spec, found[name])
        found[f"{name} library"] = folder / f"{name}-loras"
        found[f"{name} library"].mkdir()
        for seed, adapter in enumerate(("a", "b", "c")):
            path = found[f"{name} library"] / f"{adapter}.gguf"
            make_adapter(path, found[name], rank=8, alpha=64, seed=seed)
    return found


def open_pair(paths: dict[str, Path], small: str = "small", **settings: Any) -> Runtime:
    runtime = Runtime(
        paths["large"], small=paths[small],
        **(PARAMS | {"small_adapters": paths[f"{small} library"]} | settings),
    )  # fmt: skip
    routing = runtime._scheduler.steps
    assert routing is not None
    routing.new_bounds = lambda: StepBounds(min_tokens=2, max_tokens=7)
    return runtime


@pytest.fixture(scope="module")
def pair(paths: dict[str, Path]) -> Iterator[Runtime]:
    with open_pair(paths) as runtime:
        yield runtime


def ask(runtime: Runtime, **options: Any) -> Any:
    given = {"max_tokens": N_TOKENS, "prefix": "off", "seed": 1} | options
    return runtime.generate(PROMPT, **given)


def figures(runtime: Runtime) -> dict[str, Any]:
    steps: Any = runtime.stats()["steps"]
    found: dict[str, Any] = steps["adapters"]
    return found


@pytest.mark.parametrize("options", SAMPLED)
@pytest.mark.parametrize("asked", ["a", {"a": 0.5, "b": -0.25}, {"a": 0.5}])
def test_always_small_is_the_small_model_alone_with_its_adapter(
    paths: dict[str, Path], pair: Runtime, asked: Any, options: dict[str, Any]
) -> None:
    with Runtime(paths["small"], adapters=paths["small library"], **PARAMS) as alone:
        expected = ask(alone, adapter=asked, **options)
        plain = ask(alone, **options)
    found = ask(pair, steps="small", small_adapter=asked, **options)
    assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
    assert ask(pair, steps="small", **options).token_ids == plain.token_ids
    assert plain.token_ids != expected.token_ids
    assert found.adapter is None
    assert found.stats.adapters["small"]["used"] == expected.stats.adapters["used"]


def test_always_small_of_another_vocabulary_writes_its_adapter_s_text(
    paths: dict[str, Path],
) -> None:
    plain: dict[str, Any] = {"grammar": "root ::= [a-z ]+"}  # no characters in two tokens
    with Runtime(paths["other"], adapters=paths["other library"], **PARAMS) as alone:
        expected, without = ask(alone, adapter="b", **plain).text, ask(alone, **plain).text
    assert expected != without and min(len(expected), len(without)) > N_TOKENS
    with open_pair(paths, "other") as runtime:
        found = ask(runtime, steps="small", small_adapter="b", **plain).text
        other = ask(runtime, steps="small", **plain).text
    for text, whole in ((found, expected), (other, without)):
        n = min(len(text), len(whole))
        assert n > N_TOKENS // 2 and text[:n] == whole[:n]


@pytest.mark.parametrize("options", SAMPLED)
def test_always_large_knows_nothing_of_the_small_model_s_adapter(
    paths: dict[str, Path], options: dict[str, Any]
) -> None:
    library = paths["large library"]
    with Runtime(paths["large"], adapters=library, **PARAMS) as alone:
        expected, adapted = ask(alone, **options), ask(alone, adapter="b", **options)
    assert expected.token_ids != adapted.token_ids
    with open_pair(paths, adapters=library) as runtime:
        found = ask(runtime, steps="large", small_adapter="a", **options)
        both = ask(runtime, steps="large", small_adapter="a", adapter="b", **options)
    assert found.token_ids == expected.token_ids
    assert both.token_ids == adapted.token_ids and both.adapter == "b"
    assert both.stats.adapters["used"] == {"b": 1.0}
    assert both.stats.adapters["small"]["used"] == {"a": 1.0}


@pytest.mark.parametrize("spec", MIXED)
def test_a_mixture_of_one_is_that_one(pair: Runtime, spec: str) -> None:
    """One factor of 1 beside zeros is that adapter, and none but zeros is no adapter."""
    one = ask(pair, steps=spec, small_adapter="a")
    assert ask(pair, steps=spec, small_adapter={"a": 1.0, "b": 0.0}).token_ids == one.token_ids
    assert (
        ask(pair, steps=spec, small_adapter={"b": 0.0}).token_ids == ask(pair, steps=spec).token_ids
    )
    parts = one.stats.steps
    assert sum(part.n_tokens for part in parts) >= one.stats.n_generated


def test_cells_of_one_adapter_never_serve_another(pair: Runtime) -> None:
    asked: list[Any] = ["a", None, "b", "a", {"a": 0.5}, "b", None]
    for spec in ("small", *MIXED):
        alone = [ask(pair, steps=spec, small_adapter=each).token_ids for each in asked]
        kept = [
            ask(pair, steps=spec, small_adapter=each, prefix="exact").token_ids for each in asked
        ]
        assert kept == alone


def test_a_grammar_is_obeyed_with_an_adapter(pair: Runtime) -> None:
    grammar = 'root ::= ("ab" | "cd")+'
    for spec in ("small", *MIXED):
        found = ask(pair, steps=spec, small_adapter="a", grammar=grammar)
        assert set(found.text) <= set("abcd")


def test_many_requests_take_turns_in_one_slot(paths: dict[str, Path]) -> None:
    with open_pair(paths, adapter_slots=1, n_kv=2048) as runtime:
        asked: list[Any] = ["a", "b", "c", None] * 3
        alone = {each: ask(runtime, steps="random:0.5", small_adapter=each) for each in asked[:4]}
        found: dict[int, Any] = {}

        def run(i: int, each: Any) -> None:
            found[i] = ask(runtime, steps="random:0.5", small_adapter=each)

        threads = [threading.Thread(target=run, args=each) for each in enumerate(asked)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, each in enumerate(asked):
            assert found[i].token_ids == alone[each].token_ids
        told = figures(runtime)
        assert told["names"] == ["a", "b", "c"] and told["slots"] == 1
        assert told["evictions"] >= 2
        stream = runtime.stream(PROMPT, max_tokens=N_TOKENS, steps="small", small_adapter="c")
        next(stream)
        stream.close()  # a cancelled answer gives back what it held
        assert ask(runtime, steps="small", small_adapter="b").stats.n_generated


def test_both_libraries_are_in_the_budget(paths: dict[str, Path]) -> None:
    with open_pair(paths, adapters=paths["large library"]) as runtime:
        entries: Any = runtime.stats()["memory"]
        need = runtime.stats()["memory_bytes"]
        assert entries["adapter slots"] > 0 and entries["small model, adapter slots"] > 0
        expected = ask(runtime, steps="random:0.5", small_adapter="a", adapter="b")
    assert isinstance(need, int)
    with open_pair(paths, adapters=paths["large library"], memory=2 * need) as runtime:
        told: Any = runtime.stats()
        assert sum(told["memory"].values()) <= 2 * need
        found = ask(runtime, steps="random:0.5", small_adapter="a", adapter="b")
    assert found.token_ids == expected.token_ids
    with pytest.raises(CapacityError):
        open_pair(paths, memory=paths["small"].stat().st_size // 2)


def test_an_adapter_that_does_not_fit_the_small_model_is_refused_by_name(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterFileError, match=r"^a: .*another base model"):
        open_pair(paths, small_adapters=paths["large library"] / "a.gguf")
    pickle = tmp_path / "evil" / "adapter_model.bin"
    pickle.parent.mkdir()
    pickle.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(AdapterFileError, match="evil"):
        open_pair(paths, small_adapters=pickle.parent)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((paths["small library"] / "a.gguf").read_bytes()[:700])
    with pytest.raises(AdapterFileError, match=r"cut\.gguf"):
        open_pair(paths, small_adapters=[cut])
    with pytest.raises(AdapterFileError, match="none-such"):
        open_pair(paths, small_adapters=tmp_path / "none-such")


def test_an_adapter_cut_off_while_it_runs_ends_its_own_requests_only(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "loras"
    copy.mkdir()
    for name in ("a", "b"):
        data = (paths["small library"] / f"{name}.gguf").read_bytes()
        (copy / f"{name}.gguf").write_bytes(data)
    with open_pair(paths, small_adapters=copy) as runtime:
        whole = ask(runtime, steps="small", small_adapter="a")
        (copy / "b.gguf").write_bytes(data[: len(data) // 2])
        with pytest.raises(AdapterFileError, match=r"b\.gguf"):
            ask(runtime, steps="small", small_adapter="b")
        assert ask(runtime, steps="small", small_adapter="a").token_ids == whole.token_ids
        assert figures(runtime)["errors"] == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"small_adapter": "zzz"}, "'zzz'.*the small model has a, b, c"),
        ({"small_adapter": "auto"}, "only among the large model's"),
        ({"small_adapter": "a", "steps": "off"}, "ask for steps"),
        ({"small_adapter": {"a": 1e9}}, "factor"),
        ({"small_adapter": {}}, "must be a name"),
        ({"small_adapter": 7}, "must be a name"),
        ({"small_adapter": {"a": float("nan")}}, "factor"),
    ],
)
def test_requests_that_cannot_be_served_say_why(
    pair: Runtime, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        ask(pair, **({"steps": "small"} | options))


def test_settings_that_exclude_each_other_are_refused(paths: dict[str, Path]) -> None:
    library = paths["small library"]
    with pytest.raises(UsageError, match="small model of a pair"):
        Runtime(paths["large"], small_adapters=library)
    with pytest.raises(UsageError, match="speculate='small'"):
        Runtime(paths["large"], small=paths["small"], small_adapters=library, speculate="small")
    with pytest.raises(UsageError, match="small_adapters must be a path"):
        Runtime(paths["large"], small=paths["small"], small_adapters=[7])  # type: ignore[list-item]
    with (
        open_pair(paths, small_adapters=None) as runtime,
        pytest.raises(UsageError, match="small_adapters=FOLDER"),
    ):
        ask(runtime, steps="small", small_adapter="a")


def test_what_is_not_written_in_steps_tells_of_no_adapter(pair: Runtime) -> None:
    """A pair that was not calibrated writes nothing in steps unasked."""
    found = ask(pair, small_adapter="a")
    assert found.stats.steps is None and found.stats.adapters is None
