"""What a pool is made of: profiles of its models, from a TOML file or a mapping, checked.

[pool]                                  # all optional
memory = "4GiB"
tolerance = 0.1
max_tries = 3
weights = { math = 2.0 }                # of the shortfall; 1 where not named

[models.small]
path = "qwen2.5-coder-0.5b-instruct"    # or a .gguf, relative to this file
capabilities = { math = 0.3, code = 0.5, reasoning = 0.3, language = 0.4, instruction = 0.4 }
cost = 0.025                            # seconds per token; measured where not given
memory = "1GiB"                         # pages what does not fit into it; optional
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgeroute.models.pull import resolve
from edgeroute.runtime.errors import CatalogueError, UsageError
from edgeroute.runtime.units import MIB, format_bytes, parse_bytes
from edgeroute.skippers.pool_choice import DIMENSIONS

Vector = npt.NDArray[np.float64]

MAX_FILE_BYTES: Final = MIB
MAX_MODELS: Final = 32
MAX_WEIGHT: Final = 1000.0
MAX_COST_S: Final = 3600.0
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_PATH_CHARS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """One model of a pool.

    Attributes:
        name: as callers and statistics call it.
        path: its file.
        capabilities: F64 (n_dimensions,), 0 to 1 each, in the order of DIMENSIONS.
        cost_s: seconds per generated token; None: measured.
        memory: bytes that it may take, the rest of it being paged; None: all of it in memory,
            or the pool's whole budget where that is less.
    """

    name: str
    path: Path
    capabilities: Vector
    cost_s: float | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PoolParams:
    """A pool's models and how it chooses.

    Attributes:
        models: their profiles, by name.
        source: what messages call the configuration.
        memory: budget over all open models, in bytes; None: measured when the pool opens.
        tolerance: shortfall that a capable model may have, 0 to 1.
        max_tries: models that one query may be put to.
        weights: F64 (n_dimensions,), of the shortfall.
    """

    models: Mapping[str, Profile]
    source: str
    memory: int | None = None
    tolerance: float = 0.1
    max_tries: int = 3
    weights: Vector


def read_pool(pool: str | Path | Mapping[str, Any], given: Mapping[str, Any]) -> PoolParams:
    """Read a pool's configuration.

    Args:
        pool: a TOML file's path, or a mapping of the same shape.
        given: settings of `[pool]` that override the configuration's; None is not given.

    Raises:
        UsageError: it is no such configuration; the message names the line or the key.
    """
    if isinstance(pool, Mapping):
        source, content, folder = "pool", pool, Path()
    else:
        path = Path(pool)
        source, content, folder = str(path), _load(path), path.absolute().parent
    reader = _Reader(source, folder)
    own = {key: value for key, value in given.items() if value is not None}
    return reader.pool(content, own)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the pool {path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"the pool {path} has over {format_bytes(MAX_FILE_BYTES)}; none needs so")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the pool {path} is not TOML: {str(error)[:200]}") from error


class _Reader:
    """Checks a configuration key by key; every message begins with where it is."""

    def __init__(self, source: str, folder: Path) -> None:
        self._source, self._folder = source, folder

    def pool(self, content: Mapping[str, Any], given: Mapping[str, Any]) -> PoolParams:
        self._known("", content, ("models", "pool"))
        stated = self._table("pool", content.get("pool", {}))
        self._known("pool", stated, ("memory", "tolerance", "max_tries", "weights"))
        found = {**stated, **given}
        memory = found.get("memory")
        return PoolParams(
            models=self._models(content.get("models")), source=self._source,
            memory=None if memory is None else self._bytes("pool.memory", memory),
            tolerance=self._number("pool.tolerance", found.get("tolerance", 0.1), 1.0),
            max_tries=self._count("pool.max_tries", found.get("max_tries", 3)),
            weights=self._vector("pool.weights", found.get("weights", {}), MAX_WEIGHT, 1.0),
        )  # fmt: skip

    def _models(self, value: object) -> dict[str, Profile]:
        tables = self._table("models", {} if value is None else value)
        if not 1 <= len(tables) <= MAX_MODELS:
            raise UsageError(
                f"{self._source}: a pool has 1 to {MAX_MODELS} models, as [models.NAME]; this one "
                f"has {len(tables)}"
            )
        return {name: self._profile(name, table) for name, table in tables.items()}

    def _profile(self, name: str, value: object) -> Profile:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise self._error("models", f"{name!r:.80} is no name of up to 64 letters, digits, ._-")
        key = f"models.{name}"
        table = self._table(key, value)
        self._known(key, table, ("path", "capabilities", "cost", "memory"))
        for needed in ("path", "capabilities"):
            if needed not in table:
                raise self._error(key, f"it has no {needed}")
        cost, memory = table.get("cost"), table.get("memory")
        return Profile(
            name=name, path=self._path(f"{key}.path", table["path"]),
            capabilities=self._vector(f"{key}.capabilities", table["capabilities"], 1.0, None),
            cost_s=None if cost is None else self._number(f"{key}.cost", cost, MAX_COST_S),
            memory=None if memory is None else self._bytes(f"{key}.memory", memory),
        )  # fmt: skip

    def _path(self, key: str, value: object) -> Path:
        if not isinstance(value, str | Path) or not 0 < len(str(value)) <= _MAX_PATH_CHARS:
            raise self._error(key, f"a catalogue name or a path is needed, not {value!r:.80}")
        spec = str(value)
        if spec.lower().endswith(".gguf") and not spec.startswith(("hf:", "~")):
            spec = str(self._folder / spec)  # which leaves an absolute path as it is
        try:
            return resolve(spec)
        except (CatalogueError, OSError) as error:
            raise self._error(key, str(error)) from error

    def _vector(self, key: str, value: object, most: float, other: float | None) -> Vector:
        """Read a number for all dimensions, or a table; `other` is for those not named."""
        if not isinstance(value, Mapping):
            return np.full(len(DIMENSIONS), self._number(key, value, most))
        self._known(key, value, DIMENSIONS)
        missing = [name for name in DIMENSIONS if name not in value]
        if missing and other is None:
            raise self._error(key, f"{', '.join(missing)} is missing; a lone number serves all")
        return np.array([
            self._number(f"{key}.{name}", value[name], most) if name in value else other
            for name in DIMENSIONS
        ], dtype=np.float64)  # fmt: skip

    def _number(self, key: str, value: object, most: float) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most:
            return float(value)
        raise self._error(key, f"a number from 0 to {most:g} is needed, not {value!r:.80}")

    def _count(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_MODELS:
            raise self._error(key, f"a whole number from 1 to {MAX_MODELS} is needed, not "
                                   f"{value!r:.80}")  # fmt: skip
        return value

    def _bytes(self, key: str, value: object) -> int:
        if not isinstance(value, str | int):
            raise self._error(key, f"bytes such as 2GiB are needed, not {value!r:.80}")
        try:
            return parse_bytes(value)
        except UsageError as error:
            raise self._error(key, str(error)) from error

    def _table(self, key: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self._error(key, f"a table is needed, not {value!r:.80}")
        return value

    def _known(self, key: str, table: Mapping[Any, object], known: Iterable[str]) -> None:
        names = list(known)
        for each in table:
            if each not in names:
                near = difflib.get_close_matches(str(each)[:80], names, 1)
                hint = f"; did you mean {near[0]}" if near else f"; known: {', '.join(names)}"
                raise self._error(key, f"there is no key {each!r:.80}{hint}")

    def _error(self, key: str, reason: str) -> UsageError:
        return UsageError(f"{self._source}: {key}: {reason}" if key
                          else f"{self._source}: {reason}")  # fmt: skip
