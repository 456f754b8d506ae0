"""A dense llama or qwen2 file refactored into shared and routed experts, without training.

Every layer's feed-forward is cut along its neurons: those that always matter become a
shared expert, the rest equal experts among which a linear gate chooses per token. With all
experts chosen the result is the dense model; with fewer it is cheaper and worse, by how
much is measured on text kept apart and reported.
Source: Read-ME (arXiv 2410.19123) for the idea.
"""

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgeroute.runtime.errors import (
    CapacityError,
    ModelFileError,
    UnsupportedModelError,
    UsageError,
)
from edgeroute.runtime.gguf import GGMLType, GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.convert.moe_activations import DenseModel
from edgeroute.tools.convert.moe_layers import Quality, Refactoring, Windows
from edgeroute.tools.convert.moe_text import TextParams, default_windows, file_windows
from edgeroute.tools.convert.moe_writer import (
    FILE_TYPES,
    MoeShape,
    MoeWriter,
    copied,
    max_used,
    n_room,
)

Progress = Callable[[str, int, int], None]
"""Called with a phase, how much of it is done, and of how much."""

ARCHITECTURES: Final = ("llama", "qwen2")
N_WINDOW: Final = 512
MIN_TOKENS: Final = 2 * N_WINDOW
CHECKED_ONE_IN: Final = 8
"""For eight calibration tokens one more is kept apart to judge the result."""

SHARED_ONE_IN, MOST_EXPERTS, EXPERT_STEP = 8, 80, 32
"""Defaults: an eighth of the neurons shared, the rest in the narrowest experts, of 32 times
a power of two, that are at most 80."""

