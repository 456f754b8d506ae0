"""A remote model writes the hard steps; whatever becomes of it, the answer is completed here."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.stats import Generation
from edgeroute.tools import synth
from tests.edgeroute.remote_server import RemoteServer

PARAMS: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 64, "threads": 1, "remote_timeout_s": 0.5}
STEP = ["The ", "first ", "of ", "these ", "is ", "the ", "one ", "that ", "we ", "want", ".\n\n"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("remote") / "small.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], n_layer=2), found)
    return found


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with RemoteServer(lambda body: itertools.cycle(STEP)) as found:
        yield found


def open_pair(path: Path, server: RemoteServer, **settings: Any) -> Runtime:
    runtime = Runtime(path, remote=server.remote, **(PARAMS | settings))
    routing = runtime._scheduler.steps
    assert routing is not None
    routing.new_bounds = lambda: StepBounds(min_tokens=2, max_tokens=60)
    return runtime


def writers(generation: Generation) -> list[tuple[str, str | None]]:
    return [(part.model, part.reason) for part in generation.stats.steps or ()]


def test_the_remote_model_writes_steps_and_the_local_one_reads_them(
    path: Path, server: RemoteServer
) -> None:
    with open_pair(path, server) as runtime:
        found = runtime.generate("Say it: ", max_tokens=150, steps="large")
        assert found.text.startswith("".join(STEP) * 2)
        assert {who for who, _ in writers(found)} == {"large"}
        assert found.finish_reason == "length" and found.stats.n_generated == 150
        stats: Any = runtime.stats()["steps"]
        assert len(found.stats.steps or ()) > 1 == stats["remote"]["n_calls"]


def test_steps_of_both_make_one_answer(path: Path, server: RemoteServer) -> None:
    with open_pair(path, server) as runtime:
        found = runtime.generate("Say it: ", max_tokens=200, steps="random:0.5", seed=3)
        again = runtime.generate("Say it: ", max_tokens=200, steps="random:0.5", seed=3)
    assert {who for who, _ in writers(found)} == {"small", "large"}
    assert found.token_ids == again.token_ids
    prompts = [str(seen.body.get("prompt")) for seen in server.seen if seen.body]
    assert len(prompts) > 2 and all(("Say it: " + found.text).startswith(each) for each in prompts)
    assert sum(part.n_tokens for part in found.stats.steps or ()) == 200


def test_always_small_asks_nobody(path: Path, server: RemoteServer) -> None:
    with Runtime(path, n_ctx=512, n_ubatch=64, threads=1) as alone:
        expected = alone.generate("Say it: ", max_tokens=40)
    with open_pair(path, server) as runtime:
        found = runtime.generate("Say it: ", max_tokens=40, steps="small")
    assert found.token_ids == expected.token_ids
    assert not server.seen


@pytest.mark.parametrize("fault", ["kill", "slow", "garbage"])
@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("after", [0, 5])
def test_an_answer_is_completed_here_and_says_so(
    path: Path, server: RemoteServer, fault: str, after: int, good: int
) -> None:
    """Whether the first step or a later one fails, before or after its first words."""
    getattr(server, fault)(good * len(STEP) + after)
    with open_pair(path, server) as runtime:
        found = runtime.generate("Say it: ", max_tokens=120, steps="large")
        stats: Any = runtime.stats()["steps"]
    assert found.finish_reason == "length" and found.stats.n_generated == 120
    assert ("small", "fallback") in writers(found)
    assert stats["remote"]["n_failures"] >= 1
    assert [who for who, _ in writers(found)].count("large") == good, "half a step is not taken"
    assert found.text.startswith("".join(STEP) * good)


def test_an_answer_that_the_remote_model_ends_is_ended(path: Path) -> None:
    with (
        RemoteServer(lambda body: ["All ", "done", "."]) as server,
        open_pair(path, server) as runtime,
    ):
        found = runtime.generate("Say it: ", max_tokens=120, steps="large")
    assert (found.text, found.finish_reason) == ("All done.", "stop")


def test_a_cancel_ends_a_call_that_hangs(path: Path, server: RemoteServer) -> None:
    server.slow(0)
    with open_pair(path, server, remote_timeout_s=60.0) as runtime:
        stream = runtime.stream("Say it: ", max_tokens=40, steps="large", timeout_s=0.3)
        *_, last = stream
        assert last.finish_reason == "timeout"
        assert server.wait(lambda server: server.n_cancelled > 0)


def test_what_a_grammar_refuses_is_written_here(path: Path, server: RemoteServer) -> None:
    with open_pair(path, server) as runtime:
        found = runtime.generate(
            "Say it: ", max_tokens=60, steps="large", grammar='root ::= [0-9]{12} "."'
        )
    assert found.text[:12].isdigit() and found.finish_reason == "stop"
    assert {who for who, _ in writers(found)} == {"small"}


def test_prompts_that_cannot_be_told_are_refused(path: Path, server: RemoteServer) -> None:
    with open_pair(path, server) as runtime:
        with pytest.raises(UsageError, match="prompt_ids"):
            runtime.generate(prompt_ids=[5, 6, 7], steps="large")
        with pytest.raises(UsageError, match="own logits"):
            runtime.generate("x", steps="verify:-1:-2")


def test_what_came_after_a_trimmed_blank_line_makes_no_empty_step(path: Path) -> None:
    texts = ["\n\n", *STEP]
    with RemoteServer(lambda body: texts) as server, open_pair(path, server) as runtime:
        found = runtime.generate("Say it: ", max_tokens=60, steps="large")
    assert "\n\n\n" not in found.text.lstrip("\n")
