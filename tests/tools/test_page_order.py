"""Pages ordered by a trace: what misses together lies together, and the counted reads are true."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute import Runtime, paging
from edgeroute.cli import cli
from edgeroute.offload.disk import DiskFile
from edgeroute.offload.sidecar import Sidecar, sidecar_path
from edgeroute.offload.trace import (
    Pools,
    PoolState,
    Trace,
    TraceMeta,
    TraceWriter,
    make_step,
)
from edgeroute.runtime import slots as slots_module
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import synth
from edgeroute.tools.convert import page_order, page_reads
from edgeroute.tools.convert.pack import lay_out, pack, packed_layout
from edgeroute.tools.convert.page_order import chosen, missed, order_by, order_of
from tests.edgeroute import paged_lab as lab

SPEC = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=4, n_vocab=384, n_embd=128, n_ff=128, n_ff_exp=128,
    n_head=2, n_head_kv=1, n_embd_head=64, n_expert=32, n_expert_used=4,
)  # fmt: skip
"""Pages of 192 KiB."""
META = TraceMeta(model="m", n_layer=2, n_expert=8, n_expert_used=2, page_bytes=10, layers=(0, 1))


def pools(n_slots: int) -> Pools:
    state = PoolState(layers=(0, 1), n_slots=n_slots, policy="lru", page_bytes=10, slot_bytes=10)
    return Pools(step=0, begins=True, pools=(state,), group_bytes=1 << 20, n_ahead=2)


def traced(steps: list[list[list[int]]], n_slots: int = 2) -> Trace:
    """A trace of decode steps, each the experts of layer after layer."""
    made = tuple(make_step(META, False, list(enumerate(step))) for step in steps)
    return Trace(meta=META, steps=made, live=(pools(n_slots),))


def test_what_is_missing_counts_and_not_what_is_chosen() -> None:
    """Page 0 is chosen always and found from the second step on; 3 slots hold it and two more."""
    steps = [[[0, 1]], [[0, 2]], [[0, 1]], [[0, 3]]]
    assert missed(traced(steps, n_slots=2), 0) == [[0, 1], [2], [1], [3]]
    assert missed(traced(steps, n_slots=3), 0) == [[0, 1], [2], [3]]
    assert missed(traced(steps, n_slots=2), 2) == [[1], [3]]


def test_prompts_do_not_miss_but_choose() -> None:
    trace = traced([[[0, 1]], [[2, 3]]])
    prompt = make_step(META, True, [(0, [4, 5, 6, 7])])
    longer = replace(trace, steps=(prompt, *trace.steps))
    assert missed(longer, 0) == missed(trace, 0) == [[0, 1], [2, 3]]
    assert list(chosen(longer)) == [[4, 5], [6, 7], [0, 1], [2, 3]]


def test_pairs_that_come_together_most_are_neighbours() -> None:
    leases = [[1, 5]] * 5 + [[5, 9]] * 4 + [[1, 9]] * 3 + [[2, 3]] * 9 + [[3, 9]] + [[7]]
    assert order_of(leases) == [2, 3, 9, 5, 1, 7]
    assert order_of([]) == []
    rng = np.random.default_rng(1)
    leases = [rng.choice(24, rng.integers(1, 6), replace=False).tolist() for _ in range(300)]
    found = order_of(leases)
    assert sorted(found) == sorted({page for pages in leases for page in pages})


def test_an_order_halves_the_reads_of_routes_that_come_in_pairs() -> None:
    """Experts i and i + 8 are used together, so the file's order never has them side by side."""
    rng = np.random.default_rng(2)
    leases = [[i, i + 8] for i in rng.integers(0, 8, 200).tolist()]
    place = {page: at for at, page in enumerate(order_of(leases))}
    assert len(place) == 16 and all(abs(place[i] - place[i + 8]) == 1 for i in range(8))


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (replace(traced([[[0, 1]], [[2, 3]]]), live=()), "says nothing of what was in memory"),
        (traced([[[0, 1]]]), "by decoded tokens; this trace has 1"),
    ],
)
def test_traces_that_say_too_little_are_refused(trace: Trace, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        missed(trace, 0)


# on a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("order") / "moe.gguf"
    synth.write(SPEC, path)
    return path


@pytest.fixture(autouse=True)
def _slim_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's own memory, which is larger than any model here, counts as nothing."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))


ASK: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1, "prefetch": "off",
                       "levers": "asked", "policy": "lru", "overlap": "off"}  # fmt: skip
PROMPTS = [[10 + 7 * i + 3 * j * (i + 1) % 300 for j in range(5 + 20 * i)] for i in range(3)]


def answer(path: Path, **more: Any) -> tuple[list[tuple[int, ...]], Any]:
    with pytest.raises(CapacityError) as refusal:
        Runtime(path, memory="1MiB", **ASK)
    assert refusal.value.smallest_bytes is not None
    with Runtime(path, memory=refusal.value.smallest_bytes + (4 << 20), **ASK, **more) as runtime:
        texts = [runtime.generate(prompt_ids=ids, max_tokens=40, prefix="off").token_ids
                 for ids in PROMPTS]  # fmt: skip
        return texts, runtime.stats()["experts"]


