"""What was proven of each lever on this machine and model, and where that is kept.

`edgeroute bench levers` writes it; a Runtime with levers="proven" reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Verdict = Literal["wins", "loses", "level", "lossy", "failed"]
"""`wins` and `loses` where the interval of the gain excludes 0; `level` where it does not;
`lossy` gains, but at a cost in quality above what is allowed; `failed` could not be run."""

VALID_S: Final = 90 * 24 * 3600
"""A proof older than this counts for nothing: machines and disks age."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What a proof holds for. Any difference makes it void.

    Attributes:
        model: the file's identity: its size and a hash of its header.
        machine: processor, cores, memory and the disk's kind, hashed; no serial numbers.
        power_mode: of the board or the power supply (`ac`, `battery`), where there is one.
        version: edgeroute's, and ggml's.
        budget: memory budget in steps of an eighth of the model's bytes: levers that pay at one
            budget lose at another.
    """

    model: str
    machine: str
    power_mode: str
    version: str
    budget: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One lever against off.

    Attributes:
        lever: its name, such as `prefetch` or `speculate`.
        settings: the Runtime settings that it was measured with, such as {"prefetch": "gate"}.
        off: those that it was measured against.
        gain: ratio of seconds per token without it to seconds with it, less 1: 0.1 is 10 %
            quicker. `low` and `high` bound it with 95 % confidence.
        kl: nats per token against the model without it; 0 where answers are the same bits.
        n_pairs: alternating pairs measured.
        when: seconds since 1970.
        note: a sentence, for tables.
    """

    lever: str
    settings: Mapping[str, Any]
    off: Mapping[str, Any]
    gain: float
    low: float
    high: float
    kl: float
    verdict: Verdict
    n_pairs: int
    when: int
    note: str = ""
