"""Vectors of texts: the numbers, what may interrupt them, and what is left behind."""

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
import pytest

from edgeroute import Runtime, paging
from edgeroute.embedding import MAX_INPUTS, STATES
from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime import errors
from edgeroute.runtime.tensor import get_bytes, shape
from edgeroute.runtime.units import MIB
from edgeroute.tools import synth
from tests.edgeroute.layered_lab import plain_machine

TEXTS = ["A cat sat on the mat.", "A dog lay on the rug.", "Shares fell sharply on Monday."]
INPUTS = [[40 + 7 * i + j * (i + 2) % 90 for j in range(n)] for i, n in enumerate((1, 9, 70, 200))]
SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 64, "threads": 1}


def settled(runtime: Runtime) -> dict[str, Any]:
    """Wait until nothing runs, and check that every cell and byte is accounted for."""
    until = time.monotonic() + 20
    while (stats := runtime.stats())["running"] or stats["waiting"]:
        assert time.monotonic() < until, stats
        time.sleep(0.002)
    found: dict[str, Any] = stats
    assert found["kv_free_cells"] + found["kv_kept_cells"] == found["kv_cells"]
    assert sum(found["memory"].values()) == found["memory_bytes"] <= found["budget_bytes"]
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed, pass by pass: `embed` or `answer`, and the first token."""
    seen: list[str] = []
    run = Forward.run

    def noted(self: Forward, pieces: Any, spans: Any = None, **more: Any) -> Any:
        kind = "embed" if spans and spans[0].norm else "answer"
        seen.append(f"{kind} {pieces[0].tokens[0]}")
        return run(self, pieces, spans, **more)

    monkeypatch.setattr(Forward, "run", noted)
    return seen


# numbers


def test_vectors_are_means_behind_the_output_norm(tiny: Runtime) -> None:
    """Against numpy's norm and mean of what the last layer leaves."""
    found = tiny.embed(INPUTS)
    assert found.vectors.shape == (4, tiny._loaded.model.hparams.n_embd)
    assert found.vectors.dtype == np.float32
    assert found.n_tokens == (1, 9, 70, 200)
    tiny.close()
    with Runtime(tiny.path, n_ctx=512, threads=1) as runtime:
        loaded = runtime._loaded
        forward, hparams = loaded.forward, loaded.model.hparams
        tensor = forward.weights["output_norm.weight"]
        weight = np.empty(shape(tensor)[0], np.float32)
        get_bytes(tensor, weight)
        region = loaded.kv.allocate(256)
        assert region is not None
        for ids, vector in zip(INPUTS, found.vectors, strict=True):
            forward.run([Piece(tokens=ids, pos=0, region=region)], forward.headless())
            x = forward.residual(len(ids)).astype(np.float64)
            x /= np.sqrt((x * x).mean(axis=1, keepdims=True) + hparams.norm_rms_eps)
            mean = (x * weight).mean(axis=0)
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-6)
        loaded.kv.release(region)


def test_a_batch_equals_each_input_alone(smollm2: Runtime) -> None:
    """To the bit: inputs are computed one by one, whatever else there is."""
    together = smollm2.embed(TEXTS)
    apart = [smollm2.embed([text]) for text in TEXTS]
    assert np.array_equal(together.vectors, np.concatenate([one.vectors for one in apart]))
    assert together.n_tokens == tuple(len(smollm2.encode(text)) for text in TEXTS)
    np.testing.assert_allclose(np.linalg.norm(together.vectors, axis=1), 1, atol=1e-6)
    cosines = together.vectors @ together.vectors.T
    assert cosines[0, 1] > max(cosines[0, 2], cosines[1, 2]) + 0.05, "like texts are nearer"


def test_token_ids_are_taken_as_they_are(smollm2: Runtime) -> None:
    ids = smollm2.encode(TEXTS[0])
    assert np.array_equal(smollm2.embed([ids]).vectors, smollm2.embed([TEXTS[0]]).vectors)
    assert np.array_equal(smollm2.embed([tuple(ids)]).vectors, smollm2.embed([ids]).vectors)


