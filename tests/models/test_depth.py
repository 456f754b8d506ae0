"""Depth plans: all run is no plan, and cached decoding is full recomputation, for any mixture."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from edgeroute.models.depth_file import (
    ARCH,
    KEY_DATA,
    KEY_MODEL,
    KEY_PLANS,
    KEY_VERSION,
    DepthFile,
    fingerprint,
)
from edgeroute.models.forward import Forward, Piece, split_steps
from edgeroute.models.registry import describe
from edgeroute.models.standins import PARTS, TENSORS, tensor_name
from edgeroute.runtime.depth import ACTS, Step, Steps, all_run
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import ComputeError, DepthFileError, EdgerouteError, ModelFileError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache, KvShape
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools.synth import make

N_REPEAT, N_EMBD, N_LAYER = 2, 256, 5
PLAN = "p"
Logits = npt.NDArray[np.float32]


def write_depth(
    path: Path, model: Path, *, changes: dict[str, npt.NDArray[np.float32] | None] | None = None,
    header: dict[str, object] | None = None,
) -> Path:  # fmt: skip
    """Write a depth file with every stand-in of a plan, small enough to change little."""
    rng = np.random.default_rng(3)
    shapes = {"norm": (N_EMBD,), "bias": (N_EMBD,), "a": (32, N_EMBD), "b": (N_EMBD, 32),
              "gate": (64, N_EMBD), "up": (64, N_EMBD), "down": (N_EMBD, 64)}  # fmt: skip
    tensors = {
        tensor_name(PLAN, il, part, name): rng.normal(0, 0.05, shapes[name]).astype(np.float32)
        for il in range(N_LAYER) for part in PARTS for name in TENSORS
        if part != "layer" or il % 2  # some layers have one for both halves
    }  # fmt: skip
    for name, value in (changes or {}).items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    with GGUFFile.open(model) as file:
        meta: dict[str, object] = {KEY_MODEL: fingerprint(file), KEY_DATA: "0" * 64,
                                   KEY_PLANS: "[]", KEY_VERSION: 1}  # fmt: skip
    arch = str((header or {}).pop("arch", ARCH))
    writer = GGUFWriter(path, arch)
    for key, found in (meta | (header or {})).items():
        if isinstance(found, int):
            writer.add_uint32(key, found)
        else:
            writer.add_string(key, str(found))
    for name, rows in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def opened(path: Path, depth: Path | None = None) -> Iterator[Forward]:
    with ExitStack() as own:
        file = own.enter_context(GGUFFile.open(path))
        model = describe(file)
        device = own.enter_context(Device.open())
        device.set_threads(1)
        weights = ResidentWeights(file, device, model.specs())
        own.callback(weights.close)
        weights.load()
        hp = model.hparams
        kv = KvCache(device, KvShape(
            n_layer=hp.n_layer, n_embd_k_gqa=hp.n_embd_k_gqa, n_embd_v_gqa=hp.n_embd_v_gqa,
            n_embd_head=hp.n_embd_head_k, n_embd_head_v=hp.n_embd_head_v, v_in_k=hp.v_in_k,
            n_repeat=N_REPEAT,
        ), 512)  # fmt: skip
        own.callback(kv.close)
        forward = Forward(model, device, weights, kv)
        own.callback(forward.close)
        if depth is not None:
            found = own.enter_context(DepthFile(depth, file, hp))
            parts = {(il, part) for il in range(hp.n_layer) for part in ("attn", "ffn")}
            specs = found.specs(PLAN, parts)
            for part in sorted(parts):  # also those that a `layer` one would stand for
                specs += [s for s in found.specs(PLAN, {part}) if s not in specs]
            standins = ResidentWeights(found.file, device, specs)
            own.callback(standins.close)
            standins.load()
            forward.standins = standins
        yield forward


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3", "qwen3moe"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("depth") / f"{request.param}.gguf"
    make(request.param, where, n_layer=N_LAYER)
    return where


@pytest.fixture(scope="module")
def depth(path: Path) -> Path:
    return write_depth(path.with_suffix(".depth"), path)


def random_steps(rng: np.random.Generator) -> Steps:
    """Mix everything that a plan may say; repeats up to what the pool has rows for."""
    steps: list[Step] = []
    n_repeat = 0
    for il in range(N_LAYER):
        attn, ffn = (ACTS[i] for i in rng.choice(3, 2, p=[0.5, 0.2, 0.3]))
        steps.append(Step(il, attn, ffn))
        if n_repeat < N_REPEAT and rng.random() < 0.3:
            n_repeat += 1
            attn, ffn = (("run", "run"), ("run", "skip"), ("skip", "run"))[rng.integers(3)]
            steps.append(Step(il, attn, ffn, repeat=n_repeat))
    return tuple(steps)


def tokens(n: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, 300, n)]


def compute(forward: Forward, ids: list[int], cuts: list[int], steps: Steps | None) -> Logits:
    """Compute a text in parts that end at `cuts`; return the logits at each end."""
    region = forward.kv.allocate(len(ids))
    assert region is not None
    spans = None if steps is None else forward.spans(steps, PLAN)
    rows: list[Logits] = []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        found = forward.run([Piece(tokens=ids[start:end], pos=start, region=region)], spans)
        assert found is not None
        rows.append(found[0])
    forward.kv.release(region)
    return np.stack(rows)


def test_all_run_is_no_plan(path: Path, depth: Path) -> None:
    ids = tokens(40, 1)
    with opened(path, depth) as forward:
        bare = compute(forward, ids, [30, 31, 32], None)
        steps = all_run(range(N_LAYER))
        assert np.array_equal(compute(forward, ids, [30, 31, 32], steps), bare)
        split = split_steps(forward.spans(steps)[0])
        region = forward.kv.allocate(len(ids))
        assert region is not None
        found = forward.run([Piece(tokens=ids[:30], pos=0, region=region)], split)
        assert found is not None and np.array_equal(found[0], bare[0])


def test_cached_decoding_is_full_recomputation(path: Path, depth: Path) -> None:
    """Fifty random plans for each of four families: two hundred."""
    rng = np.random.default_rng(7)
    ids = tokens(24, 2)
    with opened(path, depth) as forward:
        distinct = set()
        for _ in range(50):
            steps = random_steps(rng)
            cached = compute(forward, ids, [17, 18, 19, 23], steps)[-1]
            whole = compute(forward, ids, [], steps)[-1]
            # Kernels for one row and for many round differently, in F32 weights and F16 keys.
            assert np.sum((cached - whole) ** 2) <= 1e-6 * np.sum(whole**2), steps
            distinct.add(whole.tobytes())
        assert len(distinct) > 40


def test_a_repeated_pass_has_keys_of_its_own(path: Path) -> None:
    """Sharing one row of keys would let the second pass overwrite the first's."""
    ids = tokens(20, 5)
    once = all_run(range(N_LAYER))
    twice = (*once[:2], Step(1, repeat=1), *once[2:])
    with opened(path) as forward:
        whole = compute(forward, ids, [], twice)[-1]
        cached = compute(forward, ids, [12, 13, 14, 15, 19], twice)[-1]
        assert np.sum((cached - whole) ** 2) <= 1e-6 * np.sum(whole**2)
        shared = tuple(step._replace(repeat=0) for step in twice)
        wrong = compute(forward, ids, [12, 13, 14, 15, 19], shared)[-1]
        assert np.sum((wrong - whole) ** 2) > 1e-5 * np.sum(whole**2)


