"""What a router has learned, in a file that survives a crash and trusts nobody.

File (little endian): magic, version, bytes of the header, the header as JSON, then F64
values: the recent contexts, and per arm the upper triangle of its gram matrix and its
moments; last the SHA-256 of all before. Lengths follow from the header alone and must be
the file's. A file is replaced whole or not at all.
"""

import hashlib
import json
import math
import os
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Never

import numpy as np
from numpy.typing import NDArray

from edgeroute.offload.linucb import MAX_ARMS, MAX_D, ArmStatistics
from edgeroute.offload.polar_controller import MAX_CONTEXTS, EpochCounts
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.whole_file import replacing

MAGIC: Final = b"EDGEPOLR"
VERSION: Final = 1
MAX_HEADER_BYTES: Final = 16 << 20
MAX_TEXT_CHARS: Final = 255
MAX_VALUE: Final = 1e12  # of a sum: more requests than any device serves

_START: Final = struct.Struct("<8sII")
_HASH_BYTES: Final = 32
_F64: Final = np.dtype("<f8")
Vector = NDArray[np.float64]


class PolarStateError(EdgerouteError):
    """A router's saved state is damaged, hostile, or of other features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedArm:
    """What is known of an adapter, or of the base model (`name` None)."""

    name: str | None
    identity: str = ""
    cost_s: float = 0.0
    statistics: ArmStatistics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolarState:
    """All of a router that survives a restart; `contexts` is F64 (n_contexts, d)."""

    d: int
    space: str
    arms: tuple[SavedArm, ...]
    contexts: Vector
    counts: EpochCounts
    resident: tuple[str, ...]


def write_state(path: Path, state: PolarState) -> None:
    """Save a state; whatever happens, `path` has the old file or the new one.

    Raises:
        OSError: it could not be written; the old file is untouched.
    """
    content = encode_state(state)
    with replacing(path) as part:
        part.write_bytes(content)


def read_state(path: Path, set_aside: bool = False) -> PolarState | None:
    """Read a saved state; None where there is no file.

    Args:
        path: of the file.
        set_aside: rename a file that is refused to `<name>.refused` and return None, so
            that the caller starts afresh and nothing is lost.

    Raises:
        PolarStateError: the file is not a state that this version wrote whole, and
            `set_aside` is False.
        OSError: it cannot be read, or not be set aside.
    """
    if not path.exists():
        return None
    try:
        return decode_state(_read(path), str(path))
    except PolarStateError:
        if not set_aside:
            raise
        os.replace(path, path.with_name(path.name + ".refused"))
        return None


def _read(path: Path) -> bytes:
    limit = _file_bytes(MAX_HEADER_BYTES, MAX_D, MAX_CONTEXTS, MAX_ARMS)
    if not path.is_file():
        raise PolarStateError(f"the router's state {path} is not a file; delete it")
    size = path.stat().st_size
    if size > limit:
        raise PolarStateError(
            f"the router's state {path} has {size} bytes, more than the {limit} that any has; "
            "delete it to start afresh"
        )
    with path.open("rb") as file:
        return file.read(limit + 1)


def _n_values(d: int, n_contexts: int, n_arms: int) -> int:
    return n_contexts * d + n_arms * (d * (d + 1) // 2 + d)


def _file_bytes(header: int, d: int, n_contexts: int, n_arms: int) -> int:
    values = _F64.itemsize * _n_values(d, n_contexts, n_arms)
    return _START.size + header + values + _HASH_BYTES


def encode_state(state: PolarState) -> bytes:
    """Return a state's file. Arms without statistics are written with zeros."""
    d = state.d
    upper = np.triu_indices(d)
    values = [state.contexts.reshape(-1)]
    arms = []
    for arm in state.arms:
        known = arm.statistics or ArmStatistics(
            gram=np.zeros((d, d)), moment=np.zeros(d), n_plays=0.0
        )
        values += [known.gram[upper], known.moment]
        arms.append([arm.name, arm.identity, arm.cost_s, known.n_plays])
    header = json.dumps(
        {
            "d": d, "space": state.space, "n_contexts": len(state.contexts), "arms": arms,
            "counts": asdict(state.counts), "resident": list(state.resident),
        },
        separators=(",", ":"),
    ).encode()  # fmt: skip
    content = _START.pack(MAGIC, VERSION, len(header)) + header
    content += np.concatenate(values).astype(_F64).tobytes()
    return content + hashlib.sha256(content).digest()


def decode_state(content: bytes, source: str) -> PolarState:
    """Check a state's file and return the state; `source` names it in errors.

    Raises:
        PolarStateError: it is not what `encode_state` makes.
    """
    return _Checker(content, source).read()


