"""A plan, streamed layers and an adapter at once: each gives what it promises."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from edgeroute import Runtime
from edgeroute.depth_routing import MODEL, stamp_of
from edgeroute.models.adapter_file import base_shapes
from edgeroute.models.depth_file import fingerprint
from edgeroute.models.registry import describe
from edgeroute.models.standins import tensor_name
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import MIB
from edgeroute.skippers.depth_router import LIMITS
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.tools import synth
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.standin_records import StandInTensor
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf
from tests.edgeroute.layered_lab import plain_machine

N_LAYER, N_EMBD = 12, 256
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1, "max_batch": 2,
                            "speculate": "off"}  # fmt: skip
GONE = LayerDepth(attn="skip", ffn="skip")
PLAN = DepthPlan(
    name="p",
    layers=tuple(
        {1: GONE, 3: GONE, 5: LayerDepth(attn="approximate", ffn="approximate"), 6: GONE,
         8: LayerDepth(attn="repeat", ffn="repeat"), 9: LayerDepth(ffn="skip"), 10: GONE,
         }.get(il, LayerDepth())
        for il in range(N_LAYER)
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _slim_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of tiny models stream; refusals name bytes."""
    plain_machine(monkeypatch, MIB=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("paged") / "llama.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], n_layer=N_LAYER), where)
    rng = np.random.default_rng(1)
    shapes = {"norm": (N_EMBD,), "a": (16, N_EMBD), "b": (N_EMBD, 16)}
    tensors = {
        tensor_name("p", 5, "layer", name): StandInTensor(
            rows=rng.normal(0, 0.3, ne).astype(np.float32), kind=GGMLQuantizationType.F32
        )
        for name, ne in shapes.items()
    }
    with GGUFFile.open(where) as file:
        content = DepthContent(
            model=fingerprint(file), data="0" * 64, plans=(PLAN,), tensors=tensors
        )
        write_depth_file(where.with_suffix(".depth"), content)
        make_gguf(where.with_name("a.lora.gguf"), base_shapes(describe(file)), AdapterSpec(rank=4))
    return where


def smallest_budget(path: Path, **settings: Any) -> int:
    with pytest.raises(CapacityError) as refusal, Runtime(path, memory=1 << 20, **settings):
        pass
    assert refusal.value.smallest_bytes is not None
    return refusal.value.smallest_bytes


def answers(runtime: Runtime, **options: Any) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(5)
    prompts = [[int(t) for t in rng.integers(3, 300, n)] for n in (3, 90)]
    return [
        runtime.generate(prompt_ids=p, max_tokens=8, prefix="off", **options).token_ids
        for p in prompts
    ]


def test_streamed_and_resident_agree_under_a_plan_and_an_adapter(path: Path) -> None:
    adapter = str(path.with_name("a.lora.gguf"))
    settings = SETTINGS | {"depth": "p", "adapters": [adapter], "adapter_slots": 1}
    with Runtime(path, **settings) as resident:
        (name,) = resident.adapters
        expected = answers(resident, adapter=name)
        assert expected != answers(resident)  # the adapter does something
        assert expected != answers(resident, adapter=name, depth="full")  # and so does the plan
    budget = smallest_budget(path, **settings) + 4 * MIB
    with Runtime(path, memory=budget, **settings) as streamed:
        stats: Any = streamed.stats()
        assert stats["layers"]["streamed"] >= 8
        assert sum(stats["memory"].values()) <= budget
        assert answers(streamed, adapter=name) == expected


def test_routers_decide_alike_where_layers_stream(path: Path) -> None:
    rng = np.random.default_rng(4)
    arrays: dict[str, Any] = {LIMITS: np.array([1, 1, 4, 2], np.int32)}
    with GGUFFile.open(path) as file:
        arrays[MODEL] = stamp_of(fingerprint(file))
    for il in range(1, N_LAYER - 1):
        for name, shape in (("w1", (8, N_EMBD)), ("b1", (8,)), ("w2", (3, 8)), ("b2", (3,))):
            arrays[f"router/blk.{il}.{name}"] = rng.normal(0, 3.0, shape).astype(np.float32)
    with path.with_name("llama.router.npz").open("wb") as out:
        np.savez(out, **arrays)
    settings = SETTINGS | {"depth": "routed"}
    with Runtime(path, **settings) as resident:
        expected = answers(resident)
        stats: Any = resident.stats()
        assert stats["depth"]["layers_run"] != N_LAYER
    budget = smallest_budget(path, **settings) + 4 * MIB
    with Runtime(path, memory=budget, **settings) as streamed:
        stats = streamed.stats()
        assert stats["layers"]["streamed"] >= 8
        assert answers(streamed) == expected


def test_layers_that_a_plan_leaves_out_are_not_read(path: Path) -> None:
    settings = SETTINGS | {"depth": "p"}
    budget = smallest_budget(path, **settings)
    with Runtime(path, memory=budget, **settings) as streamed:
        read: list[int] = []
        for depth in ("p", "full", "p"):
            found = streamed.generate(prompt_ids=[5, 6, 7], max_tokens=8, depth=depth)
            layers: Any = found.stats.to_dict()["layers"]
            read.append(layers["bytes"])
    # Five of twelve layers need nothing of the file: four are skipped, one has a stand-in.
    assert read[2] < 0.8 * read[1] and read[0] < read[1]
