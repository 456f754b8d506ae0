"""What a Runtime answers on a device of another process: the processor's tokens and bits."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device.equal_lab import SETTINGS, ask, balanced, both, ids, together, told
from tests.edgeroute.session_lab import settled

pytestmark = pytest.mark.usefixtures("same_kernels")
ARCHS = sorted(synth.ARCHITECTURES)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("rpc") / "llama.gguf"
    synth.make("llama", found)
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_family(arch: str, rpc: RpcServer, tmp_path: Path) -> None:
    """A prompt in chunks, and answers that share passes."""
    synth.make(arch, tmp_path / "m.gguf")

    def scenario(runtime: Runtime) -> Any:
        return ask(runtime, 150, max_tokens=6), sorted(
            together(runtime, [{"n": n, "text": n, "max_tokens": 5} for n in (3, 40)])
        )

    both(rpc, tmp_path / "m.gguf", scenario)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q4_0", "BF16", "F16"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_every_type_of_weights_and_cells(
    kind: str, kv_type: str, rpc: RpcServer, tmp_path: Path
) -> None:
    synth.make("qwen2", tmp_path / "m.gguf", weight_type=kind, n_layer=2)
    both(rpc, tmp_path / "m.gguf", lambda r: ask(r, 90, max_tokens=6), kv_type=kv_type)


def test_long_contexts(rpc: RpcServer, path: Path) -> None:
    """Over 512 cells attention of one token is another kernel's; prompts come in many chunks."""

    def scenario(runtime: Runtime) -> Any:
        alone = [ask(runtime, n, text=n, max_tokens=6) for n in (505, 800)]
        asks = [{"n": n, "text": n, "max_tokens": 6} for n in (700, 30, 520)]
        return alone, together(runtime, asks)

    both(rpc, path, scenario, n_ctx=1024, n_kv=4096)


def test_sampled_and_constrained_answers(rpc: RpcServer, path: Path) -> None:
    def scenario(runtime: Runtime) -> Any:
        return [
            ask(runtime, temperature=1.3, seed=3, top_p=0.9, prefix="off"),
            ask(runtime, temperature=0.8, seed=4, repeat_penalty=1.3, logit_bias={50: 3.0}),
            ask(runtime, json_schema={"type": "object"}, max_tokens=24),
        ]

    both(rpc, path, scenario)


def test_beginnings_that_were_computed_before(rpc: RpcServer, path: Path) -> None:
    """Cells are kept, and copied to a second conversation that begins alike."""

    def scenario(runtime: Runtime) -> Any:
        shared = ids(300, 5)
        found, n_reused = [], []
        for tail in ([7, 8], [7, 8, 9, 10], [11] * 5):
            answer = runtime.generate(prompt_ids=[*shared, *tail], max_tokens=6, logprobs=2)
            found.append(told(answer))
            n_reused.append(answer.stats.n_cached)
        assert n_reused[0] == 0 and min(n_reused[1:]) > 250
        return found, n_reused

    both(rpc, path, scenario)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_sessions_survive_a_restart(
    kv_type: str, rpc: RpcServer, path: Path, tmp_path: Path
) -> None:
    """Cells are read from a device, and written to it, by threads that save and load."""
    prompt, told_by = ids(200, 3), {}
    for device in ("cpu", rpc.name):
        settings = SETTINGS | {"kv_type": kv_type, "sessions": str(tmp_path), "device": device}
        with Runtime(path, **settings) as runtime:
            answer = runtime.generate(prompt_ids=prompt, max_tokens=8, session="a")
            settled(runtime)
        longer = [*prompt, *answer.token_ids, *ids(9, 4)]
        with Runtime(path, **settings) as runtime:
            again = runtime.generate(prompt_ids=longer, max_tokens=8, logprobs=2, session="a")
            assert again.stats.session is not None
            assert again.stats.session["restored_tokens"] == again.stats.n_cached > 100
            told_by[device] = answer.token_ids, told(again)
            settled(runtime)
            balanced(runtime)
    assert told_by["cpu"] == told_by[rpc.name]


def test_embeddings(rpc: RpcServer, path: Path) -> None:
    inputs = [ids(n, n) for n in (1, 9, 70, 200)]

    def scenario(runtime: Runtime) -> Any:
        return [vector.tobytes() for vector in runtime.embed(inputs).vectors]

    both(rpc, path, scenario)


@pytest.fixture(scope="module")
def far(rpc: RpcServer, path: Path) -> Iterator[Runtime]:
    with Runtime(path, device=rpc.name, **SETTINGS | {"n_ctx": 2048, "n_kv": 4096}) as runtime:
        yield runtime


def test_cancelling_between_tokens_and_in_a_prompt(far: Runtime) -> None:
    """A graph that a device computes is not stopped; the next is not begun."""
    before = ask(far, prefix="off")
    for n in (20, 1900):
        stream = far.stream(prompt_ids=ids(n, n), max_tokens=100, prefix="off")
        timer = threading.Timer(0.02, stream.cancel)
        timer.start()
        chunks = list(stream)
        timer.join()
        assert chunks[-1].finish_reason == "cancelled"
        assert balanced(far)["running"] == 0
    assert ask(far, prefix="off") == before


def test_a_stop_that_came_before_the_pass(far: Runtime) -> None:
    """The flag of a stop is lowered again; answers after it are whole."""
    before = ask(far, 100, prefix="off")
    for _ in range(20):
        stream = far.stream(prompt_ids=ids(64, 1), max_tokens=50)
        next(stream)
        stream.cancel()
        list(stream)
    assert ask(far, 100, prefix="off") == before


def test_a_real_model(rpc: RpcServer, smollm2_path: Path) -> None:
    """Its weights are quantised several ways, and its vocabulary is large."""
    both(rpc, smollm2_path, lambda runtime: ask(runtime, 70, max_tokens=8))
