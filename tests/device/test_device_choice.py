"""Devices against the processor: what is proved, kept and warned of, and what `auto` takes."""

import ctypes
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edgeroute
from edgeroute import device_choice, device_proofs, device_trial
from edgeroute.cli import cli
from edgeroute.config import RunParams
from edgeroute.device_choice import choose, prove, warning_of
from edgeroute.device_proofs import DeviceProof, load_proof, save_proof, subject
from edgeroute.device_trial import Outcome, compare
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, DeviceLostError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.ggml.structs import TensorStruct
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.bench.rpc_servers import RpcServer
from edgeroute.tools.synth import make
from tests.device import fake_backend as fakes

PARAMS = RunParams(threads=1)
AUTO = RunParams(threads=1, device="auto")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs of other tests must not count here, nor seconds be spent on exact speeds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(device_trial, "TIMED_S", 0.0)


@pytest.fixture
def file(tiny_path: Path) -> Iterator[GGUFFile]:
    with GGUFFile.open(tiny_path) as opened:
        yield opened


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device counts as quicker than the processor."""
    monkeypatch.setattr(device_choice, "MIN_GAIN", 0.0)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


# proofs


def test_an_rpc_device_is_proved_and_remembered(rpc: RpcServer, file: GGUFFile) -> None:
    with Device.open(rpc.name) as device:
        unknown = warning_of(device, file)
    address = rpc.name.removeprefix("rpc:")
    assert unknown is not None and unknown.startswith("nothing proves yet that rpc:127.0.0.1:")
    assert unknown.endswith(f"edgeroute doctor --prove {file.path} --rpc {address}")
    proof = prove(rpc.name, file, PARAMS)
    assert proof.holds and proof.n_changed == 0 and proof.nmse < 1e-6 and not proof.note
    assert proof.n_layers == 3 and proof.n_tokens > 700
    assert min(proof.prefill_s, proof.decode_s, proof.cpu_prefill_s, proof.cpu_decode_s) > 0
    with Device.open(rpc.name) as device:
        assert warning_of(device, file) is None
        q8 = warning_of(device, file, "q8_0")
    assert q8 is not None and q8.endswith(" --kv-type q8_0")
    with Device.open("cpu") as device:
        assert warning_of(device, file) is None


def test_the_doctor_proves(rpc: RpcServer, file: GGUFFile) -> None:
    address = rpc.name.removeprefix("rpc:")
    found = run("doctor", "--prove", str(file.path), "--rpc", address, "--json")
    (proof,) = json.loads(found.stdout)["proofs"]
    assert found.exit_code == 0 and proof["holds"] and proof["device"] == rpc.name
    with Device.open(rpc.name) as device:
        known = load_proof(subject(device.info, file))
    assert known is not None and known.nmse == proof["nmse"]
    lost = run("doctor", "--prove", str(file.path), "--rpc", "127.0.0.1:9")
    assert lost.exit_code == 3 and "does not answer" in lost.stdout


def test_without_a_gpu_there_is_nothing_to_prove(file: GGUFFile) -> None:
    found = run("doctor", "--prove", str(file.path))
    assert found.exit_code == 0 and "name devices of other machines by --rpc" in found.stdout
    assert run("doctor", "--prove", str(file.path), "--rpc", "nowhere").exit_code == 2


@pytest.mark.parametrize("arch", ["gemma3", "gpt-oss", "deepseek2"])
def test_every_kind_of_model_is_proved(arch: str, tmp_path: Path) -> None:
    """Sliding windows, experts, sinks and latent attention."""
    make(arch, tmp_path / "m.gguf")
    with fakes.fake_device(), GGUFFile.open(tmp_path / "m.gguf") as file:
        proof = prove("fake0", file, PARAMS)
    assert proof.holds and proof.nmse < 1e-6


def test_only_the_first_layers_of_a_large_model_are_compared(
    file: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_trial, "LAYER_BYTES", 0)
    with fakes.fake_device() as device:
        assert prove("fake0", file, PARAMS).n_layers == 2
        assert device.n_live == 0 and device.n_instances == 0 and not device.misuse


# auto


def test_auto_takes_what_is_proved_and_quicker(
    file: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_choice, "MIN_GAIN", 0.0)
    with fakes.fake_device() as device:
        assert choose(AUTO, file) == ("fake0",)
        n = device.n_computed
        assert choose(AUTO, file) == ("fake0",) and device.n_computed == n > 0
        monkeypatch.setattr(device_choice, "MIN_GAIN", 1e9)
        assert choose(AUTO, file) == ("cpu",)


def test_auto_takes_as_many_as_the_model_needs(file: GGUFFile, quick: None) -> None:
    small = fakes.Fake(memory_bytes=max(24 << 20, file.size_bytes // 2))
    with fakes.fake_devices(fakes.Fake(), fakes.Fake()):
        assert len(choose(AUTO, file)) == 1
    with fakes.fake_devices(small, small), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFFile, "size_bytes", property(lambda _: 40 << 20), raising=False)
        assert sorted(choose(AUTO, file)) == ["fake0", "fake1"]


def test_auto_never_takes_what_is_elsewhere(rpc: RpcServer, file: GGUFFile, quick: None) -> None:
    with Device.open(rpc.name):
        assert choose(AUTO, file) == ("cpu",)


def test_a_device_that_cannot_be_tried_is_left_alone(file: GGUFFile, quick: None) -> None:
    with fakes.fake_device(fakes.Fake(memory_bytes=1 << 20)):
        with pytest.raises(CapacityError):
            prove("fake0", file, PARAMS)
        assert choose(AUTO, file) == ("cpu",)
    with pytest.raises(DeviceLostError):
        prove("rpc:127.0.0.1:9", file, PARAMS)


def test_a_device_without_the_operations_does_not_hold(file: GGUFFile, quick: None) -> None:
    with fakes.fake_device(fakes.Fake(refuses=frozenset({"FLASH_ATTN_EXT"}))):
        proof = prove("fake0", file, PARAMS)
        assert not proof.holds and "FLASH_ATTN_EXT" in proof.note and proof.gain == 0.0
        assert choose(AUTO, file) == ("cpu",)


# devices that lie


def _last(graph: int) -> TensorStruct:
    g = ggml()
    return TensorStruct.from_address(g.ggml_graph_node(graph, g.ggml_graph_n_nodes(graph) - 1))


def _rows(graph: int) -> Any:
    """What a graph ends with, a row per token."""
    last = _last(graph)
    n, width = last.ne[1], last.ne[0]
    values = (ctypes.c_float * (n * width)).from_address(last.data)
    return np.ctypeslib.as_array(values).reshape(n, width)


def _sees(graph: int) -> tuple[int, int]:
    """Attention operations of a graph per layer of the tiny model, and the cells of the widest."""
    g, n, widest = ggml(), 0, 0
    for i in range(g.ggml_graph_n_nodes(graph)):
        node = g.ggml_graph_node(graph, i)
        if g.ggml_op_desc(node) == b"FLASH_ATTN_EXT":
            n += 1
            keys = TensorStruct.from_address(TensorStruct.from_address(node).src[1])
            widest = max(widest, keys.ne[1])
    return n // 3, widest


def _swaps_tokens(graph: int) -> None:
    """One token of passes with several sequences gets another's values."""
    if _sees(graph)[0] > 1 and len(rows := _rows(graph)) > 1:
        rows[-1] = rows[0]


