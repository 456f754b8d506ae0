"""Requests with adapters: right answers whatever is cached, loading, replaced or broken."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.models.adapter_records import AdapterFile
from edgeroute.runtime.errors import AdapterFileError, CapacityError, ClosedError, UsageError
from edgeroute.runtime.units import MIB
from edgeroute.tools import synth
from tests.edgeroute import adapter_lab as lab
from tests.edgeroute import adapter_stress as stress

SPEC = replace(stress.SPEC, n_ff=96)
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_kv": 2560, "n_ubatch": 64, "threads": 1,
                            "adapter_state": "off"}  # fmt: skip
SHARED = [5 + 7 * i % 370 for i in range(70)]  # past one batch of a prompt
PROMPTS = [[*SHARED, 9 + i, *range(40 + i, 60)] for i in range(4)]
NAMES = [f"a{i}" for i in range(8)]

Answer = tuple[int, ...]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "model.gguf"
    synth.write(SPEC, path)
    return path


@pytest.fixture(scope="module")
def library(model: Path) -> Path:
    """Eight adapters, some of which take two slots of rank 16."""
    folder = model.parent / "library"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        lab.make(folder / f"{name}.gguf", model, rank=16 + 2 * (i % 3), alpha=10.0, delta=0.6,
                 seed=i)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def cold(model: Path, library: Path) -> Callable[..., Answer]:
    """Each adapter's answer, asked alone with nothing cached."""
    found: dict[Any, Answer] = {}

    def ask(adapter: Any, prompt: int, paths: Any = library) -> Answer:
        key = str(adapter), prompt, str(paths)
        if key not in found:
            with Runtime(model, **SETTINGS, adapters=paths) as alone:
                for i in range(len(PROMPTS)):
                    found[str(adapter), i, str(paths)] = answer(alone, i, adapter, prefix="off")
        return found[key]

    return ask


@pytest.fixture
def open_runtime(model: Path, library: Path) -> Iterator[Callable[..., Runtime]]:
    """Open Runtimes over the library; every one must be balanced at its end."""
    opened: list[Runtime] = []

    def open_one(adapters: Any = library, **settings: Any) -> Runtime:
        opened.append(Runtime(model, **{**SETTINGS, "adapters": adapters, **settings}))
        return opened[-1]

    yield open_one
    for runtime in opened:
        if not runtime._engine._closing:
            check_balanced(runtime)
        runtime.close()


def answer(runtime: Runtime, prompt: int, adapter: Any = None, **options: Any) -> Answer:
    settings = {"max_tokens": 10, "temperature": 0.0} | options
    return runtime.generate(prompt_ids=PROMPTS[prompt], adapter=adapter, **settings).token_ids


def check_balanced(runtime: Runtime) -> dict[str, Any]:
    """Nothing is held when nobody asks: no cells, no pins, no slot twice, no bytes unbooked."""
    lab.wait_for(lambda: not (runtime.stats()["running"] or runtime.stats()["waiting"]))
    stats: dict[str, Any] = runtime.stats()
    assert stats["kv_free_cells"] + stats["kv_kept_cells"] == stats["kv_cells"]
    adapters = runtime._loaded.adapters
    assert adapters is not None
    store = adapters.store
    lab.wait_for(lambda: all(each.loading is None or each.loading.done() for each in store._placed))
    placed = [slot for page in store._placed for slot in page.slots]
    assert sorted([*placed, *store._free]) == list(range(1, store.slots.n_slots + 1))
    assert not any(page.n_pins for page in [*store._placed, *store._pages.values()])
    booked = stats["memory"].get("adapter slots", 0)
    assert booked == store.slots.n_bytes
    assert stats["memory_bytes"] == sum(stats["memory"].values()) <= stats["budget_bytes"]
    return stats


