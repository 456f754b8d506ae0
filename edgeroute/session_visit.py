"""One request's dealings with its saved session, from its arrival to its statistics."""

from concurrent.futures import Future
from dataclasses import dataclass

from edgeroute.runtime.held_cells import HeldCells
from edgeroute.runtime.sequence import Sequence
from edgeroute.runtime.session_file import SessionFacts
from edgeroute.session_work import Look, Restored, Wanted


@dataclass(slots=True, kw_only=True, eq=False)
class Visit:
    """One request's dealings with its session. The engine thread owns it.

    Attributes:
        name: of the session.
        key: what its cells depend on, as the prefix cache has it.
        began: when it was asked for, `time.monotonic`.
        patience_s: how long after that it waits for what is next.
        look: what is saved; None where nothing can be.
        wanted: what was asked for.
        sequence: its cells, while they are filled and until the request takes them.
        settled: whether nothing more is waited for.
        not_restored: why nothing was restored; None where something was.
        saved: True where its cells are being saved, else why not.
    """

    name: str
    key: str | None
    began: float
    patience_s: float
    look: Future[Look] | None = None
    wanted: Wanted | None = None
    facts: SessionFacts | None = None
    sequence: Sequence | None = None
    held: HeldCells | None = None
    load: Future[Restored] | None = None
    settled: bool = False
    restored_tokens: int = 0
    restore_s: float = 0.0
    n_bytes: int = 0
    not_restored: str | None = None
    saved: bool | str = "it ended before its cells were computed"

    def to_dict(self) -> dict[str, object]:
        """Return what became of it, as plain JSON types."""
        return {
            "name": self.name, "restored_tokens": self.restored_tokens,
            "restore_s": round(self.restore_s, 6), "bytes": self.n_bytes,
            "not_restored": self.not_restored, "saved": self.saved,
        }  # fmt: skip
