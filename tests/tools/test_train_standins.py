"""Stand-ins trained on a tiny model: torch computes the plan as the engine does, and it helps."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeroute.config import RunParams  # noqa: E402
from edgeroute.loaded import LoadedModel  # noqa: E402
from edgeroute.models.depth_file import DepthFile, fingerprint  # noqa: E402
from edgeroute.runtime.gguf import GGUFFile  # noqa: E402
from edgeroute.skippers.plan import DepthPlan, LayerDepth  # noqa: E402
from edgeroute.tools.depth_file import DepthContent, write_depth_file  # noqa: E402
from edgeroute.tools.depth_probe import Probe  # noqa: E402
from edgeroute.tools.standin_records import StandInShape  # noqa: E402
from edgeroute.tools.standins import StandIns, fit_plan  # noqa: E402
from edgeroute.tools.torch_llama import TorchLlama  # noqa: E402
from edgeroute.tools.torch_training import Schedule, batches  # noqa: E402
from edgeroute.tools.train_standins import _Plan, train_standins  # noqa: E402
from tests.tools.depth_lab import write_deep  # noqa: E402

N_LAYER, N_WINDOW = 6, 32
SHAPES = (
    StandInShape(il=2, part="ffn", width=96), StandInShape(il=3, part="attn", rank=16),
    StandInShape(il=4, part="ffn", rank=8, width=64),
)  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep(tmp_path_factory.mktemp("model"), request.param, n_layer=N_LAYER, n_ff=192,
                      weight_type="F32")  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    return np.random.default_rng(1).integers(5, 380, (48, N_WINDOW)).astype(np.int32)


@pytest.fixture(scope="module")
def fitted(model: Path, texts: np.ndarray) -> StandIns:
    return fit_plan(model, texts[:24], SHAPES)


def score(model: Path, found: StandIns, text: list[int], folder: Path) -> float:
    """The plan's divergence as the engine computes it, from a file."""
    layers = [LayerDepth()] * N_LAYER
    for shape in found.shapes:
        layers[shape.il] = replace(layers[shape.il], **{shape.part: "approximate"})
    plan, path = DepthPlan(name="x", layers=tuple(layers)), folder / "x.depth"
    settings = RunParams(n_ctx=256, n_ubatch=256, n_kv=256, threads=1, speculate="off")
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(contextlib.closing(LoadedModel(model, settings)))
        write_depth_file(path, DepthContent(
            model=fingerprint(loaded.file), data="0" * 64, plans=[plan],
            tensors={f"x/{name}": tensor for name, tensor in found.tensors.items()},
        ))  # fmt: skip
        probe = stack.enter_context(contextlib.closing(Probe(loaded)))
        file = stack.enter_context(DepthFile(path, loaded.file, loaded.model.hparams))
        stack.enter_context(probe.standing_in(file, [plan]))
        return probe.score(probe.window(text), plan.steps(), "x").mean_kl


def test_a_plan_in_torch_is_the_engines(
    model: Path, fitted: StandIns, texts: np.ndarray, tmp_path: Path
) -> None:
    with GGUFFile.open(model) as file:
        whole = np.arange(file.tensors["token_embd.weight"].ne[1], dtype=np.int32)
        plan = _Plan(TorchLlama(file, torch.float32), fitted, whole)
        ours = plan.checked(texts[-1:])
    engine = score(model, fitted, texts[-1].tolist(), tmp_path)
    assert ours == pytest.approx(engine, rel=0.1) and engine > 0


def test_training_lowers_what_the_engine_measures(
    model: Path, fitted: StandIns, texts: np.ndarray, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    with GGUFFile.open(model) as file:
        found = train_standins(
            file, fitted, texts, time.monotonic() + 60, 1,
            lambda _, done, total: told.append((done, total)),
        )  # fmt: skip
        again = train_standins(file, found.standins, texts, time.monotonic() - 1, 1)
    assert found.after < found.before and told[-1][0] == told[-1][1]
    assert {name: tensor.rows.shape for name, tensor in found.standins.tensors.items()} == {
        name: tensor.rows.shape for name, tensor in fitted.tensors.items()
    }
    assert again.standins is found.standins, "no time: what was given"
    before, after = (
        np.mean([score(model, each, text.tolist(), tmp_path) for text in texts[-4:]])
        for each in (fitted, found.standins)
    )
    assert after < before


def test_a_schedule_ends_with_the_updates_or_the_time() -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.AdamW([weight], lr=1.0)
    schedule, rates = Schedule(0.5, 20, time.monotonic() + 60), list[float]()
    while schedule.go_on(optimiser):
        rates.append(optimiser.param_groups[0]["lr"])
    assert len(rates) == schedule.n_done == 20
    assert max(rates) < 0.5 and rates[-1] < 0.02 and rates[0] < rates[5]
    assert not Schedule(0.5, 20, time.monotonic() - 1).go_on(optimiser)


def test_batches_take_every_window_before_one_again() -> None:
    found = batches(5, 2)
    taken = [i for _ in range(5) for i in next(found).tolist()]
    assert sorted(taken[:5]) == list(range(5)) and sorted(taken[5:]) == list(range(5))
