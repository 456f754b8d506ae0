"""Trains a LoRA adapter on prompts and completions, on the CPU, reproducible by seed.

The base is a GGUF file, dequantised; what is learned is written as a PEFT folder.
Source: LoRA (arXiv 2106.09685); AdamW (arXiv 1711.05101).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeroute.runtime.errors import ComputeError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.tools.adapter_train_data import Encoded, batches, encode, read_jsonl, split
from edgeroute.tools.adapter_train_peft import Card, base_name, check_target, write_folder
from edgeroute.tools.torch_llama import PARTS, LowRank, TorchLlama, greedy

Dtype = Literal["auto", "f32", "bf16"]

N_ANSWER_SPARE: Final = 8
"""Tokens that an answer may have beyond the longest right one before it is cut off."""

EVALUATE_AT_ONCE: Final = 64
MAX_GRAD_NORM: Final = 1.0
N_STOP: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainParams:
    """How to train.

    Attributes:
        rank, alpha: of the adapter; its scale is alpha / rank.
        targets: keys of PARTS.
        n_steps, n_batch: optimiser steps, and examples of each.
        lr: peak learning rate, reached after `n_warmup` steps, then falling as a cosine to 0.
        weight_decay: of AdamW.
        stop_nats: training ends early once the last N_STOP steps' mean loss is below this.
        seed: of the first values, the held-out examples and the order.
        n_held_out: examples with different prompts that are kept apart to judge the result.
        chat: whether a prompt is a user's message in the model's template, or plain text.
        max_tokens: of one example; longer ones are refused.
        dtype: of the base's matrices; auto is bf16 where the processor multiplies it itself.
        store: type of the written matrices.
        threads: compute threads. Another number rounds differently.
        license: of the adapter, for its card; None is the base's.
        about: what the adapter does, for its card.
        base_name: of the base, for PEFT and the card, as `owner/name`; None is what the file says.
        replace: whether an adapter folder that exists may be replaced.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    n_steps: int = 200
    n_batch: int = 8
    lr: float = 2e-3
    n_warmup: int = 10
    weight_decay: float = 0.0
    stop_nats: float = 0.0
    seed: int = 1
    n_held_out: int = 32
    chat: bool = False
    max_tokens: int = 512
    dtype: Dtype = "auto"
    store: Literal["f16", "f32"] = "f16"
    threads: int = 1
    license: str | None = None
    about: str | None = None
    base_name: str | None = None
    replace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep:
    """Progress: how much of a phase is done; the step's loss while training."""

    phase: str
    n_done: int
    n_total: int
    loss: float | None = None


