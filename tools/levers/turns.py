"""Short turns of several configurations that live side by side, each in a process of its own.

A run that opens a model, fills its caches and then decodes for a few seconds spends most of its
time on what is not measured, and is seconds to minutes away from the run that it is compared
with, in which a shared disk changes. So as many processes as memory has room for are open at
once, and take turns of about a second in an order that is drawn anew each round. All continue the
same answer, so that a round is of the same tokens for all; who waits, sleeps.

No process has a configuration's place for long: where the kernel puts its pages decides several
per cent of its speed for all its life. After LIFE rounds all are closed and new ones opened, with
another prompt. Settings are not switched inside one process: caches would hand on what another
policy kept, and what is only chosen when a model is opened could not be compared at all.
"""

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from edgeroute.runtime import machine
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.tools.levers.measure import Bench
from edgeroute.tools.levers.race import LIFE
from edgeroute.tools.levers.runner import TURN_TOKENS, Turn, TurnRunner

DEFAULT: Final = "the default"
BY_DEFAULT: Final[Mapping[str, Any]] = {"levers": "proven"}
TURN_RATIO: Final = 0.25
"""Seconds of a turn over those of a run of its own."""
SPARE_RATIO: Final = 0.2
"""Share of the free memory that living processes leave, so that none has to give way."""
BESIDE_BYTES: Final = 512 << 20
COPIES: Final = 1.5
"""What a process takes of a model that is wholly in memory, in sizes of its file, and beside."""


@dataclass(slots=True)
class Heat:
    """What some configurations took, round by round, beside the default.

    Attributes:
        seconds: per token, by name; the default's is among them.
        errors: why some could not be run; those have no seconds.
        noisy: whether others used the machine meanwhile.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    noisy: bool = False


class Life:
    """A process that a configuration has until `close`, or until it fails."""

    def __init__(self, bench: Bench, settings: Mapping[str, Any]) -> None:
        with contextlib.ExitStack() as own:
            self._worker = bench.opened(own, TurnRunner, settings)
            self._own = own.pop_all()

    def call(self, method: str, *args: object) -> Any:
        """Call a method of the TurnRunner there; an error ends the process."""
        try:
            return self._worker.call(method, *args)
        except EdgerouteError:
            self._own.__exit__(*sys.exc_info())  # which may say more: that the kernel killed it
            raise

    def close(self) -> None:
        """End the process; safe to call after an error."""
        self._own.close()

    def kill(self) -> None:
        """End the process in the midst of what it does."""
        self._own.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


class Lives:
    """Makes heats, one after the other.

    Args:
        bench: opens processes.
        need_bytes: memory that one of them takes at most, see `need_bytes`.
        seed: of the orders.
    """

    def __init__(self, bench: Bench, need_bytes: int, seed: int = 1) -> None:
        self._bench, self._need_bytes = bench, need_bytes
        self._rng = random.Random(seed)
        self._n_tokens = 0
        self._n_heats = 0

    @property
    def room(self) -> int:
        """How many processes may live at once beside the default's; 0: each must live alone."""
        free = (1 - SPARE_RATIO) * machine.memory().available_bytes
        return max(0, int(free // max(1, self._need_bytes)) - 1)

    def heat(self, singles: Mapping[str, Mapping[str, Any]]) -> Heat:
        """Let the default and some configurations live for LIFE rounds.

        Where memory has room for one process only, they live one after the other.

        Args:
            singles: settings by name.

        Raises:
            EdgerouteError: the default cannot be run.
        """
        if not self._n_tokens:
            self._size()
        settings: dict[str, Mapping[str, Any]] = {DEFAULT: BY_DEFAULT, **singles}
        heat, turns = Heat(), dict[str, list[Turn]]()

        def live() -> None:
            groups = [settings] if self.room else [{name: settings[name]} for name in settings]
            for group in groups:
                turns.update(self._together(group, heat))

        _, heat.noisy = self._bench.probed(live)
        self._n_heats += 1
        wanted = [turn.token_ids for turn in turns[DEFAULT]]
        for name, taken in turns.items():
            if name in heat.errors:
                continue
            if [turn.token_ids for turn in taken] != wanted:
                heat.errors[name] = "its answers differ from the default's"
            else:
                heat.seconds[name] = [turn.token_s for turn in taken]
        return heat

    def _together(
        self, settings: Mapping[str, Mapping[str, Any]], heat: Heat
    ) -> dict[str, list[Turn]]:
        """Make the rounds of processes that live side by side."""
        lives: dict[str, Life] = {}
        turns: dict[str, list[Turn]] = {name: [] for name in settings}
        try:
            for name in self._rng.sample(list(settings), len(settings)):
                with _noting(name, heat):  # who opens first gets the best of free memory
                    lives[name] = Life(self._bench, settings[name])
                    self._begin(lives[name])
            for _ in range(LIFE):
                names = [name for name in lives if name not in heat.errors]
                for name in self._rng.sample(names, len(names)):
                    with _noting(name, heat):
                        turns[name].append(lives[name].call("turn", self._n_tokens))
        except BaseException:
            for life in lives.values():
                life.kill()
            raise
        for life in lives.values():
            life.close()
        return turns

    def _begin(self, life: Life) -> None:
        life.call("begin", self._bench.prompts, self._n_heats)

    def _size(self) -> None:
        """Find out how many tokens fill a turn, in a life of the default for nothing else.

        What it has in memory then is not what others have.
        """
        low, high = TURN_TOKENS
        life = Life(self._bench, BY_DEFAULT)
        try:
            self._begin(life)
            turn: Turn = life.call("turn", low)
        except BaseException:
            life.kill()
            raise
        life.close()
        wanted = TURN_RATIO * self._bench.params.seconds / max(turn.token_s, 1e-6)
        self._n_tokens = max(low, min(high, int(wanted)))


@contextlib.contextmanager
def _noting(name: str, heat: Heat) -> Iterator[None]:
    """Keep the error of a configuration for the report; without the default nothing goes on."""
    try:
        yield
    except EdgerouteError as error:
        if name == DEFAULT:
            raise
        heat.errors[name] = str(error)[:200]


def need_bytes(file_bytes: int, budget_bytes: int, *, paged: bool) -> int:
    """Return what a process takes at most: its budget, or a model that is wholly in memory."""
    return budget_bytes if paged else min(budget_bytes, int(COPIES * file_bytes) + BESIDE_BYTES)
