"""What paging could reach at best: by the disk and the arithmetic, and by the policy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeroute.models.base import MoeModel
from edgeroute.models.registry import describe
from edgeroute.offload.replay import choose_policy, replay
from edgeroute.offload.trace import read_trace
from edgeroute.runtime.gguf import GGUFFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Seconds that some bytes and some arithmetic take, one after the other or at once.

    Source: field.md section 2, the physical limit; `resident_s` is measured with all in memory,
    so it contains the reads of resident weights.
    """

    moved_bytes: float
    store_bytes_s: float
    resident_s: float

    @property
    def serial_s(self) -> float:
        """First all reads, then all arithmetic."""
        return self.moved_bytes / self.store_bytes_s + self.resident_s

    @property
    def overlapped_s(self) -> float:
        """Reads behind arithmetic, or arithmetic behind reads."""
        return max(self.moved_bytes / self.store_bytes_s, self.resident_s)

    def to_dict(self) -> dict[str, float]:
        return {
            "moved_bytes": round(self.moved_bytes),
            "store_bytes_s": round(self.store_bytes_s),
            "resident_s": round(self.resident_s, 6),
            "serial_s": round(self.serial_s, 6),
            "overlapped_s": round(self.overlapped_s, 6),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Bytes of a file by use. A page is one expert's slices; sizes may differ by layer."""

    file_bytes: int
    expert_bytes: int
    token_bytes: int
    """Of the experts that one token chooses in all layers."""

    @property
    def fixed_bytes(self) -> int:
        """What every token needs, embeddings included."""
        return self.file_bytes - self.expert_bytes

    def to_dict(self) -> dict[str, int]:
        return {
            "file_bytes": self.file_bytes,
            "expert_bytes": self.expert_bytes,
            "token_bytes": self.token_bytes,
        }


def geometry(path: Path) -> Geometry:
    """Read what a file's experts weigh; a dense model has none.

    Raises:
        UnsupportedModelError, ModelFileError: this version cannot run the file.
    """
    with GGUFFile.open(path) as file:
        model = describe(file)
        expert_bytes = token_bytes = 0
        moe = model.hparams.moe
        if moe is not None and isinstance(model, MoeModel):
            for il in range(model.hparams.n_layer):
                if model.is_moe(il):
                    n = sum(file.tensors[name].nbytes for name in model.expert_tensors(il))
                    expert_bytes += n
                    token_bytes += n // moe.n_expert * moe.n_expert_used
    return Geometry(file_bytes=path.stat().st_size, expert_bytes=expert_bytes,
                    token_bytes=token_bytes)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One trace through every policy with the slots that the run had.

    `lru_bytes` is what LRU would read by demand alone in all decode steps together.
    """

    n_slots: int
    best: str
    hit_ratios: Mapping[str, float]
    lru_bytes: int

    def to_dict(self) -> dict[str, object]:
        return {
            "n_slots": self.n_slots,
            "best": self.best,
            "hit_ratios": {name: round(ratio, 5) for name, ratio in self.hit_ratios.items()},
            "lru_bytes": self.lru_bytes,
        }


def replayed(trace_path: Path, n_slots: int) -> Replayed:
    """Replay a trace through LRU, every other online policy, and Belady's optimum.

    All traced layers share one pool here; where the model's experts have several types, so
    that the engine has several pools, the figures are near, not exact.

    Raises:
        UsageError: it is no trace, or has no decode steps.
        CapacityError: a step needs more slots.
    """
    trace = read_trace(trace_path)
    choice = choose_policy(trace, n_slots)
    lru = replay(trace, "lru", n_slots).decode.total
    return Replayed(
        n_slots=n_slots, best=choice.name, hit_ratios=choice.hit_ratios,
        lru_bytes=lru.misses * trace.meta.page_bytes,
    )  # fmt: skip
