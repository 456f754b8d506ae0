"""`edgeroute.small_adapter`: the small model's adapter of one request, by name or as a mixture."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.tools import synth
from tests.edgeroute.adapter_lab import make
from tests.server.api_lab import CHAT, COMPLETIONS, HELLO, Api, api

SETTINGS: dict[str, Any] = {"n_ctx": 256, "threads": 1, "adapter_state": "off"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("small-adapter")
    llama = synth.ARCHITECTURES["llama"]
    large, small = folder / "large.gguf", folder / "small.gguf"
    synth.write(replace(llama, n_layer=3), large)
    synth.write(replace(llama, n_layer=2), small)
    library = folder / "loras"
    library.mkdir()
    for seed, name in enumerate(("a", "b")):
        make(library / f"{name}.gguf", small, rank=8, alpha=64, seed=seed)
    with (
        Runtime(large, small=small, small_adapters=library, **SETTINGS) as runtime,
        api(runtime) as opened,
    ):
        yield opened


def ask(served: Api, **extension: Any) -> dict[str, Any]:
    return served.complete(max_tokens=16, edgeroute={"steps": "small", **extension})


@pytest.mark.parametrize("asked", ["a", {"a": 0.5, "b": 0.25}])
def test_it_is_what_the_engine_gives(served: Api, asked: Any) -> None:
    found, plain = ask(served, small_adapter=asked), ask(served)
    expected = served.runtime.generate(
        "hello there", max_tokens=16, steps="small", small_adapter=asked
    )
    assert found["choices"][0]["text"] == expected.text != plain["choices"][0]["text"]
    told = found["edgeroute"]
    assert told["adapter"] is None
    assert told["stats"]["adapters"]["small"]["used"] == ({asked: 1.0} if asked == "a" else asked)


def test_what_cannot_be_is_refused_with_the_names_there_are(served: Api) -> None:
    for path, body in ((CHAT, HELLO), (COMPLETIONS, {"prompt": "hello there"})):
        unknown = {"steps": "small", "small_adapter": "poems"}
        error = served.refused(path, body | {"edgeroute": unknown})
        assert "'poems'" in error["message"] and "a, b" in error["message"]
        for wrong in ("", 3, {"a": 101}, {"a": "x"}, [], "x" * 257):
            served.refused(path, body | {"edgeroute": {"small_adapter": wrong}})
        nobody = {"steps": "off", "small_adapter": "a"}
        assert "steps" in served.refused(path, body | {"edgeroute": nobody})["message"]
    assert served.rests()