REPAIR_UP_TO_RATIO: Final = 0.5
"""Active share up to which the down projections are refitted unless told otherwise: above it
the repair gains nothing on text that it has not seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeParams:
    """What is wanted; None is the default for the model.

    Attributes:
        n_expert: routed experts of a layer.
        n_shared: neurons of the shared expert.
        n_used: experts that run for each token, stored as the file's default.
        n_tokens: calibration tokens.
        seed: of the text's order, samples and first centres.
        repair: whether down projections are refitted to the routing.
        weight_type: of the experts, a key of FILE_TYPES.
        texts: files of calibration text.
        replace: whether an existing target may be replaced.
    """

    n_expert: int | None = None
    n_shared: int | None = None
    n_used: int | None = None
    n_tokens: int = 20480
    seed: int = 1
    repair: bool | None = None
    weight_type: str = "q8_0"
    texts: tuple[Path, ...] = ()
    replace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeReport:
    """What was written, and what it costs on text kept apart."""

    out: Path
    n_bytes: int
    arch: str
    shape: MoeShape
    repaired: bool
    n_fitted: int
    quality: Quality
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        found = asdict(self.shape) | asdict(self.quality)
        found |= {name: getattr(self, name)
                  for name in ("n_bytes", "arch", "repaired", "n_fitted", "seconds")}  # fmt: skip
        found["path"] = str(self.out)
        found["ppl_dense"] = float(np.exp(self.quality.nats_dense))
        found["ppl_moe"] = float(np.exp(self.quality.nats_moe))
        return found


def convert(source: Path, out: Path, params: MoeParams, progress: Progress) -> MoeReport:
    """Refactor the dense file `source` into the file `out`.

    Raises:
        UsageError: counts that do not fit the model or each other, or too little text.
        UnsupportedModelError: not a model that this can refactor.
        ModelFileError: a malformed file, or a target that cannot be written.
        CapacityError: no room on the disk.
        In every case no target is left behind, and one that existed is untouched.
    """
    began = time.perf_counter()
    if out.exists() and not params.replace:
        raise UsageError(f"{out} exists; name another file, or give --force to replace it")
    with GGUFFile.open(source) as file:
        check_source(file)
        model = DenseModel(file)
        shape = plan_shape(model, params)
        fit, check = _windows(file, params)
        _check_disk(model, shape, out)
        repair = params.repair
        if repair is None:
            repair = shape.n_expert_used <= REPAIR_UP_TO_RATIO * shape.n_expert
        work = Refactoring(model, shape, fit, check, repair=repair, seed=params.seed)
        quality = _write(work, MoeWriter(model, shape, out), shape.n_layer, out, progress)
    return MoeReport(
        out=out, n_bytes=out.stat().st_size, arch=model.hparams.arch, shape=shape,
        repaired=repair, n_fitted=fit.size, quality=quality, seconds=time.perf_counter() - began,
    )  # fmt: skip


def _write(
    work: Refactoring, target: MoeWriter, n_layer: int, out: Path, progress: Progress
) -> Quality:
    """Refactor layer by layer into the file."""
    try:
        with target as writer:
            for il in range(n_layer):
                progress("layers", il, n_layer)
                writer.put_layer(il, work.layer(il))
            progress("layers", n_layer, n_layer)
            quality = work.quality()
            writer.finish()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"the disk became full while {out} was written; nothing of it "
                                "was kept: free some space") from error  # fmt: skip
        raise ModelFileError(
            f"cannot write {out}: {error.strerror or error}; nothing of it was kept"
        ) from error
    return quality


def check_source(file: GGUFFile) -> None:
    """Refuse what cannot be refactored, before anything is read.

    Raises:
        UnsupportedModelError: another architecture, a mixture of experts already, or a
            feature that stock llama.cpp's qwen2moe has not.
    """
    meta, name = file.metadata, file.path.name
    arch = meta.get_str("general.architecture")
    if f"{arch}.expert_count" in meta and meta.get_int(f"{arch}.expert_count") > 0:
        raise UnsupportedModelError(f"{name} has experts already; a dense model is needed")
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{name} is a {arch[:40]!r} model; dense {' and '.join(ARCHITECTURES)} models can be "
            "refactored"
        )
    if f"{arch}.attention.scale" in meta:
        raise UnsupportedModelError(f"{name} sets {arch}.attention.scale, which the target "
                                    "architecture, qwen2moe, has not")  # fmt: skip


def plan_shape(model: DenseModel, params: MoeParams) -> MoeShape:
    """Settle the counts.

    Raises:
        UsageError: they do not fit the model or each other, or more experts are to run than
            llama.cpp's graph has room for.
        UnsupportedModelError: the model has something that the target architecture has not.
    """
    _check_features(model)
    hp = model.hparams
    n_expert, n_shared = _split(hp.n_ff, params)
    width = (hp.n_ff - n_shared) // n_expert
    step = GGMLType[params.weight_type.upper()].block_size
    if width % step or n_shared % step or hp.n_embd % step:
        raise UsageError(
            f"experts of {width} neurons and {n_shared} shared ones, {hp.n_embd} wide, cannot be "
            f"stored as {params.weight_type}, which needs multiples of {step}; choose other "
            "--experts and --shared, or --type f16"
        )
    n_used = params.n_used if params.n_used is not None else max(1, n_expert // 2)
    if not 1 <= n_used <= n_expert:
        raise UsageError(f"--used is {n_used}; there are {n_expert} experts")
    shape = MoeShape(n_layer=hp.n_layer, n_embd=hp.n_embd, n_expert=n_expert,
                     n_expert_used=n_used, n_ff_exp=width, n_ff_shexp=n_shared,
                     weight_type=params.weight_type)  # fmt: skip
    if n_room(model, shape) is None:
        raise UsageError(
            f"--used is {n_used}, but llama.cpp's graph has room for {max_used(model, shape)} "
            f"experts a token in a file of {hp.n_layer} layers like this, and aborts beyond; "
            "choose fewer, wider experts (--experts) or a lower --used"
        )
    return shape


def _split(n_ff: int, params: MoeParams) -> tuple[int, int]:
    """Return the number of routed experts and of shared neurons."""
    n_expert, n_shared = params.n_expert, params.n_shared
    if n_expert is None:
        routed = n_ff - (n_ff // SHARED_ONE_IN if n_shared is None else n_shared)
        width = EXPERT_STEP
        while routed // width > MOST_EXPERTS:
            width *= 2
        n_expert = routed // width
        if n_shared is None:
            n_shared = n_ff - n_expert * width
    elif n_shared is None:
        width = (n_ff - n_ff // SHARED_ONE_IN) // n_expert // EXPERT_STEP * EXPERT_STEP
        n_shared = n_ff - n_expert * width
    n_routed = n_ff - n_shared
    if n_expert < 2 or n_shared < 1 or n_routed < n_expert or n_routed % n_expert:
        raise UsageError(
            f"{n_ff} neurons less {n_shared} shared ones are {n_routed}, which {n_expert} equal "
            "experts cannot share out; choose --shared and --experts so that they divide"
        )
    return n_expert, n_shared


def _check_features(model: DenseModel) -> None:
    hp, file = model.hparams, model.file
    lacking = None
    known = {*copied(model), *(f"blk.{il}.ffn_{part}.weight" for il in range(hp.n_layer)
                               for part in ("gate", "up", "down"))}  # fmt: skip
    strange = sorted(set(file.tensors) - known)
    if strange:
        lacking = f"the tensor {strange[0]}"
    elif hp.n_head * hp.n_embd_head_k != hp.n_embd:
        lacking = f"{hp.n_head} heads of {hp.n_embd_head_k} in a width of {hp.n_embd}"
    elif hp.rope.n_rot != hp.n_embd_head_k:
        lacking = f"rotation of {hp.rope.n_rot} of {hp.n_embd_head_k} values"
    elif hp.rope.ext_factor:
        lacking = "YaRN rope scaling"
    if lacking:
        raise UnsupportedModelError(
            f"{file.path.name} has {lacking[:100]}, which cannot be carried into a qwen2moe file"
        )


def _windows(file: GGUFFile, params: MoeParams) -> tuple[Windows, Windows]:
    """Return windows to fit to and windows kept apart."""
    if params.n_tokens < MIN_TOKENS:
        raise UsageError(f"--tokens is {params.n_tokens}; at least {MIN_TOKENS} are needed")
    n_check = max(2, params.n_tokens // N_WINDOW // CHECKED_ONE_IN)
    with Tokenizer.open(file) as tokenizer:

        def encode(text: str, special: bool) -> list[int]:
            return tokenizer.encode(text, add_special=special, parse_special=False)

        if params.texts:
            n_tokens = params.n_tokens + n_check * N_WINDOW
            found = file_windows(params.texts, encode,
                                 TextParams(n_tokens=n_tokens, seed=params.seed))  # fmt: skip
            return found[:-n_check], found[-n_check:]
        fit = default_windows(encode, TextParams(n_tokens=params.n_tokens, seed=params.seed))
        wanted = TextParams(n_tokens=n_check * N_WINDOW, seed=params.seed)
        return fit, default_windows(encode, wanted, held_out=True)


def _check_disk(model: DenseModel, shape: MoeShape, out: Path) -> None:
    """Refuse before hours of work what the disk cannot hold."""
    tensors = model.file.tensors
    names = [n for n in copied(model) if n in tensors]
    n_bytes = sum(tensors[name].nbytes for name in names)
    if model.hparams.tied:
        n_bytes += tensors["token_embd.weight"].nbytes
    kind = GGMLType(FILE_TYPES[shape.weight_type][0])
    n_bytes += 3 * shape.n_layer * kind.nbytes((shape.n_embd, model.hparams.n_ff))
    try:
        free = shutil.disk_usage(out.absolute().parent).free
    except OSError as error:
        raise UsageError(f"cannot write to {out.parent}: {error.strerror}") from error
    if n_bytes > free:
        raise CapacityError(f"{out} would need {format_bytes(n_bytes)}, but the disk has "
                            f"{format_bytes(free)} free; write elsewhere")  # fmt: skip