def test_stored_keys_serve_a_later_token_that_runs_the_layer(path: Path) -> None:
    """`store` writes the keys that the layer would have written, and adds nothing."""
    ids = tokens(20, 6)
    skips = tuple(Step(il, "skip" if il == 2 else "run") for il in range(N_LAYER))
    stores = tuple(step._replace(store=step.il == 2) for step in skips)
    last = all_run(range(N_LAYER))
    with opened(path) as forward:
        region = forward.kv.allocate(len(ids))
        assert region is not None

        def answer(first: Steps) -> Logits:
            forward.run([Piece(tokens=ids[:-1], pos=0, region=region)], forward.spans(first))
            found = forward.run(
                [Piece(tokens=ids[-1:], pos=len(ids) - 1, region=region)], forward.spans(last)
            )
            assert found is not None
            return found[0]

        answer(last)  # else cells would hold zeros, not another text's keys
        forward.run([Piece(tokens=tokens(20, 9), pos=0, region=region)])
        stored = answer(stores)
        forward.run([Piece(tokens=tokens(20, 9), pos=0, region=region)])
        assert not np.array_equal(answer(skips), stored)
        assert np.array_equal(answer(stores), stored)


def test_a_stand_in_is_what_its_formula_says(path: Path, depth: Path) -> None:
    """With everything approximated, the whole model in numpy; nothing happens at position 0."""
    steps = tuple(Step(il, "approximate", "approximate") for il in range(N_LAYER))
    ids = tokens(6, 8)
    with opened(path, depth) as forward, GGUFFile.open(depth) as file:
        given = {
            name: np.frombuffer(file.view(info), np.float32).reshape(info.ne[::-1])
            for name, info in file.tensors.items()
        }
        eps = forward.model.hparams.norm_rms_eps
        x = forward.embed(ids).astype(np.float64)
        for il in range(N_LAYER):
            for part in ("layer",) if il % 2 else ("attn", "ffn"):
                at = {t: given[tensor_name(PLAN, il, part, t)].astype(np.float64) for t in TENSORS}
                h = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + eps) * at["norm"]
                gate = h @ at["gate"].T
                y = h @ at["a"].T @ at["b"].T + at["bias"]
                y += (gate / (1 + np.exp(-gate)) * (h @ at["up"].T)) @ at["down"].T
                x[1:] += y[1:]
        region = forward.kv.allocate(len(ids))
        assert region is not None
        piece = Piece(tokens=ids, pos=0, region=region, n_out=len(ids))
        found = forward.run([piece], forward.spans(steps, PLAN))
        assert found is not None
        normed = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + eps)
        expected = head_logits(path, normed)
        assert np.sum((found - expected) ** 2) <= 1e-4 * np.sum(expected**2)