def test_several_batches_of_a_prompt_make_the_vector_of_one(tiny_path: Path) -> None:
    """Not to the bit: batches of other sizes take other paths through ggml's kernels."""
    with Runtime(tiny_path, **{**SETTINGS, "n_ubatch": 256}) as runtime:
        whole = runtime.embed(INPUTS)
    with Runtime(tiny_path, **SETTINGS) as runtime:
        split = runtime.embed(INPUTS)
    assert np.array_equal(whole.vectors[:2], split.vectors[:2]), "those are one batch in both"
    np.testing.assert_allclose(split.vectors, whole.vectors, atol=2e-4)
    assert not np.array_equal(whole.vectors[3], split.vectors[3])


def test_llama_cpp_pools_the_same_vectors(smollm2: Runtime, smollm2_path: Path) -> None:
    texts = [*TEXTS, "def f(x):\n    return x + 1", "word " * 250]
    peer = llama_cpp.Llama(
        str(smollm2_path), embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
        # Its mean is of the last batch alone where a text takes several.
        n_ctx=512, n_batch=512, n_ubatch=512, n_threads=1, n_threads_batch=1, verbose=False,
        flash_attn=True,
    )  # fmt: skip
    try:
        theirs = np.array([peer.embed(text) for text in texts])
    finally:
        peer.close()
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    cosines = (smollm2.embed(texts).vectors * theirs).sum(axis=1)
    assert cosines.min() > 0.999, cosines


# turns


def test_running_answers_go_on_between_its_batches(tiny: Runtime, passes: list[str]) -> None:
    stream = tiny.stream(prompt_ids=[300] * 5, max_tokens=200, logit_bias={0: -100, 2: -100})
    next(stream)
    tiny.embed([[60] * 400, [61] * 20, [62] * 20])
    embeds = [i for i, each in enumerate(passes) if each.startswith("embed")]
    assert len(embeds) == 3
    still = [i for i in embeds if any(each.startswith("answer") for each in passes[i + 1 :])]
    assert still, "the answer ended too early to show anything"
    assert all(passes[i + 1].startswith("answer") for i in still)
    stream.close()
    settled(tiny)


def test_calls_take_turns_between_inputs(tiny_path: Path, passes: list[str]) -> None:
    """Where there are cells for one input at a time: a call of many does not go before others."""
    hold = threading.Event()

    async def all_at_once(runtime: Runtime) -> None:
        tasks = [asyncio.create_task(each) for each in (
            runtime.aembed([[60 + i] * 200 for i in range(4)]),
            runtime.aembed([[160 + i] * 200 for i in range(4)]),
            runtime.agenerate(prompt_ids=[260] * 200, max_tokens=1),
        )]  # fmt: skip
        while runtime._engine.n_queued < 3:
            await asyncio.sleep(0.001)
        hold.set()
        await asyncio.gather(*tasks)

    with Runtime(tiny_path, n_ctx=256, n_kv=256, threads=1) as runtime:
        holder = threading.Thread(target=runtime._engine.order, args=(lambda: assert_set(hold),))
        holder.start()
        asyncio.run(all_at_once(runtime))
        holder.join()
        firsts = [int(each.split()[1]) for each in passes]
        assert sorted(firsts) == [60, 61, 62, 63, 160, 161, 162, 163, 260]
        assert 260 in firsts[:3], "behind one input of each call, not behind all"
        assert all(abs(firsts.index(60 + i) - firsts.index(160 + i)) < 3 for i in range(4))
        settled(runtime)


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


def test_it_waits_for_cells_and_gives_them_back(tiny_path: Path) -> None:
    with Runtime(tiny_path, n_ctx=512, n_kv=512, threads=1) as runtime:
        stream = runtime.stream(prompt_ids=[40] * 300, max_tokens=200)
        next(stream)
        found = runtime.embed([[50] * 300], timeout_s=60)
        assert found.n_tokens == (300,)
        assert list(stream)[-1].finish_reason in ("length", "stop")
        settled(runtime)


