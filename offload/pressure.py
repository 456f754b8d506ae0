"""How much the expert slots may hold as memory comes and goes: a pure rule over readings.

The kernel's own killer looks at what is available; so does this, earlier and with a margin.
"""

from dataclasses import dataclass

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PressureParams:
    """Margins of `Pressure`.

    Below `low_bytes` available, slots are given up until `high_bytes` are; above twice
    `high_bytes` for `calm_readings` readings in a row, they come back, a part at a time.

    Raises:
        UsageError: margins that contradict each other.
    """

    low_bytes: int = 128 * MIB
    high_bytes: int = 256 * MIB
    calm_readings: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.low_bytes <= self.high_bytes or self.calm_readings < 1:
            raise UsageError(f"pressure margins contradict each other: {self}")


class Pressure:
    """Turns readings of available memory into a size for the slots. Not thread-safe.

    Attributes:
        n_shrunk: times that slots were given up.
    """

    def __init__(self, full_bytes: int, params: PressureParams | None = None) -> None:
        """Begin at `full_bytes`, which it will never exceed."""
        self.full_bytes = full_bytes
        self.params = params or PressureParams()
        self.target_bytes = full_bytes
        self.n_shrunk = 0
        self._n_calm = 0

    def read(self, available_bytes: int, held_bytes: int) -> int | None:
        """Take a reading.

        Args:
            available_bytes: what the machine or control group could give now.
            held_bytes: what the slots in use hold.

        Returns:
            The bytes that slots should have from now on; None where nothing changes.
        """
        params = self.params
        if available_bytes < params.low_bytes:
            self._n_calm = 0
            target = max(0, held_bytes - (params.high_bytes - available_bytes))
            if target >= self.target_bytes:
                return None
            self.target_bytes = target
            self.n_shrunk += 1
            return target
        spare = available_bytes - 2 * params.high_bytes
        self._n_calm = self._n_calm + 1 if spare > 0 else 0
        if self.target_bytes >= self.full_bytes or self._n_calm < params.calm_readings:
            return None
        self._n_calm = 0
        target = min(self.full_bytes, self.target_bytes + spare // 2)
        if target == self.target_bytes:  # half of a byte to spare
            return None
        self.target_bytes = target
        return target
