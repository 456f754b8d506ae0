"""Bridges trained on a tiny model: torch drafts as the engine does, and training helps."""

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeroute.bridges import BridgeFile  # noqa: E402
from edgeroute.config import RunParams  # noqa: E402
from edgeroute.loaded import LoadedModel  # noqa: E402
from edgeroute.paging_layers import FIRST_KEPT  # noqa: E402
from edgeroute.tools.calibrate_drafts import DraftsParams, calibrate_drafts  # noqa: E402
from edgeroute.tools.draft_streams import DraftProbe, Streams  # noqa: E402
from edgeroute.tools.torch_llama import TorchLlama  # noqa: E402
from edgeroute.tools.train_bridges import BridgeTrainer, Texts, _Drafts  # noqa: E402
from tests.tools.depth_lab import write_deep, write_text  # noqa: E402

N_LAYER, N_WINDOW, END, RANK = 8, 64, 6, 32


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep(tmp_path_factory.mktemp("model"), request.param, n_layer=N_LAYER,
                      weight_type="F32")  # fmt: skip


def texts_of(probe: DraftProbe, n: int) -> tuple[Streams, Texts]:
    rng = np.random.default_rng(1)
    streams = Streams(N_WINDOW, (FIRST_KEPT, END))
    for _ in range(n):
        streams.read(probe, rng.integers(5, 380, N_WINDOW).tolist())
    return streams, Texts(streams.tokens, streams.windows(FIRST_KEPT), streams.windows(END),
                          streams.n_checked)  # fmt: skip


def test_a_draft_in_torch_is_the_engines(model: Path, tmp_path: Path) -> None:
    """First guesses of a bridge, from its stream on: the same tokens but for half precision."""
    out, data = tmp_path / "x.drafts", write_text(tmp_path)
    calibrate_drafts(model, DraftsParams(files=(data,), n_window=48, out=out, rank=RANK),
                     lambda *_: None)  # fmt: skip
    settings = RunParams(n_ctx=256, n_ubatch=256, n_kv=256, threads=1, speculate="off")
    with contextlib.closing(LoadedModel(model, settings)) as loaded:
        with contextlib.closing(DraftProbe(loaded)) as probe:
            tokens = np.random.default_rng(2).integers(5, 380, N_WINDOW).tolist()
            window = probe.window(tokens)
            with BridgeFile(out, loaded.file, loaded.model.hparams) as bridges:
                bridge = bridges.find(range(FIRST_KEPT, END))
                assert bridge is not None
                with contextlib.closing(bridges.weights(bridge, loaded.device)) as weights:
                    weights.load()
                    probe.standins = weights
                    right = probe.guess(window, bridge, crosses=True)
                    probe.graphs.clear()
                    probe.standins = None
        torch_model = TorchLlama(loaded.file, torch.float32, first=END)
        trainer = BridgeTrainer(torch_model, np.arange(loaded.model.hparams.n_vocab), 1e-5)
        near, far = (torch.from_numpy(window.states[il][None].copy()) for il in (FIRST_KEPT, END))
        a, b = _maps(out, loaded)
        with torch.no_grad():
            drafts = _Drafts(torch_model, END, far)
            first = next(trainer._guesses(drafts, near, far, [a, b]))
            guessed = trainer._predictions(first)[0].argmax(-1).numpy()
            full = trainer._predictions(drafts.full)[0].argmax(-1).numpy()
        assert np.mean(full[:-1] == window.logs.argmax(-1)) > 0.97
        places = np.linspace(N_WINDOW // 8, N_WINDOW - 2, 32).astype(int)
        ours = [bool(guessed[i] == window.logs[i].argmax()) for i in places]
        assert np.mean([x == y for x, y in zip(ours, right, strict=True)]) > 0.9


def _maps(path: Path, loaded: LoadedModel) -> tuple["torch.Tensor", "torch.Tensor"]:
    from gguf import GGUFReader, quants

    stem = f"bridge-{FIRST_KEPT}-{END}/blk.{FIRST_KEPT}.layer."
    found = {t.name.removeprefix(stem): quants.dequantize(t.data, t.tensor_type)
             for t in GGUFReader(path).tensors if t.name.startswith(stem)}  # fmt: skip
    a, b = found["a"].T, found["b"].T
    bias = found["bias"] @ np.linalg.pinv(b)  # what a row that takes a 1 would have to be
    return torch.from_numpy(np.vstack([a, bias]).astype(np.float32)), torch.from_numpy(b.copy())


def test_training_lowers_the_divergence_on_text_kept_apart(model: Path) -> None:
    settings = RunParams(n_ctx=256, n_ubatch=256, n_kv=256, threads=1, speculate="off")
    with contextlib.closing(LoadedModel(model, settings)) as loaded:
        with contextlib.closing(DraftProbe(loaded)) as probe:
            streams, texts = texts_of(probe, 32)
        eps = loaded.model.hparams.norm_rms_eps
        a, b, _ = streams.fit(FIRST_KEPT, END, RANK, eps)
        trainer = BridgeTrainer(TorchLlama(loaded.file, torch.float32, first=END),
                                np.unique(texts.tokens), eps)  # fmt: skip
        found = trainer.train(END, texts, (a, b), time.monotonic() + 60)
        assert found.after < found.before
        assert found.a.shape == a.shape and found.b.shape == b.shape
        assert not np.array_equal(found.a, a)
        kept = trainer.train(END, texts, (found.a, found.b), time.monotonic() - 1)
        assert kept.after <= kept.before