# other ways to hold weights


def test_streamed_layers_give_the_bits_of_resident_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_machine(monkeypatch, MIB=1)
    path = tmp_path / "model.gguf"
    synth.write(synth.ARCHITECTURES["llama"], path)
    with Runtime(path, **SETTINGS) as runtime:
        expected = runtime.embed(INPUTS)
        least = runtime.stats()["memory_bytes"]
    assert isinstance(least, int)
    with Runtime(path, **SETTINGS, memory=least - 64 * 1024) as runtime:
        assert runtime._loaded.layers is not None
        found = runtime.embed(INPUTS)
        assert np.array_equal(found.vectors, expected.vectors)
        assert runtime.generate(prompt_ids=[50] * 9, max_tokens=3).token_ids
        assert np.array_equal(runtime.embed(INPUTS[:2]).vectors, expected.vectors[:2])
        settled(runtime)


def test_paged_experts_give_the_bits_of_resident_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    path = tmp_path / "model.gguf"
    synth.write(replace(
        synth.ARCHITECTURES["qwen3moe"], n_layer=4, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
        n_head_kv=1, n_embd_head=64, n_expert=32, n_expert_used=3,
    ), path)  # fmt: skip
    with Runtime(path, **SETTINGS) as runtime:
        expected = runtime.embed(INPUTS)
        answer = runtime.generate(prompt_ids=INPUTS[1], max_tokens=6).token_ids
    with pytest.raises(errors.CapacityError) as refusal:
        Runtime(path, **SETTINGS, memory=MIB)
    least = refusal.value.smallest_bytes
    assert least is not None
    with Runtime(path, **SETTINGS, memory=least + 4 * MIB) as runtime:
        assert runtime._loaded.experts is not None
        runtime._loaded.experts._next_reading = math.inf  # nobody else's memory takes slots away
        for _ in range(2):
            assert np.array_equal(runtime.embed(INPUTS).vectors, expected.vectors)
            assert runtime.generate(prompt_ids=INPUTS[1], max_tokens=6).token_ids == answer
        settled(runtime)
        assert all(pool.table.n_pinned == 0 for pool in runtime._loaded.experts.pools)


# refusals and ends


def test_what_is_refused(tiny: Runtime) -> None:
    for inputs, told in [
        ([], "a list of texts"), ("text", "a list of texts"), ([b"text"], "input 0 must be"),
        ([3], "input 0 must be"), (["a", [1, 10**9]], "input 1: prompt_ids"),
        ([[1], []], "input 1: the prompt is empty"), ([[True]], "input 0: prompt_ids"),
        ([[1]] * (MAX_INPUTS + 1), "over the limit"),
    ]:  # fmt: skip
        with pytest.raises(errors.UsageError, match=told):
            tiny.embed(inputs)  # type: ignore[arg-type]
    with pytest.raises(errors.ContextError, match=r"input 1: the prompt has 513 tokens.*512"):
        tiny.embed([[1], [7] * 513])
    with pytest.raises(errors.ContextError, match="input 0"):
        tiny.embed(["word " * 100_000])
    with pytest.raises(errors.UsageError, match="no adapters"):
        tiny.embed(["text"], adapter="a")
    with pytest.raises(errors.UsageError, match="positive"):
        tiny.embed(["text"], timeout_s=-1)
    assert tiny.stats()["finished"] == 0
    assert tiny.embed([[7] * 512]).n_tokens == (512,)
    tiny.close()
    with pytest.raises(errors.ClosedError):
        tiny.embed(["text"])


def test_a_deadline_is_an_error(tiny: Runtime) -> None:
    with pytest.raises(errors.DeadlineError, match=r"\d+ of 2000 inputs"):
        tiny.embed([[40] * 500] * 2000, timeout_s=0.1)
    settled(tiny)
    assert tiny.embed([[40]]).n_tokens == (1,)


