"""Devices that may be lost, and what a Runtime tells of those that were."""

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.runtime.device import Device

MAX_NOTES: Final = 8
"""Losses that are told of; the newest stay."""


def devices_at_risk(loaded: "LoadedModel") -> "tuple[Device, ...]":
    """Return the devices of a model, and of the small one beside it, that may be lost."""
    small = () if loaded.small is None else devices_at_risk(loaded.small)
    own = tuple(each for each in loaded.devices.all if each.link is not None)
    return (*own, *small)


def lost_names(loaded: "LoadedModel") -> list[str]:
    """Name the devices that are gone, each once."""
    devices = devices_at_risk(loaded)
    gone = [each.info.name for each in devices if each.link is not None and each.link.lost]
    return list(dict.fromkeys(gone))


@dataclass(slots=True)
class Losses:
    """What was lost so far. The engine thread writes it; any thread may look.

    Attributes:
        n_lost: devices.
        n_opened: times that the model was opened again.
        n_continued: requests that went on.
        n_failed: requests that ended because of a loss.
        down: why nothing answers now; None while something does.
    """

    n_lost: int = 0
    n_opened: int = 0
    n_continued: int = 0
    n_failed: int = 0
    down: str | None = None
    _notes: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_NOTES))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, text: str) -> None:
        """Tell what was lost, and what replaced it."""
        with self._lock:
            self._notes.append(text)

    @property
    def notes(self) -> list[str]:
        """What was noted, the newest last."""
        with self._lock:
            return list(self._notes)

    def add_to(self, stats: Mapping[str, object]) -> dict[str, object]:
        """Return a Runtime's figures with those of its losses, if there were any."""
        if not self.n_lost:
            return dict(stats)
        told = self.notes if self.down is None else [*self.notes, self.down]
        before = stats.get("warnings")
        return {
            **stats,
            "warnings": [*(before if isinstance(before, list) else []), *told],
            "losses": {
                "lost": self.n_lost, "opened": self.n_opened, "continued": self.n_continued,
                "failed": self.n_failed, "down": self.down is not None,
            },
        }  # fmt: skip
