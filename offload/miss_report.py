"""What the gate of misses did, and what it knows."""

from dataclasses import asdict, dataclass

from edgeroute.offload.miss_cost import CostReport


@dataclass(frozen=True, slots=True, kw_only=True)
class MissReport:
    """What it did and knows, for `stats`.

    Attributes:
        state: `upload` or `compute`, what it does now; `trial`, `on` or `off` (forced).
        n_leases: leases that missed experts in decode steps, and `n_computed_leases` of them
            that the processor computed.
        n_uploaded: pages uploaded, prompts included, in `uploaded_s` seconds.
        n_computed: pages computed by the processor, `n_pairs` pairs of token and expert, in
            `computed_s` seconds.
        upload: cost of an upload as measured; None before any.
        compute: cost of computing as measured; None before any.
        upload_step_s: seconds of a step that uploads, in the latest trial or estimate.
        compute_step_s: the same, computing.
        n_trials: trials ended, and `n_changes` changes of mind.
    """

    state: str
    n_leases: int
    n_computed_leases: int
    n_uploaded: int
    uploaded_s: float
    n_computed: int
    n_pairs: int
    computed_s: float
    upload: CostReport | None
    compute: CostReport | None
    upload_step_s: float | None
    compute_step_s: float | None
    n_trials: int
    n_changes: int

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        return asdict(self)
