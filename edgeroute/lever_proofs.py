"""What was proven of each lever on this machine and model, and where that is kept.

`edgeroute bench levers` writes it; a Runtime with levers="proven" reads it. The file is a note in
the user's cache folder: what in it is not of the right form is taken for not there.
"""

import functools
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import psutil

from edgeroute import __version__
from edgeroute.runtime import machine
from edgeroute.runtime.cache_file import cache_path, read_entries, replace_text
from edgeroute.runtime.ggml.lib import libraries
from edgeroute.runtime.gguf import GGUFFile

Verdict = Literal["wins", "loses", "level", "lossy", "failed"]
"""`wins` and `loses` where the interval of the gain excludes 0; `level` where it does not;
`lossy` gains, but at a cost in quality above what is allowed; `failed` could not be run."""

VALID_S: Final = 90 * 24 * 3600
"""A proof older than this counts for nothing: machines and disks age."""
ALL_EIGHTHS: Final = 16
"""Eighths of a model's bytes from which on a budget counts as one for everything."""
FOLDER: Final = "levers"
MAX_FILE_BYTES: Final = 1 << 18
MAX_ENTRIES, MAX_PROOFS, MAX_SETTINGS = 16, 96, 8
_VERSION: Final = 1
_HEAD_BYTES: Final = 1 << 16
_WORD: Final = re.compile(r"[A-Za-z0-9_.:+-]{1,64}")
_NOTE_CHARS: Final = 300
_MOST: Final = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What a proof holds for. Any difference makes it void.

    Attributes:
        model: the file's identity: its size and a hash of its header.
        machine: processor, cores, memory and the disk's kind, hashed; no serial numbers.
        power_mode: of the board or the power supply (`ac`, `battery`), where there is one.
        version: edgeroute's, and ggml's.
        budget: memory budget in steps of an eighth of the model's bytes: levers that pay at one
            budget lose at another.
    """

    model: str
    machine: str
    power_mode: str
    version: str
    budget: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One lever against off.

    Attributes:
        lever: its name, such as `prefetch` or `speculate`.
        settings: the Runtime settings that it was measured with, such as {"prefetch": "gate"}.
        off: those that it was measured against.
        gain: ratio of seconds per token without it to seconds with it, less 1: 0.1 is 10 %
            quicker. `low` and `high` bound it with 95 % confidence.
        kl: nats per token against the model without it; 0 where answers are the same bits.
        n_pairs: alternating pairs measured.
        when: seconds since 1970.
        note: a sentence, for tables.
    """

    lever: str
    settings: Mapping[str, Any]
    off: Mapping[str, Any]
    gain: float
    low: float
    high: float
    kl: float
    verdict: Verdict
    n_pairs: int
    when: int
    note: str = ""


def fingerprint(file: GGUFFile, budget_bytes: int) -> Fingerprint:
    """Say what a proof that is made now would hold for.

    Args:
        file: the model.
        budget_bytes: memory for all of it.
    """
    eighths = 8 * budget_bytes // max(1, file.size_bytes)
    return Fingerprint(
        model=model_id(file), machine=_machine_id(_disk_kind(file.path)), power_mode=_power_mode(),
        version=f"{__version__}/{libraries().version}",
        budget="all" if eighths >= ALL_EIGHTHS else f"{eighths}/8",
    )  # fmt: skip


def model_id(file: GGUFFile) -> str:
    """Tell model files apart: a hash of the size and of both ends of the header.

    The beginning has the settings, the end the places of all tensors. That costs less than a
    millisecond, which a hash of a header with a vocabulary of megabytes would not.
    """
    digest = hashlib.sha256(f"{file.size_bytes} {file.data_offset}".encode())
    with file.path.open("rb") as raw:
        digest.update(raw.read(min(_HEAD_BYTES, file.data_offset)))
        raw.seek(max(0, file.data_offset - _HEAD_BYTES))
        digest.update(raw.read(min(_HEAD_BYTES, file.data_offset)))
    return digest.hexdigest()[:32]


def any_proofs() -> bool:
    """Tell whether there can be proofs at all, at the cost of one look at the file system."""
    return cache_path(FOLDER).is_dir()


def load_proofs(wanted: Fingerprint) -> tuple[Proof, ...]:
    """Return the proofs that hold for a fingerprint; none where there are none, or all too old."""
    return _young(_read(_path(wanted)).get(wanted, ()))


