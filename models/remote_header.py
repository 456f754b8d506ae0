"""A model's header without the model: fetched from a hub by ranges, a small part of the file.

Long arrays of numbers in it (scores and kinds of tokens) are stepped over; only their lengths
matter for a forecast.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edgeroute.models import hub
from edgeroute.models.catalogue import CATALOGUE, CatalogueEntry, HubSource, lookup
from edgeroute.models.hub import Announced, announce, fetch_range
from edgeroute.models.sources import BrokenTransferError, SourceError
from edgeroute.models.store import hub_spec, parse_hub_spec
from edgeroute.runtime.errors import CatalogueError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.gguf_header import HeldParts, ShortHeaderError
from edgeroute.runtime.units import KIB, MIB, format_bytes

MAX_HEADER_BYTES: Final = 64 * MIB
"""The largest published header has about 20 MiB."""
MIN_RANGE_BYTES: Final = 64 * KIB
MAX_RANGE_BYTES: Final = MIB
N_RANGES: Final = 2048
"""A range is this part of a file, so that little is fetched in vain."""
N_ATTEMPTS: Final = 4

Report = Callable[[int], None]
"""Called with the bytes fetched so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteHeader:
    """A file of which only the header is here.

    `file` has no tensor's bytes; close it. `n_fetched` bytes of `file.size_bytes` were fetched,
    in `n_ranges` requests.
    """

    spec: str
    file: GGUFFile
    n_fetched: int
    n_ranges: int


def is_remote(spec: str) -> bool:
    """Whether a name is a hub's file, or a catalogue's that a hub has: not a path."""
    if spec.startswith("hf:"):
        return True
    entry = CATALOGUE.get(spec.strip().lower())
    return entry is not None and _hub_source(entry) is not None


def fetch_header(spec: str, report: Report | None = None) -> RemoteHeader:
    """Fetch the header of `hf:owner/repo/file.gguf[@revision]`, or of a catalogue's model.

    Raises:
        CatalogueError: no such name or file, or the hub cannot be reached.
        ModelFileError: the header is malformed.
    """
    if spec.startswith("hf:"):
        source, n_bytes, sha256 = parse_hub_spec(spec), None, None
    else:
        entry = lookup(spec)
        found = _hub_source(entry)
        if found is None:
            raise CatalogueError(
                f"{entry.name} cannot be read in part, its sources are whole files; "
                f"get it with `edgeroute pull {entry.name}`"
            )
        source, n_bytes, sha256 = found, entry.n_bytes, entry.sha256
    announced = announce(source, n_bytes, sha256)
    return _Fetch(hub_spec(source), source, announced, report).run()


def _hub_source(entry: CatalogueEntry) -> HubSource | None:
    return next((each for each in entry.sources if isinstance(each, HubSource)), None)


class _Fetch:
    """Fetches the parts that the parser asks for, until it asks for no more."""

    def __init__(
        self, spec: str, source: HubSource, announced: Announced, report: Report | None
    ) -> None:
        self._spec, self._source, self._announced, self._report = spec, source, announced, report
        self._buffer = bytearray()
        self._parts: list[tuple[int, int]] = []
        self._n_fetched = self._n_ranges = 0
        size = announced.n_bytes
        self._range_bytes = max(MIN_RANGE_BYTES, min(MAX_RANGE_BYTES, size // N_RANGES))

    def run(self) -> RemoteHeader:
        size = self._announced.n_bytes
        self._fetch(0, 1)
        while True:
            held = HeldParts(size_bytes=size, parts=tuple(self._parts))
            try:
                file = GGUFFile.from_parts(self._spec, memoryview(bytes(self._buffer)), held)
            except ShortHeaderError as short:
                self._fetch(short.start, short.end)
                continue
            return RemoteHeader(
                spec=self._spec, file=file, n_fetched=self._n_fetched, n_ranges=self._n_ranges
            )

    def _fetch(self, start: int, end: int) -> None:
        """Fetch at least up to `end`, beginning with the first byte that is not here."""
        last = self._parts[-1][1] if self._parts else 0
        start = max(start, last)
        end = min(self._announced.n_bytes, max(end, start + self._range_bytes))
        if end > MAX_HEADER_BYTES:
            raise SourceError(
                f"{self._spec}: its header has more than {format_bytes(MAX_HEADER_BYTES)}, "
                "which no model needs; it is not fetched"
            )
        data = self._fetched(start, end)
        self._buffer += bytes(start - len(self._buffer)) + data
        if self._parts and start == last:
            start = self._parts.pop()[0]
        self._parts.append((start, end))
        self._n_fetched += len(data)
        if self._report is not None:
            self._report(self._n_fetched)

    def _fetched(self, start: int, end: int) -> bytes:
        """Fetch a range, more than once where the connection breaks."""
        for attempt in range(N_ATTEMPTS):
            self._n_ranges += 1
            try:
                return fetch_range(self._announced, self._source, start, end)
            except BrokenTransferError:
                if attempt == N_ATTEMPTS - 1:
                    raise
                time.sleep(hub.BACKOFF_S * 2**attempt)
        raise AssertionError("the loop returns or raises")
