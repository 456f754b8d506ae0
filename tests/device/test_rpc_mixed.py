"""Random passes on a device of another process and on the processor: the same bits, every time.

What was wrong on a GPU was wrong in passes of several sequences, over 512 cells and more, and
where prompts come in parts beside single tokens: most of what is drawn here is of that kind.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute.models.forward import Piece
from edgeroute.runtime.cells import Region
from edgeroute.runtime.lora import LoraRow
from edgeroute.tools import synth
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.device.equal_lab import nmse
from tests.edgeroute.adapter_lab import Model, make

N_CELLS, PASS_TOKENS, N_PASSES = 2048, 128, 20
FIRST = (0, 250, 505, 1020, 1700)
"""Cells that each sequence begins behind; they hold zeros. Passes go on over 256, 512 and 1,024."""
N_SEQUENCES = len(FIRST)
MIXTURES: list[dict[str, float]] = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": -1.5}]
KINDS = {
    "llama": {"weight_type": "Q8_0"}, "qwen2": {"weight_type": "Q4_0"}, "gemma3": {},
    "qwen3moe": {"weight_type": "Q8_0"}, "deepseek2": {}, "gpt-oss": {},
}  # fmt: skip


@dataclass(slots=True)
class Texts:
    """Sequences of the same tokens in the pools of several models; one generator draws all."""

    models: list[Model]
    rows: list[list[LoraRow | None]]
    rng: np.random.Generator
    regions: list[list[Region]] = field(default_factory=list)
    n_past: list[int] = field(default_factory=lambda: list(FIRST))

    def __post_init__(self) -> None:
        for model in self.models:
            found = [model.loaded.kv.allocate(N_CELLS) for _ in range(N_SEQUENCES)]
            assert None not in found
            self.regions.append([region for region in found if region is not None])

    def draw(self) -> list[tuple[int, int, int, int]]:
        """Draw a pass: (sequence, new tokens, how many get logits, number of its adapter)."""
        rng, left = self.rng, PASS_TOKENS
        found = []
        for i in sorted(rng.choice(N_SEQUENCES, rng.integers(1, N_SEQUENCES + 1), replace=False)):
            n = 1 if rng.random() < 0.6 else int(rng.integers(2, 120))
            if rng.random() < 0.05:
                self.n_past[i] = int(rng.integers(0, self.n_past[i] + 1))  # cells are used again
            if n > left or self.n_past[i] + n > N_CELLS:
                continue
            left -= n
            n_out = int(rng.choice([0, 1, 1, n])) if n > 1 else 1
            found.append((int(i), n, n_out, i % (len(MIXTURES) + 1)))
        return found

    def copy(self) -> None:
        """Copy the beginning of one sequence to another."""
        source, target = self.rng.choice(N_SEQUENCES, 2, replace=False)
        n = self.n_past[source] // 2
        if n:
            for model, regions in zip(self.models, self.regions, strict=True):
                model.loaded.kv.copy(regions[source], regions[target], n)
            self.n_past[target] = n

    def run(self, drawn: list[tuple[int, int, int, int]]) -> list[Any]:
        """Compute a pass with every model."""
        tokens = [self.rng.integers(4, 380, n).tolist() for _, n, _, _ in drawn]
        found = []
        for model, regions, rows in zip(self.models, self.regions, self.rows, strict=True):
            pieces = [
                Piece(mine, self.n_past[i], regions[i], n_out, rows[adapter])
                for mine, (i, _, n_out, adapter) in zip(tokens, drawn, strict=True)
            ]
            logits = model.forward.run(pieces, borrow=True)
            assert logits is not None
            found.append(logits.copy())
        for i, n, _, _ in drawn:
            self.n_past[i] += n
        return found


@contextlib.contextmanager
def texts(path: Path, devices: list[dict[str, Any]], seed: int) -> Iterator[Texts]:
    """Open a model once per device, with adapters, and empty sequences."""
    adapters = [path.with_name(f"{name}.gguf") for name in "ab"]
    with contextlib.ExitStack() as own:
        models, rows = [], []
        for settings in devices:
            model = own.enter_context(Model(
                path, adapters, n_ctx=N_CELLS, n_kv=N_SEQUENCES * N_CELLS, n_ubatch=PASS_TOKENS,
                **settings,
            ))  # fmt: skip
            leases = [own.enter_context(model.leased(mixture)) for mixture in MIXTURES]
            models.append(model)
            rows.append([None, *(lease.row for lease in leases)])
        yield Texts(models, rows, np.random.default_rng(seed))


def written(arch: str, folder: Path) -> Path:
    path = folder / "m.gguf"
    synth.make(arch, path, n_layer=None if arch in ("gemma3", "deepseek2") else 2, **KINDS[arch])  # type: ignore[arg-type]
    for seed, name in enumerate("ab"):
        make(folder / f"{name}.gguf", path, rank=4 + 5 * seed, seed=seed, delta=0.5)
    return path


@pytest.mark.usefixtures("same_kernels")
@pytest.mark.parametrize(("arch", "kv_type"), [*((arch, "f16") for arch in KINDS),
                                               ("llama", "q8_0")])  # fmt: skip
def test_random_passes(arch: str, kv_type: str, rpc: RpcServer, tmp_path: Path) -> None:
    path = written(arch, tmp_path)
    devices = [{"device": name, "kv_type": kv_type} for name in ("cpu", rpc.name)]
    n_long = n_mixed = 0
    with texts(path, devices, seed=len(arch)) as found:
        for step in range(N_PASSES):
            if step % 7 == 6:
                found.copy()
            drawn = found.draw()
            if not drawn:
                continue
            ours, theirs = found.run(drawn)
            assert np.array_equal(ours, theirs), (step, drawn, found.n_past)
            assert np.isfinite(ours).all()
            n_long += any(found.n_past[i] > 512 for i, *_ in drawn)
            sizes = [n for _, n, *_ in drawn]
            n_mixed += min(sizes) == 1 < max(sizes)
    assert n_long >= 8 and n_mixed >= 6, (n_long, n_mixed)


def test_kernels_of_another_layout_agree_within_rounding(rpc: RpcServer, tmp_path: Path) -> None:
    """The processor repacks weights, and the device does not: other sums of the same numbers."""
    path = written("qwen2", tmp_path)
    with texts(path, [{"device": "cpu"}, {"device": rpc.name}], seed=3) as found:
        here = found.models[0].loaded
        if not here.plan.weights.repacked:
            pytest.skip("this processor has no layout of its own for these weights")
        passes = [found.run([each for each in found.draw() if each[2]]) for _ in range(8)]
    ours, theirs = (np.concatenate(each) for each in zip(*passes, strict=True))
    assert not np.array_equal(ours, theirs)
    assert nmse(theirs, ours) < 1e-4
