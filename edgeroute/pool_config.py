"""What a pool is made of: profiles of its models, from a TOML file or a mapping, checked.

[pool]                                  # all optional
memory = "4GiB"
tolerance = 0.1
max_tries = 3
weights = { math = 2.0 }                # of the shortfall; 1 where not named
energy = 0.5                            # weight of joules per token against accuracy; 0: none

[models.small]
path = "qwen2.5-coder-0.5b-instruct"    # or a .gguf, relative to this file
capabilities = { math = 0.3, code = 0.5, reasoning = 0.3, language = 0.4, instruction = 0.4 }
cost = 0.025                            # seconds per token; measured where not given
memory = "1GiB"                         # pages what does not fit into it; optional
depth = "auto"                          # these four as of a Runtime; optional. Profiles of one
depth_max_kl = 0.05                     # file that differ in them share one model in memory
small = "smollm2-135m-instruct"
steps = "auto"
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgeroute.config_file import Reader, load_toml
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.pool_choice import DIMENSIONS

Vector = npt.NDArray[np.float64]

MAX_MODELS: Final = 32
MAX_WEIGHT: Final = 1000.0
MAX_COST_S: Final = 3600.0
SETTINGS: Final = ("depth", "depth_max_kl", "small", "steps")
"""Of a Runtime, those that a profile may give its model."""


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
        settings: of its Runtime, those of SETTINGS that are given.
    """

    name: str
    path: Path
    capabilities: Vector
    cost_s: float | None = None
    memory: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


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
        energy: weight of joules per token, 0 to 1, accuracy having the rest. At 0 the cheapest
            capable model answers, which is another rule: see `skippers.pool_choice`.
    """

    models: Mapping[str, Profile]
    source: str
    memory: int | None = None
    tolerance: float = 0.1
    max_tries: int = 3
    weights: Vector
    energy: float = 0.0


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
        source, content, folder = str(path), load_toml(path, "the pool"), path.absolute().parent
    reader = _Reader(source, folder)
    own = {key: value for key, value in given.items() if value is not None}
    return reader.pool(content, own)


class _Reader(Reader):
    """Reads what a pool is made of."""

    def pool(self, content: Mapping[str, Any], given: Mapping[str, Any]) -> PoolParams:
        self.known("", content, ("models", "pool"))
        stated = self.table("pool", content.get("pool", {}))
        own = ("memory", "tolerance", "max_tries", "weights", "energy")
        self.known("pool", stated, own)
        found = {**stated, **given}
        memory = found.get("memory")
        return PoolParams(
            models=self._models(content.get("models")), source=self.source,
            memory=None if memory is None else self.n_bytes("pool.memory", memory),
            tolerance=self.number("pool.tolerance", found.get("tolerance", 0.1), 1.0),
            max_tries=self.count("pool.max_tries", found.get("max_tries", 3), MAX_MODELS),
            weights=self._vector("pool.weights", found.get("weights", {}), MAX_WEIGHT, 1.0),
            energy=self.number("pool.energy", found.get("energy", 0.0), 1.0),
        )  # fmt: skip

    def _models(self, value: object) -> dict[str, Profile]:
        tables = self.table("models", {} if value is None else value)
        if not 1 <= len(tables) <= MAX_MODELS:
            raise UsageError(
                f"{self.source}: a pool has 1 to {MAX_MODELS} models, as [models.NAME]; this one "
                f"has {len(tables)}"
            )
        return {name: self._profile(name, table) for name, table in tables.items()}

    def _profile(self, name: str, value: object) -> Profile:
        key = f"models.{self.name('models', name)}"
        table = self.table(key, value)
        self.known(key, table, ("path", "capabilities", "cost", "memory", *SETTINGS))
        for needed in ("path", "capabilities"):
            if needed not in table:
                raise self.error(key, f"it has no {needed}")
        cost, memory = table.get("cost"), table.get("memory")
        return Profile(
            name=name, path=self.model(f"{key}.path", table["path"]),
            capabilities=self._vector(f"{key}.capabilities", table["capabilities"], 1.0, None),
            cost_s=None if cost is None else self.number(f"{key}.cost", cost, MAX_COST_S),
            memory=None if memory is None else self.n_bytes(f"{key}.memory", memory),
            settings=self._settings(key, table),
        )  # fmt: skip

    def _settings(self, key: str, table: Mapping[str, Any]) -> dict[str, Any]:
        """Read how a model is run; what the values mean is checked with the others of a run."""
        found = {name: table[name] for name in SETTINGS if name in table}
        for name, value in found.items():
            if name == "small":
                found[name] = str(self.model(f"{key}.small", value))
            elif name == "depth_max_kl":
                found[name] = self.number(f"{key}.{name}", value, 100.0)
            elif not isinstance(value, str):
                raise self.error(f"{key}.{name}", f"a text is needed, not {value!r:.80}")
        return found

    def _vector(self, key: str, value: object, most: float, other: float | None) -> Vector:
        """Read a number for all dimensions, or a table; `other` is for those not named."""
        if not isinstance(value, Mapping):
            return np.full(len(DIMENSIONS), self.number(key, value, most))
        self.known(key, value, DIMENSIONS)
        missing = [name for name in DIMENSIONS if name not in value]
        if missing and other is None:
            raise self.error(key, f"{', '.join(missing)} is missing; a lone number serves all")
        return np.array([
            self.number(f"{key}.{name}", value[name], most) if name in value else other
            for name in DIMENSIONS
        ], dtype=np.float64)  # fmt: skip
