"""Layers on several devices compute what the processor alone computes, bit for bit."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeroute.models.early_exit import EarlyExit
from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.errors import CapacityError, ComputeError
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.tools.bench.rpc_servers import RpcServer, rpc_server
from edgeroute.tools.synth import ARCHITECTURES, write
from tests.device.split_lab import N_TOKENS, SPREADS, STEPS, Bench, Spread
from tests.edgeroute.paged_lab import equal, play

N_LAYER = 5


@pytest.fixture(scope="module")
def servers(rpc: RpcServer) -> Iterator[tuple[RpcServer, RpcServer]]:
    with rpc_server() as second:
        yield rpc, second


def make(arch: str, path: Path, kind: str = "F32", n_layer: int = N_LAYER) -> Path:
    spec = dataclasses.replace(ARCHITECTURES[arch], weight_type=kind, n_layer=n_layer)
    write(spec, path)
    return path


@pytest.fixture(scope="module")
def bench(
    servers: tuple[RpcServer, RpcServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    path = make("llama", tmp_path_factory.mktemp("split") / "llama.gguf")
    with Bench(path, servers) as opened:
        yield opened


@pytest.mark.parametrize("how", SPREADS, ids=lambda how: f"{how.layers}-{how.head}")
def test_any_spread_gives_the_same_bits(how: Spread, bench: Bench) -> None:
    with bench.alone() as alone, bench.spread(how) as split:
        assert equal(play(split, STEPS), play(alone, STEPS))
        assert split.kv.n_free_cells == split.kv.n_cells


@pytest.mark.usefixtures("same_kernels")
@pytest.mark.parametrize(
    ("arch", "kind", "kv_type"),
    [("gemma3", "Q8_0", "f16"), ("deepseek2", "F32", "q8_0"), ("qwen3moe", "Q4_K", "f16"),
     ("gpt-oss", "F32", "f16"), ("qwen2", "Q4_0", "q8_0")],
)  # fmt: skip
def test_families_with_windows_latents_experts_and_quantised_cells(
    arch: str, kind: str, kv_type: str, servers: tuple[RpcServer, RpcServer], tmp_path: Path
) -> None:
    path = make(arch, tmp_path / "m.gguf", kind, 3)
    with (
        Bench(path, servers, kv_type=kv_type) as opened,
        opened.alone() as alone,
        opened.spread(SPREADS[1]) as split,
    ):
        assert equal(play(split, STEPS), play(alone, STEPS))


def test_spans_cut_anywhere_and_their_residual_streams(bench: Bench) -> None:
    with bench.alone() as alone, bench.spread(SPREADS[3]) as split:
        for spans in (alone.by_layer(), alone.headless()):
            assert equal(play(split, STEPS, spans=spans), play(alone, STEPS, spans=spans))
        assert np.array_equal(split.residual(2), alone.residual(2))
        for forward in (alone, split):
            play(forward, [[("a", 30, 0)]], spans=forward.normed())
        assert np.array_equal(split.residual(30), alone.residual(30))
        tokens = [5, 9, 200, 5]
        assert np.array_equal(split.embed(tokens), alone.embed(tokens))


def test_a_stream_that_is_set_goes_on_from_there(bench: Bench) -> None:
    states = np.random.default_rng(2).normal(0, 1, (8, bench.model.hparams.n_embd))
    states = states.astype(np.float32)
    later = Span(all_run(range(2, N_LAYER)), embed=False, output=True)
    before = Span(all_run(range(2)), embed=True, output=False)

    def run(forward: Forward) -> object:
        region = forward.kv.allocate(256)
        assert region is not None
        piece = Piece(list(range(5, 13)), 0, region, 8)
        assert forward.run([piece], [before]) is not None
        forward.set_residual(states)
        logits = forward.run([piece], [later])
        forward.kv.release(region)
        assert logits is not None
        return logits.tobytes()

    with bench.alone() as alone, bench.spread(SPREADS[1]) as split:
        assert run(split) == run(alone)
        with pytest.raises(ComputeError, match="do not fit a stream"):
            split.set_residual(states[:, :5])
        with pytest.raises(ComputeError, match="no span has left"):
            split.residual(N_TOKENS + 1)


def test_steps_that_skip_store_and_leave_layers_early(bench: Bench) -> None:
    steps = tuple(
        Step(il, "skip" if il in (0, 2, 4) else "run", "skip" if il in (2, 3, 4) else "run",
             store=il == 4) for il in range(N_LAYER)
    )  # fmt: skip
    idle = tuple(Step(il, "skip", "skip") for il in range(N_LAYER))

    def leave(forward: Forward) -> list[object]:
        early, region = EarlyExit(forward, 3), forward.kv.allocate(256)
        assert region is not None
        found: list[object] = []
        for pos, leaves in enumerate((True, False, False, True, False)):
            done = early.decode(Piece([7 + pos], pos, region), lambda _, go=leaves: go)
            assert done is not None
            found.append((done[0].tobytes(), done[1]))
        forward.kv.release(region)
        return found

    with bench.alone() as alone:
        for how in (SPREADS[1], SPREADS[3]):
            with bench.spread(how) as split:
                for each in (steps, idle):
                    spans = Forward.spans(each)
                    assert equal(play(split, STEPS, spans=spans), play(alone, STEPS, spans=spans))
                assert leave(split) == leave(alone)


def test_a_repeated_layer_has_its_keys_on_its_own_device(bench: Bench) -> None:
    steps = list(all_run(range(N_LAYER)))
    steps.insert(2, Step(1, repeat=1))
    spans = Forward.spans(steps)
    one = Spread(layers="c", head="c")
    with bench.spread(one, n_repeat=1) as alone, bench.spread(SPREADS[2], n_repeat=1) as split:
        assert equal(play(split, STEPS, spans=spans), play(alone, STEPS, spans=spans))


def test_a_stop_is_honoured_between_devices(bench: Bench) -> None:
    """Servers cannot be stopped within a graph: the next one does not begin."""
    with bench.spread(SPREADS[0]) as split:
        region = split.kv.allocate(256)
        assert region is not None
        piece = Piece([5, 6, 7], 0, region)
        bench.group.stop_flag.set()
        assert split.run([piece]) is not None  # nobody watches
        bench.group.watch_stop_flag(True)
        try:
            assert split.run([piece]) is None
            bench.group.stop_flag.clear()
            assert split.run([piece]) is not None
        finally:
            bench.group.watch_stop_flag(False)
            bench.group.stop_flag.clear()
            split.kv.release(region)


def test_borrowed_logits_and_what_is_on_the_way_are_those_of_a_copy(bench: Bench) -> None:
    with bench.spread(SPREADS[1]) as split:
        assert equal(play(split, STEPS, borrow=True), play(split, STEPS))
        assert split.graphs.n_built > 0 and split.graphs.n_bytes > 0
        split.graphs.clear()
        assert equal(play(split, STEPS, borrow=True), play(split, STEPS))


def test_growth_that_is_refused_leaves_a_split_usable(bench: Bench) -> None:
    with bench.spread(SPREADS[0]) as split:
        expected = play(split, STEPS)
        split.graphs.clear()
        for lane in split._lanes:
            lane.graphs.renew()

        def refuse(_device: object, _n_bytes: int) -> None:
            raise CapacityError("no more")

        grown, split.grown = split.grown, refuse
        with pytest.raises(CapacityError, match="no more"):
            play(split, STEPS)
        split.grown = grown
        for region in [r for r in split.kv._free if r.n_cells < split.kv.n_cells]:
            assert region.n_cells  # what the failed pass held is not in the free list
        split.kv._free = [type(split.kv._free[0])(0, split.kv.n_cells)]
        assert equal(play(split, STEPS), expected)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_cells_come_in_one_order_wherever_they_are(kv_type: str, bench: Bench) -> None:
    shape = KvShape(n_layer=4, n_embd_k_gqa=64, n_embd_v_gqa=64, n_embd_head=64, kv_type=kv_type)
    a, b, c = (bench.devices[each] for each in "abc")
    rng = np.random.default_rng(0)
    pools = [KvCache(c, shape, 512), KvCache([a, c, b, a], shape, 512)]
    try:
        assert pools[0].is_host and not pools[1].is_host
        assert pools[1].bytes_on(a) == 2 * pools[1].bytes_on(b) == pools[0].n_bytes // 2
        assert (pools[1].rotations[0] == (None, None)) == (kv_type == "f16")
        data = rng.integers(0, 255, 300 * shape.bytes_per_cell).astype(np.uint8)
        for pool in pools:
            source, target = pool.allocate(256), pool.allocate(256)
            assert source is not None and target is not None
            pool.write_cells(100, 300, data)
            pool.copy(source, target, 200)
        read = [np.empty(400 * shape.bytes_per_cell, np.uint8) for _ in pools]
        for pool, into in zip(pools, read, strict=True):
            pool.read_cells(0, 400, into)
        assert np.array_equal(*read) and read[0].any()
        with pytest.raises(ValueError, match="3 devices for 4 rows"):
            KvCache([a, b, c], shape, 512)
    finally:
        for pool in pools:
            pool.close()
