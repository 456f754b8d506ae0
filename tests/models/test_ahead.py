"""Several tokens of each sequence in one graph: the bits of as many passes, and when it is done."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute.models import ahead
from edgeroute.models.ahead import WISHES, Ahead
from edgeroute.models.forward import Piece
from edgeroute.runtime.cells import Region
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.lora import LoraRow
from edgeroute.tools import synth
from edgeroute.tools.synth_adapter import AdapterSpec, make_peft
from tests.edgeroute.adapter_lab import Model, base_of

N_PROMPT = 23
KINDS: dict[str, Any] = {
    "llama": {"weight_type": "Q8_0"}, "qwen2": {"weight_type": "Q4_K"}, "qwen3": {},
    "gemma3": {"weight_type": "Q4_0"}, "olmoe": {}, "deepseek2": {}, "gpt-oss": {},
}  # fmt: skip
Logits = list[npt.NDArray[np.float32]]


def begin(model: Model, n: int) -> list[Region]:
    """Give `n` sequences prompts of their own, each a token longer than the last."""
    rng = np.random.default_rng(7)
    regions = []
    for i in range(n):
        region = model.loaded.kv.allocate(256)
        assert region is not None
        model.forward.run([Piece(rng.integers(4, 380, N_PROMPT + i).tolist(), 0, region)])
        regions.append(region)
    return regions


def pieces(
    regions: list[Region], tokens: list[int], at: int, lora: LoraRow | None = None
) -> list[Piece]:
    pos = N_PROMPT + at
    each = zip(regions, tokens, strict=True)
    return [Piece([token], pos + i, own, lora=lora) for i, (own, token) in enumerate(each)]


def one_by_one(
    model: Model, regions: list[Region], n_passes: int, lora: LoraRow | None = None
) -> Logits:
    found, tokens = [], list(range(5, 5 + len(regions)))
    for at in range(n_passes):
        logits = model.forward.run(pieces(regions, tokens, at, lora))
        assert logits is not None
        found.append(logits.copy())
        tokens = [int(row.argmax()) for row in logits]
    return found


def at_once(
    ahead: Ahead, regions: list[Region], n_passes: int, lora: LoraRow | None = None
) -> Logits:
    computed = ahead.run(pieces(regions, list(range(5, 5 + len(regions))), 0, lora), n_passes)
    assert computed is not None and len(computed) == n_passes
    for logits, fed in computed[:-1]:
        assert fed is not None and fed.tolist() == logits.argmax(axis=1).tolist()
    assert computed[-1].fed is None
    return [logits.copy() for logits, _ in computed]


def cells(model: Model, regions: list[Region], n_more: int) -> list[npt.NDArray[np.uint8]]:
    kv, found = model.loaded.kv, []
    for i, region in enumerate(regions):
        n = N_PROMPT + i + n_more
        data = np.empty(n * kv.shape.bytes_per_cell, np.uint8)
        kv.read_cells(region.start, n, data)
        found.append(data)
    return found


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize(("n", "n_passes"), [(1, 4), (3, 2)])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_several_passes_have_the_bits_of_as_many_runs(
    arch: str, n: int, n_passes: int, kv_type: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    synth.make(arch, path, **KINDS[arch])
    with Model(path, None, kv_type=kv_type) as model:
        regions = begin(model, n)
        expected = one_by_one(model, regions, n_passes)
        stored = cells(model, regions, n_passes)
        several = Ahead(model.forward)
        assert Ahead.can(model.forward)
        assert np.array_equal(at_once(several, regions, n_passes), expected)
        others = begin(model, n)
        n_built = model.forward.graphs.n_built
        assert np.array_equal(at_once(several, others, n_passes), expected)
        assert model.forward.graphs.n_built == n_built  # it was found again, for other cells
        for got, want in zip(cells(model, others, n_passes), stored, strict=True):
            assert np.array_equal(got, want)


def test_adapters_add_to_each_pass(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    synth.make("llama", path)
    make_peft(tmp_path / "a", base_of(path), AdapterSpec(rank=4))
    with Model(path, [tmp_path / "a"]) as model:
        regions = begin(model, 1)
        plain = one_by_one(model, regions, 3)
        with model.leased({"a": 1.0}) as lease:
            expected = one_by_one(model, regions, 3, lease.row)
            assert not np.array_equal(expected[0], plain[0])
            several = Ahead(model.forward)
            assert np.array_equal(at_once(several, regions, 3, lease.row), expected)
        assert np.array_equal(at_once(several, regions, 3), plain)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    path = tmp_path / "m.gguf"
    synth.make("llama", path)
    with Model(path, None) as opened:
        yield opened


def test_a_graph_is_built_once_it_was_wished_for_often_enough(model: Model) -> None:
    regions = begin(model, 2)
    several = Ahead(model.forward)
    wished = [several.ready(pieces(regions, [5, 6], at % 4), 4) for at in range(WISHES + 1)]
    assert wished == [False] * WISHES + [True]
    at_once(several, regions, 4)
    assert several.ready(pieces(begin(model, 2), [7, 8], 0), 4)  # as far apart, elsewhere
    assert not several.ready(pieces(begin(model, 1), [7], 0), 4)  # another graph


def test_later_passes_see_no_more_cells_than_the_first(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "WISHES", 0)
    region = model.loaded.kv.allocate(512)
    assert region is not None and region.n_cells == 512
    several = Ahead(model.forward)
    at = {
        pos: several.ready([Piece([5], pos, region)], 4) for pos in (252, 253, 255, 256, 508, 509)
    }
    assert at == {252: True, 253: False, 255: False, 256: True, 508: True, 509: False}


def test_logits_have_to_fit_beside_what_a_prompt_takes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "WISHES", 0)
    (region,) = begin(model, 1)
    n_bytes = 4 * model.forward.model.hparams.n_vocab
    n_most = model.forward.graphs.n_bytes // 2 // n_bytes
    several = Ahead(model.forward)
    assert several.ready([Piece([5], N_PROMPT, region)], n_most)
    assert not several.ready([Piece([5], N_PROMPT, region)], n_most + 1)


def test_a_stopped_computation_gives_nothing(model: Model) -> None:
    regions = begin(model, 1)
    device = model.loaded.device
    device.stop_flag.set()
    device.watch_stop_flag(True)
    try:
        assert Ahead(model.forward).run(pieces(regions, [5], 0), 4) is None
    finally:
        device.watch_stop_flag(False)
        device.stop_flag.clear()


def test_a_token_outside_its_region_is_refused(model: Model) -> None:
    region = model.loaded.kv.allocate(256)
    assert region is not None
    with pytest.raises(ComputeError, match="do not fit"):
        Ahead(model.forward).run([Piece([5], region.n_cells, region)], 2)
