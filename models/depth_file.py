"""Depth files: plans of what to leave out of one model, and the stand-ins they need.

A GGUF file of architecture `edgeroute-depth`, written by `edgeroute calibrate`, that names the
model and the text it was made from. Nothing in it is trusted: it fits the model or is refused.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Final

import platformdirs

from edgeroute.models.base import Hparams
from edgeroute.models.standins import BRIDGE_TENSORS, PARTS, tensor_name
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import DepthFileError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.gguf_metadata import quote
from edgeroute.runtime.weights import TensorSpec, Use

ARCH: Final = "edgeroute-depth"
VERSION: Final = 1
SUFFIX: Final = ".depth"
KEY_VERSION, KEY_MODEL = "edgeroute.depth.version", "edgeroute.depth.model"
KEY_DATA, KEY_PLANS = "edgeroute.depth.data", "edgeroute.depth.plans"

_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10
_STAND_IN = re.compile(
    rf"([a-z0-9._-]{{1,64}})/blk\.(\d{{1,4}})\.({'|'.join(PARTS)})\.({'|'.join(BRIDGE_TENSORS)})"
)
_ELEMENTWISE: Final = frozenset({"norm", "bias", "before"})


def fingerprint(file: GGUFFile) -> str:
    """Tell model files apart: sha256 over the size, the header, and samples of the weights.

    Reads at most 4 MiB of the weights, so that it costs nothing beside loading.
    """
    digest = hashlib.sha256(str(file.size_bytes).encode())
    with file.path.open("rb") as raw:
        left = file.data_offset
        while left > 0 and (block := raw.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        span = max(0, file.size_bytes - file.data_offset - _SAMPLE_BYTES)
        for i in range(_SAMPLES):
            raw.seek(file.data_offset + span * i // (_SAMPLES - 1))
            digest.update(raw.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def depth_paths(model: GGUFFile, suffix: str = SUFFIX) -> tuple[Path, Path]:
    """Return where a model's depth file is: beside it, or in the user's folder."""
    beside = model.path.with_name(model.path.name.removesuffix(".gguf") + suffix)
    mine = platformdirs.user_data_path("edgeroute") / "depth"
    return beside, mine / f"{fingerprint(model)[:32]}{suffix}"


def find_depth_file(model: GGUFFile, suffix: str = SUFFIX) -> Path | None:
    """Return the depth file of a model, or None where nobody has calibrated it."""
    return next((path for path in depth_paths(model, suffix) if path.is_file()), None)


class DepthFile(Closing):
    """A depth file that belongs to a model; use it as a context manager or call `close`.

    Attributes:
        plans: JSON text of the plans, not checked here.
        data: sha256 of the text that it was made from.
        file: the mapped file, which the stand-ins' tensors stay in.
    """

    def __init__(
        self, path: Path, model: GGUFFile, hparams: Hparams, *, bridges: bool = False
    ) -> None:
        """Open and check a depth file, or with `bridges` a drafts file: see models/standins.py.

        Raises:
            ModelFileError: it is no GGUF file, or a malformed one.
            DepthFileError: it is for another model or version, or its tensors fit nothing.
        """
        self.file = GGUFFile.open(path)
        try:
            self._check_header(fingerprint(model), model.path.name)
            self.plans: str = self.file.metadata.get_str(KEY_PLANS)
            self.data: str = self.file.metadata.get_str(KEY_DATA)
            self._found = _sort(self.file, hparams)
            if not bridges:
                self._refuse_bridges()
        except BaseException:
            self.file.close()
            raise

    def specs(self, plan: str, wanted: set[tuple[int, str]]) -> list[TensorSpec]:
        """List the tensors of a plan's stand-ins.

        Args:
            plan: its name.
            wanted: layer and sub-block (`attn`, `ffn`) of everything that it approximates.

        Raises:
            DepthFileError: a stand-in is missing.
        """
        specs: list[TensorSpec] = []
        for il, part in sorted(wanted):
            both = {(il, "attn"), (il, "ffn")} <= wanted
            name = "layer" if both and (plan, il, "layer") in self._found else part
            found = self._found.get((plan, il, name))
            if found is None:
                raise DepthFileError(
                    f"plan {plan!r} of {self.file.path.name} approximates {part} of layer {il}, "
                    "but has no stand-in for it; calibrate the model again"
                )
            specs += [spec for spec in found if spec not in specs]
        return specs

    def close(self) -> None:
        """Unmap the file."""
        self.file.close()

    def _refuse_bridges(self) -> None:
        """Only drafts know what came before: elsewhere a bridge would read what nobody wrote."""
        for found in self._found.values():
            for spec in found:
                if spec.name.endswith(".before"):
                    raise DepthFileError(
                        f"{self.file.path.name} has a tensor {spec.name}, which only drafts can "
                        "use; calibrate the model again"
                    )

    def _check_header(self, wanted: str, model: str) -> None:
        meta, name = self.file.metadata, self.file.path.name
        arch = meta.get_str("general.architecture")
        if arch != ARCH:
            raise DepthFileError(
                f"{name} is a file of architecture {quote(arch)}, not of depth plans; "
                "`edgeroute calibrate MODEL` writes those"
            )
        version = meta.get_int(KEY_VERSION, low=0, high=1 << 31)
        if version != VERSION:
            raise DepthFileError(
                f"{name} has version {version} of depth files, this program reads {VERSION}; "
                "calibrate the model again"
            )
        made_for = meta.get_str(KEY_MODEL)
        if made_for != wanted:
            raise DepthFileError(
                f"{name} was made for another model than {model} (fingerprint "
                f"{quote(made_for[:16])}, not {wanted[:16]}); calibrate this one"
            )


_Found = dict[tuple[str, int, str], list[TensorSpec]]


def _sort(file: GGUFFile, hparams: Hparams) -> _Found:
    """Sort tensors into stand-ins, and check that each is a whole one of this model's widths.

    Raises:
        DepthFileError: a name, an extent or a part of one is wrong.
    """
    parts: dict[tuple[str, int, str], dict[str, tuple[int, ...]]] = {}
    for name, info in file.tensors.items():
        match = _STAND_IN.fullmatch(name)
        if match is None or int(match[2]) >= hparams.n_layer:
            raise DepthFileError(
                f"{file.path.name} has a tensor {quote(name)}, which stands for nothing in a "
                f"model of {hparams.n_layer} layers"
            )
        parts.setdefault((match[1], int(match[2]), match[3]), {})[match[4]] = info.ne
    return {key: _stand_in(file, key, given, hparams) for key, given in parts.items()}


def _stand_in(
    file: GGUFFile, key: tuple[str, int, str], given: dict[str, tuple[int, ...]], hparams: Hparams
) -> list[TensorSpec]:
    """Check one stand-in's tensors by their extents."""
    whole = [{"a", "b"} & given.keys(), {"gate", "up", "down"} & given.keys()]
    if "norm" not in given or [len(each) for each in whole] not in ([2, 0], [0, 3], [2, 3]):
        raise DepthFileError(
            f"the stand-in {tensor_name(*key, 'norm').removesuffix('.norm')} of {file.path.name} "
            f"has only {', '.join(sorted(given))}; it needs norm, and a with b or gate with up "
            "and down"
        )
    n = hparams.n_embd
    n_in = 2 * n if "before" in given else n
    rank = _inner(given, "a", most=n)
    width = _inner(given, "gate", most=max(hparams.n_ff, 4 * n))
    extents = {"norm": (n,), "bias": (n,), "before": (n,), "a": (n_in, rank), "b": (rank, n),
               "gate": (n_in, width), "up": (n_in, width), "down": (width, n)}  # fmt: skip
    specs: list[TensorSpec] = []
    for tensor, ne in given.items():
        name = tensor_name(*key, tensor)
        if ne != extents[tensor]:
            raise DepthFileError(
                f"tensor {name} of {file.path.name} has extents {list(ne)}; a model of width {n} "
                f"takes {list(extents[tensor])}"
            )
        use: Use = "elementwise" if tensor in _ELEMENTWISE else "mul_mat"
        specs.append(TensorSpec(name=name, ne=ne, use=use))
    return specs


def _inner(given: dict[str, tuple[int, ...]], tensor: str, *, most: int) -> int:
    """Return the second extent of a tensor, or one that nothing has where it is out of bounds."""
    ne = given.get(tensor, ())
    return ne[1] if len(ne) == 2 and 0 < ne[1] <= most else 0


def first_writable(beside: Path, mine: Path) -> Path:
    """Return where to write what was measured of a model: beside it, or in the user's folder.

    Raises:
        UsageError: nowhere.
    """
    if os.access(beside.parent, os.W_OK):
        return beside
    try:
        mine.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"neither {beside.parent} nor {mine.parent} can be written; name a file "
                         "by --out") from error  # fmt: skip
    return mine
