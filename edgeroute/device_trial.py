"""A device against the processor: the same passes of one model on both, compared and timed.

The passes cover what was seen to go wrong on devices: prompts in chunks, more than 512 cells,
prompts of unequal lengths in one pass with single tokens, cells that others used before.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.device_proofs import DeviceProof
from edgeroute.device_support import Probe, unsupported
from edgeroute.memory_plan import kv_shape
from edgeroute.models.base import Model
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.registry import describe
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.cells import Region
from edgeroute.runtime.depth import all_run
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.machine import usable_cores
from edgeroute.runtime.weights import ResidentWeights, TensorSpec

NMSE_MEAN, NMSE_WORST = 1e-3, 3e-2
"""What kernels that round otherwise may differ by, over all tokens and for any one of them. Those
of an x86 and an ARM processor differ by 1.7e-4 and 6e-4; a wrong token by about 1."""
NMSE_WORST_EXPERTS: Final = 0.3
"""For any one token of a model with experts: at a near tie a token may get another expert, which
was seen to make 0.01 on two layers."""
CLEAR_SIGMAS: Final = 6.0
"""A likeliest token is clear where so many deviations of an allowed error would not change it."""
LAYER_BYTES: Final = 128 << 20
"""Layers are compared until their weights are this long; of a small model that is all."""
N_CELLS: Final = 2560
N_OUT: Final = 4
"""Tokens of a prompt's part whose logits are compared."""
TIMED_PROMPT, TIMED_RUNS, TIMED_S = 128, 5, 0.5
_EMBED: Final = "token_embd.weight"
_BAD: Final = 1e9

Numbers = npt.NDArray[np.float32]
Pass = tuple[tuple[str, int], ...]
"""How many tokens each sequence brings to one pass."""

PASSES: Final[tuple[Pass, ...]] = (
    (("a", 384),),
    (("a", 128),),
    (("a", 88), ("b", 5), ("c", 70)),
    (("a", 1), ("b", 1), ("c", 1)),
    (("b", 1), ("d", 33), ("a", 1), ("c", 1)),
    (("a", 1), ("b", 1), ("c", 1), ("d", 1)),
    (("end b", 0),),
    (("e", 41), ("a", 1), ("d", 1)),
    (("e", 1), ("a", 1)),
    (("a", 1),),
)
"""Sequence `e` gets the cells that `b` gave back."""
_REGIONS: Final = {"a": 1024, "b": 256, "c": 256, "d": 256, "e": 256}


