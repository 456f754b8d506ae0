"""What the step policies of a pair have learned, in a file that survives a restart.

JSON: the version, the marks of both models, each policy as its `to_dict` tells it, and the SHA-256
of all that. Nobody vouches for it: a file that is damaged, hostile or of other models is set aside,
and learning begins anew. It is replaced whole or not at all.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

import platformdirs

from edgeroute.runtime.errors import EdgerouteError, StepsFileError, UsageError
from edgeroute.runtime.untrusted_json import parse_object
from edgeroute.runtime.whole_file import replacing
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.skippers.step_targets import LEARNING, Learning
from edgeroute.steps_file import SUFFIX, steps_paths

VERSION: Final = 1
MAX_BYTES: Final = 4 << 20
MAX_POLICIES: Final = 64
"""Policies whose learned state is kept."""
_KEYS: Final = frozenset({"version", "small", "large", "policies", "sha256"})
_WHAT: Final = "the state of the step policies"


class Marks(NamedTuple):
    """What tells the models of a pair from others: fingerprints, of a remote one its name."""

    small: str
    large: str


class StepMemory:
    """Keeps what the policies of a pair learn. The engine thread owns it.

    Args:
        path: of the file; None keeps it nowhere.
        marks: tells the models apart; called once, when there is something to keep or to read.
    """

    def __init__(self, path: Path | None, marks: Callable[[], Marks]) -> None:
        self._path = path
        self._find_marks = marks
        self._n_recalled = 0
        self._refused: str | None = None
        self._failed: str | None = None

    @functools.cached_property
    def marks(self) -> Marks:
        """The models as they were when first asked for."""
        return self._find_marks()

    def recall(self) -> list[Learning]:
        """Return the policies as they were saved; none where there is no file, or a bad one.

        Raises:
            UsageError: there is something else than a file.
            OSError: the file cannot be read, or a bad one not be set aside.
        """
        if self._path is None or not self._path.exists():
            return []
        if not self._path.is_file():
            raise UsageError(f"steps_state {self._path} is not a file; name one, or off")
        try:
            found = decode(self._read(self._path), self.marks)
        except StepsFileError as error:
            os.replace(self._path, self._path.with_name(f"{self._path.name}.refused"))
            self._refused = str(error)
            return []
        self._n_recalled = len(found)
        return found

    def _read(self, path: Path) -> bytes:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise StepsFileError(f"{_WHAT} has more than {MAX_BYTES} bytes")
        return raw

    def save(self, policies: Iterable[Learning]) -> None:
        """Write what policies know; whatever happens, there is the old file or the new one.

        Raises:
            OSError: it could not be written; the old file is untouched.
        """
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as part:
            part.write_bytes(encode(policies, self.marks))
        self._failed = None

    def failed(self, error: OSError) -> None:
        """Note that it could not be written, which no answer shall end for."""
        self._failed = str(error)

    def stats(self) -> dict[str, object]:
        """Return where it is kept and what came of that, as plain JSON types."""
        found: dict[str, object] = {
            "path": None if self._path is None else str(self._path),
            "recalled": self._n_recalled,
        }
        notes = {"refused": self._refused, "failed": self._failed}
        return found | {name: why for name, why in notes.items() if why is not None}


def memory_path(large: Path | str, small: Path, given: str | None) -> Path | None:
    """Return where what the policies of a pair learn is kept.

    Args:
        large: path of the large model; of a remote one its name.
        small: path of the small model.
        given: a path, `off` for nowhere, None for a file with the user's state.
    """
    if given is not None:
        return None if given == "off" else Path(given)
    name = steps_paths(large, small)[1].name.removesuffix(SUFFIX)
    folder = platformdirs.user_state_path("edgeroute", appauthor=False) / "steps"
    return folder / f"{name}.learned.json"


def encode(policies: Iterable[Learning], marks: Marks) -> bytes:
    """Return the file of what policies know."""
    told = [policy.to_dict() for policy in policies][-MAX_POLICIES:]
    content: dict[str, object] = {"version": VERSION, **marks._asdict(), "policies": told}
    return json.dumps(content | {"sha256": _digest(content)}, allow_nan=False).encode()


def decode(raw: bytes, marks: Marks) -> list[Learning]:
    """Check a file and return its policies, in its order.

    Raises:
        StepsFileError: it is not what `encode` makes for these models.
    """
    content = parse_object(raw, _WHAT, StepsFileError)
    if content.get("version") is True or content.get("version") != VERSION:
        raise StepsFileError(f"{_WHAT} has another version than {VERSION}")
    if content.keys() != _KEYS:
        raise StepsFileError(f"{_WHAT} has not exactly the keys {', '.join(sorted(_KEYS))}")
    if content.pop("sha256") != _digest(content):
        raise StepsFileError(f"the checksum of {_WHAT} is wrong")
    if (content["small"], content["large"]) != marks:
        raise StepsFileError(f"{_WHAT} is of other models than these")
    told = content["policies"]
    if not isinstance(told, list) or len(told) > MAX_POLICIES:
        raise StepsFileError(f"{_WHAT} does not list at most {MAX_POLICIES} policies")
    found = {policy.spec: policy for policy in map(_policy, told)}
    if len(found) != len(told):
        raise StepsFileError(f"{_WHAT} has a policy twice")
    return list(found.values())


def _policy(told: object) -> Learning:
    spec = told.get("spec") if isinstance(told, dict) else None
    if not isinstance(told, dict) or not isinstance(spec, str):
        raise StepsFileError(f"{_WHAT} has a policy without a name")
    try:
        policy = parse_steps(spec)
        if isinstance(policy, LEARNING):
            policy.restore(told)
            return policy
    except EdgerouteError as error:
        raise StepsFileError(f"{_WHAT} cannot be used: {error}") from error
    raise StepsFileError(f"{_WHAT} has the policy {policy.spec!r:.80}, which learns nothing")


def _digest(content: dict[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