class _Checker:
    """Parses a file that nobody vouches for; each step compares before it uses."""

    def __init__(self, content: bytes, source: str) -> None:
        self._content = content
        self._source = source

    def fail(self, reason: str) -> Never:
        raise PolarStateError(
            f"the router's state {self._source} cannot be used: {reason}; delete it to start afresh"
        )

    def read(self) -> PolarState:
        header, start = self._header()
        d = self._int(header["d"], 1, MAX_D, "d")
        n_contexts = self._int(header["n_contexts"], 0, MAX_CONTEXTS, "n_contexts")
        names = header["arms"]
        if not isinstance(names, list) or len(names) > MAX_ARMS:
            self.fail(f"it does not list at most {MAX_ARMS} arms")
        wanted = _file_bytes(start - _START.size, d, n_contexts, len(names))
        if len(self._content) != wanted:
            self.fail(f"it has {len(self._content)} bytes, its header says {wanted}")
        if hashlib.sha256(self._content[:-_HASH_BYTES]).digest() != self._content[-_HASH_BYTES:]:
            self.fail("its checksum is wrong")
        values = np.frombuffer(self._content[start:-_HASH_BYTES], dtype=_F64).astype(np.float64)
        if not np.all(np.abs(values) <= MAX_VALUE):
            self.fail(f"it has values that are no numbers or beyond {MAX_VALUE:g}")
        contexts, sums = np.split(values, [n_contexts * d])
        arms = self._arms(names, sums.reshape(len(names), -1) if names else sums, d)
        return PolarState(
            d=d, space=self._text(header["space"], "its feature space"), arms=arms,
            contexts=contexts.reshape(n_contexts, d), counts=self._counts(header["counts"]),
            resident=self._resident(header["resident"], {arm.name for arm in arms}),
        )  # fmt: skip

    def _header(self) -> tuple[dict[str, Any], int]:
        size = len(self._content)
        if size < _START.size + _HASH_BYTES:
            self.fail(f"it has {size} bytes, too few for a header")
        magic, version, n_header = _START.unpack_from(self._content)
        if magic != MAGIC:
            self.fail(f"it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            self.fail(f"it is of version {version}, and only {VERSION} is read")
        end = _START.size + n_header
        if n_header > MAX_HEADER_BYTES or end + _HASH_BYTES > size:
            self.fail(f"it claims a header of {n_header} bytes, more than it may have")
        try:
            header = json.loads(self._content[_START.size : end])
        except (ValueError, RecursionError) as error:
            self.fail(f"its header is not JSON ({str(error)[:80]})")
        keys = {"d", "space", "n_contexts", "arms", "counts", "resident"}
        if not isinstance(header, dict) or header.keys() != keys:
            self.fail(f"its header does not have exactly the keys {', '.join(sorted(keys))}")
        return header, end

    def _arms(self, given: list[object], sums: Vector, d: int) -> tuple[SavedArm, ...]:
        upper = np.triu_indices(d)
        arms: dict[str | None, SavedArm] = {}
        for entry, row in zip(given, sums, strict=True):
            if not isinstance(entry, list) or len(entry) != 4:
                self.fail("an arm is not a name, an identity, a cost and a count")
            name = None if entry[0] is None else self._text(entry[0], "an arm's name", 1)
            if name in arms:
                self.fail(f"the arm {name!r} comes twice")
            gram = np.zeros((d, d))
            gram[upper] = row[: len(upper[0])]
            gram = gram + np.triu(gram, 1).T
            self._check_gram(gram, name)
            arms[name] = SavedArm(
                name=name,
                identity=self._text(entry[1], f"the identity of {name!r}"),
                cost_s=self._float(entry[2], f"the cost of {name!r}"),
                statistics=ArmStatistics(
                    gram=gram,
                    moment=row[len(upper[0]) :].copy(),
                    n_plays=self._float(entry[3], f"the plays of {name!r}"),
                ),
            )
        return tuple(arms.values())

    def _check_gram(self, gram: Vector, name: str | None) -> None:
        """A sum of xxᵀ has no negative eigenvalue; with one, a confidence width is no number."""
        least = float(np.linalg.eigvalsh(gram)[0])
        if least < -1e-6 * max(1.0, float(np.abs(gram).max())):
            self.fail(f"the sums of {name!r} are none of any contexts (eigenvalue {least:g})")

    def _counts(self, given: object) -> EpochCounts:
        names = {entry.name for entry in fields(EpochCounts)}
        if not isinstance(given, dict) or given.keys() != names:
            self.fail(f"its counts are not exactly {', '.join(sorted(names))}")
        owed = self._float(given["owed_total"], "owed_total")
        whole = {name: self._int(given[name], 0, 1 << 53, name) for name in names - {"owed_total"}}
        return EpochCounts(**whole, owed_total=owed)

    def _resident(self, given: object, known: set[str | None]) -> tuple[str, ...]:
        if not isinstance(given, list) or len(given) > MAX_ARMS:
            self.fail("it does not list the resident adapters")
        names = [self._text(name, "a resident adapter's name", 1) for name in given]
        if len(set(names)) != len(names) or not known.issuperset(names):
            self.fail("a resident adapter comes twice, or is no arm")
        return tuple(names)

    def _text(self, value: object, what: str, least: int = 0) -> str:
        if not isinstance(value, str) or not least <= len(value) <= MAX_TEXT_CHARS:
            self.fail(f"{what[:80]} is no text of {least} to {MAX_TEXT_CHARS} characters")
        return value

    def _int(self, value: object, low: int, high: int, what: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(f"{what[:80]} is {str(value)[:40]}, not a number between {low} and {high}")
        return value

    def _float(self, value: object, what: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"{what[:80]} is {str(value)[:40]}, not a number")
        if not (0 <= value <= MAX_VALUE and math.isfinite(value)):
            self.fail(f"{what[:80]} is {str(value)[:40]}, not between 0 and {MAX_VALUE:g}")
        return float(value)
