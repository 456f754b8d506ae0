"""Matrices multiplied as one: which are joined, and that each row keeps its bits."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter

from edgeroute.models.forward import Forward, Piece
from edgeroute.models.registry import describe
from edgeroute.runtime import joints
from edgeroute.runtime import weights as weights_module
from edgeroute.runtime.device import Device
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.joints import Joint, Joints
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.runtime.tensor import Descriptors, new_tensor, place_all, set_bytes, shape
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools.synth import make

Logits = npt.NDArray[np.float32]
GATE, UP = "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"
F32, F16 = 0, 1


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with Device.open("cpu") as opened:
        yield opened


@contextmanager
def opened(path: Path, device: Device, **how: bool) -> Iterator[ResidentWeights]:
    with GGUFFile.open(path) as file:
        weights = ResidentWeights(file, device, describe(file).specs(), **how)
        try:
            weights.load()
            yield weights
        finally:
            weights.close()


def run(path: Path, device: Device, kv_type: str) -> list[Logits]:
    """Compute a prompt of 70 tokens, two sequences in one pass, and one token alone."""
    with opened(path, device) as weights:
        hp = describe(weights.file).hparams
        kv_shape = KvShape(
            n_layer=hp.n_layer, n_embd_k_gqa=hp.n_embd_k_gqa, n_embd_v_gqa=hp.n_embd_v_gqa,
            n_embd_head=hp.n_embd_head_k, kv_type=kv_type,
        )  # fmt: skip
        with closing(KvCache(device, kv_shape, 512)) as kv:
            forward = Forward(describe(weights.file), device, weights, kv)
            one, two = kv.allocate(128), kv.allocate(128)
            assert one is not None and two is not None
            tokens = [int(t) for t in np.random.default_rng(1).integers(0, hp.n_vocab, 71)]
            found = [
                forward.run([Piece(tokens[:70], 0, one, 70)]),
                forward.run([Piece(tokens[70:], 70, one, 1), Piece(tokens[:9], 0, two, 2)]),
                forward.run([Piece(tokens[9:10], 9, two, 1)]),
            ]
            forward.close()
        assert all(each is not None for each in found)
        return [each for each in found if each is not None]


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize(
    "kind",
    ["llama-F32", "llama-F16", "llama-Q4_0", "llama-Q8_0", "qwen2-Q4_K", "qwen2-Q5_0",
     "qwen3-Q4_1", "gemma3-Q4_0", "gpt-oss-Q8_0", "olmoe-Q4_K"],
)  # fmt: skip
def test_joined_products_have_the_bits_of_single_ones(
    kind: str, kv_type: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, weight_type = kind.rsplit("-", 1)
    path = tmp_path / f"{kind}.gguf"
    make(arch, path, weight_type=weight_type)
    joined = run(path, device, kv_type)
    monkeypatch.setattr(
        Joints, "find", lambda self, names, get: [Joint(get(name), (name,)) for name in names]
    )
    monkeypatch.setattr(ResidentWeights, "_gather", lambda self: None)
    apart = run(path, device, kv_type)
    for a, b in zip(joined, apart, strict=True):
        assert np.isfinite(a).all() and np.array_equal(a, b)


@pytest.mark.parametrize("weight_type", ["Q8_0", "Q4_0"])
def test_gate_and_up_are_joined_mapped_and_repacked(
    weight_type: str, device: Device, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    make("llama", path, weight_type=weight_type)
    with opened(path, device) as weights:
        (found,) = weights.joints([UP, GATE])
        assert set(found.names) == {GATE, UP}
        n_in, n_out = shape(weights[GATE])[:2]
        assert shape(found.tensor)[:2] == (n_in, 2 * n_out)
        assert weights.joints([UP, GATE]) == [found]  # made once
        (alone,) = weights.joints([GATE])
        assert alone == Joint(weights[GATE], (GATE,))


def test_only_neighbours_of_one_type_and_width_are_joined(device: Device) -> None:
    """A gap, another type, or another input keeps matrices apart; order does not matter."""
    descriptors = Descriptors(8)
    names = ("a", "b", "half", "c", "wide")
    kinds = {"half": F16}
    widths = {"wide": 32}
    tensors = {
        name: new_tensor(descriptors, kinds.get(name, F32), (widths.get(name, 16), 8), name)
        for name in names
    }
    buffer = place_all(list(tensors.values()), device)
    try:
        with Joints() as made:
            found = made.find(names[::-1], tensors.get)
            assert sorted(joint.names for joint in found) == [
                ("a", "b"), ("c",), ("half",), ("wide",)
            ]  # fmt: skip
            numbers = np.arange(2 * 8 * 16, dtype=np.float32)
            (both,) = (joint.tensor for joint in found if len(joint.names) == 2)
            set_bytes(both, numbers)
            product = np.empty(8 * 16, np.float32)
            joints.ggml().ggml_backend_tensor_get(
                tensors["b"], product.ctypes.data, 0, product.nbytes
            )
            assert np.array_equal(product, numbers[8 * 16 :])  # the same memory, b behind a
    finally:
        buffer.free()
        descriptors.free()


def scattered(path: Path, kind: str) -> None:
    """Make a model whose output projection stands between queries, keys and values."""
    write = GGUFWriter.write_header_to_file

    def write_sorted(writer: GGUFWriter, *args: object) -> None:
        # attn_k, attn_output, attn_q, attn_v: as many converters write them
        writer.tensors[0] = dict(sorted(writer.tensors[0].items()))
        write(writer, *args)  # type: ignore[arg-type]

    arch, weight_type = kind.rsplit("-", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "write_header_to_file", write_sorted)
        make(arch, path, weight_type=weight_type)


@pytest.mark.parametrize("kind", ["llama-Q4_1", "qwen2-Q5_0", "qwen2-Q4_0", "gpt-oss-Q8_0"])
def test_what_a_file_scatters_is_gathered(
    kind: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys of a Q4_0 model are repacked: they lie together, and now their biases do."""
    path = tmp_path / "model.gguf"
    scattered(path, kind)
    qkv = [f"blk.1.attn_{part}.weight" for part in "qkv"]
    with opened(path, device) as weights:
        (found,) = weights.joints(qkv)
        plan = weights.plan
        assert found.names == tuple(qkv) and (found.bias is not None) == (kind[:5] != "llama")
    together = run(path, device, "f16")
    monkeypatch.setattr(ResidentWeights, "_gather", lambda self: None)
    with opened(path, device) as weights:
        assert len(weights.joints(qkv)) > 1 or weights.joints(qkv)[0].bias is None
        sizes = weights.plan
    assert plan.copied_bytes > sizes.copied_bytes
    assert plan.mapped_bytes + plan.copied_bytes - sizes.mapped_bytes - sizes.copied_bytes < 4096
    for a, b in zip(together, run(path, device, "f16"), strict=True):
        assert np.isfinite(a).all() and np.array_equal(a, b)


def test_long_products_stay_where_they_are(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    scattered(path, "llama-Q4_1")
    monkeypatch.setattr(weights_module, "_GATHERED_BYTES", 1000)
    with opened(path, device) as weights:
        assert weights.plan.copied_bytes == 0