class Outcome(NamedTuple):
    """What one pass left: states of all its tokens and logits of some, F32 with a row per token."""

    states: Numbers
    logits: Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far a device's numbers are from the processor's; see DeviceProof."""

    nmse: float
    worst_nmse: float
    n_changed: int
    n_tokens: int
    worst_allowed: float = NMSE_WORST

    @property
    def holds(self) -> bool:
        """Whether the device answers like the processor."""
        near = self.nmse <= NMSE_MEAN and self.worst_nmse <= self.worst_allowed
        return near and not self.n_changed


class _Part(NamedTuple):
    """Layers of a model, and whether its head belongs to what is compared."""

    model: Model
    layers: tuple[int, ...]
    head: bool

    @property
    def span(self) -> tuple[Span, ...]:
        body = Span(all_run(self.layers), embed=False, output=False)
        head = Span((), embed=False, output=True)
        return (body, head) if self.head else (body,)

    def specs(self, *, embedding: bool) -> list[TensorSpec]:
        """List the tensors that these layers need."""
        wanted = {f"blk.{il}." for il in self.layers}
        found = []
        for spec in self.model.specs():
            if spec.name.startswith("blk."):
                if ".".join(spec.name.split(".")[:2]) + "." in wanted:
                    found.append(spec)
            elif spec.name == _EMBED:
                found += [spec] if embedding else []
            else:
                found.append(spec)
        return found


def try_device(device: Device, file: GGUFFile, params: RunParams) -> DeviceProof:
    """Compute the passes on a device and on the processor, compare and time them.

    Takes seconds: some hundred tokens through at most LAYER_BYTES of layers, twice.

    Raises:
        CapacityError: either has not the memory for it.
        DeviceLostError: the device went away meanwhile.
    """
    model = describe(file)
    lacks = unsupported(device, Probe(
        file=file, model=model, kv=kv_shape(model.hparams, params), n_ubatch=512,
    ))  # fmt: skip
    part = _part(file, model, lacks)
    if not part.layers:
        return _refused(lacks)
    with Device.open("cpu") as cpu:
        cpu.set_threads(params.threads or usable_cores())
        with _forward(cpu, file, part, params) as here:
            given = [here.embed(_tokens(model, each)) for each in PASSES if _tokens(model, each)]
            wanted = run_passes(here, part.span, given)
            cpu_s = _timed(here, part.span)
    with _forward(device, file, part, params) as there:
        found = run_passes(there, part.span, given)
        device_s = _timed(there, part.span)
    worst = NMSE_WORST if model.hparams.moe is None else NMSE_WORST_EXPERTS
    seen = replace(compare(wanted, found), worst_allowed=worst)
    return DeviceProof(
        holds=seen.holds, nmse=seen.nmse, worst_nmse=seen.worst_nmse, n_changed=seen.n_changed,
        n_tokens=seen.n_tokens, n_layers=len(part.layers), prefill_s=device_s[0],
        decode_s=device_s[1], cpu_prefill_s=cpu_s[0], cpu_decode_s=cpu_s[1],
        when=int(time.time()), note=_note(device, seen),
    )  # fmt: skip


def _note(device: Device, seen: Difference) -> str:
    if seen.holds:
        return ""
    return (f"{device.info.name} does not answer like the processor: normalised error "
            f"{seen.nmse:.2g} (at most {NMSE_MEAN:g}), of the worst token {seen.worst_nmse:.2g} "
            f"(at most {seen.worst_allowed:g}), {seen.n_changed} clear tokens changed")  # fmt: skip


def _refused(lacks: dict[int, set[str]]) -> DeviceProof:
    """Return the proof of a device that cannot compute any of the layers."""
    names = sorted(set[str]().union(*lacks.values()))
    return DeviceProof(
        holds=False, nmse=0.0, worst_nmse=0.0, n_changed=0, n_tokens=0, n_layers=0, prefill_s=0.0,
        decode_s=0.0, cpu_prefill_s=0.0, cpu_decode_s=0.0, when=int(time.time()),
        note=f"it lacks {', '.join(names)}"[:300],
    )  # fmt: skip


def _part(file: GGUFFile, model: Model, lacks: dict[int, set[str]]) -> _Part:
    """Take the first layers, at least two and one with experts, that the device can compute."""
    hparams = model.hparams
    least = 2 if hparams.moe is None else 1 + max(1, hparams.moe.n_layer_dense_lead)
    sizes = dict.fromkeys(range(hparams.n_layer), 0)
    for name, info in file.tensors.items():
        words = name.split(".", 2)
        if words[0] == "blk" and words[1].isdigit() and int(words[1]) in sizes:
            sizes[int(words[1])] += info.nbytes
    layers: list[int] = []
    n_bytes = 0
    for il, size in sizes.items():
        if n_bytes + size > LAYER_BYTES and len(layers) >= least:
            break
        if il not in lacks:
            layers.append(il)
            n_bytes += size
    return _Part(model, tuple(layers), hparams.n_layer not in lacks)


@contextlib.contextmanager
def _forward(device: Device, file: GGUFFile, part: _Part, params: RunParams) -> Iterator[Forward]:
    """Load a part of a model onto a device for the time of the trial."""
    with contextlib.ExitStack() as own:
        specs = part.specs(embedding=device.is_cpu)
        weights = ResidentWeights(file, device, specs, rows_on_demand=True,
                                  repack_experts=params.repack_experts)  # fmt: skip
        own.callback(weights.close)
        weights.load()
        kv = KvCache(device, kv_shape(part.model.hparams, params), N_CELLS)
        own.callback(kv.close)
        forward = Forward(part.model, device, weights, kv)
        own.callback(forward.close)
        forward.reserve_stream(512)
        device.check()
        yield forward


def _tokens(model: Model, each: Pass) -> list[int]:
    """Return a pass's tokens: the same for all, spread over the vocabulary."""
    n = sum(count for _, count in each)
    seed = 1 + PASSES.index(each)
    found: list[int] = np.random.default_rng(seed).integers(0, model.hparams.n_vocab, n).tolist()
    return found


