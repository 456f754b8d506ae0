"""Models with adapters beside models into which the same adapters were merged."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.adapter_file import BaseShapes, base_shapes
from edgeroute.models.forward import Piece
from edgeroute.models.registry import describe
from edgeroute.offload.adapter_store import Lease
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import synth
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf, make_peft
from edgeroute.tools.synth_tensors import tensors

F32Array = npt.NDArray[np.float32]
Deltas = dict[str, F32Array]
"""What is added to each weight, by stem: (n_out, n_in)."""
Step = tuple[int, int]
"""New tokens of one batch, and how many of the last get logits."""

STEPS: tuple[Step, ...] = ((40, 40), (17, 0), (5, 2), (1, 1), (1, 1), (1, 1))
WAIT_S = 60.0


def base_of(model: Path) -> BaseShapes:
    with GGUFFile.open(model) as file:
        return base_shapes(describe(file))


def make(path: Path, model: Path, **spec: Any) -> Path:
    """Write an adapter for a model: GGUF where the name says so, else a PEFT folder."""
    writer = make_gguf if path.suffix == ".gguf" else make_peft
    writer(path, base_of(model), AdapterSpec(**spec))
    return path


def gguf_deltas(path: Path) -> Deltas:
    """Read scale * B A of every weight with llama.cpp's own reader of GGUF files."""
    reader = GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    found = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    deltas = {}
    for name, a in found.items():
        if name.endswith(".lora_a"):
            b = found[f"{name.removesuffix('a')}b"]
            deltas[name.removesuffix(".weight.lora_a")] = alpha / a.shape[0] * (b @ a)
    return deltas


def mean(parts: Sequence[tuple[Deltas, float]]) -> Deltas:
    """Add deltas up, each with its factor."""
    found: Deltas = {}
    for deltas, factor in parts:
        for stem, delta in deltas.items():
            found[stem] = found.get(stem, np.zeros_like(delta)) + np.float32(factor) * delta
    return found


def merge(
    spec: synth.SynthSpec, path: Path, deltas: Mapping[str, F32Array], patch: pytest.MonkeyPatch
) -> Path:
    """Write a synthetic model with deltas added to its F32 weights."""
    left = set(deltas)

    def added(spec: synth.SynthSpec) -> Iterator[Any]:
        for name, data, kind in tensors(spec):
            stem = name.removesuffix(".weight")
            if stem in deltas:
                left.remove(stem)
                data = data + deltas[stem]
            yield name, data, kind

    with patch.context() as patched:
        patched.setattr(synth, "tensors", added)
        synth.write(spec, path)
    assert not left, f"no such weights: {left}"
    return path


class Model:
    """A loaded model, driven batch by batch without a scheduler."""

    def __init__(self, path: Path, adapters: Sequence[Path] | None = (), **params: Any) -> None:
        settings: dict[str, Any] = {"n_ctx": 512, "n_kv": 2560, "n_ubatch": 64, "threads": 1,
                                    "adapter_state": "off"} | params  # fmt: skip
        if adapters is not None:
            settings["adapters"] = tuple(map(str, adapters))
        self.loaded = LoadedModel(path, RunParams(**settings))
        self.loaded.device.set_threads(1)
        self.forward = self.loaded.forward

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.loaded.close()

    @contextlib.contextmanager
    def leased(self, mixture: Mapping[str, float]) -> Iterator[Lease]:
        """Hold adapters that have arrived."""
        assert self.loaded.adapters is not None
        store = self.loaded.adapters.store
        lease = store.lease(mixture)
        assert lease is not None
        try:
            wait_for(lambda: store.ready(lease))
            yield lease
        finally:
            store.release(lease)

    def logits(
        self, mixture: Mapping[str, float] | None = None, steps: Sequence[Step] = STEPS,
        **run: Any,
    ) -> F32Array:  # fmt: skip
        """Compute a random text with some adapters: F32 (n_out over all steps, n_vocab)."""
        rng = np.random.default_rng(3)
        region = self.loaded.kv.allocate(256)
        assert region is not None
        pos, found = 0, []
        with self.leased(mixture) if mixture else contextlib.nullcontext() as lease:
            row = None if lease is None else lease.row
            for n_tokens, n_out in steps:
                tokens = rng.integers(4, 380, n_tokens).tolist()
                logits = self.forward.run([Piece(tokens, pos, region, n_out, row)], **run)
                assert logits is not None
                found.append(logits.copy())
                pos += n_tokens
        self.loaded.kv.release(region)
        whole = np.concatenate(found)
        assert np.isfinite(whole).all()
        return whole


def nmse(found: F32Array, reference: F32Array) -> float:
    wide = reference.astype(np.float64)
    return float(np.sum((found - wide) ** 2) / np.sum(wide**2))


def wait_for(done: Any) -> None:
    """Poll until something is true."""
    deadline = time.monotonic() + WAIT_S
    for i in itertools.count():
        if done():
            return
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.0005 if i < 200 else 0.01)