def _forgets_far_cells(graph: int) -> None:
    if _sees(graph)[1] > 512:
        _rows(graph)[:, ::3] *= 0.5


def _gives_nothing(graph: int) -> None:
    _rows(graph)[0, 0] = np.nan


def _is_a_little_off(graph: int) -> None:
    rows = _rows(graph)
    rows += 0.1 * np.random.default_rng(1).standard_normal(rows.shape, np.float32) * rows.std()


@pytest.mark.parametrize(
    "lie", [_swaps_tokens, _forgets_far_cells, _gives_nothing, _is_a_little_off]
)
def test_a_device_that_lies_is_found_out(
    lie: Callable[[int], None], file: GGUFFile, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fakes.FakeDevice._compute

    def compute(self: Any, graph: int) -> None:
        honest(self, graph)
        lie(graph)

    monkeypatch.setattr(fakes.FakeDevice, "_compute", compute)
    with fakes.fake_device():
        proof = prove("fake0", file, PARAMS)
        assert not proof.holds and proof.note.startswith("fake0 does not answer like")
        assert choose(AUTO, file) == ("cpu",)
        with Device.open("fake0") as device:
            warning = warning_of(device, file)
        assert warning is not None and warning.startswith("DO NOT TRUST answers computed on fake0")
        assert "--device cpu" in warning and warning.endswith(f"doctor --prove {file.path}")


def test_the_doctor_ends_with_3_where_a_device_lies(
    file: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fakes.FakeDevice._compute
    monkeypatch.setattr(
        fakes.FakeDevice,
        "_compute",
        lambda self, graph: (honest(self, graph), _gives_nothing(graph)),
    )
    with fakes.fake_device():
        found = run("doctor", "--prove", str(file.path))
    assert found.exit_code == 3 and "FAILED: fake0 does not answer like" in found.stdout


def test_an_error_of_the_allowed_size_holds() -> None:
    """Rounding differs between kernels: 0.02 of the power's root is 4e-4 of the power."""
    rng = np.random.default_rng(0)
    wanted = [Outcome(*(rng.standard_normal((6, 64), np.float32) for _ in range(2)))]
    near, far = (
        [Outcome(*(each + size * rng.standard_normal(each.shape, np.float32) for each in outcome))
         for outcome in wanted]
        for size in (np.float32(0.02), np.float32(0.1))
    )  # fmt: skip
    assert compare(wanted, wanted).nmse == 0.0 and compare(wanted, near).holds
    assert not compare(wanted, far).holds


def test_a_clear_token_may_not_change() -> None:
    wanted = Outcome(np.ones((1, 4), np.float32), np.zeros((1, 1000), np.float32))
    wanted.logits[0] = np.random.default_rng(0).standard_normal(1000)
    wanted.logits[0, :2] = 9.0, 5.0
    found = Outcome(wanted.states, wanted.logits.copy())
    found.logits[0, 1] = 9.1
    assert compare([wanted], [found]).n_changed == 1
    wanted.logits[0, 1] = 8.99
    assert compare([wanted], [found]).n_changed == 0  # it was a near tie


# the cache


def _proof(**fields: Any) -> DeviceProof:
    values: dict[str, Any] = {
        "holds": True, "nmse": 1e-5, "worst_nmse": 1e-4, "n_changed": 0, "n_tokens": 700,
        "n_layers": 3, "prefill_s": 1e-4, "decode_s": 1e-3, "cpu_prefill_s": 2e-4,
        "cpu_decode_s": 2e-3, "when": int(time.time()) - 5,
    }  # fmt: skip
    return DeviceProof(**values | fields)


def test_a_proof_ages_and_is_void_elsewhere(file: GGUFFile) -> None:
    with Device.open("cpu") as device:
        about = subject(device.info, file)
        other = subject(device.info, file, "q8_0")
    save_proof(about, _proof())
    assert load_proof(about) == _proof(when=load_proof(about).when)  # type: ignore[union-attr]
    assert load_proof(other) is None
    save_proof(about, _proof(when=int(time.time()) - device_proofs.VALID_S - 1))
    assert load_proof(about) is None
    save_proof(about, _proof(when=int(time.time()) + 999))
    assert load_proof(about) is None
    assert _proof().gain == pytest.approx(2.0)


@pytest.mark.parametrize(
    "change",
    [
        {"holds": 1}, {"nmse": -1.0}, {"nmse": True}, {"decode_s": "0"}, {"n_tokens": 1.5},
        {"when": -1}, {"note": 7}, {"note": "x" * 9999}, {"note": "\u001b[2J"}, {"more": 1},
    ],
)  # fmt: skip
def test_proofs_that_cannot_be_believed_are_left_out(
    change: dict[str, Any], file: GGUFFile
) -> None:
    with Device.open("cpu") as device:
        about = subject(device.info, file)
    save_proof(about, _proof())
    assert load_proof(about) is not None
    path = device_proofs._path(about)
    found = json.loads(path.read_text())
    found["entries"][0]["proof"] |= change
    path.write_text(json.dumps(found))
    assert load_proof(about) is None


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "[" * 5000, "{}", '{"version": 1}', '{"version": 1, "entries": 7}',
             '{"version": 1, "entries": [7, {}, {"subject": 1, "proof": 2}]}', "NaN",
             " " * (1 << 18)]
)  # fmt: skip
def test_files_that_cannot_be_believed_are_left_out(text: str, file: GGUFFile) -> None:
    with Device.open("cpu") as device:
        about = subject(device.info, file)
    path = device_proofs._path(about)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert load_proof(about) is None
    save_proof(about, _proof())
    assert load_proof(about) is not None


def test_a_runtime_by_auto_answers_as_the_processor(tiny_path: Path, quick: None) -> None:
    answers = []
    with fakes.fake_device():
        for device in ("cpu", "auto"):
            with edgeroute.Runtime(tiny_path, device=device, n_ctx=256, threads=1) as runtime:
                answers.append(runtime.generate(prompt_ids=list(range(4, 40)), max_tokens=6))
                stats: Any = runtime.stats()
    assert answers[0].token_ids == answers[1].token_ids
    assert stats["devices"]["fake0"]["layers"] == [0, 1, 2] and stats["warnings"] == []


def test_a_runtime_tells_of_a_device_that_nothing_is_proved_of(tiny_path: Path) -> None:
    with (
        fakes.fake_device(),
        edgeroute.Runtime(tiny_path, device="fake0", n_ctx=256, threads=1) as runtime,
    ):
        warnings: Any = runtime.stats()["warnings"]
    assert len(warnings) == 1 and warnings[0].startswith("nothing proves yet that fake0 answers")
