"""Adapters read from disk: the same numbers from every format, in the base model's order."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter

from edgeroute.models import adapter_names
from edgeroute.models.adapter_data import DataReader
from edgeroute.models.adapter_file import (
    AdapterFile,
    BaseShapes,
    base_shapes,
    find_adapters,
    open_adapter,
)
from edgeroute.models.adapter_records import interleave
from edgeroute.models.registry import describe
from edgeroute.runtime.errors import AdapterFileError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.synth import ARCHITECTURES, make
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf, make_peft, safetensors_bytes

Numbers = dict[str, tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]]

BASE = BaseShapes(
    arch="llama",
    n_head=4,
    n_head_kv=2,
    n_layer=2,
    n_expert=0,
    linears={
        f"blk.{il}.{leaf}": ne
        for il in range(2)
        for leaf, ne in {
            "attn_q": (48, 64),
            "attn_k": (48, 32),
            "attn_v": (48, 32),
            "attn_output": (64, 48),
            "ffn_gate": (48, 80),
            "ffn_up": (48, 80),
            "ffn_down": (80, 48),
        }.items()
    },
)


def numbers(adapter: AdapterFile) -> Numbers:
    """Read everything, and check what every adapter promises."""
    found = {}
    for tensor, a, b in adapter.read():
        assert a.dtype == b.dtype == np.float16
        assert a.flags.c_contiguous and b.flags.c_contiguous
        assert a.shape == (tensor.rank, tensor.n_in) and b.shape == (tensor.n_out, tensor.rank)
        found[tensor.name] = (a, b)
    assert list(found) == [tensor.name for tensor in adapter.tensors] == sorted(found)
    return found


def same(left: Numbers, right: Numbers) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(x, y) for name in left for x, y in zip(left[name], right[name], strict=True)
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Two-layer models by architecture, each made once."""
    folder = tmp_path_factory.mktemp("bases")

    def path_of(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        if not path.exists():
            make(arch, path, n_layer=2)
        return path

    return path_of


def shapes_of(path: Path) -> BaseShapes:
    with GGUFFile.open(path) as file:
        return base_shapes(describe(file))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_base_shapes_are_the_matrices_of_the_layers(
    arch: str, bases: Callable[[str], Path]
) -> None:
    """Nothing that a layer multiplies with is left out, nothing else is in."""
    base = shapes_of(bases(arch))
    with GGUFFile.open(bases(arch)) as file:
        matrices = {
            name.removesuffix(".weight"): info.ne
            for name, info in file.tensors.items()
            if len(info.ne) == 2 and name.startswith("blk.") and name.endswith(".weight")
        }
    assert base.linears == matrices
    assert base.arch == arch.split("-")[0] or arch.startswith("gpt-oss")
    assert "output" not in base.linears and "token_embd" not in base.linears


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        *((arch, "F32") for arch in ARCHITECTURES if arch in adapter_names.LEAVES),
        ("llama", "F16"),
        ("llama", "BF16"),
    ],
)
def test_peft_and_gguf_give_the_same_numbers(
    arch: str, kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shapes_of(bases(arch))
    spec = AdapterSpec(rank=4, alpha=6.0, kind=kind)
    make_peft(tmp_path / "peft", base, spec)
    make_gguf(tmp_path / "gguf.gguf", base, spec)
    peft, gguf = open_adapter(tmp_path / "peft", base), open_adapter(tmp_path / "gguf.gguf", base)
    assert peft.format == "peft" and gguf.format == "gguf"
    assert peft.tensors == gguf.tensors and peft.n_bytes == gguf.n_bytes > 0
    assert {tensor.scale for tensor in peft.tensors} == {1.5}
    assert same(numbers(peft), numbers(gguf))


def test_every_type_of_number_is_the_same_adapter(tmp_path: Path) -> None:
    found = []
    for kind in ("F32", "F16", "BF16"):
        make_peft(tmp_path / kind, BASE, AdapterSpec(kind=kind))
        found.append(numbers(open_adapter(tmp_path / kind, BASE)))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_f32_rounds_to_the_nearest_f16(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    a = (rng.standard_normal((2, 48)) * 10.0 ** rng.integers(-9, 4, (2, 48))).astype(np.float32)
    b = rng.standard_normal((32, 2)).astype(np.float32)
    write_one(tmp_path / "a", "self_attn.v_proj", a, b)
    ((_, read_a, read_b),) = open_adapter(tmp_path / "a", BASE).read()
    assert np.array_equal(read_a, a.astype(np.float16))
    assert np.array_equal(read_b, b.astype(np.float16))  # v is not rotated: rows stay


def write_one(
    folder: Path, module: str, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]
) -> None:
    """Write a PEFT folder that adapts one module of layer 0."""
    folder.mkdir()
    prefix = f"base_model.model.model.layers.0.{module}"
    data = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(data, "F32", {}))
    config = {"peft_type": "LORA", "r": a.shape[0], "lora_alpha": a.shape[0]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def rotate(x: npt.NDArray[np.float64], pos: int, *, halves: bool) -> npt.NDArray[np.float64]:
    """Rotate heads (n_head, n): element i with i + n/2, or with i + 1."""
    n = x.shape[1]
    angle = pos * 10000.0 ** (-np.arange(0, n, 2) / n)
    first = slice(0, n // 2) if halves else slice(0, n, 2)
    second = slice(n // 2, n) if halves else slice(1, n, 2)
    out = np.empty_like(x)
    out[:, first] = x[:, first] * np.cos(angle) - x[:, second] * np.sin(angle)
    out[:, second] = x[:, first] * np.sin(angle) + x[:, second] * np.cos(angle)
    return out


def test_rows_of_q_and_k_follow_the_rotation_of_llama_files(tmp_path: Path) -> None:
    """Attention scores of the adapter's part are Hugging Face's, computed ggml's way."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(48)
    results = {}
    for module, leaf, n_head, n_out in (("q_proj", "q", 4, 64), ("k_proj", "k", 2, 32)):
        a, b = rng.standard_normal((2, 48)), rng.standard_normal((n_out, 2))
        folder = tmp_path / leaf
        write_one(folder, f"self_attn.{module}", a.astype(np.float32), b.astype(np.float32))
        ((tensor, a16, b16),) = open_adapter(folder, BASE).read()
        assert tensor.name == f"blk.0.attn_{leaf}"
        ours = (b16.astype(np.float64) @ (a16.astype(np.float64) @ x)).reshape(n_head, 16)
        exact = b.astype(np.float16).astype(np.float64) @ (a16.astype(np.float64) @ x)
        theirs = exact.reshape(n_head, 16)
        assert not np.allclose(ours, theirs)
        results[leaf] = (rotate(ours, 7, halves=False), rotate(theirs, 7, halves=True))
    for group in range(2):
        ours_score = results["q"][0][group * 2] @ results["k"][0][group]
        assert ours_score == pytest.approx(results["q"][1][group * 2] @ results["k"][1][group])


def test_only_files_of_ggml_s_normal_rotation_are_reordered() -> None:
    for arch in adapter_names.LEAVES:
        base = replace(BASE, arch=arch)
        heads = [
            adapter_names.heads_to_interleave(f"blk.0.{leaf}", base)
            for leaf in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "attn_q_a")
        ]
        assert heads == ([4, 2, 0, 0, 0, 0] if arch in ("llama", "deepseek") else [0] * 6)


def test_interleaving_moves_whole_rows() -> None:
    b = np.arange(16, dtype=np.float16).reshape(8, 2)
    moved = interleave(b, 2)
    assert [int(row[0]) // 2 for row in moved] == [0, 2, 1, 3, 4, 6, 5, 7]
    assert moved.flags.c_contiguous


@pytest.mark.parametrize(
    ("rslora", "scales"), [(False, {8: 2.0, 2: 8.0}), (True, {8: 16 / 8**0.5, 2: 16 / 2**0.5})]
)
def test_scale_is_alpha_over_rank_or_its_root(
    rslora: bool, scales: dict[int, float], tmp_path: Path
) -> None:
    spec = AdapterSpec(use_rslora=rslora, ranks={"k_proj": 2, "layers.1.mlp.up_proj": 2})
    make_peft(tmp_path / "a", BASE, spec)
    adapter = open_adapter(tmp_path / "a", BASE)
    numbers(adapter)
    small = {tensor.name for tensor in adapter.tensors if tensor.rank == 2}
    assert small == {"blk.0.attn_k", "blk.1.attn_k", "blk.1.ffn_up"}
    for tensor in adapter.tensors:
        assert tensor.scale == pytest.approx(scales[tensor.rank], rel=1e-12)


def test_alpha_may_differ_by_module(tmp_path: Path) -> None:
    spec = AdapterSpec(alphas={"layers.1.self_attn.q_proj": 4.0, "q_proj": 32.0})
    make_peft(tmp_path / "a", BASE, spec)
    scales = {tensor.name: tensor.scale for tensor in open_adapter(tmp_path / "a", BASE).tensors}
    assert scales["blk.1.attn_q"] == 0.5 and scales["blk.0.attn_q"] == 4.0
    assert scales["blk.0.attn_v"] == 2.0


@pytest.mark.parametrize(
    ("key", "fits"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        (r"layers\.0\.self_attn\.q_proj", True),
        ("^model.layers.0.self_attn.q_proj$", True),
        ("^self_attn.q_proj", False),
        ("proj", False),
    ],
)
def test_patterns_fit_as_peft_reads_them(key: str, fits: bool, tmp_path: Path) -> None:
    make_peft(tmp_path / "a", BASE, AdapterSpec(targets=("attn_q",)))
    edit_config(tmp_path / "a", alpha_pattern={key: 80})
    scales = [tensor.scale for tensor in open_adapter(tmp_path / "a", BASE).tensors]
    assert scales[0] == (10.0 if fits else 2.0)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_gguf_without_alpha_is_not_scaled(tmp_path: Path) -> None:
    """llama.cpp takes an alpha of 0, or none, as a scale of 1."""
    for alpha in (None, 0.0):
        path = tmp_path / "a.gguf"
        write_gguf(path, alpha, np.ones((1, 48), np.float32), np.ones((32, 1), np.float32))
        assert [tensor.scale for tensor in open_adapter(path, BASE).tensors] == [1.0]


def write_gguf(
    path: Path, alpha: float | None, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]
) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_tensor("blk.0.attn_v.weight.lora_a", a)
    writer.add_tensor("blk.0.attn_v.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_rank_1_of_a_gguf_may_lack_an_extent(tmp_path: Path) -> None:
    """ggml's own writer drops trailing extents of 1."""
    write_gguf(tmp_path / "a.gguf", 2.0, np.ones(48, np.float32), np.ones((32, 1), np.float32))
    adapter = open_adapter(tmp_path / "a.gguf", BASE)
    assert adapter.tensors[0].rank == 1 and adapter.tensors[0].scale == 2.0
    numbers(adapter)


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("base_model.model.model.", ".weight"),
        ("base_model.model.model.", ".default.weight"),
        ("base_model.model.", ".weight"),
        ("model.", ".weight"),
        ("base_model.model.language_model.model.", ".weight"),
        ("base_model.model.model.language_model.", ".default.weight"),
    ],
)
def test_names_as_peft_s_versions_write_them(prefix: str, suffix: str, tmp_path: Path) -> None:
    a, b = np.ones((2, 48), np.float32), np.ones((32, 2), np.float32)
    write_one(tmp_path / "a", "self_attn.v_proj", a, b)
    stem = f"{prefix}layers.1.self_attn.v_proj"
    data = {f"{stem}.lora_A{suffix}": a, f"{stem}.lora_B{suffix}": b}
    (tmp_path / "a/adapter_model.safetensors").write_bytes(safetensors_bytes(data, "F16", {}))
    assert [t.name for t in open_adapter(tmp_path / "a", BASE).tensors] == ["blk.1.attn_v"]


def test_routers_and_shared_experts_are_adapted(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shapes_of(bases("qwen2moe"))
    spec = AdapterSpec(rank=2, targets=("ffn_gate_inp", "ffn_up_shexp", "attn_q"))
    make_peft(tmp_path / "a", base, spec)
    names = {tensor.name for tensor in open_adapter(tmp_path / "a", base).tensors}
    assert names >= {"blk.0.ffn_gate_inp", "blk.1.ffn_up_shexp"} and len(names) == 6


def test_a_safetensors_file_with_settings_beside_it(tmp_path: Path) -> None:
    make_peft(tmp_path / "robot", BASE, AdapterSpec())
    data, config = tmp_path / "robot/adapter_model.safetensors", tmp_path / "robot"
    by_folder = open_adapter(tmp_path / "robot", BASE)
    by_file = open_adapter(data, BASE)
    assert by_file == by_folder and by_file.name == "robot"
    shutil.copy(data, tmp_path / "dates.v2.safetensors")
    shutil.copy(config / "adapter_config.json", tmp_path / "dates.v2.json")
    bare = open_adapter(str(tmp_path / "dates.v2.safetensors"), BASE)
    assert bare.name == "dates.v2" and same(numbers(bare), numbers(by_folder))
    (tmp_path / "dates.v2.json").rename(tmp_path / "adapter_config.json")
    assert open_adapter(tmp_path / "dates.v2.safetensors", BASE).tensors == bare.tensors
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterFileError, match="no settings beside it"):
        open_adapter(tmp_path / "dates.v2.safetensors", BASE)


def test_a_link_to_a_regular_file_is_followed(tmp_path: Path) -> None:
    """The hub's cache keeps files elsewhere and links to them."""
    make_peft(tmp_path / "blobs", BASE, AdapterSpec())
    (tmp_path / "a").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        try:
            (tmp_path / "a" / name).symlink_to(tmp_path / "blobs" / name)
        except OSError:
            pytest.skip("no right to make links here")
    adapter = open_adapter(tmp_path / "a", BASE)
    assert adapter.name == "a" and len(numbers(adapter)) == len(BASE.linears)


def test_the_folder_here_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_peft(tmp_path / "robot", BASE, AdapterSpec())
    monkeypatch.chdir(tmp_path / "robot")
    assert open_adapter(".", BASE).name == "robot"
    assert open_adapter("adapter_model.safetensors", BASE).name == "robot"


def test_description_comes_from_where_there_is_one(tmp_path: Path) -> None:
    make_peft(tmp_path / "a", BASE, AdapterSpec())
    make_gguf(tmp_path / "g.gguf", BASE, AdapterSpec(description="dates  to\nISO"))
    assert open_adapter(tmp_path / "g.gguf", BASE).description == "dates to ISO"
    assert open_adapter(tmp_path / "a", BASE).description == ""
    readme = tmp_path / "a/README.md"
    readme.write_text("---\nlicense: mit\ndescription: 'robot commands'\n---\ndescription: no\n")
    assert open_adapter(tmp_path / "a", BASE).description == "robot commands"
    make_peft(tmp_path / "a", BASE, AdapterSpec(description="unit\tconversion"))
    assert open_adapter(tmp_path / "a", BASE).description == "unit conversion"
    edit_config(tmp_path / "a", description="\x1b[31m" + "x" * 10_000)
    assert open_adapter(tmp_path / "a", BASE).description == "[31m" + "x" * 496


def test_opening_reads_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_peft(tmp_path / "a", BASE, AdapterSpec())
    make_gguf(tmp_path / "g.gguf", BASE, AdapterSpec())

    def forbidden(*_: object) -> None:
        raise AssertionError("numbers were read")

    monkeypatch.setattr(DataReader, "read", forbidden)
    for path in ("a", "g.gguf"):
        adapter = open_adapter(tmp_path / path, BASE)
        with pytest.raises(AssertionError):
            next(adapter.read())


@pytest.mark.parametrize("path", ["a/adapter_model.safetensors", "g.gguf"])
def test_a_file_that_changed_is_not_read(path: str, tmp_path: Path) -> None:
    make_peft(tmp_path / "a", BASE, AdapterSpec())
    make_gguf(tmp_path / "g.gguf", BASE, AdapterSpec())
    file = tmp_path / path
    adapter = open_adapter(file, BASE)
    other = tmp_path / "other"
    shutil.copy2(file, other)
    os.replace(other, file)  # same bytes, same time, another file
    with pytest.raises(AdapterFileError, match="changed since it was opened"):
        next(adapter.read())
    adapter = open_adapter(file, BASE)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(AdapterFileError, match="changed since it was opened"):
        next(adapter.read())
    file.unlink()
    with pytest.raises(AdapterFileError, match="cannot open the adapter file"):
        next(adapter.read())


def test_a_file_rewritten_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    make_peft(tmp_path / "a", BASE, AdapterSpec())
    adapter = open_adapter(tmp_path / "a", BASE)
    reading = adapter.read()
    next(reading)
    os.utime(adapter.data_path, ns=(1, 1))
    with pytest.raises(AdapterFileError, match="changed while it was read"):
        list(reading)
    reading = open_adapter(tmp_path / "a", BASE).read()
    next(reading)
    os.truncate(adapter.data_path, adapter.data_path.stat().st_size // 2)
    with pytest.raises(AdapterFileError, match=r"too early; the file is truncated"):
        list(reading)


def test_reading_may_stop_early(tmp_path: Path) -> None:
    make_peft(tmp_path / "a", BASE, AdapterSpec())
    reading = open_adapter(tmp_path / "a", BASE).read()
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert not list(reading)


def test_find_adapters_lists_what_a_folder_holds(tmp_path: Path) -> None:
    for name in ("zeta", "alpha", ".hidden"):
        make_peft(tmp_path / name, BASE, AdapterSpec(targets=("attn_q",)))
    make_gguf(tmp_path / "mid.gguf", BASE, AdapterSpec(targets=("attn_q",)))
    (tmp_path / "bare.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    names = [path.name for path in find_adapters(tmp_path)]
    assert names == ["alpha", "bare.safetensors", "mid.gguf", "zeta"]
    assert find_adapters(str(tmp_path / "alpha")) == [tmp_path / "alpha"]
    several = find_adapters([tmp_path / "mid.gguf", tmp_path / "zeta"])
    assert [path.name for path in several] == ["mid.gguf", "zeta"]
    assert find_adapters([]) == []


def test_find_adapters_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match=r"holds no adapters: no PEFT folders"):
        find_adapters(tmp_path / "empty")
    with pytest.raises(AdapterFileError, match="cannot open the adapter"):
        find_adapters(tmp_path / "missing")
    make_peft(tmp_path / "robot", BASE, AdapterSpec(targets=("attn_q",)))
    make_gguf(tmp_path / "robot.gguf", BASE, AdapterSpec(targets=("attn_q",)))
    with pytest.raises(AdapterFileError, match="both named 'robot'; rename one"):
        find_adapters(tmp_path)


def test_safetensors_of_its_own_library_are_read(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    a, b = np.full((2, 48), 0.5, np.float32), np.full((32, 2), 0.25, np.float32)
    write_one(tmp_path / "a", "self_attn.v_proj", a, b)
    prefix = "base_model.model.model.layers.0.self_attn.v_proj"
    data = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    path = tmp_path / "a/adapter_model.safetensors"
    ours = path.read_bytes()
    library.save_file(data, path, metadata={"format": "pt"})
    assert numbers(open_adapter(tmp_path / "a", BASE))["blk.0.attn_v"][0][0, 0] == 0.5
    path.write_bytes(ours)
    assert np.array_equal(library.load_file(path)[f"{prefix}.lora_A.weight"], a)
    assert struct.unpack_from("<Q", ours)[0] % 8 == 0
