"""A graph found again for sequences whose cells lie elsewhere: no new graph, the same bits."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.models.forward import Piece
from edgeroute.runtime import kv_cache
from edgeroute.runtime.cells import Region
from edgeroute.tools import synth
from tests.edgeroute.adapter_lab import Model

SIZES = (30, 1, 1, 7, 1)
KINDS = {"llama": {"weight_type": "Q8_0"}, "gemma3": {}, "deepseek2": {}, "gpt-oss": {}}


def texts(n: int) -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(4, 380, sum(SIZES)).tolist() for _ in range(n)]


def region(model: Model) -> Region:
    found = model.loaded.kv.allocate(256)
    assert found is not None
    return found


def answers(
    model: Model, regions: list[Region], tokens: list[list[int]]
) -> npt.NDArray[np.float32]:
    """Compute texts side by side, a piece of each in one pass."""
    found, pos = [], 0
    for size in SIZES:
        logits = model.forward.run([
            Piece(each[pos : pos + size], pos, own, size)
            for each, own in zip(tokens, regions, strict=True)
        ])  # fmt: skip
        assert logits is not None
        found.append(logits.copy())
        pos += size
    return np.concatenate(found)


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("n_together", [1, 3])
def test_other_cells_give_the_same_bits(arch: str, n_together: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    synth.make(arch, path, **KINDS[arch])  # type: ignore[arg-type]
    tokens = texts(n_together)
    with Model(path, None) as model:
        first = [region(model) for _ in range(n_together)]
        expected = answers(model, first, tokens)
        n_built = model.forward.graphs.n_built
        for _ in range(2):
            others = [region(model) for _ in range(n_together)]
            assert others[0].start != first[0].start
            assert np.array_equal(answers(model, others, tokens), expected)
            assert np.array_equal(answers(model, first, tokens), expected)  # and back again
        assert model.forward.graphs.n_built == n_built
        model.forward.graphs.clear()
        assert np.array_equal(answers(model, others, tokens), expected)


def test_cells_are_cleared_ahead_once_somebody_has_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    synth.make("llama", path)
    with Model(path, None) as model:
        kv = model.loaded.kv
        assert not kv.clear_ahead() and kv.n_clear == 0
        mine = region(model)
        assert kv.n_clear == 256
        monkeypatch.setattr(kv_cache, "CLEAR_BYTES", 100 * kv.shape.bytes_per_cell)
        assert [kv.clear_ahead() for _ in range(4)] == [True, True, False, False]
        assert kv.n_clear == 512
        kv.release(mine)
        assert not kv.clear_ahead() and kv.n_clear == 512
        while kv.allocate(256) is not None:
            while kv.clear_ahead():
                pass
        assert kv.n_clear == kv.n_cells
