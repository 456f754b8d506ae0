"""Less than the whole model on a device of another process: the processor's tokens and bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Runtime, drafters
from edgeroute.models.early_exit import EarlyExit
from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.cells import Region
from edgeroute.runtime.depth import ExpertRule, Step, all_run
from edgeroute.skippers.plan import LayerDepth
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device.equal_lab import ask, both, together
from tests.edgeroute.adapter_lab import Model
from tests.edgeroute.test_depth_runtime import N_LAYER, PLANS, plan, routers, write
from tests.edgeroute.test_speculation import _Fixed, speculation_of

pytestmark = pytest.mark.usefixtures("same_kernels")
N_CELLS = 256
Logits = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with plans that skip, approximate and repeat, and one that shortens prompts."""
    where: Path = tmp_path_factory.mktemp("rpc-depth") / "llama.gguf"
    synth.make("llama", where, n_layer=N_LAYER)
    short = plan("short", {il: LayerDepth(keep=30) for il in range(2, N_LAYER)})
    write(where, (*PLANS, short))
    return where


@pytest.mark.parametrize("name", ["half", "liar", "slow", "short"])
def test_plans(name: str, rpc: RpcServer, path: Path) -> None:
    """Skipped, approximated and repeated layers; tokens that deep layers do not see."""

    def scenario(runtime: Runtime) -> Any:
        alone = [ask(runtime, n, depth=depth) for n in (20, 200) for depth in (None, "full")]
        asks = [{"n": 40, "text": i, "depth": (None, "full")[i % 2]} for i in range(4)]
        return alone, together(runtime, asks)

    both(rpc, path, scenario, depth=name)


def test_routed_plans(rpc: RpcServer, path: Path) -> None:
    """A router reads the residual stream of a prompt, and decides for the answer."""
    routers(path, 5)

    def scenario(runtime: Runtime) -> Any:
        found = [ask(runtime, 90, text) for text in range(4)]
        stats: Any = runtime.stats()["depth"]
        assert stats["routed"] == 4
        return found, stats["layers_run"]

    both(rpc, path, scenario, depth="routed")


def on_both(rpc: RpcServer, path: Path, play: Callable[[Forward, Region], list[Logits]]) -> None:
    """Drive a model on both by hand; the logits must be the same bits."""
    found = []
    for device in ("cpu", rpc.name):
        with Model(path, None, device=device, repack_experts=False) as model:
            region = model.loaded.kv.allocate(N_CELLS)
            assert region is not None
            found.append([each.copy() for each in play(model.forward, region)])
            model.loaded.kv.release(region)
    assert len(found[0]) == len(found[1]) > 0
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert all(np.isfinite(each).all() for each in found[0])


def run(forward: Forward, pieces: list[Piece], spans: Any = None) -> Logits:
    logits = forward.run(pieces, spans)
    assert logits is not None
    return logits


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_leaving_in_the_middle(arch: str, rpc: RpcServer, tmp_path: Path) -> None:
    """Each token leaves, or does not; those that left have only keys stored behind."""
    synth.make(arch, tmp_path / "m.gguf", n_layer=4)

    def play(forward: Forward, region: Region) -> list[Logits]:
        found = [run(forward, [Piece(range(4, 60), 0, region, 3)])]
        exits = EarlyExit(forward, 2)
        for i in range(10):
            decided = exits.decode(Piece([30 + i], 56 + i, region), lambda _, i=i: i % 3 == 1)
            assert decided is not None and decided[1] == (i % 3 == 1)
            found.append(decided[0].copy())
        return found

    on_both(rpc, tmp_path / "m.gguf", play)


def test_spans_hand_on_the_residual_stream(rpc: RpcServer, path: Path) -> None:
    """A graph per layer, the head by itself, hidden states alone, and states put in by the host."""

    def play(forward: Forward, region: Region) -> list[Logits]:
        piece = Piece(range(4, 50), 0, region, 2)
        found = [run(forward, [piece]), run(forward, [piece], forward.by_layer())]
        assert np.array_equal(*found)
        found.append(run(forward, [piece], forward.headless()))
        found.append(forward.residual(46))
        run(forward, [piece], forward.normed())
        found.append(forward.residual(46))
        forward.set_residual(found[3])
        found.append(run(forward, [piece], forward.headless()[1:]))
        assert np.array_equal(found[0], found[-1])
        found.append(forward.embed([5, 6, 7]))
        steps = (*all_run(range(2)), Step(1), Step(1), *all_run(range(2, N_LAYER)))
        found.append(run(forward, [piece], forward.spans(steps[:2] + steps[4:])))
        return found

    on_both(rpc, path, play)


@pytest.mark.parametrize(
    ("rule", "value"), [("count", 1.0), ("weight", 0.2), ("mass", 0.5), ("ratio", 0.6)]
)
def test_rules_for_experts(rule: ExpertRule, value: float, rpc: RpcServer, tmp_path: Path) -> None:
    """Tokens compute fewer of the experts that their routers chose."""
    spec = synth.make("qwen3moe", tmp_path / "m.gguf")
    assert spec.n_expert_used > 1

    def play(forward: Forward, region: Region) -> list[Logits]:
        steps = tuple(Step(il, expert_rule=rule, expert_value=value)
                      for il in range(spec.n_layer))  # fmt: skip
        found = [run(forward, [Piece(range(4, 60), 0, region, 56)], forward.spans(steps))]
        for i in range(4):
            found.append(run(forward, [Piece([9 + i], 56 + i, region)], forward.spans(steps)))
        whole = run(forward, [Piece(range(4, 60), 0, region, 56)])
        assert not np.array_equal(whole, found[0])
        return [each.copy() for each in found]

    on_both(rpc, tmp_path / "m.gguf", play)


@pytest.mark.parametrize("source", ["lookup", "self", "small"])
def test_drafts(
    source: str, rpc: RpcServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drafted, verified and kept is the same; so the drafter's logits are, too.

    Guesses are chains on both: trees are for cells that the host can move.
    """
    monkeypatch.setattr(drafters, "may_branch", lambda *_: False)
    large, small = tmp_path / "large.gguf", tmp_path / "small.gguf"
    synth.make("llama", large, n_layer=4, weight_type="Q8_0")
    synth.make("llama", small, n_layer=2, weight_type="Q8_0", seed=2)
    settings: dict[str, Any] = {"small": small} if source == "small" else {}

    def scenario(runtime: Runtime) -> Any:
        speculation_of(runtime).policy = _Fixed(3)
        found = [ask(runtime, n, max_tokens=16, prefix="off") for n in (6, 90)]
        stats: Any = runtime.stats()["speculation"]
        assert stats["drafted"] > 0
        return found, stats["drafted"], stats["accepted"]

    drafted = both(rpc, large, scenario, speculate=source, **settings)
    plain = both(rpc, large, lambda r: [ask(r, n, max_tokens=16, prefix="off") for n in (6, 90)],
                 speculate="off")  # fmt: skip
    assert drafted[0] == plain