def test_the_command_orders_by_a_trace_and_answers_stay_the_same(
    model: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(model, tmp_path / "mine.gguf"))
    trace = tmp_path / "routes.trace"
    expected, stats = answer(path, trace=str(trace), read_bytes="1MiB")
    assert stats["decode"]["misses"] and stats["n_slots"] < stats["n_pages"]
    done = CliRunner().invoke(
        cli, ["convert", "pack", str(path), "--order", str(trace), "--json"]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "reads per decoded token" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["reads"]
    ordered = order_by(trace, path)
    assert found == json.loads(json.dumps(ordered.to_dict()))
    with DiskFile.open(path) as disk, GGUFFile.open(path) as file:
        header = lay_out(file, disk, packed_layout(file, ordered.pages))
    assert list(header.pages)[: len(ordered.pages)] == ordered.pages != sorted(ordered.pages)
    found, told = answer(path, read_bytes="1MiB")
    assert found == expected and told["sidecar"] == "used"
    assert told["decode"]["misses"] == stats["decode"]["misses"]
    assert told["n_reads"] < stats["n_reads"]


@pytest.mark.parametrize(
    "change", [{"n_expert": 8}, {"n_layer": 3}, {"n_ff_exp": 64}, {"weight_type": "Q8_0"}], ids=str
)
def test_a_trace_of_another_model_is_refused(
    change: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    other, trace = tmp_path / "other.gguf", tmp_path / "routes.trace"
    synth.write(replace(SPEC, **change), other)
    n_layer, n_expert = SPEC.n_layer, SPEC.n_expert
    meta = TraceMeta(model="moe.gguf", n_layer=n_layer, n_expert=n_expert, n_expert_used=4,
                     page_bytes=page_bytes(model), layers=tuple(range(n_layer)))  # fmt: skip
    TraceWriter(trace, meta).close()
    done = CliRunner().invoke(cli, ["convert", "pack", str(other), "--order", str(trace)])
    assert done.exit_code == 2 and "record one of this model" in done.output
    assert not sidecar_path(other).exists()


def page_bytes(path: Path) -> int:
    with GGUFFile.open(path) as file:
        return sum(file.tensors[f"blk.0.ffn_{part}_exps.weight"].nbytes // SPEC.n_expert
                   for part in ("gate", "up", "down"))  # fmt: skip


def test_what_is_no_trace_and_no_list_is_refused(model: Path, tmp_path: Path) -> None:
    missing, cut = tmp_path / "missing", tmp_path / "cut.trace"
    cut.write_bytes(b"EDGETRAC")
    for path, message in ((missing, "cannot read the order"), (cut, "trace")):
        done = CliRunner().invoke(cli, ["convert", "pack", str(model), "--order", str(path)])
        assert done.exit_code in (2, 3) and message in done.output
    assert not sidecar_path(model).exists()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("read_bytes", [1 << 14, 1 << 17, 1 << 19])
def test_counted_reads_are_those_that_are_done(
    read_bytes: int, packed: bool, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "IN_PLACE_MIN_BYTES", 1 if in_place else 1 << 30)
    path = tmp_path / "moe.gguf"
    synth.write(SPEC, path)
    n = SPEC.n_expert
    leases = [[3, 4, 5, 12], [n + 1], [n + 2, n + 3], [2 * n + 8, 2 * n + 14]]
    with contextlib.closing(lab.Lab(path)) as opened:
        layers = {layer.il: layer.infos for layer in opened.pools[0].layers}
        extents = page_order._apart(layers, SPEC.n_expert)
        file = path
        if packed:
            order = [5, 12, 2 * n + 14, 2 * n + 8]
            pack(path, order=order)
            file = sidecar_path(path)
            with DiskFile.open(path) as disk:
                header = lay_out(opened.file, disk, packed_layout(opened.file, order))
            extents = page_order._packed(header)
            opened.pools = lab_in_sidecar(opened.pools, header)
        with opened.paged(slots=16, read_bytes=read_bytes, wrap=lambda d: reopened(d, file)) as p:
            for pages in leases:
                p.store.begin(prefill=False)
                il = pages[0] // SPEC.n_expert
                assert p.store.lease(il, [page % SPEC.n_expert for page in pages]) is not None
                p.store.end()
            stats = p.transfer.stats
            found = page_reads.count_reads(leases, extents, p.disk, read_bytes)
            assert (found.n_reads, found.read_bytes) == (stats.n_reads, stats.read_bytes)


def lab_in_sidecar(plans: Any, header: Any) -> Any:
    from edgeroute.offload.expert_pool import in_sidecar

    return in_sidecar(plans, Sidecar(header))


def reopened(disk: Any, path: Path) -> DiskFile:
    disk.close()
    return DiskFile.open(path)