def test_a_cancelled_task_frees_its_cells_within_a_batch(
    smollm2: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of a batch, which stops at its next operation."""
    stopped: list[bool] = []
    run = smollm2._loaded.forward.run

    def noted(*args: Any, **more: Any) -> Any:
        found = run(*args, **more)
        stopped.append(found is None)
        return found

    monkeypatch.setattr(smollm2._loaded.forward, "run", noted)

    async def start_and_cancel() -> None:
        task = asyncio.create_task(smollm2.aembed([[1000] * 2000] * 50))
        while not smollm2.stats()["running"]:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.03)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(start_and_cancel())
    settled(smollm2)
    assert stopped[-1] and len(stopped) < 20


def test_an_interrupted_batch_is_computed_again(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny.embed(INPUTS)
    run, calls = tiny._loaded.forward.run, iter(range(1000))

    def interrupted(*args: Any, **more: Any) -> Any:
        if next(calls) % 2 == 0:
            tiny.interrupt()
        return run(*args, **more)

    monkeypatch.setattr(tiny._loaded.forward, "run", interrupted)
    assert np.array_equal(tiny.embed(INPUTS).vectors, expected.vectors)
    assert next(calls) >= 2 * len(INPUTS)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Make hidden states what `put` says, after the first input."""
    told: dict[str, Any] = {"put": None}
    residual = Forward.residual

    def changed(self: Forward, n_tokens: int) -> Any:
        found = residual(self, n_tokens)
        return found if told["put"] is None else np.full_like(found, told["put"])

    monkeypatch.setattr(Forward, "residual", changed)
    yield told


def test_no_vector_is_made_of_nothing(tiny: Runtime, states: dict[str, Any]) -> None:
    for value in (0.0, np.nan, np.inf):
        states["put"] = value
        with pytest.raises(errors.ComputeError, match="input 0 has no vector"):
            tiny.embed([[40] * 3])
        settled(tiny)
    states["put"] = None
    assert tiny.embed([[40] * 3]).vectors.shape[0] == 1


def test_a_failed_pass_fails_its_call_and_no_other(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny._loaded.forward.run

    def fails(pieces: Any, spans: Any = None, **more: Any) -> Any:
        if spans and pieces[0].tokens[0] == 66:
            raise errors.ComputeError("planted")
        return run(pieces, spans, **more)

    monkeypatch.setattr(tiny._loaded.forward, "run", fails)
    with pytest.raises(errors.ComputeError, match="planted"):
        tiny.embed([[50], [66], [70]])
    assert tiny.embed([[50], [70]]).n_tokens == (1, 1)
    settled(tiny)


def refuse(*_: object) -> None:
    raise errors.CapacityError("planted")


def test_hidden_states_are_in_the_ledger_or_refused(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Runtime(tiny_path, **SETTINGS) as runtime:
        runtime.embed([[40]])
        runtime.embed([[40] * 300])
        memory: Any = settled(runtime)["memory"]
        assert memory[STATES] == 4 * 64 * runtime._loaded.model.hparams.n_embd
    with Runtime(tiny_path, **SETTINGS) as runtime:
        ledger = runtime._loaded.ledger
        monkeypatch.setattr(ledger, "budget_bytes", ledger.used_bytes + 100)
        for _ in range(2):
            with pytest.raises(errors.CapacityError):
                runtime.embed([[40]])
        assert STATES not in settled(runtime)["memory"]
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr(Forward, "reserve_stream", refuse)
            with pytest.raises(errors.CapacityError, match="planted"):
                runtime.embed([[40]])
        assert STATES not in settled(runtime)["memory"]
        assert runtime.embed([[40]]).n_tokens == (1,)
        assert runtime.generate(prompt_ids=[40], max_tokens=2).token_ids
