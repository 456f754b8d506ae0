"""Both layouts of repacked weights: prompts have the bits of one, answers of the other."""

import dataclasses
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeroute import Runtime, shelf_plan
from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Piece
from edgeroute.runtime import errors
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.plain_weights import WIDE_FROM
from edgeroute.shelf_plan import ShelfModel
from edgeroute.tools.forecast.placement import place
from edgeroute.tools.forecast.plan import plan_model
from edgeroute.tools.synth import make

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_kv": 2048, "threads": 1}
PROMPT = "x" * (2 * WIDE_FROM)
ARCHS = ["qwen2", "llama", "qwen3moe"]


@pytest.fixture(scope="module", params=ARCHS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("plain") / "model.gguf"
    make(request.param, found, weight_type="Q4_K")
    return found


@contextmanager
def opened(path: Path, **settings: Any) -> Iterator[LoadedModel]:
    with closing(LoadedModel(path, RunParams(**SETTINGS | settings))) as loaded:
        loaded.device.set_threads(1)
        yield loaded


def logits(loaded: LoadedModel, *widths: int) -> list[npt.NDArray[np.float32]]:
    """Compute batches of so many tokens one behind another; return the last logits of each."""
    found, pos, rng = [], 0, np.random.default_rng(5)
    region = loaded.kv.allocate(sum(widths))
    assert region is not None
    for n in widths:
        made = loaded.forward.run([Piece([int(t) for t in rng.integers(5, 300, n)], pos, region)])
        assert made is not None
        found.append(made[0])
        pos += n
    loaded.kv.release(region)
    return found


def test_each_pass_has_the_kernels_of_its_width(path: Path) -> None:
    with opened(path, plain_prompts=True) as both, opened(path, repack_experts=False) as plain, \
            opened(path) as repacked:  # fmt: skip
        assert repacked.plan.weights.repacked == both.plan.weights.repacked
        assert both.plan.weights.plain and both.warnings == ()
        wide, narrow = (WIDE_FROM, WIDE_FROM + 37), (WIDE_FROM - 1, 1, 5)
        if not plain.plan.weights.repacked:  # with experts, only those stay plain
            for mine, theirs in zip(logits(both, *wide), logits(plain, *wide), strict=True):
                assert np.array_equal(mine, theirs)
        for mine, theirs in zip(logits(both, *narrow), logits(repacked, *narrow), strict=True):
            assert np.array_equal(mine, theirs)
        a, b = logits(both, *wide)[0], logits(repacked, *wide)[0]
        assert not np.array_equal(a, b), "the same kernels: this shows nothing"
        assert np.sum((a - b) ** 2) < 1e-2 * np.sum(b**2)


def test_both_layouts_are_in_the_ledger(path: Path) -> None:
    with opened(path, plain_prompts=True) as both, opened(path) as one:
        more = both.plan.weights.mapped_bytes - one.plan.weights.mapped_bytes
        infos = both.file.tensors
        assert more == sum(infos[name].nbytes for name in both.plan.weights.plain) > 0
        assert both.ledger.used_bytes - one.ledger.used_bytes == pytest.approx(more, rel=0.05)


def test_plans_reckon_with_both_layouts(path: Path) -> None:
    """Of `edgeroute plan`, of its forecasts, and of a server's shelf."""
    beside = set()  # what a shelf adds to the parts
    for plain_prompts in (False, True):
        params = RunParams(**SETTINGS, plain_prompts=plain_prompts, memory=1 << 30)
        with opened(path, plain_prompts=plain_prompts, memory=1 << 30) as loaded:
            needed = loaded.plan.total_bytes
        assert plan_model(path, params).memory.total_bytes == needed
        with GGUFFile.open(path) as file:
            assert place(file, params).needed_bytes == needed
        shelf = ShelfModel(name="m", path=path, params=dataclasses.replace(params, memory=None))
        beside.add(shelf_plan.plan_model(shelf, 1 << 30, "server").whole_bytes - needed)
    assert len(beside) == 1


def test_a_budget_for_one_layout_has_one(path: Path) -> None:
    with opened(path, plain_prompts=True) as both, opened(path) as one:
        budget = (both.plan.total_bytes + one.plan.total_bytes) // 2
    with opened(path, plain_prompts=True, memory=budget) as loaded:
        assert loaded.forward.plain is None and not loaded.plan.weights.plain
        (warning,) = loaded.warnings
        assert "both layouts need" in warning and "there are" in warning


def test_nothing_to_gain_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make("llama", path, weight_type="Q8_0")
    with Runtime(path, plain_prompts=True, **SETTINGS) as runtime:
        (warning,) = runtime.stats()["warnings"]  # type: ignore[misc]
        assert "no matrix is repacked" in warning
    with pytest.raises(errors.UsageError, match="plain_prompts must be true or false"):
        Runtime(path, plain_prompts="yes", **SETTINGS)  # type: ignore[arg-type]


def test_reused_cells_have_the_bits_of_a_fresh_prompt(path: Path) -> None:
    ask: dict[str, Any] = {"max_tokens": 6, "logprobs": 2}
    later = PROMPT + "y" * (WIDE_FROM + 5)
    with Runtime(path, plain_prompts=True, **SETTINGS) as runtime:
        fresh = runtime.generate(later, prefix="off", **ask)
        runtime.generate(PROMPT, max_tokens=1)
        again = runtime.generate(later, **ask)
    assert again.stats.n_cached > 0
    assert (again.token_ids, again.logprobs) == (fresh.token_ids, fresh.logprobs)


def test_a_session_of_one_layout_is_not_continued_in_both(path: Path, tmp_path: Path) -> None:
    where: dict[str, Any] = {"sessions": str(tmp_path / "sessions"), **SETTINGS}
    with Runtime(path, **where) as runtime:
        assert runtime.generate(PROMPT, max_tokens=2, session="a").stats.n_cached == 0
    with Runtime(path, plain_prompts=True, **where) as runtime:
        assert runtime.generate(PROMPT, max_tokens=2, session="a").stats.n_cached == 0
    with Runtime(path, plain_prompts=True, **where) as runtime:
        assert runtime.generate(PROMPT, max_tokens=2, session="a").stats.n_cached > 0
