"""What a pool is opened with: settings of its models, and the file of what it learned."""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from edgeroute.config import RunParams, merge_settings
from edgeroute.pool_config import PoolParams
from edgeroute.runtime.errors import UsageError


def state_path(params: PoolParams, given: str | Path | None) -> Path | None:
    """Return where a pool keeps what it learned.

    Args:
        params: of the pool.
        given: a path, `off` for nowhere, None for a file with the user's state.
    """
    if given == "off":
        return None
    if given is not None:
        return Path(given)
    names = sorted(f"{each.name}={each.path}" for each in params.models.values())
    key = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    folder = platformdirs.user_state_path("edgeroute", appauthor=False) / "pools"
    return folder / f"{key}.polar"


def run_params(
    params: PoolParams, shared: Mapping[str, Any], state: str | Path | None
) -> RunParams:
    """Merge what all models share; `memory` becomes the pool's budget.

    Args:
        params: of the pool.
        shared: settings of all its models.
        state: where the pool keeps what it learned; `off` also holds for its models.

    Raises:
        UsageError: a setting is out of range, or the environment sets one that pools lack.
    """
    kept = {"steps_state": "off"} if state == "off" else {}
    found = merge_settings({**shared, "memory": params.memory, **kept})
    alone = (found.small, found.remote, found.adapters) == (None, None, None)
    if not alone or found.depth != "full":
        raise UsageError(
            "a pool's models share no small or remote model, adapters or depth plan: give a model "
            "its own under [models.NAME], and unset EDGEROUTE_SMALL, _REMOTE, _ADAPTERS and _DEPTH"
        )
    return found


def check_known(what: str, given: Iterable[object], known: Iterable[str]) -> None:
    """Refuse names that a pool does not know.

    Raises:
        UsageError: there is one; the message names the nearest known.
    """
    names = list(known)
    for each in given:
        if each not in names:
            near = difflib.get_close_matches(str(each)[:80], names, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
            raise UsageError(f"a pool has no {what} {each!r:.80}; {hint}")
