"""The GGUF reader against the `gguf` package, on synthetic files and every value type."""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.runtime.errors import ClosedError, ModelFileError
from edgeroute.runtime.gguf import GGMLType, GGUFFile
from edgeroute.runtime.gguf_strings import join_strings, split_strings
from edgeroute.runtime.vocab_check import check_vocab
from edgeroute.tools import synth


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A synthetic model of every architecture; some quantised."""
    folder = tmp_path_factory.mktemp("models")
    weight_types = {"llama": "Q4_K", "qwen2": "Q8_0", "qwen3": "F16", "gemma3": "Q4_0"}
    paths = {}
    for arch in synth.ARCHITECTURES:
        paths[arch] = folder / f"{arch}.gguf"
        synth.make(arch, paths[arch], weight_type=weight_types.get(arch, "F32"))
    return paths


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Callable[[gguf.GGUFWriter], None]], GGUFFile]:
    """A file with one tensor and whatever metadata the test adds."""

    def write(add: Callable[[gguf.GGUFWriter], None]) -> GGUFFile:
        path = tmp_path / "written.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        add(writer)
        writer.add_tensor("t", np.arange(8, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return GGUFFile.open(path)

    return write


@pytest.mark.parametrize("arch", synth.ARCHITECTURES)
def test_tensors_agree_with_the_gguf_package(arch: str, models: dict[str, Path]) -> None:
    oracle = gguf.GGUFReader(models[arch])
    with GGUFFile.open(models[arch]) as file:
        assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
        assert file.data_offset == oracle.data_offset
        assert file.alignment == oracle.alignment
        assert file.size_bytes == models[arch].stat().st_size
        for tensor in oracle.tensors:
            info = file.tensors[tensor.name]
            assert info.type == tensor.tensor_type
            assert info.ne == tuple(int(extent) for extent in tensor.shape)
            assert info.offset == tensor.data_offset
            assert info.nbytes == tensor.n_bytes
            assert bytes(file.view(info)) == tensor.data.tobytes()


@pytest.mark.parametrize("arch", synth.ARCHITECTURES)
def test_metadata_agrees_with_the_gguf_package(arch: str, models: dict[str, Path]) -> None:
    oracle = gguf.GGUFReader(models[arch])
    expected = {key: field for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    with GGUFFile.open(models[arch]) as file:
        assert list(file.metadata.keys()) == list(expected)
        for key, field in expected.items():
            assert _read(file, key, field.types) == field.contents(), key


def _read(file: GGUFFile, key: str, types: list[gguf.GGUFValueType]) -> object:
    metadata, kinds = file.metadata, gguf.GGUFValueType
    if types[0] is kinds.ARRAY:
        assert metadata.array_len(key) >= 0
        if types[-1] is kinds.STRING:
            return metadata.get_array(key, str)
        item = {kinds.FLOAT32: float, kinds.BOOL: bool}.get(types[-1], int)
        return metadata.get_array(key, item).tolist()
    if types[0] is kinds.STRING:
        return metadata.get_str(key)
    if types[0] is kinds.BOOL:
        return metadata.get_bool(key)
    if types[0] in (kinds.FLOAT32, kinds.FLOAT64):
        return metadata.get_float(key)
    return metadata.get_int(key)


SCALARS = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 2**16 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "uint32": (0, 2**32 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "uint64": (0, 2**64 - 1),
    "int64": (-(2**63), 2**63 - 1),
}


@pytest.mark.parametrize("kind", SCALARS)
def test_integers_round_trip(kind: str, written: Callable[..., GGUFFile]) -> None:
    low, high = SCALARS[kind]

    def add(writer: gguf.GGUFWriter) -> None:
        getattr(writer, f"add_{kind}")("low", low)
        getattr(writer, f"add_{kind}")("high", high)

    with written(add) as file:
        assert file.metadata.get_int("low") == low
        assert file.metadata.get_int("high") == high
        assert file.metadata.type_name("low") == kind.upper()
        if kind == "uint32":
            assert file.metadata.get_u32("high") == high
        else:
            with pytest.raises(ModelFileError, match=rf"'high' is {kind.upper()}, but UINT32"):
                file.metadata.get_u32("high")


def test_other_scalars_round_trip(written: Callable[..., GGUFFile]) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("f32", 0.5)
        writer.add_float64("f64", 1e300)
        writer.add_bool("yes", True)
        writer.add_bool("no", False)
        writer.add_string("text", "naïve ▁ \n")
        writer.add_float32("nan", float("nan"))

    with written(add) as file:
        metadata = file.metadata
        assert metadata.get_float("f32") == 0.5
        assert metadata.get_float("f64") == 1e300
        assert metadata.get_bool("yes") is True and metadata.get_bool("no") is False
        assert metadata.get_str("text") == "naïve ▁ \n"
        with pytest.raises(ModelFileError, match="finite"):
            metadata.get_float("nan")


@pytest.mark.parametrize("kind", [*SCALARS, "float32", "float64", "bool_"])
def test_numeric_arrays_round_trip_in_their_width(
    kind: str, written: Callable[..., GGUFFile]
) -> None:
    values = [0, 1, 1] if kind == "bool_" else [*SCALARS.get(kind, (-1, 2)), 3]
    item = {"float32": float, "float64": float, "bool_": bool}.get(kind, int)
    sub_type = gguf.GGUFValueType[kind.upper().rstrip("_")]

    def add(writer: gguf.GGUFWriter) -> None:
        python_values = [item(value) for value in values]
        writer.add_key_value("a", python_values, gguf.GGUFValueType.ARRAY, sub_type=sub_type)

    with written(add) as file:
        decoded = file.metadata.get_array("a", item)
        assert decoded.dtype == np.dtype(kind)
        assert decoded.tolist() == values
        assert file.metadata.array_len("a") == 3
        with pytest.raises(ModelFileError, match="but ARRAY of STRING is wanted"):
            file.metadata.get_array("a", str)


def test_getters_name_key_found_and_wanted(written: Callable[..., GGUFFile]) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_string("s", "x")
        writer.add_uint32("n", 7)
        writer.add_array("a", [1, 2])

    with written(add) as file:
        metadata = file.metadata
        for getter, message in (
            (lambda: metadata.get_u32("s"), "'s' is STRING, but UINT32 is wanted"),
            (lambda: metadata.get_str("n"), "'n' is UINT32, but STRING is wanted"),
            (lambda: metadata.get_bool("n"), "'n' is UINT32, but BOOL is wanted"),
            (lambda: metadata.get_float("n"), "'n' is UINT32, but FLOAT32 is wanted"),
            (lambda: metadata.get_array("n", int), "'n' is UINT32, but ARRAY is wanted"),
            (lambda: metadata.get_int("a"), "'a' is ARRAY of INT32, but an integer is wanted"),
            (lambda: metadata.get_u32("n", low=8), "'n' is 7; it must be between 8 and"),
            (lambda: metadata.get_u32("n", high=6), "'n' is 7; it must be between 0 and 6"),
            (lambda: metadata.get_u32("none"), "the key 'none' is missing"),
        ):
            with pytest.raises(ModelFileError) as caught:
                getter()
            assert f"written.gguf: {message}" in str(caught.value)
        assert metadata.get_u32("none", None) is None
        assert metadata.get_str("none", "x") == "x"
        assert "n" in metadata and "none" not in metadata


def test_int_or_array_takes_both(written: Callable[..., GGUFFile]) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("one", 4)
        writer.add_array("each", [4, 2, 1])
        writer.add_array("negative", [4, -2, 1])

    with written(add) as file:
        assert file.metadata.get_int_or_array("one", 3) == (4, 4, 4)
        assert file.metadata.get_int_or_array("each", 3) == (4, 2, 1)
        assert file.metadata.get_int_or_array("none", 2, 5) == (5, 5)
        with pytest.raises(ModelFileError, match="'each' has 3 elements; 4 are needed"):
            file.metadata.get_int_or_array("each", 4)
        with pytest.raises(ModelFileError, match="'negative' is -2"):
            file.metadata.get_int_or_array("negative", 3)


def test_a_bool_array_element_of_2_is_refused(tmp_path: Path) -> None:
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 7, 2) + b"\1\2"
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    with GGUFFile.open(path) as file, pytest.raises(ModelFileError, match="neither 0 nor 1"):
        file.metadata.get_array("a", bool)


def test_address_points_at_the_bytes_of_the_view(models: dict[str, Path]) -> None:
    with GGUFFile.open(models["llama"]) as file:
        for info in file.tensors.values():
            view = np.frombuffer(file.view(info), dtype=np.uint8)
            assert file.address(info) == view.ctypes.data
            assert view.nbytes == info.nbytes
            assert not view.flags.writeable
        del view


def test_release_is_rounded_inward_and_data_stays_readable(models: dict[str, Path]) -> None:
    import mmap

    page = mmap.PAGESIZE
    with GGUFFile.open(models["llama"]) as file:
        info = file.tensors["token_embd.weight"]
        before = bytes(file.view(info))
        assert file.release(page + 1, page) == 0
        assert file.release(page + 1, 2 * page) in (0, page)
        assert file.release(2 * page, 3 * page) in (0, 3 * page)
        assert file.release(0, 2**62) <= file.size_bytes
        assert file.release(-5, 1) == 0
        assert bytes(file.view(info)) == before


def test_release_gives_resident_memory_back(models: dict[str, Path]) -> None:
    status = Path("/proc/self/smaps")
    if not status.exists():
        pytest.skip("only Linux tells what part of a mapping is resident")

    def resident_kib() -> int:
        lines = status.read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(models["gemma3-linear"].name))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    with GGUFFile.open(models["gemma3-linear"]) as file:
        np.frombuffer(file.view(next(iter(file.tensors.values()))), dtype=np.uint8).sum()
        before = resident_kib()
        released = file.release(0, file.size_bytes)
        assert released > 0 and resident_kib() < before


def test_closed_file_refuses_and_views_survive(models: dict[str, Path]) -> None:
    file = GGUFFile.open(models["llama"])
    info = file.tensors["output_norm.weight"]
    view = file.view(info)
    expected = bytes(view)
    file.close()
    file.close()
    assert bytes(view) == expected
    for use in (
        lambda: file.view(info),
        lambda: file.address(info),
        lambda: file.release(0, 1),
        lambda: file.metadata.get_str("general.architecture"),
        lambda: file.metadata.get_array("tokenizer.ggml.tokens", str),
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_close_unmaps(tmp_path: Path, models: dict[str, Path]) -> None:
    path = tmp_path / "mapped.gguf"
    path.write_bytes(models["llama"].read_bytes())
    maps = Path("/proc/self/maps")
    file = GGUFFile.open(path)
    view = file.view(file.tensors["output_norm.weight"])
    file.metadata.get_array("tokenizer.ggml.tokens", str)
    file.close()
    del view
    if maps.exists():
        assert str(path) not in maps.read_text()
    os.remove(path)


def test_block_sizes_agree_with_the_gguf_package() -> None:
    sizes = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    # The package counts Q8_1's two half-precision sums as singles; no file stores that type.
    del sizes[GGMLType.Q8_1]
    for kind in GGMLType:
        if kind.value in sizes:
            assert (kind.block_size, kind.type_size) == sizes[kind.value], kind
    assert set(sizes) <= {kind.value for kind in GGMLType}
    assert GGMLType.Q4_K.row_size(512) == 288
    assert GGMLType.Q4_K.nbytes((512, 3, 2)) == 288 * 6
    assert GGMLType.F32.is_quantized is False


@pytest.mark.parametrize("arch", synth.ARCHITECTURES)
def test_synthetic_vocabularies_pass_the_check(arch: str, models: dict[str, Path]) -> None:
    with GGUFFile.open(models[arch]) as file:
        check_vocab(file)


texts = st.binary(max_size=20) | st.integers(250, 300).map(lambda n: b"x" * n)


@settings(max_examples=300, deadline=None)
@given(st.lists(texts, max_size=40))
def test_strings_are_split_as_a_walk_would(values: list[bytes]) -> None:
    """Zero bytes and lengths around 256 look like other lengths; none may be believed."""
    raw = b"".join(struct.pack("<Q", len(value)) + value for value in values)
    assert split_strings(raw, len(values)) == values
    joined = join_strings(raw, len(values))
    assert (joined is None) == any(b"\0" in value for value in values)


@pytest.mark.parametrize("value", [b"", b"\0" * 9, b"\1\0\0\0\0\0\0\0"])
def test_many_misleading_strings_are_split_by_the_walk(value: bytes) -> None:
    raw = (struct.pack("<Q", len(value)) + value) * 5000
    assert split_strings(raw, 5000) == [value] * 5000


def test_open_does_not_decode_arrays(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large vocabulary would slow every open; only a wish to read it may decode it."""
    from edgeroute.runtime import gguf_metadata

    def refuse(*_: object) -> Iterator[object]:
        raise AssertionError("decoded at open")

    for name in ("split_strings", "join_strings"):
        monkeypatch.setattr(gguf_metadata, name, refuse)
    monkeypatch.setattr(gguf_metadata.Metadata, "get_array", refuse)
    with GGUFFile.open(models["gemma3"]) as file:
        assert file.metadata.array_len("tokenizer.ggml.tokens") == 384
