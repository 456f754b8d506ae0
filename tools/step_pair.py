"""A pair of models that answers tasks under policies of step routing, and what came of it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

from edgeroute.engine import Runtime
from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.skippers.step_price import PassCost
from edgeroute.skippers.steps import WHO, Glance, StepPart, Who
from edgeroute.tools.step_glances import open_watcher
from edgeroute.tools.step_tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """An answer of the pair.

    Attributes:
        text: what was written.
        seconds: from the question to the end.
        parts: who wrote what.
        large_passes: passes that the large model made.
    """

    text: str
    seconds: float
    parts: tuple[StepPart, ...]
    large_passes: int


Watch = Callable[[Task, str], list[Glance]]
"""Returns what the small model sees at the start of each step of an answer to a task."""


class Pair(Protocol):
    """A pair that is open: it answers tasks under any policy."""

    def answer(self, task: Task, steps: str, seed: int) -> Answered:
        """Answer a task greedily; the seed is for the policy."""

    def costs(self) -> Mapping[Who, PassCost]:
        """Return what passes of the models were measured to take."""


class Models(Protocol):
    """Two models that can be opened as a pair, and the small one to watch answers."""

    @property
    def names(self) -> Mapping[Who, str]:
        """What people call them."""

    @property
    def fingerprints(self) -> Mapping[Who, str]:
        """What tells them from others."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What else their figures depend on, as plain JSON types."""

    def open(self, steps_file: Path) -> AbstractContextManager[Pair]:
        """Open the pair; the weights of a learned policy come from the steps file."""

    def watch(self) -> AbstractContextManager[Watch]:
        """Open the small model alone."""


class RuntimePair:
    """A Runtime with a small model beside it, which nobody else uses meanwhile.

    Args:
        runtime: the engine.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def answer(self, task: Task, steps: str, seed: int) -> Answered:
        """Answer a task greedily; no keys and values of an earlier answer serve it.

        Raises:
            UsageError: the prompt does not fit.
        """
        before = self._large_passes()
        began = time.perf_counter()
        found = self.runtime.generate(
            task.prompt, messages=task.messages, max_tokens=task.max_tokens, temperature=0.0,
            stop=list(task.stop), seed=seed, steps=steps, prefix="off",
        )  # fmt: skip
        seconds = time.perf_counter() - began
        parts = cast("list[dict[str, Any]]", found.stats.to_dict().get("steps") or [])
        return Answered(
            text=found.text, seconds=seconds, parts=tuple(StepPart(**part) for part in parts),
            large_passes=self._large_passes() - before,
        )  # fmt: skip

    def costs(self) -> dict[Who, PassCost]:
        """Return what passes of the models were measured to take."""
        found = cast("dict[Who, dict[str, float]]", self._stats()["costs"])
        return {who: PassCost(**found[who]) for who in WHO}

    def _large_passes(self) -> int:
        return cast("dict[Who, int]", self._stats()["passes"])["large"]

    def _stats(self) -> dict[str, Any]:
        found = cast("dict[str, Any]", self.runtime.stats().get("steps", {}))
        if "passes" not in found:
            raise UsageError("no small model writes steps in this Runtime; name one by small=")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Two model files on this machine.

    Attributes:
        small, large: their paths.
        memory: budget over both, as a Runtime takes it.
        threads: compute threads; None for what the engine measures.
    """

    small: Path
    large: Path
    memory: str | None = None
    threads: int | None = None

    @property
    def names(self) -> dict[Who, str]:
        """The files' names."""
        return {"small": self.small.stem, "large": self.large.stem}

    @property
    def fingerprints(self) -> dict[Who, str]:
        """What tells the files from others.

        Raises:
            ModelFileError: one is no model file.
        """
        found: dict[Who, str] = {}
        for who, path in zip(WHO, (self.small, self.large), strict=True):
            with GGUFFile.open(path) as file:
                found[who] = fingerprint(file)
        return found

    @property
    def settings(self) -> dict[str, object]:
        """The budget and the threads."""
        return {"memory": self.memory, "threads": self.threads}

    @contextlib.contextmanager
    def open(self, steps_file: Path) -> Iterator[Pair]:
        """Open a Runtime, both models warm: graphs are built on first use, in nobody's time.

        Raises:
            EdgerouteError: see Runtime.
        """
        with Runtime(
            self.large, small=self.small, steps="large", steps_file=steps_file,
            steps_state="off", memory=self.memory, threads=self.threads,
        ) as runtime:  # fmt: skip
            pair = RuntimePair(runtime)
            for spec in WHO:
                pair.answer(_WARMING, spec, 0)
            yield pair

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        """Open the small model alone.

        Raises:
            CapacityError: it does not fit the memory.
        """
        with open_watcher(self.small, self.threads) as watcher:
            yield watcher.watch


_WARMING: Final = Task(prompt="One, two, three, four, five,", answer="six", max_tokens=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A task answered under a policy, judged.

    Attributes:
        right: whether the answer is.
        text: what was written.
        seconds: that it took.
        parts: who wrote what.
        large_passes: passes that the large model made.
    """

    right: bool
    text: str
    seconds: float
    parts: tuple[StepPart, ...]
    large_passes: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer."""
        return sum(part.n_tokens for part in self.parts)

    @property
    def n_large(self) -> int:
        """Those that the large model wrote."""
        return sum(part.n_tokens for part in self.parts if part.model == "large")

    def to_json(self) -> dict[str, object]:
        """Return plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Result":
        """Return what `to_json` was called on."""
        parts = tuple(StepPart(**part) for part in value["parts"])
        return cls(**value | {"parts": parts})
