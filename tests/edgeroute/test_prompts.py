"""Prompts that share a pass: when, with which bits, and what ends one of them."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from edgeroute import Generation, Runtime, paging
from edgeroute.passes import Passes
from edgeroute.row_bits import Rows, beside_prompts
from edgeroute.runtime.errors import ComputeError
from edgeroute.tools.synth import make
from tests.edgeroute.engine_lab import until

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_kv": 8192, "threads": 1}
SHORT = [f"{i} says: " + "so " * i for i in range(1, 9)]


@contextlib.contextmanager
def held(runtime: Runtime) -> Iterator[None]:
    """Keep the engine thread from working, so that what is asked meanwhile comes together."""
    go, holds = threading.Event(), threading.Event()

    def hold() -> None:
        holds.set()
        go.wait()

    thread = threading.Thread(target=runtime._engine.order, args=(hold,))
    thread.start()
    holds.wait()
    try:
        yield
    finally:
        go.set()
        thread.join()


def together(runtime: Runtime, prompts: Sequence[str], **options: Any) -> list[Generation]:
    """Ask all at once; return the answers."""
    with held(runtime):
        streams = [runtime.stream(prompt, **options) for prompt in prompts]
    answers = [list(stream)[-1].generation for stream in streams]
    return [answer for answer in answers if answer is not None]


def counts(runtime: Runtime) -> tuple[int, int]:
    """Passes over prompts so far, and their batches."""
    stats = runtime.stats()
    return stats["prompt_passes"], stats["prompt_batches"]  # type: ignore[return-value]


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Runtime]:
    """A model whose rows have bits of their own."""
    path = tmp_path / "plain.gguf"
    make("llama", path, weight_type="Q8_0")
    with Runtime(path, **SETTINGS) as runtime:
        yield runtime


@pytest.mark.parametrize(("weight_type", "n_passes"), [("Q8_0", 1), ("Q6_K", 2), ("Q4_K", 8),
                                                       ("F32", 8)])  # fmt: skip
def test_prompts_of_one_pass_are_answered_as_alone(
    tmp_path: Path, weight_type: str, n_passes: int
) -> None:
    """Eight of one length each: seven tiled ones share a pass, repacked ones with rests none."""
    path = tmp_path / "model.gguf"
    make("qwen2", path, weight_type=weight_type)
    ask: dict[str, Any] = {"max_tokens": 6, "logprobs": 2, "prefix": "off"}
    with Runtime(path, **SETTINGS) as runtime:
        prompts = [prompt.ljust(33, "x") for prompt in SHORT]
        alone = [runtime.generate(prompt, **ask) for prompt in prompts]
        assert len({answer.stats.n_prompt for answer in alone}) == 1
        assert counts(runtime) == (8, 8)
        answers = together(runtime, prompts, **ask)
        assert counts(runtime) == (8 + n_passes, 16)
    for one, other in zip(alone, answers, strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)


def test_whole_groups_of_repacked_weights_share_a_pass(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make("qwen2", path, weight_type="Q4_K")
    ask: dict[str, Any] = {"max_tokens": 6, "logprobs": 2, "prefix": "off"}
    with Runtime(path, **SETTINGS) as runtime:
        n_more = runtime.encode("").__len__()
        prompts = [f"{i}".ljust(n - n_more, "x") for i, n in enumerate((13, 12, 32, 20, 9))]
        alone = [runtime.generate(prompt, **ask) for prompt in prompts]
        assert [answer.stats.n_prompt for answer in alone] == [13, 12, 32, 20, 9]
        before = counts(runtime)
        answers = together(runtime, prompts, **ask)
        # 12, 32 and 13 behind them; then 20 and 9 behind it.
        assert counts(runtime) == (before[0] + 2, before[1] + 5)
    for one, other in zip(alone, answers, strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)


def test_speed_that_is_asked_for_comes_before_bits(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make("qwen2", path, weight_type="Q4_K")
    with Runtime(path, max_batch=16, **SETTINGS) as runtime:
        assert len(together(runtime, SHORT, max_tokens=2)) == 8
        assert counts(runtime) == (1, 8)


@pytest.mark.parametrize("max_batch", [None, 16])
def test_prompts_of_models_with_experts_are_alone_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_batch: int | None
) -> None:
    path = tmp_path / "model.gguf"
    make("qwen3moe", path, weight_type="Q8_0", n_layer=32)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))  # not the test runner's
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    with Runtime(path, n_ctx=512, n_kv=2048, threads=1) as runtime:
        budget = runtime._loaded.ledger.used_bytes - (2 << 20)
    settings = SETTINGS | {"n_kv": 2048, "memory": budget}
    with Runtime(path, max_batch=max_batch, **settings) as runtime:
        assert "experts" in runtime.stats()
        answers = together(runtime, SHORT, max_tokens=2)
        assert [answer.stats.n_generated for answer in answers] == [2] * 8
        assert counts(runtime) == ((8, 8) if max_batch is None else (1, 8))


def test_a_pass_is_not_wider_than_its_memory(tmp_path: Path) -> None:
    """The compute buffer was entered in the ledger when the model was opened."""
    for arch, n in (("llama", 90), ("qwen3", 40), ("gemma3", 70), ("qwen2", 24)):
        path = tmp_path / f"{arch}.gguf"
        make(arch, path, weight_type="Q8_0")
        with Runtime(path, **SETTINGS) as runtime:
            before = runtime._loaded.forward.graphs.n_bytes
            for width in (n, n + 1, 128):
                together(runtime, [f"{i}" + "x" * width for i in range(16)], max_tokens=2,
                         prefix="off")  # fmt: skip
            passes, batches = counts(runtime)
            assert batches == 48 and passes < 48
            assert runtime._loaded.forward.graphs.n_bytes == before


def test_long_prompts_are_computed_alone(plain: Runtime) -> None:
    together(plain, [f"{i}" + "x" * 200 for i in range(3)], max_tokens=1)
    assert counts(plain) == (3, 3)


def test_what_several_prompts_share_is_computed_once(plain: Runtime) -> None:
    """One waits for the first where it can take over more than sharing its pass would spare."""
    begin = "x" * 120
    answers = together(plain, [begin + end for end in "abc"], max_tokens=8, prefix="all")
    assert counts(plain) == (2, 3)
    n_cached = [answer.stats.n_cached for answer in answers]
    assert n_cached[0] == 0 and min(n_cached[1:]) >= 120


def test_seconds_are_shared_out_by_tokens(plain: Runtime) -> None:
    answers = together(plain, ["x" * 20, "y" * 60], max_tokens=1)
    assert counts(plain) == (1, 2)
    a, b = (answer.stats for answer in answers)
    assert a.prefill_s / a.n_prompt == pytest.approx(b.prefill_s / b.n_prompt)


class Slow(NamedTuple):
    """A Runtime whose first pass over prompts is entered, and goes on when it may."""

    runtime: Runtime
    entered: threading.Event
    go: threading.Event


@pytest.fixture
def slow(plain: Runtime, monkeypatch: pytest.MonkeyPatch) -> Slow:
    """It may be stopped meanwhile."""
    found, run = Slow(plain, threading.Event(), threading.Event()), Passes._run

    def slow_run(self: Passes, pieces: Any, requests: Any, spans: Any = None) -> Any:
        if not found.entered.is_set():
            found.entered.set()
            assert found.go.wait(20)
        return run(self, pieces, requests, spans)

    monkeypatch.setattr(Passes, "_run", slow_run)
    return found


def test_one_that_leaves_does_not_stop_the_others(slow: Slow) -> None:
    with held(slow.runtime):
        going = slow.runtime.stream(SHORT[0], max_tokens=4)
        staying = slow.runtime.stream(SHORT[1], max_tokens=4)
    slow.entered.wait()
    going.cancel()
    slow.go.set()
    assert list(going)[-1].finish_reason == "cancelled"
    assert list(staying)[-1].finish_reason == "length"
    assert counts(slow.runtime) == (1, 2)


def test_a_pass_that_nobody_wants_is_stopped(slow: Slow) -> None:
    runtime = slow.runtime
    with held(runtime):
        streams = [runtime.stream(prompt, max_tokens=4) for prompt in SHORT[:2]]
        late = runtime.stream(SHORT[2], max_tokens=4, timeout_s=0.3)
    slow.entered.wait()
    flag = runtime._loaded.device.stop_flag
    for stream in streams:
        stream.cancel()
        assert not flag.is_set()
    until(flag.is_set)
    slow.go.set()
    reasons = [list(stream)[-1].finish_reason for stream in (*streams, late)]
    assert reasons == ["cancelled", "cancelled", "timeout"]
    assert runtime.stats()["kv_kept_cells"] == 0, "nothing was computed"
    assert runtime.generate(SHORT[0], max_tokens=2).stats.n_generated == 2
    stats = runtime.stats()
    assert stats["kv_free_cells"] + stats["kv_kept_cells"] == stats["kv_cells"]  # type: ignore[operator]


def test_a_pass_that_fails_ends_its_own_requests(
    plain: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = plain._loaded.forward
    run = forward.run

    def failing(pieces: Any, spans: Any = None, *, borrow: bool = False) -> Any:
        if len(pieces) == 2:
            raise ComputeError("a kernel failed")
        return run(pieces, spans, borrow=borrow)

    monkeypatch.setattr(forward, "run", failing)
    with held(plain):
        streams = [plain.stream(prompt, max_tokens=1) for prompt in (*SHORT[:2], "z" * 200)]
    for stream in streams[:2]:
        with pytest.raises(ComputeError, match="a kernel failed"):
            list(stream)
    assert list(streams[2])[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("rows", "plain", "expected"),
    [(Rows(group=4), "ab", Rows(tiled=64)), (Rows(group=4, tiled=8), "a", Rows(group=4, tiled=64)),
     (Rows(group=4, mixed=True), "ab", Rows(tiled=64, mixed=True)), (Rows(group=4), "", None)],
)  # fmt: skip
def test_a_second_layout_changes_what_it_computes_only(
    rows: Rows, plain: str, expected: Rows | None
) -> None:
    """Weights of other types beside it, floats say, keep what their rows depend on."""
    loaded: Any = SimpleNamespace(
        params=SimpleNamespace(max_batch=None), rows=rows, max_batch=rows.max_single,
        model=SimpleNamespace(hparams=SimpleNamespace(moe=None)),
        forward=SimpleNamespace(plain=object() if plain else None),
        plan=SimpleNamespace(weights=SimpleNamespace(plain=set(plain), repacked=set("ab"))),
    )  # fmt: skip
    assert beside_prompts(loaded) == (rows if expected is None else expected)


def test_what_rows_keep() -> None:
    grouped = Rows(group=4, tiled=8)
    assert grouped.max_single == 3 and Rows(tiled=8).max_single == 7
    assert Rows().max_single == 16 and Rows(mixed=True).max_single == 1
    assert grouped.keep((8, 12, 9)) and not grouped.keep((9, 8)) and not grouped.keep((4, 8))
    assert grouped.keep((3,)) and Rows(mixed=True).keep((5,)) and not Rows(mixed=True).keep((8, 8))
    assert Rows().keep((1, 3, 500))