class Gate:
    """Holds every read of an adapter up until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.n_began = threading.Event(), 0
        read = AdapterFile.read

        def slow(file: AdapterFile) -> Any:
            self.n_began += 1
            assert self.open.wait(lab.WAIT_S)
            yield from read(file)

        patch.setattr(AdapterFile, "read", slow)

    def wait(self) -> None:
        lab.wait_for(lambda: self.n_began)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


# right answers


def test_answers_differ_and_are_the_same_again(open_runtime: Any, cold: Any) -> None:
    """Else nothing below would show anything."""
    assert len({cold(name, 0) for name in NAMES} | {cold(None, 0)}) == 9
    runtime = open_runtime()
    for name in (*NAMES, None):
        assert answer(runtime, 0, name) == cold(name, 0)


def test_a_library_changes_nothing_for_the_base_model(
    model: Path, open_runtime: Any, cold: Any
) -> None:
    with Runtime(model, **SETTINGS) as bare:
        assert answer(bare, 0) == cold(None, 0) == answer(open_runtime(), 0)
        with pytest.raises(UsageError, match="open it with adapters="):
            answer(bare, 0, "a0")


def test_eight_adapters_and_the_base_in_one_batch(open_runtime: Any, cold: Any) -> None:
    runtime = open_runtime(max_batch=9)
    streams = [
        runtime.stream(prompt_ids=PROMPTS[i % 4], max_tokens=10, temperature=0.0, adapter=name)
        for i, name in enumerate([*NAMES, None])
    ]
    for i, (name, stream) in enumerate(zip([*NAMES, None], streams, strict=True)):
        found = tuple(token for chunk in stream for token in chunk.token_ids)
        assert found == cold(name, i % 4), name
    assert check_balanced(runtime)["mean_batch"] > 2


def test_mixtures_and_scales(open_runtime: Any, cold: Any) -> None:
    runtime = open_runtime()
    half, mixed = {"a0": 0.5}, {"a1": 0.7, "a0": 0.3}
    assert answer(runtime, 0, {"a0": 1}) == cold("a0", 0)
    assert answer(runtime, 0, {"a0": 1.0, "a3": 0}) == cold("a0", 0)
    assert answer(runtime, 0, {"a0": 0.0}) == cold(None, 0)
    assert answer(runtime, 0, half) == cold(half, 0)
    assert answer(runtime, 0, mixed) == cold(dict(sorted(mixed.items())), 0)


def test_an_answer_tells_which_adapters_served_it(open_runtime: Any) -> None:
    runtime = open_runtime()
    ids = PROMPTS[0]
    one = runtime.generate(prompt_ids=ids, max_tokens=1, adapter="a2")
    assert one.adapter == "a2" and one.stats.adapters is not None
    assert one.stats.adapters["used"] == {"a2": 1.0} and one.stats.adapters["hit"] is False
    two = runtime.generate(prompt_ids=ids, max_tokens=1, adapter={"a2": 0.5, "a1": 2})
    assert two.adapter == "a1:2+a2:0.5"
    again = runtime.generate(prompt_ids=ids, max_tokens=1, adapter={"a2": 0.5})
    assert again.adapter == "a2:0.5" and again.stats.adapters["hit"] is True
    assert again.stats.to_dict()["adapters"]["used"] == {"a2": 0.5}
    none = runtime.generate(prompt_ids=ids, max_tokens=1)
    assert none.adapter is None and none.stats.adapters is None
    nothing = runtime.generate(prompt_ids=ids, max_tokens=0, adapter="a5")
    assert nothing.finish_reason == "length" and nothing.token_ids == ()


@pytest.mark.parametrize("n_slots", [1, 8])
@pytest.mark.parametrize("n_kv", [256, 2560])  # whether a finished prompt's cells are dropped
@pytest.mark.parametrize("mode", ["exact", "all", "off"])
def test_a_b_a_with_a_shared_prefix(
    mode: Any, n_kv: int, n_slots: int, open_runtime: Any, cold: Any
) -> None:
    runtime = open_runtime(n_kv=n_kv, adapter_slots=n_slots)
    order = ["a0", "a1", "a0", None, "a1", None, "a0", {"a0": 0.5}, "a0"]
    alone = {name: open_runtime() for name in ("a0", "a1")} if mode == "all" else {}
    n_cached = 0
    for i, name in enumerate(order):
        prompt = i % 2
        made = runtime.generate(prompt_ids=PROMPTS[prompt], max_tokens=10, temperature=0.0,
                                adapter=name, prefix=mode)  # fmt: skip
        allowed = {cold(name, prompt)}
        if mode == "all" and isinstance(name, str):  # cells of its own, computed in other parts
            allowed.add(answer(alone[name], prompt, name, prefix=mode))
        assert made.token_ids in allowed, (i, name)
        n_cached += made.stats.n_cached
    assert (n_cached > 0) == (mode != "off" and n_kv > 256)


def test_a_prompt_is_reused_within_an_adapter_only(open_runtime: Any) -> None:
    runtime = open_runtime()
    cached = [
        runtime.generate(prompt_ids=PROMPTS[0], max_tokens=2, adapter=name).stats.n_cached
        for name in ("a0", "a1", None, {"a0": 0.5}, {"a0": 1.0, "a1": 0.0})
    ]
    assert cached[:4] == [0, 0, 0, 0] and cached[4] > 0


# the library changes


def test_a_replaced_adapter_serves_neither_old_cells_nor_old_numbers(
    model: Path, open_runtime: Any, cold: Any, tmp_path: Path
) -> None:
    runtime = open_runtime()
    assert answer(runtime, 0, "a0") == cold("a0", 0)
    new = lab.make(tmp_path / "new" / "a0", model, rank=16, delta=0.6, seed=77)
    assert runtime.add_adapter(new) == "a0"
    made = runtime.generate(prompt_ids=PROMPTS[0], max_tokens=10, temperature=0.0, adapter="a0")
    assert made.stats.n_cached == 0
    assert made.token_ids == cold("a0", 0, new) != cold("a0", 0)
    assert answer(runtime, 0, "a0") == cold("a0", 0, new)


def test_a_library_that_begins_empty(
    model: Path, open_runtime: Any, cold: Any, library: Path
) -> None:
    runtime = open_runtime((), adapter_slots=4)
    assert runtime.adapters == [] and answer(runtime, 0) == cold(None, 0)
    assert "adapter slots" not in runtime.stats()["memory"]
    for name in NAMES[:3]:
        runtime.add_adapter(library / f"{name}.gguf")
    assert runtime.adapters == NAMES[:3]
    for name in NAMES[:3]:
        assert answer(runtime, 1, name) == cold(name, 1)
    for name in NAMES[:3]:
        runtime.remove_adapter(name)
    assert runtime.adapters == []
    assert check_balanced(runtime)["adapters"]["free_slots"] == 4


def test_other_weights_get_slots_while_requests_run(
    model: Path, open_runtime: Any, cold: Any, tmp_path: Path
) -> None:
    """A running request keeps its bits, though its graphs are built anew."""
    first = lab.make(tmp_path / "first", model, rank=16, targets=("attn_q",), delta=0.9, seed=1)
    later = lab.make(tmp_path / "later", model, rank=16, targets=("ffn_down", "attn_k"),
                     delta=0.9, seed=2)  # fmt: skip
    wanted = cold("first", 0, first), cold("later", 1, later)
    runtime = open_runtime(first, adapter_slots=2)
    before = runtime.stats()["memory"]["adapter slots"]
    stream = runtime.stream(prompt_ids=PROMPTS[0], max_tokens=10, temperature=0.0, adapter="first")
    found = [*next(stream).token_ids]
    runtime.add_adapter(later)
    beside = runtime.stream(prompt_ids=PROMPTS[1], max_tokens=10, temperature=0.0, adapter="later")
    found += [token for chunk in stream for token in chunk.token_ids]
    assert tuple(found) == wanted[0]
    assert tuple(token for chunk in beside for token in chunk.token_ids) == wanted[1]
    assert answer(runtime, 0, "first") == wanted[0]
    assert check_balanced(runtime)["memory"]["adapter slots"] > before


def test_an_adapter_that_does_not_fit_the_budget_is_refused_and_nothing_changes(
    model: Path, open_runtime: Any, cold: Any, tmp_path: Path
) -> None:
    small = lab.make(tmp_path / "small", model, rank=16, targets=("attn_q",), seed=1)
    large = lab.make(tmp_path / "large", model, rank=16, seed=2)
    used = open_runtime(small, adapter_slots=200).stats()["memory_bytes"]
    runtime = open_runtime(small, adapter_slots=200, memory=used + MIB)
    before = check_balanced(runtime)["memory"]
    with pytest.raises(CapacityError, match="over the budget"):
        runtime.add_adapter(large)
    assert runtime.adapters == ["small"] and check_balanced(runtime)["memory"] == before
    assert answer(runtime, 0, "small") == cold("small", 0, small)
    wide = lab.make(tmp_path / "wide", model, rank=300, targets=("attn_q",))
    with pytest.raises(CapacityError, match="'wide' takes 19 slots"):
        runtime.add_adapter(wide)


def test_a_very_high_rank_beside_a_very_low_one(
    model: Path, open_runtime: Any, cold: Any, tmp_path: Path
) -> None:
    """Slots as narrow as the lowest would take more of them than a request may use."""
    low = lab.make(tmp_path / "low", model, rank=2, targets=("attn_q",), delta=0.9, seed=1)
    high = lab.make(tmp_path / "high", model, rank=300, targets=("attn_v",), delta=0.9, seed=2)
    runtime = open_runtime([low, high])
    assert len({answer(runtime, 0, name) for name in ("low", "high", None)}) == 3


def test_a_request_keeps_an_adapter_that_is_removed_meanwhile(open_runtime: Any, cold: Any) -> None:
    runtime = open_runtime()
    stream = runtime.stream(prompt_ids=PROMPTS[0], max_tokens=10, temperature=0.0, adapter="a3")
    found = [*next(stream).token_ids]
    runtime.remove_adapter("a3")
    with pytest.raises(UsageError, match="there is no adapter 'a3'"):
        answer(runtime, 0, "a3")
    with pytest.raises(UsageError, match="'a3'"):
        runtime.remove_adapter("a3")
    found += [token for chunk in stream for token in chunk.token_ids]
    assert tuple(found) == cold("a3", 0)
    assert "a3" not in check_balanced(runtime)["adapters"]["resident"]


def test_a_request_that_waits_for_room_hears_that_its_adapter_was_removed(
    open_runtime: Any, gate: Gate
) -> None:
    runtime = open_runtime(adapter_slots=1)
    first = runtime.stream(prompt_ids=PROMPTS[0], max_tokens=2, adapter="a0")
    gate.wait()
    second = runtime.stream(prompt_ids=PROMPTS[0], max_tokens=2, adapter={"a1": 1.0, "a2": 0.0})
    lab.wait_for(lambda: runtime.stats()["waiting"] == 2)
    runtime.remove_adapter("a1")
    gate.open.set()
    assert list(first)[-1].finish_reason == "length"
    with pytest.raises(UsageError, match="there is no adapter 'a1'"):
        list(second)


# loads that are slow or fail


def test_others_pass_a_request_whose_adapter_is_being_read(
    open_runtime: Any, cold: Any, gate: Gate
) -> None:
    runtime = open_runtime()
    slow = runtime.stream(prompt_ids=PROMPTS[0], max_tokens=10, temperature=0.0, adapter="a0")
    gate.wait()
    assert answer(runtime, 0) == cold(None, 0)  # while a0 is still not there
    assert runtime.stats()["adapters"]["resident"] == []
    gate.open.set()
    found = [chunk for chunk in slow]
    assert tuple(t for chunk in found for t in chunk.token_ids) == cold("a0", 0)
    assert found[-1].generation.stats.adapters["wait_s"] > 0


@pytest.mark.parametrize("end", ["timeout", "cancelled"])
def test_leaving_while_an_adapter_is_read(
    end: str, open_runtime: Any, cold: Any, gate: Gate
) -> None:
    runtime = open_runtime(adapter_slots=1)
    options = {"timeout_s": 0.15} if end == "timeout" else {}
    stream = runtime.stream(prompt_ids=PROMPTS[0], max_tokens=10, adapter="a0", **options)
    behind = runtime.stream(prompt_ids=PROMPTS[1], max_tokens=10, temperature=0.0, adapter="a1")
    gate.wait()
    if end == "cancelled":
        stream.cancel()
    last = list(stream)[-1]
    assert last.finish_reason == end and last.generation.token_ids == ()
    gate.open.set()
    assert tuple(t for chunk in behind for t in chunk.token_ids) == cold("a1", 1)
    assert answer(runtime, 0, "a0") == cold("a0", 0)


@pytest.mark.parametrize("harm", ["deleted", "truncated", "rewritten", "swapped"])
def test_a_file_that_changed_since_it_was_opened(
    harm: str, model: Path, open_runtime: Any, cold: Any, tmp_path: Path
) -> None:
    good = lab.make(tmp_path / "good.gguf", model, rank=16, delta=0.6, seed=1)
    bad = lab.make(tmp_path / "bad.gguf", model, rank=16, delta=0.6, seed=2)
    wanted = cold("good", 0, good), cold("bad", 0, bad)
    runtime = open_runtime([good, bad], adapter_slots=1)
    whole = bad.read_bytes()
    if harm == "deleted":
        bad.unlink()
    elif harm == "truncated":
        bad.write_bytes(whole[: len(whole) // 2])
    elif harm == "rewritten":
        time.sleep(0.02)  # file systems' clocks tick
        bad.write_bytes(whole)
    else:
        bad.unlink()
        lab.make(bad, model, rank=16, delta=0.6, seed=3)
    streams = [runtime.stream(prompt_ids=PROMPTS[0], max_tokens=4, adapter="bad") for _ in "123"]
    for stream in streams:
        with pytest.raises(AdapterFileError, match="bad"):
            list(stream)
    with pytest.raises(AdapterFileError, match="bad"):
        answer(runtime, 0, {"bad": 0.5})
    assert answer(runtime, 0, "good") == wanted[0]
    stats = check_balanced(runtime)
    assert stats["adapters"]["errors"] >= 2 and stats["kv_kept_cells"] > 0
    bad.unlink(missing_ok=True)
    bad.write_bytes(whole)
    runtime.add_adapter(bad)  # what was put right serves again
    assert answer(runtime, 0, "bad") == wanted[1]


def test_a_damaged_adapter_is_not_added(model: Path, open_runtime: Any, tmp_path: Path) -> None:
    runtime = open_runtime()
    text = tmp_path / "text.gguf"
    text.write_text("no adapter")
    for path in (text, tmp_path / "missing", model):
        with pytest.raises(AdapterFileError):
            runtime.add_adapter(path)
    assert runtime.adapters == NAMES


def test_closing_while_an_adapter_is_read(open_runtime: Any, library: Path, gate: Gate) -> None:
    runtime = open_runtime()
    streams = [runtime.stream(prompt_ids=PROMPTS[0], adapter=name) for name in NAMES[:3]]
    gate.wait()
    closer = threading.Thread(target=runtime.close)
    closer.start()
    for stream in streams:
        with pytest.raises(ClosedError):
            list(stream)
    gate.open.set()
    closer.join(lab.WAIT_S)
    assert not closer.is_alive() and gate.n_began < 3
    with pytest.raises(ClosedError):
        runtime.add_adapter(library / "a0.gguf")
    assert not [t for t in threading.enumerate() if t.name.startswith("edgeroute-adapters")]


# what is refused


@pytest.mark.parametrize(
    "asked",
    ["nobody", "", "../a0", 7, 1.5, True, [], ["a0"], {}, {"a0": math.nan}, {"a0": math.inf},
     {"a0": "1"}, {"a0": None}, {"a0": True}, {"a0": 1e9}, {"a0": 1.0, "nobody": 0.0}, {7: 1.0},
     {None: 1.0}, {f"a{i}": 1.0 for i in range(99)}, b"a0"],
    ids=repr,
)  # fmt: skip
def test_what_is_no_adapter_is_refused(asked: Any, open_runtime: Any) -> None:
    runtime = open_runtime()
    with pytest.raises(UsageError, match="adapter"):
        answer(runtime, 0, asked)
    assert runtime.stats()["finished"] == 0


def test_a_mixture_that_never_fits_is_refused_and_nobody_waits(
    open_runtime: Any, cold: Any
) -> None:
    runtime = open_runtime(adapter_slots=1)
    n_slots = runtime.stats()["adapters"]["slots"]
    with pytest.raises(CapacityError, match=f"there are {n_slots}"):
        answer(runtime, 0, dict.fromkeys(NAMES, 0.1))
    assert answer(runtime, 0, "a0") == cold("a0", 0)


def test_what_adapters_of_one_slot_take_is_booked(open_runtime: Any) -> None:
    """Graphs with an adapter are larger; the compute buffer was sized for them."""
    runtime = open_runtime()
    booked = runtime.stats()["memory"]["compute buffer"]
    small = [None, "a0", "a3", "a6"]
    assert answer(runtime, 0, {"a0": 0.7}) and runtime.stats()["adapters"]["slots"] == 16
    streams = [runtime.stream(prompt_ids=PROMPTS[0], max_tokens=4, adapter=n) for n in small]
    for stream in streams:
        list(stream)
    assert runtime._loaded.forward.graphs.n_bytes <= booked


# many at once


def test_many_threads_over_many_adapters(tmp_path: Path) -> None:
    figures = stress.Stress(tmp_path, stress.StressParams()).run()
    assert not figures["failures"] and figures.get("wrong", 0) == 0, figures
    assert figures["answered"] + figures.get("gone", 0) >= 600
    assert figures["most_bytes"] <= figures["budget_bytes"]
    held = [figures[what] for what in ("lost_cells", "lost_slots", "doubled_slots", "pins")]
    assert held == [0, 0, 0, 0]
    assert figures["loads"] > 100 and figures["evictions"] > 50 and figures["added"] > 3
    assert figures["distinct_answers"] > 0.9 * figures["answers"]
