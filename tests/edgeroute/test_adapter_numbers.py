"""An adapter computes what merged weights compute; mixtures, blocks and batches change no bit."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from edgeroute import paging, paging_layers
from edgeroute.models.forward import Piece
from edgeroute.offload.adapter_store import MAX_SLOTS_PER_TOKEN
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.lora import LoraRow
from edgeroute.tools import synth, synth_adapter
from tests.edgeroute import adapter_lab as lab
from tests.edgeroute.adapter_lab import Model, make, nmse

SMALL = {"n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 1, "n_embd_head": 32}
MOE_SMALL = {"n_layer": 2, "n_expert": 8, "n_expert_used": 3, "n_ff_exp": 32}
SPECS = {
    name: replace(synth.ARCHITECTURES[name], **{**SMALL, **more})
    for name, more in {
        "llama": {"n_layer": 2},
        "llama-bias": {"n_layer": 2},
        "qwen2": {"n_layer": 2},
        "qwen3": {"n_layer": 2},
        "gemma3": {},
        "qwen2moe": {**MOE_SMALL, "n_ff_shexp": 64},
        "qwen3moe": MOE_SMALL,
        "olmoe": {**MOE_SMALL, "n_head_kv": 2, "n_ff": 32},
    }.items()
}
LIMIT = 3e-6
"""NMSE of an adapter in halves against merged F32 weights; half-precision keys alone make 7e-7
in gemma3's seven layers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter-numbers")


def model_of(arch: str, folder: Path, **more: Any) -> tuple[synth.SynthSpec, Path]:
    """A small model; each is written once."""
    spec = replace(SPECS[arch], **more)
    path = folder / f"{arch}{'-'.join(f'{k}{v}' for k, v in more.items())}.gguf"
    if not path.exists():
        synth.write(spec, path)
    return spec, path


@pytest.fixture(scope="module")
def trio(folder: Path) -> Iterator[Any]:
    """A llama with three adapters of rank 8 and one of rank 20 with other ranks per module."""
    _, path = model_of("llama", folder)
    adapters = [make(folder / f"{name}.gguf", path, rank=8, seed=seed)
                for seed, name in enumerate("abc")]  # fmt: skip
    ranks = {"q_proj": 5, "down_proj": 17}
    adapters.append(make(folder / "wide", path, rank=20, alpha=30.0, seed=9, ranks=ranks))
    with Model(path, adapters) as model:
        yield model