def run_passes(forward: Forward, span: Sequence[Span], given: Sequence[Numbers]) -> list[Outcome]:
    """Compute PASSES from their token embeddings; every region is given back at the end."""
    regions: dict[str, Region] = {}
    ends: dict[str, int] = {}
    found = []
    embedded = iter(given)
    for each in PASSES:
        if each[0][0].startswith("end "):
            forward.kv.release(regions.pop(each[0][0].removeprefix("end ")))
            continue
        pieces = []
        for name, n in each:
            if name not in regions:
                regions[name], ends[name] = _take(forward, _REGIONS[name]), 0
            pieces.append(Piece([0] * n, ends[name], regions[name], min(n, N_OUT)))
            ends[name] += n
        found.append(_run(forward, span, pieces, next(embedded)))
    for region in regions.values():
        forward.kv.release(region)
    return found


def _take(forward: Forward, n_cells: int) -> Region:
    region = forward.kv.allocate(n_cells)
    assert region is not None, "the pool holds all regions"
    return region


def _run(
    forward: Forward, span: Sequence[Span], pieces: Sequence[Piece], states: Numbers
) -> Outcome:
    forward.set_residual(states)
    logits = forward.run(pieces, span)
    if logits is None:
        raise ComputeError(f"a pass on {forward.device.info.name} was stopped")
    return Outcome(forward.residual(len(states)), logits)


def _timed(forward: Forward, span: Sequence[Span]) -> tuple[float, float]:
    """Measure seconds per token of a prompt, and of one that is decoded after 600; medians."""
    region = _take(forward, 1024)
    n_embd = forward.model.hparams.n_embd
    found = []
    for n, pos in ((TIMED_PROMPT, 0), (1, 600)):
        states = np.zeros((n, n_embd), np.float32) + np.float32(0.01)
        pieces = [Piece([0] * n, pos, region, 1)]
        _run(forward, span, pieces, states)  # builds the graph, and wakes what sleeps
        runs: list[float] = []
        while not runs or (len(runs) < TIMED_RUNS and sum(runs) < TIMED_S):
            began = time.perf_counter()
            _run(forward, span, pieces, states)
            runs.append(time.perf_counter() - began)
        found.append(float(np.median(runs)) / n)
    forward.kv.release(region)
    return found[0], found[1]


def compare(wanted: Sequence[Outcome], found: Sequence[Outcome]) -> Difference:
    """Measure how far numbers are from those wanted, token by token.

    Whatever is not a number counts as wrong.
    """
    errors: list[Numbers] = []
    n_changed = n_tokens = 0
    for ours, theirs in zip(wanted, found, strict=True):
        n_tokens += len(ours.states)
        errors.append(_row_errors(ours.states, theirs.states))
        if ours.logits.size:
            errors.append(_row_errors(ours.logits, theirs.logits))
            n_changed += _changed(ours.logits, theirs.logits)
    rows = np.concatenate(errors)
    return Difference(nmse=min(_BAD, float(rows.mean())), worst_nmse=min(_BAD, float(rows.max())),
                      n_changed=n_changed, n_tokens=n_tokens)  # fmt: skip


def _row_errors(wanted: Numbers, found: Numbers) -> Numbers:
    """Return each row's squared error over its power."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.square(found.astype(np.float64) - wanted).sum(1)
        power = np.square(wanted.astype(np.float64)).sum(1)
        rows = error / np.maximum(power, np.finfo(np.float32).tiny)
    finite: Numbers = np.nan_to_num(rows, nan=_BAD, posinf=_BAD).astype(np.float32)
    return finite


def _changed(wanted: Numbers, found: Numbers) -> int:
    """Count rows whose clearly likeliest token is another now."""
    top = np.sort(wanted, axis=1)[:, -2:]
    limit = CLEAR_SIGMAS * np.sqrt(NMSE_MEAN * np.square(wanted).mean(1))
    clear = top[:, 1] - top[:, 0] > limit
    return int((clear & (wanted.argmax(1) != found.argmax(1))).sum())
