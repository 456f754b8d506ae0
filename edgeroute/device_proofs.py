"""What was proved of devices with a model, and where that is kept.

A proof says that a device answered like the processor, or did not, and how quick both were. The
file is a note in the user's cache folder: what in it is not of the right form is taken for not
there, and a proof never makes anybody open anything.
"""

import functools
import hashlib
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from edgeroute import __version__
from edgeroute.lever_proofs import model_id
from edgeroute.runtime.board_files import Tree
from edgeroute.runtime.cache_file import cache_path, read_entries, write_entries
from edgeroute.runtime.device import RPC_PREFIX, DeviceInfo
from edgeroute.runtime.ggml.lib import libraries
from edgeroute.runtime.gguf import GGUFFile

FOLDER: Final = "devices"
VALID_S: Final = 90 * 24 * 3600
VALID_RPC_S: Final = 7 * 24 * 3600
"""What stands behind an address may change without a trace here."""
MAX_FILE_BYTES, MAX_ENTRIES, MAX_CHARS = 1 << 17, 32, 300
_VERSION: Final = 1
_DRIVERS: Final = (
    "proc/driver/nvidia/version",
    "etc/nv_tegra_release",
    "sys/module/amdgpu/version",
)
_MOST: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a proof holds for. Any difference makes it void.

    Attributes:
        device: ggml's name, or the address that was named.
        description: what the device calls itself, and its memory.
        driver: of the device as far as the system tells, hashed.
        version: edgeroute's, ggml's, and the sizes of ggml's libraries, which differ by build.
        model: the file's identity: see `model_id`.
        kv_type: how keys and values are kept; other kernels read other types.
    """

    device: str
    description: str
    driver: str
    version: str
    model: str
    kv_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProof:
    """A device against the processor, on layers of a model.

    Attributes:
        holds: it answers like the processor.
        nmse: squared error over power, mean over all tokens' states and logits.
        worst_nmse: of the worst token.
        n_changed: tokens whose likeliest successor changed though it was clear.
        n_tokens: tokens that were compared.
        n_layers: layers of the model that were.
        prefill_s: seconds per token of a prompt, through those layers.
        decode_s: seconds per token that is decoded alone, likewise.
        cpu_prefill_s: the processor's.
        cpu_decode_s: the processor's.
        when: seconds since 1970.
        note: a sentence: why it does not hold.
    """

    holds: bool
    nmse: float
    worst_nmse: float
    n_changed: int
    n_tokens: int
    n_layers: int
    prefill_s: float
    decode_s: float
    cpu_prefill_s: float
    cpu_decode_s: float
    when: int
    note: str = ""

    def answer_s(self, n_prompt: int = 512, n_answer: int = 128) -> tuple[float, float]:
        """Return the seconds of a usual answer, through those layers: the device's, and the CPU's.

        Args:
            n_prompt: tokens of the prompt.
            n_answer: tokens of the answer.
        """
        return (
            n_prompt * self.prefill_s + n_answer * self.decode_s,
            n_prompt * self.cpu_prefill_s + n_answer * self.cpu_decode_s,
        )

    @property
    def gain(self) -> float:
        """How many times as quick as the processor the device is at a usual answer."""
        device_s, cpu_s = self.answer_s()
        return cpu_s / device_s if device_s > 0 else 0.0


def subject(info: DeviceInfo, file: GGUFFile, kv_type: str = "f16") -> Subject:
    """Say what a proof that is made now would hold for."""
    far = info.name.startswith(RPC_PREFIX)  # all that it says of itself is an address of ours
    text = f"{info.description}, {info.memory_total_bytes} bytes"
    return Subject(
        device=_short(info.name), description="elsewhere" if far else _short(text),
        driver="" if far else _driver(), version=_version(), model=model_id(file),
        kv_type=kv_type,
    )  # fmt: skip


def load_proof(wanted: Subject) -> DeviceProof | None:
    """Return the proof for a subject; None where there is none, or it is too old."""
    found = _read(_path(wanted)).get(wanted)
    valid_s = VALID_RPC_S if wanted.device.startswith(RPC_PREFIX) else VALID_S
    return found if found is not None and 0 <= time.time() - found.when < valid_s else None


def save_proof(made_for: Subject, proof: DeviceProof) -> None:
    """Keep a proof in the place of an older one; without a writable cache folder it is not kept."""
    entries = _read(_path(made_for))
    entries.pop(made_for, None)
    entries[made_for] = proof
    kept = list(entries.items())[-MAX_ENTRIES:]
    write_entries(_path(made_for), _VERSION, [
        {"subject": asdict(about), "proof": asdict(each)} for about, each in kept
    ])  # fmt: skip


def _short(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:MAX_CHARS]


def _path(about: Subject) -> Path:
    return cache_path(FOLDER) / f"{about.model}.json"


@functools.cache
def _driver() -> str:
    """Identify the drivers: their own files, and the system's release, which has the others."""
    tree = Tree(Path("/"))
    texts = [tree.line(path) for path in _DRIVERS] + [platform.release(), sys.platform]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


@functools.cache
def _version() -> str:
    libs = libraries()
    sizes = sorted((each.name, each.stat().st_size) for each in libs.folder.glob("*ggml*"))
    build = hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]
    return f"{__version__}/{libs.version}/{build}"


def _read(path: Path) -> dict[Subject, DeviceProof]:
    """Read a file as far as it can be believed."""
    entries: dict[Subject, DeviceProof] = {}
    for each in read_entries(path, _VERSION, MAX_FILE_BYTES)[-MAX_ENTRIES:]:
        if not isinstance(each, dict):
            continue
        about, proof = _subject_of(each.get("subject")), _proof_of(each.get("proof"))
        if about is not None and proof is not None:
            entries[about] = proof
    return entries


def _subject_of(given: object) -> Subject | None:
    names: Sequence[str] = tuple(Subject.__dataclass_fields__)
    if not isinstance(given, dict) or given.keys() != set(names):
        return None
    return Subject(**given) if all(_is_text(value) for value in given.values()) else None


def _proof_of(given: object) -> DeviceProof | None:
    """Take a proof whose every value is of its kind and within bounds."""
    if not isinstance(given, dict) or given.keys() != DeviceProof.__dataclass_fields__.keys():
        return None
    good = (
        isinstance(given["holds"], bool) and _is_text(given["note"])
        and all(_is_number(given, name) for name in (
            "nmse", "worst_nmse", "prefill_s", "decode_s", "cpu_prefill_s", "cpu_decode_s"))
        and all(type(given[name]) is int and 0 <= given[name] < 1 << 53
                for name in ("n_changed", "n_tokens", "n_layers", "when"))
    )  # fmt: skip
    return DeviceProof(**given) if good else None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_CHARS and (value.isprintable() or not value)


def _is_number(given: Mapping[str, Any], name: str) -> bool:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and 0 <= value <= _MOST
