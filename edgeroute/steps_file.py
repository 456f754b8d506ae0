"""Steps files: what routing the steps of answers is worth for one pair of models.

A JSON file that `edgeroute calibrate --steps` writes: every policy that was measured, the one
that was chosen, and the weights of the learned glimpse. Nothing in it is trusted: it belongs to
the two models and every value is in its range, or it is refused.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final, Self

import platformdirs

from edgeroute.models.depth_file import first_writable
from edgeroute.runtime.errors import StepsFileError, UsageError
from edgeroute.runtime.gguf_metadata import quote
from edgeroute.runtime.untrusted_json import parse_json, show
from edgeroute.runtime.whole_file import replacing
from edgeroute.skippers.step_learned import LearnedGlimpse
from edgeroute.skippers.step_price import PassCost, Workload
from edgeroute.skippers.steps import WHO, Who

VERSION: Final = 1
SUFFIX: Final = ".steps.json"
MAX_BYTES: Final = 4 << 20
MAX_POINTS: Final = 256
MAX_ANSWERS: Final = 1_000_000
MAX_TOKENS: Final = 1e9
MAX_SECONDS: Final = 1e7
MAX_WEIGHTS: Final = 1 << 16
"""Numbers in one list of a learned glimpse; a hidden state is far shorter."""

_REMEDY: Final = "calibrate the pair again by `edgeroute calibrate --steps SMALL LARGE`"
_SPEC: Final = re.compile(r"[a-z][a-z0-9]{0,15}(:[-+.0-9a-z]{1,24}){0,4}")
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}")
_PLAIN: Final = re.compile(r"[^A-Za-z0-9._-]+")
_WORKLOAD: Final = tuple(field.name for field in fields(Workload))
_COST: Final = tuple(field.name for field in fields(PassCost))

Learned = Mapping[str, object]
"""Weights of a learned glimpse as skippers/step_learned writes them: numbers, texts, lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy and what it was measured to be worth.

    Attributes:
        spec: its text.
        n: answers that it was measured by.
        accuracy: share of them that were right; `low` and `high` are its 95 % interval.
        large_share: of the answers' tokens, by the large model.
        seconds: of an answer, measured when the pair was calibrated, mean.
        workload: tokens of an answer that each model wrote and read, means; what an answer
            takes where models cost something else is worked out from these.
    """

    spec: str
    n: int
    accuracy: float
    low: float
    high: float
    large_share: float
    seconds: float
    workload: Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsFile:
    """What was measured of a pair.

    Attributes:
        small, large: fingerprints of the models; of a remote one its name.
        points: policies; no two have one spec.
        small_accuracy, large_accuracy: of the models alone, on the same questions.
        chosen: spec of the quickest policy that reached the target; None where none did.
        target: accuracy that was asked for, as a share of `large_accuracy`.
        learned: weights of the learned glimpse; None where it was not fitted.
        costs: what a pass of each model cost on the machine that measured.
        date: of the measurement, as 2026-01-31.
        tasks: sha256 of the questions.
    """

    small: str
    large: str
    points: tuple[Point, ...]
    small_accuracy: float
    large_accuracy: float
    chosen: str | None
    target: float
    learned: Learned | None
    costs: Mapping[Who, PassCost]
    date: str
    tasks: str

    def point(self, spec: str) -> Point | None:
        """Return what was measured of a policy, if it was."""
        return next((point for point in self.points if point.spec == spec), None)

    @classmethod
    def read(cls, path: Path, small: str, large: str) -> Self:
        """Read and check a steps file.

        Args:
            path: of the file.
            small, large: fingerprints of the models that it must be for.

        Raises:
            StepsFileError: it cannot be read, a value is wrong, or it is for other models.
        """
        given = _Values(_parse(path), f"steps file {path.name}")
        version = given.whole("version", 0, 1 << 31)
        if version != VERSION:
            raise StepsFileError(f"{given.name} has version {version}, this program reads "
                                 f"{VERSION}; {_REMEDY}")  # fmt: skip
        given.only({field.name for field in fields(cls)} | {"version"})
        for who, wanted in (("small", small), ("large", large)):
            found = given.text(who, 256)
            if found != wanted:
                raise StepsFileError(
                    f"{given.name} was made for another {who} model: {quote(found[:16])}, not "
                    f"{quote(wanted[:16])}; {_REMEDY}"
                )
        points = given.objects("points", MAX_POINTS)
        file = cls(
            small=small, large=large, points=tuple(_point(each) for each in points),
            small_accuracy=given.number("small_accuracy", 0, 1),
            large_accuracy=given.number("large_accuracy", 0, 1),
            chosen=given.optional_text("chosen", 100), target=given.number("target", 0, 1),
            learned=_learned(given), costs=_costs(given.object("costs")),
            date=given.text("date", 10, _DATE), tasks=given.text("tasks", 64, _HEX),
        )  # fmt: skip
        _check_points(file, given)
        return file

    def write(self, path: Path) -> None:
        """Write the file: whole, or the old one stays.

        Raises:
            UsageError: it cannot be written.
            StepsFileError: a value is out of range, which `read` would refuse; nothing is written.
        """
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1, allow_nan=True) + "\n"
        try:
            with replacing(path) as part:
                part.write_text(text, encoding="utf-8")
                type(self).read(part, self.small, self.large)
        except OSError as error:
            raise UsageError(f"the steps file {path} cannot be written: {error.strerror}; name "
                             "another place") from error  # fmt: skip


def steps_paths(large: Path | str, small: Path) -> tuple[Path, Path]:
    """Return where a pair's steps file is: beside the large model, or in the user's folder.

    Args:
        large: path of the large model; of a remote one its name, and the file is beside the
            small one.
        small: path of the small model.
    """
    if isinstance(large, Path):
        stem, folder, whole = large.name.removesuffix(".gguf"), large.parent, str(large.absolute())
    else:
        stem = _PLAIN.sub("-", large)[:80].strip(".-") or "remote"
        folder, whole = small.parent, large
    names = f"{stem}.{small.name.removesuffix('.gguf')}"
    both = hashlib.sha256(f"{whole}\n{small.absolute()}".encode(errors="surrogateescape"))
    mine = platformdirs.user_data_path("edgeroute") / "steps"
    return folder / f"{names}{SUFFIX}", mine / f"{names}.{both.hexdigest()[:12]}{SUFFIX}"


def find_steps_file(large: Path | str, small: Path, asked: str | Path | None = None) -> Path | None:
    """Return a pair's steps file, or None where nobody has calibrated the pair.

    Args:
        large, small: as `steps_paths` takes them.
        asked: the file that the user named.

    Raises:
        UsageError: the file that the user named is not there.
    """
    if asked is not None:
        path = Path(asked)
        if not path.is_file():
            raise UsageError(f"there is no steps file {path}; `edgeroute calibrate --steps SMALL "
                             "LARGE --out FILE` writes one")  # fmt: skip
        return path
    return next((path for path in steps_paths(large, small) if path.is_file()), None)


def place_steps_file(large: Path | str, small: Path) -> Path:
    """Return where a pair's steps file may be written.

    Raises:
        UsageError: nowhere.
    """
    return first_writable(*steps_paths(large, small))


# reading


def _parse(path: Path) -> dict[str, object]:
    """Read a file of bounded size as one JSON object.

    Raises:
        StepsFileError: it is none, or too large.
    """
    name = f"steps file {path.name}"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise StepsFileError(f"{name} has more than {MAX_BYTES} bytes; {_REMEDY}")
        value = parse_json(raw, name, StepsFileError)
    except OSError as error:
        raise StepsFileError(f"{name} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise StepsFileError(f"{name} must hold one JSON object, not {show(value)}; {_REMEDY}")
    return value


class _Values:
    """A JSON object of the file, whose values are checked as they are taken."""

    def __init__(self, value: Mapping[str, object], name: str) -> None:
        self._value, self.name = value, name

    def items(self) -> "Iterable[tuple[str, object]]":
        """Return keys and unchecked values."""
        return self._value.items()

    def only(self, known: set[str]) -> None:
        """Refuse other keys."""
        for key in self._value:
            if key not in known:
                raise StepsFileError(f"{self.name} has the unknown key {quote(key)}; known are "
                                     f"{', '.join(sorted(known))}")  # fmt: skip

    def number(self, key: str, low: float, high: float) -> float:
        """Take a finite number within bounds."""
        value = self._value.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:  # type: ignore[operator]
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    def whole(self, key: str, low: int, high: int) -> int:
        """Take a whole number within bounds."""
        value = self._value.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def text(self, key: str, most: int, pattern: re.Pattern[str] | None = None) -> str:
        """Take a text of bounded length, and of a pattern if one is given."""
        value = self._value.get(key)
        if not isinstance(value, str) or not 0 < len(value) <= most:
            raise self.wrong(key, f"a text of 1 to {most} characters")
        if pattern is not None and not pattern.fullmatch(value):
            raise self.wrong(key, f"a text like {pattern.pattern}")
        return value

    def optional_text(self, key: str, most: int) -> str | None:
        """Take a text, or None."""
        return None if self.get(key) is None else self.text(key, most)

    def get(self, key: str) -> object:
        """Take what is there, unchecked.

        Raises:
            StepsFileError: the key is missing.
        """
        if key not in self._value:
            raise StepsFileError(f"{self.name} has no {key}; {_REMEDY}")
        return self._value[key]

    def object(self, key: str) -> "_Values":
        """Take an object."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return _Values(value, f"{key} of {self.name}")

    def objects(self, key: str, most: int) -> "list[_Values]":
        """Take a list of objects."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(key, f"a list of at most {most}")
        for i, each in enumerate(value):
            if not isinstance(each, dict):
                raise StepsFileError(f"{key}[{i}] of {self.name} is {show(each)}; an object is "
                                     "wanted")  # fmt: skip
        return [_Values(each, f"{key}[{i}] of {self.name}") for i, each in enumerate(value)]

    def wrong(self, key: str, wanted: str) -> StepsFileError:
        """Say what is wrong with a value."""
        shown = show(self._value[key]) if key in self._value else "missing"
        return StepsFileError(f"{key} of {self.name} is {shown}; {wanted} is wanted")


def _check_points(file: StepsFile, given: _Values) -> None:
    """Refuse a file whose parts contradict each other."""
    specs = [point.spec for point in file.points]
    for spec in specs:
        if specs.count(spec) > 1:
            raise StepsFileError(f"two points of {given.name} are of the policy {quote(spec)}")
    if file.chosen is not None and file.chosen not in specs:
        raise given.wrong("chosen", "the spec of one of its points, or null,")


def _point(given: _Values) -> Point:
    given.only({field.name for field in fields(Point)})
    workload = given.object("workload")
    workload.only(set(_WORKLOAD))
    low, accuracy, high = (given.number(key, 0, 1) for key in ("low", "accuracy", "high"))
    if not low <= accuracy <= high:
        raise given.wrong("accuracy", f"a number within its interval of {low:g} to {high:g}")
    return Point(
        spec=given.text("spec", 100, _SPEC), n=given.whole("n", 1, MAX_ANSWERS),
        accuracy=accuracy, low=low, high=high, large_share=given.number("large_share", 0, 1),
        seconds=given.number("seconds", 0, MAX_SECONDS),
        workload=Workload(**{key: workload.number(key, 0, MAX_TOKENS) for key in _WORKLOAD}),
    )  # fmt: skip


def _costs(given: _Values) -> dict[Who, PassCost]:
    given.only(set(WHO))
    found: dict[Who, PassCost] = {}
    for who in WHO:
        cost = given.object(who)
        cost.only(set(_COST))
        found[who] = PassCost(**{key: cost.number(key, 0, MAX_SECONDS) for key in _COST})
    return found


def _learned(given: _Values) -> dict[str, object] | None:
    """Take weights: bounded plain values, which then make a learned glimpse."""
    if given.get("learned") is None:
        return None
    weights = given.object("learned")
    for key, value in weights.items():
        each = value if isinstance(value, list) else [value]
        if len(each) > MAX_WEIGHTS:
            raise weights.wrong(key, f"a list of at most {MAX_WEIGHTS}")
        if not all(_is_plain(one) for one in each):
            raise weights.wrong(key, "a finite number, a text of up to 256 characters, or a list")
    found = dict(weights.items())
    try:
        LearnedGlimpse.from_dict(found)
    except UsageError as error:
        raise StepsFileError(f"{given.name}: {error}") from error
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= 256
    if isinstance(value, int) and abs(value) >= 1 << 64:  # which a float may not hold
        return False
    return isinstance(value, int | float) and math.isfinite(value)