def save_proofs(made_for: Fingerprint, proofs: Sequence[Proof]) -> None:
    """Keep proofs, in the place of older ones of the same levers with the same settings.

    The oldest leave where there are too many. Without a writable cache folder nothing is kept.
    """
    entries = _read(_path(made_for))
    known = {_key(proof): proof for proof in _young(entries.pop(made_for, ()))}
    for proof in proofs:
        known.pop(_key(proof), None)
        known[_key(proof)] = proof
    entries[made_for] = tuple(known.values())[-MAX_PROOFS:]
    kept = list(entries.items())[-MAX_ENTRIES:]
    while (text := _text(kept)) and len(text) > MAX_FILE_BYTES and len(kept) > 1:
        del kept[0]
    replace_text(_path(made_for), text)


def _young(proofs: Sequence[Proof]) -> tuple[Proof, ...]:
    now = time.time()
    return tuple(proof for proof in proofs if 0 <= now - proof.when < VALID_S)


def _key(proof: Proof) -> str:
    return json.dumps([proof.lever, proof.settings, proof.off], sort_keys=True)


def _path(made_for: Fingerprint) -> Path:
    return cache_path(FOLDER) / f"{made_for.model}.json"


def _text(entries: Sequence[tuple[Fingerprint, Sequence[Proof]]]) -> str:
    return json.dumps({"version": _VERSION, "entries": [
        {"fingerprint": asdict(made_for), "proofs": [asdict(each) for each in proofs]}
        for made_for, proofs in entries
    ]})  # fmt: skip


def _read(path: Path) -> dict[Fingerprint, tuple[Proof, ...]]:
    """Read a file as far as it can be believed."""
    entries: dict[Fingerprint, tuple[Proof, ...]] = {}
    for each in read_entries(path, _VERSION, MAX_FILE_BYTES)[-MAX_ENTRIES:]:
        made_for = _fingerprint_of(each)
        proofs = each.get("proofs") if made_for is not None else None
        if made_for is None or not isinstance(proofs, list):
            continue
        checked = (_proof_of(proof) for proof in proofs[-MAX_PROOFS:])
        entries[made_for] = tuple(proof for proof in checked if proof is not None)
    return entries


def _fingerprint_of(entry: object) -> Fingerprint | None:
    given = entry.get("fingerprint") if isinstance(entry, dict) else None
    names = Fingerprint.__dataclass_fields__
    if not isinstance(given, dict) or given.keys() != names.keys():
        return None
    if not all(isinstance(value, str) and len(value) <= 128 for value in given.values()):
        return None
    return Fingerprint(**given)


def _proof_of(given: object) -> Proof | None:
    """Take a proof whose every value is of its kind and within bounds."""
    if not isinstance(given, dict) or given.keys() != Proof.__dataclass_fields__.keys():
        return None
    numbers = [given[name] for name in ("gain", "low", "high", "kl")]
    counts = [given[name] for name in ("n_pairs", "when")]
    good = (
        _is_word(given["lever"])
        and isinstance(given["note"], str) and len(given["note"]) <= _NOTE_CHARS
        and given["verdict"] in get_args(Verdict)
        and all(isinstance(each, int | float) and not isinstance(each, bool)
                and math.isfinite(each) and abs(each) <= _MOST for each in numbers)
        and all(type(each) is int and 0 <= each < 1 << 53 for each in counts)
        and _are_settings(given["settings"]) and _are_settings(given["off"])
    )  # fmt: skip
    return Proof(**given) if good else None


def _is_word(value: object) -> bool:
    """No paths: a proof must not make a Runtime open anything."""
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _are_settings(given: object) -> bool:
    if not isinstance(given, dict) or len(given) > MAX_SETTINGS:
        return False
    return all(
        _is_word(name) and (value is None or isinstance(value, bool) or _is_word(value)
                            or (type(value) is int and abs(value) < 1 << 53))
        for name, value in given.items()
    )  # fmt: skip


@functools.cache
def _machine_id(disk_kind: str) -> str:
    memory_gib = round(psutil.virtual_memory().total / 2**30)
    facts = (processor_name(), platform.machine(), machine.usable_cores(), memory_gib, disk_kind)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def processor_name() -> str:
    """Return what the processor calls itself."""
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                head = file.read(1 << 14)
        except OSError:
            head = ""
        for line in head.splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    return platform.processor() or platform.machine()


def _disk_kind(path: Path) -> str:
    """Tell a spinning disk from a solid one, where Linux says so."""
    if sys.platform != "linux":
        return ""
    try:
        device = os.stat(path).st_dev
        block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
        for queue in (block / "queue", block.resolve().parent / "queue"):  # of a disk, a partition
            if (queue / "rotational").is_file():
                return (queue / "rotational").read_text().strip()[:8]
    except OSError:
        return ""  # a network file system, say
    return ""


def _power_mode() -> str:
    """Return the mode of a board, or of the power supply."""
    from edgeroute.runtime.board import board  # read only where there are proofs

    return board().power_mode or ""
