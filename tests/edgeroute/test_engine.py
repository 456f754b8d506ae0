"""The public face: answers, streams, limits, errors, and what is left behind."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import edgeroute
from edgeroute import Runtime, asking
from edgeroute.runtime import errors, graph_cache

PROMPTS = [f"{n}. The story of the {n} little lighthouses begins like this:" for n in range(16)]


def wait_idle(runtime: Runtime) -> dict[str, object]:
    """Wait until the engine has let go of everything; return its statistics."""
    for _ in range(500):
        stats = runtime.stats()
        if not stats["running"] and not stats["waiting"]:
            return stats
        time.sleep(0.01)
    raise AssertionError(f"the engine never became idle: {stats}")


def cells_accounted(stats: dict[str, object]) -> bool:
    """Every cell is free or kept for a later prompt; none is lost."""
    return stats["kv_free_cells"] + stats["kv_kept_cells"] == stats["kv_cells"]  # type: ignore[operator]


def test_a_real_model_answers(smollm2: Runtime) -> None:
    answer = smollm2.generate("The capital of France is", max_tokens=8)
    assert "Paris" in answer.text
    assert answer.finish_reason == "length"
    assert answer.stats.n_generated == len(answer.token_ids) == 8
    figures = answer.stats.to_dict()
    for name in ("n_prompt", "n_generated", "ttft_s", "prefill_tok_s", "decode_tok_s"):
        assert figures[name] > 0, name  # type: ignore[operator]
    assert figures["memory_bytes"] == smollm2.stats()["memory_bytes"]


def test_chat_messages_end_with_the_models_own_end(smollm2: Runtime) -> None:
    messages = [{"role": "user", "content": "Reply with the single word: yes"}]
    answer = smollm2.generate(messages=messages, max_tokens=64)
    assert answer.finish_reason == "stop"
    assert "<|im_end|>" not in answer.text


def test_streamed_pieces_make_the_whole_text(smollm2: Runtime) -> None:
    whole = smollm2.generate("Once upon a time", max_tokens=24)
    chunks = list(smollm2.stream("Once upon a time", max_tokens=24))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [i for chunk in chunks for i in chunk.token_ids] == list(whole.token_ids)
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].generation is not None
    assert chunks[-1].generation.text == whole.text
    assert len(chunks) > 10


def test_chunks_bring_every_token_also_of_text_that_was_held_back(smollm2: Runtime) -> None:
    free = smollm2.generate("1, 2, 3, 4,", max_tokens=24)
    chunks = list(smollm2.stream("1, 2, 3, 4,", max_tokens=24, stop=[free.text[8:14]]))
    generation = chunks[-1].generation
    assert generation is not None and generation.finish_reason == "stop"
    assert [i for chunk in chunks for i in chunk.token_ids] == list(generation.token_ids)


def test_a_stop_string_ends_the_answer_and_stays_out_of_it(smollm2: Runtime) -> None:
    free = smollm2.generate("1, 2, 3, 4,", max_tokens=24)
    stop = free.text[8:11]
    cut = smollm2.generate("1, 2, 3, 4,", max_tokens=24, stop=stop)
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]


def test_same_seed_same_text_other_seed_other_text(smollm2: Runtime) -> None:
    def answer(seed: int) -> str:
        return smollm2.generate("My dog", max_tokens=16, temperature=1.0, seed=seed).text

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_sixteen_threads_get_the_texts_of_sixteen_calls_in_a_row(smollm2: Runtime) -> None:
    """Neither the batch nor the prefix cache may change a text."""
    alone = [smollm2.generate(prompt, max_tokens=24).text for prompt in PROMPTS]
    together: list[str] = [""] * len(PROMPTS)

    def call(i: int) -> None:
        together[i] = smollm2.generate(PROMPTS[i], max_tokens=24).text

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert wait_idle(smollm2)["mean_batch"] > 1  # type: ignore[operator]


def test_async_calls_decode_together_and_agree(smollm2: Runtime) -> None:
    alone = [smollm2.generate(prompt, max_tokens=12).text for prompt in PROMPTS[:4]]

    async def all_of_them() -> list[str]:
        calls = [smollm2.agenerate(prompt, max_tokens=12) for prompt in PROMPTS[:4]]
        streamed = [chunk.text async for chunk in smollm2.astream(PROMPTS[0], max_tokens=12)]
        assert "".join(streamed) == alone[0]
        return [answer.text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(all_of_them()) == alone


def test_logprobs_belong_to_the_tokens(tiny: Runtime) -> None:
    answer = tiny.generate("hello", max_tokens=5, logprobs=3)
    assert [each.token_id for each in answer.logprobs] == list(answer.token_ids)
    for each in answer.logprobs:
        assert each.logprob == pytest.approx(each.top[0][1])  # greedy takes the likeliest
        assert len(each.top) == 3


def test_grammar_holds_from_the_first_token(tiny: Runtime) -> None:
    answer = tiny.generate("x", max_tokens=20, grammar='root ::= "ab" [0-9]{3}')
    assert answer.text[:2] == "ab" and answer.text[2:].isdigit() and len(answer.text) == 5
    assert answer.finish_reason == "stop"


def test_a_full_context_is_length_not_a_crash(tiny: Runtime) -> None:
    n_ctx = tiny.params.n_ctx
    ids = [40] * (n_ctx - 3)
    answer = tiny.generate(prompt_ids=ids, max_tokens=100, logit_bias={})
    if answer.finish_reason == "length":  # random weights may end by themselves
        assert len(answer.token_ids) == 4
    assert tiny.generate(prompt_ids=[40] * n_ctx, max_tokens=9).stats.n_generated <= 1
    with pytest.raises(errors.UsageError, match="n_ctx"):
        tiny.generate(prompt_ids=[40] * (n_ctx + 1))


def test_max_tokens_zero_is_length(tiny: Runtime) -> None:
    answer = tiny.generate("hello", max_tokens=0)
    assert (answer.text, answer.finish_reason) == ("", "length")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 1.0}, "temprature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": -4}, "seed"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"prefix": "some"}, "prefix"),
        ({"stop": [""]}, "stop"),
        ({"messages": [{"role": "user", "content": "x"}]}, "exactly one"),
        ({"grammar": "root ::= x", "json_schema": {}}, "exclude"),
        ({"logit_bias": {10**9: 1.0}}, "vocabulary"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    tiny: Runtime, options: dict[str, object], words: str
) -> None:
    before = tiny.stats()["finished"]
    with pytest.raises(errors.UsageError, match=words):
        tiny.generate("hello", **options)  # type: ignore[arg-type]
    with pytest.raises(errors.UsageError, match=words):
        tiny.stream("hello", **options)  # type: ignore[arg-type]  # at the call, not later
    assert tiny.stats()["finished"] == before


@pytest.mark.parametrize("bad", [{"grammar": "root ::= ("}, {"json_schema": {"type": "flower"}}])
def test_a_bad_constraint_is_an_error_never_free_text(
    tiny: Runtime, bad: dict[str, object]
) -> None:
    """Guards against failing open: llama.cpp issues 19051 and 24144."""
    with pytest.raises(errors.GrammarError):
        tiny.generate("hello", **bad)  # type: ignore[arg-type]


def test_prompts_that_no_model_can_read(tiny: Runtime) -> None:
    with pytest.raises(errors.UsageError):
        tiny.generate("lone surrogate \ud800")
    with pytest.raises(errors.UsageError, match="exactly one"):
        tiny.generate()
    with pytest.raises(errors.UsageError, match="str"):
        tiny.generate(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(errors.UsageError, match="whole numbers"):
        tiny.generate(prompt_ids=[1, 10**9])


def test_timeout_is_a_reason_not_an_error(tiny: Runtime) -> None:
    answer = tiny.generate(prompt_ids=[40] * 300, max_tokens=200, timeout_s=0.02)
    assert answer.finish_reason in ("timeout", "stop")
    assert cells_accounted(wait_idle(tiny))
    assert tiny.generate("hello", max_tokens=2).finish_reason in ("length", "stop")


def test_closing_a_stream_cancels_it(smollm2: Runtime) -> None:
    before = smollm2.stats()["finished"]
    stream = smollm2.stream("Count to one thousand: 1, 2,", max_tokens=1000)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    stats = wait_idle(smollm2)
    assert stats["finished"] == before + 1  # type: ignore[operator]
    assert cells_accounted(stats)


def test_cancelling_stops_a_long_prefill_midway(smollm2: Runtime) -> None:
    """Within one prefill batch: the 512 tokens under way are not computed to their end."""
    ids = smollm2.encode("word " * 1500)[:1500]
    stream = smollm2.stream(prompt_ids=ids, max_tokens=5)
    threading.Timer(0.1, stream.cancel).start()
    chunks = list(stream)
    assert chunks[-1].finish_reason == "cancelled"
    assert not any(chunk.text for chunk in chunks)
    assert cells_accounted(wait_idle(smollm2))


def test_a_cancelled_stream_still_gives_its_generation(smollm2: Runtime) -> None:
    stream = smollm2.stream("Count to one thousand: 1, 2,", max_tokens=1000)
    chunks = [next(stream) for _ in range(3)]
    stream.cancel()
    chunks += stream
    answer = chunks[-1].generation
    assert answer is not None and answer.finish_reason == "cancelled"
    assert answer.text == "".join(chunk.text for chunk in chunks)
    assert answer.stats.n_generated == len(answer.token_ids) >= 3
    assert answer.stats.n_prompt > 0


def test_a_dropped_stream_stops_working(smollm2: Runtime) -> None:
    for _ in smollm2.stream("Count to one thousand: 1, 2,", max_tokens=1000):
        break
    assert wait_idle(smollm2)["running"] == 0


def test_a_thousand_cancels_leak_nothing(tiny: Runtime) -> None:
    """At every phase: queued, in prefill, between tokens."""
    n_before = wait_idle(tiny)["finished"]
    streams = []
    for i in range(1000):
        stream = tiny.stream(prompt_ids=[40 + i % 50] * (1 + 37 * i % 90), max_tokens=50)
        if i % 3:
            next(stream, None)
        streams.append(stream)
        if len(streams) > i % 7:
            for each in streams:
                each.close()
            streams.clear()
    for each in streams:
        next(each, None)
        each.close()
    stats = wait_idle(tiny)
    assert cells_accounted(stats)
    assert stats["finished"] == n_before + 1000  # type: ignore[operator]
    assert tiny.generate("hello", max_tokens=2).text is not None


def test_close_ends_running_and_later_calls(tiny_path: Path) -> None:
    runtime = Runtime(tiny_path, n_ctx=512, threads=1)
    stream = runtime.stream("hello", max_tokens=500, stop=["never said"])
    runtime.close()
    runtime.close()
    with pytest.raises(errors.ClosedError):
        for _ in stream:
            pass
    with pytest.raises(errors.ClosedError, match="closed"):
        runtime.generate("hello")


def test_close_waits_for_whoever_still_asks(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar is compiled in the caller's thread, over a vocabulary that closing frees."""
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    real = asking.Sampler

    def slow(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        assert not closed.is_set()
        return real(*args)

    runtime = Runtime(tiny_path, n_ctx=512, threads=1)
    monkeypatch.setattr(asking, "Sampler", slow)

    def close() -> None:
        runtime.close()
        closed.set()

    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(runtime.generate, "x", max_tokens=4, grammar='root ::= "ab" [0-9]+')
        assert begun.wait(60)
        closing = pool.submit(close)
        assert not closed.wait(0.2)
        go_on.set()
        with pytest.raises(errors.ClosedError):
            answer.result(60)
        closing.result(60)


def test_a_bug_in_the_engine_reaches_every_caller(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead engine thread must not leave callers waiting for ever."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(tiny._scheduler.forward, "run", broken)
    with pytest.raises(errors.ClosedError, match="planted"):
        tiny.generate("hello")
    with pytest.raises(errors.ClosedError, match="planted"):
        tiny.generate("hello")


def test_a_failed_computation_fails_its_request_only(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny._scheduler.forward.run
    calls = iter([True])

    def once(*args: object, **kwargs: object) -> object:
        if next(calls, False):
            raise errors.ComputeError("planted")
        return run(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny._scheduler.forward, "run", once)
    with pytest.raises(errors.ComputeError, match="planted"):
        tiny.generate("hello")
    assert tiny.generate("hello", max_tokens=2).finish_reason in ("length", "stop")
    assert cells_accounted(wait_idle(tiny))


def test_a_stop_meant_for_another_batch_costs_nothing_but_time(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel may arrive when its own computation is over and the next one runs."""
    expected = tiny.generate(prompt_ids=[50] * 100, max_tokens=4, prefix="off")
    run = tiny._scheduler.forward.run
    stopped = iter([True])

    def stop_once(*args: object, **kwargs: object) -> object:
        return None if next(stopped, False) else run(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny._scheduler.forward, "run", stop_once)
    again = tiny.generate(prompt_ids=[50] * 100, max_tokens=4, prefix="off")
    assert again.token_ids == expected.token_ids
    assert again.finish_reason == expected.finish_reason


def test_a_timeout_stops_a_long_prefill_midway(smollm2: Runtime) -> None:
    ids = smollm2.encode("word " * 1500)[:1500]
    answer = smollm2.generate(prompt_ids=ids, max_tokens=5, timeout_s=0.15)
    assert answer.finish_reason == "timeout"
    assert answer.stats.n_generated == 0
    assert cells_accounted(wait_idle(smollm2))


def test_what_does_not_fit_is_refused_with_numbers(tiny_path: Path) -> None:
    with pytest.raises(errors.CapacityError, match=r"budget of 1 MiB.*at least 0\.\d+ GiB"):
        Runtime(tiny_path, memory="1MiB", n_ctx=512)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"n_ctx": 1}, "n_ctx"), ({"thread": 2}, "did you mean threads"),
     ({"kv_type": "f64"}, "kv_type"),
     ({"memory": "lots"}, "lots"), ({"device": "abacus"}, "abacus"), ({"n_kv": 64}, "n_kv")],
)  # fmt: skip
def test_bad_settings_are_refused(tiny_path: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(errors.UsageError, match=words):
        Runtime(tiny_path, **settings)  # type: ignore[arg-type]


def test_many_more_requests_than_cells_all_get_answers(tiny_path: Path) -> None:
    """Requests wait for cells in order; nobody starves and nothing deadlocks."""
    with Runtime(tiny_path, n_ctx=512, n_kv=512, threads=1) as runtime:
        streams = [runtime.stream(prompt_ids=[50 + i] * 200, max_tokens=4) for i in range(12)]
        ends = [list(stream)[-1].finish_reason for stream in streams]
        assert set(ends) <= {"length", "stop"}
        assert cells_accounted(wait_idle(runtime))


def test_default_model_is_used_by_the_module_function(smollm2_path: Path) -> None:
    answer = edgeroute.generate("2 + 2 =", max_tokens=2)
    assert answer.stats.n_generated == 2


def test_generation_is_a_plain_record(tiny: Runtime) -> None:
    answer = tiny.generate("hello", max_tokens=3)
    assert dataclasses.asdict(answer)["id"].startswith("gen-")
    assert answer.adapter is None


def test_cancelling_the_task_cancels_the_answer(tiny: Runtime) -> None:
    async def start_and_cancel() -> None:
        task = asyncio.create_task(tiny.agenerate(prompt_ids=[40] * 100, max_tokens=400))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(start_and_cancel())
    assert cells_accounted(wait_idle(tiny))


def test_statistics_reconcile_with_what_was_asked(tiny: Runtime) -> None:
    counters: Callable[[], dict[str, object]] = lambda: wait_idle(tiny)  # noqa: E731
    before = counters()
    answers = [tiny.generate("hello", max_tokens=6, prefix="off") for _ in range(3)]
    after = counters()
    decoded = sum(max(0, answer.stats.n_generated - 1) for answer in answers)
    ended = sum(answer.finish_reason == "stop" for answer in answers)
    grown = after["decode_steps"] - before["decode_steps"]  # type: ignore[operator]
    assert decoded <= grown <= decoded + ended
    assert after["finished"] - before["finished"] == 3  # type: ignore[operator]


def test_prompts_that_begin_alike_at_once_are_computed_once(tiny_path: Path) -> None:
    """Choices of one request, or chats with one system message: same bits, one prefill."""
    shared = "A long system message that all of them begin with. " * 6
    prompts = [f"{shared}{i}." for i in range(4)]
    with Runtime(tiny_path, n_ctx=512, n_kv=2048, threads=1) as runtime:
        alone = [runtime.generate(prompt, max_tokens=6, prefix="off") for prompt in prompts]
        streams = [runtime.stream(prompt, max_tokens=6) for prompt in prompts]
        together = [list(stream)[-1].generation for stream in streams]
    assert all(each is not None for each in together)
    assert [each.token_ids for each in together if each] == [each.token_ids for each in alone]
    assert all(each.stats.n_cached == 0 for each in alone)
    cached = [each.stats.n_cached for each in together if each]
    assert all(n > 100 for n in cached[1:]), cached


def test_the_processor_needs_no_proof(tiny: Runtime) -> None:
    """Other devices do: see tests/device/test_device_choice.py."""
    assert tiny.stats()["warnings"] == [] and tiny.stats()["device"] == "CPU"


def test_a_bug_met_by_one_answer_ends_no_other(tiny: Runtime) -> None:
    whole = tiny.generate(PROMPTS[0], max_tokens=30)
    good = tiny.stream(PROMPTS[0], max_tokens=30)
    bad = tiny.stream(PROMPTS[1], max_tokens=30)

    def broken(token_id: int) -> None:
        raise ZeroDivisionError(f"planted at {token_id}")

    bad._request.sampler.accept = broken  # type: ignore[method-assign]
    with pytest.raises(errors.ComputeError, match=r"internal error.*planted") as caught:
        list(bad)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    answer = list(good)[-1].generation
    assert answer is not None and answer.text == whole.text
    assert cells_accounted(wait_idle(tiny))


def test_graphs_of_many_shapes_are_bounded_in_bytes(
    tiny: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server meets ever new shapes: what describes their graphs must not add up."""
    monkeypatch.setattr(graph_cache, "MAX_BYTES", 1 << 20)
    whole = tiny.generate(PROMPTS[0], max_tokens=4)
    graphs = tiny._loaded.forward.graphs
    for n in range(2, 40):
        tiny.generate("x" * n, max_tokens=1, prefix="off")
    described = sum(each.descriptors.n_bytes for each in graphs._graphs.values())
    assert described == graphs._described_bytes
    assert graph_cache.KEPT_AT_LEAST <= len(graphs._graphs) < graphs.n_built
    one = max(each.descriptors.n_bytes for each in graphs._graphs.values())
    assert described <= max(1 << 20, graph_cache.KEPT_AT_LEAST * one)
    assert tiny.generate(PROMPTS[0], max_tokens=4, prefix="off").text == whole.text


def test_answers_under_way_get_their_share_between_batches_of_prompts(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that keep asking must not stop what is being written: here, for ever."""
    monkeypatch.setattr("edgeroute.scheduler.SHORT_PAUSE_S", 0.0)
    with Runtime(tiny_path, n_ctx=512, n_kv=4096, n_ubatch=64, threads=1) as runtime:
        scheduler = runtime._scheduler
        done: list[str] = []
        prefill, decode = scheduler.prompts.advance, scheduler._decode_all

        def slow_prefill() -> int:
            time.sleep(0.05)
            done.append("prompt")
            return prefill()

        def noted_decode() -> None:
            if scheduler.decoding:
                done.append("token")
                time.sleep(0.002)
            decode()

        monkeypatch.setattr(scheduler.prompts, "advance", slow_prefill)
        monkeypatch.setattr(scheduler, "_decode_all", noted_decode)
        writing = runtime.stream(PROMPTS[0], max_tokens=40, prefix="off")
        next(writing)
        done.clear()
        streams = [runtime.stream("y" * 300, max_tokens=1, prefix="off") for _ in range(8)]
        list(writing)
        during = done.copy()
        for stream in streams:
            assert list(stream)[-1].finish_reason == "length"
    tokens = during.count("token")
    assert tokens >= 30
    assert during.count("prompt") <= tokens / 2