@pytest.mark.parametrize("arch", SPECS)
def test_an_adapter_is_the_merged_model(
    arch: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All experts are used, so that no rounding can choose others."""
    n_expert = SPECS[arch].n_expert
    spec, path = model_of(arch, folder, **({"n_expert_used": n_expert} if n_expert else {}))
    adapter = make(folder / f"of-{arch}.gguf", path, rank=8, alpha=12.0)
    deltas = lab.gguf_deltas(adapter)
    merged = lab.merge(spec, folder / "merged.gguf", deltas, monkeypatch)
    with Model(merged, None) as reference:
        wanted = reference.logits()
    with Model(path, [adapter]) as model:
        found, plain = model.logits({adapter.stem: 1.0}), model.logits()
        layered = model.logits({adapter.stem: 1.0}, spans=model.forward.by_layer())
    assert nmse(found, wanted) < LIMIT
    assert nmse(plain, wanted) > 1e-3  # the adapter does something
    assert np.array_equal(found, layered)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "qwen2moe"])
def test_both_formats_of_the_same_numbers_give_the_same_bits(arch: str, folder: Path) -> None:
    _, path = model_of(arch, folder)
    peft = make(folder / f"{arch}-peft", path, rank=6, alpha=9.0, seed=4)
    gguf = make(folder / f"{arch}-gguf.gguf", path, rank=6, alpha=9.0, seed=4)
    with Model(path, [peft, gguf]) as model:
        ours, theirs = model.logits({peft.name: 1.0}), model.logits({gguf.stem: 1.0})
        plain = model.logits()
    assert np.array_equal(ours, theirs) and not np.array_equal(ours, plain)


@pytest.mark.parametrize(
    "how",
    [{"rank": 3, "alpha": 1.0}, {"rank": 8, "alpha": 8.0}, {"rank": 8, "alpha": 12.5},
     {"rank": 12, "alpha": 16.0, "use_rslora": True}, {"rank": 40, "alpha": 16.0},
     {"rank": 4, "ranks": {"q_proj": 19, "down_proj": 1}, "alpha": 7.0},
     {"rank": 8, "alphas": {"v_proj": 3.0, "layers.1.mlp.up_proj": 40.0}},
     {"rank": 8, "targets": ("ffn_down",)}, {"rank": 8, "targets": ("attn_k", "ffn_up")}],
    ids=str,
)  # fmt: skip
def test_ranks_and_scales_are_those_of_the_file(
    how: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that are no power of two, ranks above the slots' and per module, few modules."""
    spec, path = model_of("qwen2", folder)  # its rows need no reordering
    adapter = make(tmp_path / "x", path, **how)
    small = make(tmp_path / "small", path, rank=2, targets=("attn_q",), seed=5)
    made = synth_adapter._tensors(lab.base_of(path), synth_adapter.AdapterSpec(**how))
    deltas = {each.stem: np.float32(each.scale) * (each.b @ each.a) for each in made}
    merged = lab.merge(spec, tmp_path / "merged.gguf", deltas, monkeypatch)
    with Model(merged, None) as reference:
        wanted = reference.logits()
    with Model(path, [adapter, small]) as model:  # the small one makes slots of rank 8
        assert model.loaded.adapters.store.slots.rank == 8
        assert nmse(model.logits({"x": 1.0}), wanted) < LIMIT
        assert nmse(model.logits(), wanted) > 1e-5


def test_one_hot_mixtures_are_single_adapters(trio: Any) -> None:
    single = trio.logits({"a": 1.0})
    for mixture in ({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0, "wide": 0.0}):
        assert np.array_equal(trio.logits(mixture), single)
    assert not np.array_equal(trio.logits({"b": 1.0}), single)


def test_a_factor_of_zero_is_the_base_model(trio: Any) -> None:
    assert np.array_equal(trio.logits({"a": 0.0}), trio.logits())
    with Model(trio.loaded.file.path, None) as bare:
        assert np.array_equal(bare.logits(), trio.logits())


def test_mixtures_are_the_merged_mean(
    trio: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = {name: lab.gguf_deltas(folder / f"{name}.gguf") for name in "abc"}
    for mixture in ({"a": 0.5, "b": 0.5}, {"a": 0.7, "b": 0.3, "c": -0.4}, {"c": 2.0}):
        parts = [(deltas[name], weight) for name, weight in mixture.items()]
        merged = lab.merge(SPECS["llama"], tmp_path / "merged.gguf", lab.mean(parts), monkeypatch)
        with Model(merged, None) as reference:
            assert nmse(trio.logits(mixture), reference.logits()) < LIMIT


def together(model: Any, rows: list[LoraRow | None], n_steps: int = 4) -> list[Any]:
    """Decode one token of each row at once, some times; logits by row."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(4, 380, 20 + 7 * i).tolist() for i in range(8)][: len(rows)]
    later = rng.integers(4, 380, (n_steps, 8))[:, : len(rows)].tolist()
    regions = [model.loaded.kv.allocate(256) for _ in rows]
    found: list[Any] = [[] for _ in rows]
    for prompt, region, row, mine in zip(prompts, regions, rows, found, strict=True):
        mine.append(model.forward.run([Piece(prompt, 0, region, 1, row)])[0].copy())
    for i, tokens in enumerate(later):
        pieces = [
            Piece([token], len(prompt) + i, region, 1, row)
            for token, prompt, region, row in zip(tokens, prompts, regions, rows, strict=True)
        ]
        for logits, mine in zip(model.forward.run(pieces), found, strict=True):
            mine.append(logits.copy())
    for region in regions:
        model.loaded.kv.release(region)
    return found


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3moe"])
def test_a_batch_of_different_adapters_gives_each_row_what_it_gets_alone(
    arch: str, folder: Path
) -> None:
    """Seven adapters, of other ranks and scales, a mixture, and the base model in one batch."""
    _, path = model_of(arch, folder)
    made = [make(folder / f"{arch}-m{i}", path, rank=4 + 3 * i, alpha=5.0 + i, seed=20 + i)
            for i in range(8)]  # fmt: skip
    with Model(path, made, adapter_slots=8) as model:
        store = model.loaded.adapters.store
        mixtures = [{each.name: 1.0} for each in made[:6]]
        mixtures += [{made[6].name: 0.25, made[7].name: -1.5}, {}]
        leases = [store.lease(mixture) for mixture in mixtures]
        lab.wait_for(lambda: all(store.ready(lease) for lease in leases))
        rows = [lease.row for lease in leases]
        assert rows[-1] is None and len({row.slots for row in rows[:-1]}) == 7
        # Eight sequences are a batch of eight for the base's own kernels in both runs.
        found = together(model, rows)
        for i, mine in enumerate(found):
            alone = together(model, [rows[i] if k == i else None for k in range(8)])[i]
            assert all(np.array_equal(a, b) for a, b in zip(mine, alone, strict=True)), i
            same = together(model, [rows[i]] * 8)[i]
            assert all(np.array_equal(a, b) for a, b in zip(mine, same, strict=True)), i
        firsts = {each[0].tobytes() for each in found}
        assert len(firsts) == 8
        for lease in leases:
            store.release(lease)


@pytest.mark.parametrize("kind", ["Q5_1", "Q8_0"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3moe"])
def test_rows_one_by_one_have_the_bits_of_rows_together(arch: str, kind: str, folder: Path) -> None:
    """The default batch is as large as keeps the base's own bits; of F32 and F16 none is."""
    _, path = model_of(arch, folder, weight_type=kind)
    made = [make(folder / f"{arch}-s{i}.gguf", path, rank=8, seed=40 + i) for i in range(3)]
    with Model(path, made) as model:
        store = model.loaded.adapters.store
        leases = [store.lease({each.stem: 1.0}) for each in made] + [store.lease({})]
        lab.wait_for(lambda: all(store.ready(lease) for lease in leases))
        rows = [lease.row for lease in leases][: model.loaded.max_batch]
        found = together(model, rows)
        assert len(rows) > 2
        for n in range(1, len(rows)):
            fewer = together(model, rows[:n])
            for ours, theirs in zip(fewer, found, strict=False):
                assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), n
        for lease in leases:
            store.release(lease)


@pytest.mark.parametrize("arch", SPECS)
def test_the_widest_mixture_fits_every_graph(arch: str, folder: Path) -> None:
    """As many slots as a request may use, on every linear weight there is."""
    _, path = model_of(arch, folder)
    n = MAX_SLOTS_PER_TOKEN
    made = [make(folder / f"{arch}-w{i}", path, rank=2, seed=i) for i in range(n)]
    base = lab.base_of(path)
    with Model(path, made, adapter_slots=n) as model:
        found = model.logits({each.name: 1 / n for each in made}, ((64, 1), (1, 1)))
        assert found.shape[0] == 2
        routers = {name for name in base.linears if name.endswith("ffn_gate_inp")}
        assert model.loaded.adapters.store.slots.names == set(base.linears) - routers


LAST = ("blk.1.attn_output", "blk.1.ffn_down")


@pytest.mark.parametrize("stem", LAST)
def test_an_adapter_of_one_weight_that_a_batch_does_not_compute(stem: str, folder: Path) -> None:
    """A prompt's batches but the last want no logits, and leave the last layer's end out."""
    _, path = model_of("llama", folder)
    leaf = stem.rsplit(".", 1)[1]
    whole = make(folder / f"one-{leaf}-all.gguf", path, rank=4, targets=(leaf,))
    only = folder / f"one-{leaf}.gguf"
    keep_one(whole, only, stem)
    with Model(path, [only]) as model:
        steps = ((30, 0), (5, 0), (1, 0), (4, 4), (1, 1))
        found = model.logits({only.stem: 1.0}, steps)
        plain = model.logits(None, steps)
        spans = model.logits({only.stem: 1.0}, steps, spans=model.forward.by_layer())
        assert np.array_equal(found, spans) and not np.array_equal(found, plain)


def keep_one(whole: Path, out: Path, stem: str) -> None:
    """Copy a GGUF adapter with the matrices of one weight only."""
    from gguf import GGUFWriter

    reader = GGUFReader(whole)
    writer = GGUFWriter(out, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    for tensor in reader.tensors:
        if tensor.name.startswith(f"{stem}."):
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# paged and streamed


@pytest.fixture
def _slim(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's own memory counts as nothing; refusals name bytes."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    for module in (paging, paging_layers):
        monkeypatch.setattr(module, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(Device, "_find_extra_buffer_types", lambda *_: ())


def at_least(path: Path, adapters: list[Path], **params: Any) -> int:
    """What the refusal of a hopeless budget names, in bytes."""
    with pytest.raises(CapacityError) as refusal:
        Model(path, adapters, memory=1, **params)
    assert refusal.value.smallest_bytes is not None or re.search("at least", str(refusal.value))
    if refusal.value.smallest_bytes is not None:
        return int(refusal.value.smallest_bytes)
    named = re.search(r"at least (\d+\.\d+) GiB", str(refusal.value))
    assert named is not None
    return int(float(named[1]) * 2**30)


@pytest.mark.usefixtures("_slim")
@pytest.mark.parametrize("arch", ["qwen2moe", "qwen3moe", "llama"])
def test_what_is_paged_or_streamed_has_the_bits_of_what_is_resident(
    arch: str, folder: Path
) -> None:
    spec = replace(synth.ARCHITECTURES[arch], n_layer=8 if arch == "llama" else 3)
    path = folder / f"large-{arch}.gguf"
    synth.write(spec, path)
    made = [make(folder / f"{arch}-p{i}", path, rank=8 + 6 * i, alpha=10.0, seed=i)
            for i in range(2)]  # fmt: skip
    names = [each.name for each in made]
    mixtures = [{names[0]: 1.0}, {names[1]: 1.0}, {names[0]: 0.5, names[1]: 0.5}, None]
    params: dict[str, Any] = {"n_ctx": 256, "n_kv": 256, "n_ubatch": 64, "max_batch": 2,
                              "adapter_slots": 2}  # fmt: skip
    with Model(path, made, repack_experts=False, **params) as resident:
        whole = resident.loaded.plan.total_bytes
        expected = [resident.logits(mixture) for mixture in mixtures]
    budget = at_least(path, made, **params)
    assert budget < whole, "nothing would be paged"
    with Model(path, made, memory=(budget + whole) // 2, **params) as model:
        loaded = model.loaded
        assert (loaded.experts if spec.n_expert else loaded.layers) is not None
        for mixture, wanted in zip(mixtures, expected, strict=True):
            assert np.array_equal(model.logits(mixture), wanted), mixture
        assert loaded.ledger.used_bytes <= loaded.ledger.budget_bytes


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_embeddings_of_tokens_are_the_rows_of_their_matrix(arch: str, folder: Path) -> None:
    _, path = model_of(arch, folder)
    rows = next(t for t in GGUFReader(path).tensors if t.name == "token_embd.weight").data
    tokens = [5, 300, 5, 0, 383]
    with Model(path) as model:
        assert np.array_equal(model.forward.embed(tokens), rows[tokens])
        assert np.array_equal(model.forward.embed(list(range(200))), rows[:200])