def head_logits(path: Path, normed: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with GGUFFile.open(path) as file:

        def matrix(name: str) -> npt.NDArray[np.float64]:
            info = file.tensors[name]
            flat = np.frombuffer(file.view(info), np.float32)
            return flat.reshape(info.ne[::-1]).astype(np.float64)

        output = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
        return normed * matrix("output_norm.weight").ravel() @ matrix(output).T


def test_a_missing_stand_in_is_an_error(path: Path) -> None:
    steps = (Step(0), Step(1, "run", "approximate"), *all_run(range(2, N_LAYER)))
    with opened(path) as forward:
        region = forward.kv.allocate(4)
        assert region is not None
        with pytest.raises(ComputeError, match="no stand-in"):
            forward.run([Piece(tokens=[3, 4], pos=0, region=region)], forward.spans(steps, PLAN))


Change = dict[str, npt.NDArray[np.float32] | None]
A = tensor_name(PLAN, 0, "attn", "a")
HOSTILE: dict[str, tuple[Change, dict[str, object], str]] = {
    "another model": ({}, {KEY_MODEL: "ab" * 32}, "made for another model"),
    "a strange fingerprint": ({}, {KEY_MODEL: "?"}, "made for another model"),
    "another version": ({}, {KEY_VERSION: 2}, "version 2"),
    "a model, not plans": ({}, {"arch": "llama"}, "not of depth plans"),
    "half a map": ({A: None}, {}, "needs norm"),
    "no norm": ({tensor_name(PLAN, 0, "attn", "norm"): None}, {}, "needs norm"),
    "too wide": ({A: np.zeros((N_EMBD + 1, N_EMBD), np.float32)}, {}, "extents"),
    "ranks that differ": ({A: np.zeros((16, N_EMBD), np.float32)}, {}, "extents"),
    "another width": ({A: np.zeros((32, 128), np.float32)}, {}, "extents"),
    "three extents": ({A: np.zeros((2, 32, N_EMBD), np.float32)}, {}, "extents"),
    "a layer too many": ({f"{PLAN}/blk.{N_LAYER}.attn.a": np.zeros(4, np.float32)}, {},
                         "stands for nothing"),
    "a strange name": ({"p/../x": np.zeros(4, np.float32)}, {}, "stands for nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_depth_files_are_refused(case: str, path: Path, tmp_path: Path) -> None:
    changes, header, message = HOSTILE[case]
    where = write_depth(tmp_path / "x.depth", path, changes=changes, header=dict(header))
    with (
        GGUFFile.open(path) as file,
        pytest.raises(DepthFileError, match=message),
    ):
        DepthFile(where, file, describe(file).hparams).close()


def test_corrupted_depth_files_are_refused(path: Path, depth: Path, tmp_path: Path) -> None:
    """Every truncation and flipped byte of the header: refused, or a file that opens."""
    whole = bytearray(depth.read_bytes())
    with GGUFFile.open(depth) as file:
        n_header = file.data_offset
    where = tmp_path / "x.depth"
    rng = np.random.default_rng(4)
    with GGUFFile.open(path) as file:
        hparams = describe(file).hparams
        for i in range(120):
            broken = bytearray(whole)
            if i % 3:
                broken[int(rng.integers(n_header))] ^= int(rng.integers(1, 256))
            else:
                del broken[int(rng.integers(len(whole))) :]
            where.write_bytes(broken)
            try:
                DepthFile(where, file, hparams).close()
            except (DepthFileError, ModelFileError) as error:
                assert len(str(error)) > 20
                assert isinstance(error, EdgerouteError)
