"""Whose joules they were: what a meter counts, shared among the requests that were computed.

Between two readings a request has the share of the joules that it has of the seconds of passes;
the seconds of a pass are shared by the tokens that it computed for each request. So a prompt of a
thousand tokens pays for its batch alone, and answers that decode together pay alike. What is used
while nothing is asked for is nobody's; what other programs use meanwhile is in a machine's
counters, and so is what another Runtime of this process uses in an estimate.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from edgeroute.runtime.energy import EnergyMeter
from edgeroute.runtime.energy_model import check_energy

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.models.forward import Piece
    from edgeroute.request import Request

READ_EVERY_S: Final = 1.0
"""A reading between two passes, with cold caches, costs 250 us."""


class EnergySource(NamedTuple):
    """Where joules are from, and what they cover."""

    source: str
    estimated: bool
    scope: str


class EnergyBook:
    """Shares a meter's joules among requests. The engine thread owns it; any may ask `stats`.

    Args:
        meter: what counts; whoever made it closes it.
        clock: seconds.
    """

    def __init__(self, meter: EnergyMeter, clock: Callable[[], float] = time.perf_counter) -> None:
        self._meter, self._clock = meter, clock
        self._sharing: list[Request] = []  # those with seconds since the last reading
        self._last_j, self._read_at = meter.joules(), clock()
        self._totals: dict[tuple[str, bool], float] = {}
        self._answered_j = 0.0
        self._n_tokens = 0

    @property
    def source(self) -> EnergySource:
        """What is counted by now."""
        meter = self._meter
        return EnergySource(meter.source, meter.estimated, meter.scope)

    def wake(self) -> None:
        """Begin to count: what was used before is nobody's."""
        self._last_j, self._read_at = self._meter.joules(), self._clock()

    def passed(
        self, pieces: "Sequence[Piece]", requests: "Sequence[Request]", seconds: float
    ) -> None:
        """Note a pass: of a piece for each request, or of several for one."""
        if len(requests) == 1:
            self._owe(requests[0], seconds)
        else:
            n_tokens = sum(len(piece.tokens) for piece in pieces)
            for piece, request in zip(pieces, requests, strict=True):
                self._owe(request, seconds * len(piece.tokens) / n_tokens)
        if self._clock() - self._read_at >= READ_EVERY_S:
            self._read(self._sharing)

    def _owe(self, request: "Request", seconds: float) -> None:
        if request.energy_s == 0.0:
            self._sharing.append(request)
        request.energy_s += max(seconds, 1e-9)

    def settle(self, request: "Request") -> EnergySource:
        """Read the meter for a request that ends; its `energy_j` is all it will have."""
        self._read(self._sharing or [request])
        if request.token_ids:
            self._answered_j += request.energy_j
            self._n_tokens += len(request.token_ids)
        return self.source

    def _read(self, sharing: "list[Request]") -> None:
        source = self._meter.source, self._meter.estimated
        now_j = self._meter.joules()
        spent_j, self._last_j, self._read_at = now_j - self._last_j, now_j, self._clock()
        self._totals[source] = self._totals.get(source, 0.0) + spent_j
        total_s = sum(each.energy_s for each in sharing)
        for each in sharing:
            share = each.energy_s / total_s if total_s > 0 else 1 / len(sharing)
            each.energy_j += spent_j * share
            each.energy_s = 0.0
        self._sharing = []

    def stats(self) -> dict[str, object]:
        """Return what all requests together have used, as plain JSON types.

        `joules_per_token` is of finished answers, their prompts included. `measured` and
        `modelled` have the joules by source: a counter that fails is replaced.
        """
        totals = list(self._totals.items())
        per_token = self._answered_j / self._n_tokens if self._n_tokens else None
        return {
            "joules": round(sum(joules for _, joules in totals), 6),
            **({} if per_token is None else {"joules_per_token": round(per_token, 6)}),
            **self.source._asdict(),
            "measured": {name: round(j, 6) for (name, guess), j in totals if not guess},
            "modelled": {name: round(j, 6) for (name, guess), j in totals if guess},
            "notes": list(self._meter.notes),
        }


def open_book(loaded: "LoadedModel", how: str) -> EnergyBook | None:
    """Return a book over what counts on this machine; None where `how` is off.

    Lifetime: its meter is closed with the model.
    """
    mode, model = check_energy(how)
    if mode == "off":
        return None
    meter = EnergyMeter.open(mode, model=model, gpu=_gpu(loaded.device.info.name))
    loaded.before_close(meter.close)
    return EnergyBook(meter)


def _gpu(device: str) -> int | None:
    """Return the index of an NVIDIA GPU by ggml's name for it; None for other devices."""
    number = device.removeprefix("CUDA")
    return int(number) if number != device and number.isdigit() else None