Progress = Callable[[TrainStep], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Mean nats per learned token and share of exactly right answers on held-out examples."""

    nats: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What was trained. `base` and `adapter` are None where nothing was held out."""

    out: Path
    n_bytes: int
    n_params: int
    n_learned: int
    n_held_out: int
    losses: tuple[float, ...]
    base: Judged | None
    adapter: Judged | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        found: dict[str, Any] = {"path": str(self.out)}
        for name in ("n_bytes", "n_params", "n_learned", "n_held_out", "seconds"):
            found[name] = getattr(self, name)
        for name, judged in (("base", self.base), ("adapter", self.adapter)):
            if judged is not None:
                found |= {f"nats_{name}": judged.nats, f"accuracy_{name}": judged.accuracy}
        return found | {"losses": list(self.losses)}


def train(
    model: Path, data: Path, out: Path, params: TrainParams,
    progress: Progress = lambda step: None,
) -> TrainReport:  # fmt: skip
    """Train an adapter for the file `model` on the JSONL `data`, into the new folder `out`.

    Raises:
        UsageError: malformed data, or parameters that do not fit the model or each other.
        UnsupportedModelError: a base that this cannot compute.
        ModelFileError: a malformed base.
        CapacityError: no room on the disk.
        ComputeError: the loss is no longer a number.
        In every case, and on Ctrl-C, `out` is as it was.
    """
    _check(params)
    check_target(out, replace=params.replace)
    pairs = read_jsonl(data)
    with GGUFFile.open(model) as file, Tokenizer.open(file) as tokenizer:
        examples = encode(tokenizer, pairs, chat=params.chat, max_tokens=params.max_tokens)
        learned, held_out = split(examples, params.n_held_out, params.seed)
        base = open_base(file, params.dtype, progress)
        judge = _Judge(base, tokenizer, held_out)
        name, license_name = base_name(file)
        with reproducible(params.threads):
            return _run(
                _Job(
                    base=base,
                    learned=learned,
                    judge=judge,
                    params=params,
                    out=out,
                    base_name=params.base_name or name,
                    license=params.license or license_name,
                    progress=progress,
                )
            )


def open_base(
    file: GGUFFile, dtype: Dtype = "auto", progress: Progress = lambda step: None
) -> TorchLlama:
    """Dequantise a base model.

    Raises:
        UnsupportedModelError, ModelFileError: as `TorchLlama`.
    """
    chosen = torch.bfloat16 if resolve_dtype(dtype) == "bf16" else torch.float32
    return TorchLlama(
        file, chosen,
        lambda phase, done, total: progress(TrainStep(phase=phase, n_done=done, n_total=total)),
    )  # fmt: skip


def resolve_dtype(dtype: Dtype) -> Literal["f32", "bf16"]:
    """Choose the base's type: bf16 where the processor has instructions that multiply it."""
    if dtype != "auto":
        return dtype
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = ("avx512_bf16", "avx_ne_convert", "amx_bf16", "arm_bf16", "bf16")
    return "bf16" if any(abilities.get(name) for name in names) else "f32"


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Fix what makes two runs on one machine differ: threads and algorithms."""
    old_threads = torch.get_num_threads()
    old_mode = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(old_mode)
        torch.set_num_threads(old_threads)


def new_adapter(base: TorchLlama, params: TrainParams) -> LowRank:
    """Make an adapter that changes nothing yet: A random and B zero, as PEFT starts."""
    rng = torch.Generator().manual_seed(params.seed)
    pairs = {}
    for il in range(base.hparams.n_layer):
        for part in sorted(params.targets):
            n_in, n_out = base.width(part)
            bound = 1 / math.sqrt(n_in)
            a = torch.empty(params.rank, n_in).uniform_(-bound, bound, generator=rng)
            b = torch.zeros(n_out, params.rank)
            pairs[il, part] = (a.requires_grad_(), b.requires_grad_())
    return LowRank(params.alpha / params.rank, pairs)


def loss_of(base: TorchLlama, adapter: LowRank | None, batch: Sequence[Encoded]) -> Tensor:
    """Mean negative log-likelihood of the batch's completions and their ends, in nats."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.tensor([[*e.ids, *[0] * (longest - len(e.ids))] for e in batch])
    at = [
        (row, pos) for row, e in enumerate(batch) for pos in range(e.n_prompt - 1, len(e.ids) - 1)
    ]
    rows, cols = torch.tensor(at).T
    hidden = base.hidden(ids[:, :-1], adapter)
    return F.cross_entropy(base.logits(hidden[rows, cols]), ids[rows, cols + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One training run, everything read and checked."""

    base: TorchLlama
    learned: list[Encoded]
    judge: "_Judge"
    params: TrainParams
    out: Path
    base_name: str
    license: str
    progress: Progress


class _Judge:
    """Judges the base and adapters on held-out examples."""

    def __init__(self, base: TorchLlama, tokenizer: Tokenizer, held_out: list[Encoded]) -> None:
        self._base, self._tokenizer, self.held_out = base, tokenizer, held_out

    def __call__(self, adapter: LowRank | None) -> Judged | None:
        if not self.held_out:
            return None
        nats, n_tokens, n_right = 0.0, 0, 0
        for at in range(0, len(self.held_out), EVALUATE_AT_ONCE):
            part = self.held_out[at : at + EVALUATE_AT_ONCE]
            n_part = sum(len(e.ids) - e.n_prompt for e in part)
            with torch.inference_mode():
                nats += float(loss_of(self._base, adapter, part)) * n_part
            n_tokens += n_part
            room = max(len(e.ids) - e.n_prompt for e in part) + N_ANSWER_SPARE
            answers = greedy(self._base, [e.ids[: e.n_prompt] for e in part], room,
                             self._tokenizer.eog_ids, adapter)  # fmt: skip
            n_right += sum(self._tokenizer.decode(answer).strip() == e.completion.strip()
                           for answer, e in zip(answers, part, strict=True))  # fmt: skip
        return Judged(nats=nats / n_tokens, accuracy=n_right / len(self.held_out))


def _run(job: _Job) -> TrainReport:
    params = job.params
    judged_base = job.judge(None)
    began = time.perf_counter()
    adapter = new_adapter(job.base, params)
    losses = _learn(job, adapter)
    seconds = time.perf_counter() - began
    judged = job.judge(adapter)
    details: dict[str, Any] = {
        "steps": len(losses), "planned_steps": params.n_steps, "batch": params.n_batch,
        "lr": params.lr, "warmup": params.n_warmup, "weight_decay": params.weight_decay,
        "seed": params.seed, "base_dtype": str(job.base.dtype).removeprefix("torch."),
        "threads": params.threads, "prompts": "chat template" if params.chat else "plain text",
        "examples": len(job.learned), "held_out": len(job.judge.held_out),
    }  # fmt: skip
    for name, found in (("base", judged_base), ("adapter", judged)):
        if found is not None:
            details |= {f"held_out_nats_{name}": round(found.nats, 4),
                        f"held_out_exact_{name}": round(found.accuracy, 4)}  # fmt: skip
    card = Card(
        base_name=job.base_name, license=job.license, rank=params.rank, alpha=params.alpha,
        targets=params.targets, store=params.store, about=params.about, details=details,
        losses=tuple(losses),
    )  # fmt: skip
    matrices = {key: (a.detach().numpy(), b.detach().numpy())
                for key, (a, b) in adapter.pairs.items()}  # fmt: skip
    n_bytes = write_folder(job.out, matrices, job.base.hparams, card, replace=params.replace)
    return TrainReport(
        out=job.out, n_bytes=n_bytes, n_learned=len(job.learned),
        n_params=sum(matrix.numel() for matrix in adapter.parameters()),
        n_held_out=len(job.judge.held_out), losses=tuple(losses), base=judged_base,
        adapter=judged, seconds=seconds,
    )  # fmt: skip


def _learn(job: _Job, adapter: LowRank) -> list[float]:
    """Run the optimiser; return the loss of every step."""
    params, parameters = job.params, adapter.parameters()
    optimiser = torch.optim.AdamW(parameters, lr=params.lr, weight_decay=params.weight_decay)
    losses = []
    plan = batches(job.learned, params.n_batch, params.n_steps, params.seed)
    for step, batch in enumerate(plan):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(params, step)
        loss = loss_of(job.base, adapter, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ComputeError(f"the loss of step {step + 1} is {value}; nothing was written: "
                               f"train with a lower --lr than {params.lr:g}")  # fmt: skip
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimiser.step()
        losses.append(value)
        job.progress(TrainStep(phase="train", n_done=step + 1, n_total=params.n_steps, loss=value))
        if len(losses) >= N_STOP and sum(losses[-N_STOP:]) < N_STOP * params.stop_nats:
            break
    return losses


def learning_rate(params: TrainParams, step: int) -> float:
    """Return the rate of a step, counted from 0: a linear rise, then half a cosine."""
    if step < params.n_warmup:
        return params.lr * (step + 1) / params.n_warmup
    done = (step - params.n_warmup) / max(1, params.n_steps - params.n_warmup)
    return params.lr * 0.5 * (1 + math.cos(math.pi * done))


def _check(params: TrainParams) -> None:
    """Refuse parameters that no model could be trained with."""
    counts = {"rank": 1024, "n_steps": 1_000_000, "n_batch": 4096, "max_tokens": 1 << 16,
              "threads": 512}  # fmt: skip
    for name, high in counts.items():
        value = getattr(params, name)
        if not 1 <= value <= high:
            raise UsageError(f"{name} is {value}, outside 1 to {high}")
    if not 0 <= params.n_warmup <= params.n_steps:
        raise UsageError(f"{params.n_warmup} warm-up steps do not fit {params.n_steps} steps")
    if params.n_held_out < 0:
        raise UsageError(f"{params.n_held_out} examples cannot be held out")
    for name in ("alpha", "lr"):
        if not (math.isfinite(getattr(params, name)) and getattr(params, name) > 0):
            raise UsageError(f"{name} is {getattr(params, name)}, not a positive number")
    for name in ("weight_decay", "stop_nats"):
        if not (math.isfinite(getattr(params, name)) and getattr(params, name) >= 0):
            raise UsageError(f"{name} is {getattr(params, name)}, which is not 0 or more")
    strange = sorted(set(params.targets) - set(PARTS))
    if strange or not params.targets or len(set(params.targets)) != len(params.targets):
        raise UsageError(f"targets are {','.join(params.targets) or 'none'}; name some of "
                         f"{','.join(PARTS)}, each once")  # fmt: skip
