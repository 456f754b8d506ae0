"""What a pass over a model computes: one step per pass over a layer, in order.

Plain records that policies make (skippers/) and forwards execute (models/). All layers run
unless a step says otherwise, and then the graph is the one that was built without any step.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

Act = Literal["run", "skip", "approximate"]
"""What becomes of a sub-block: computed, left out, or replaced by its stand-in."""

ACTS: tuple[Act, ...] = get_args(Act)
ExpertRule = Literal["all", "count", "weight", "mass", "ratio"]
"""Which of the chosen experts compute, best first; see `Step.expert_rule`."""


class Step(NamedTuple):
    """One pass over one layer. A tuple, because graphs are looked up by it for every token.

    Attributes:
        il: layer.
        attn, ffn: what becomes of its two sub-blocks.
        repeat: 0 for the first pass over a layer; j for the plan's j-th further pass (over
            whichever layer), whose keys and values have a place of their own.
        store: keys and values are written though attention is not run, for tokens that may
            need them.
        keep: percent of a prompt's tokens that are computed; the others pass by.
        expert_rule: which chosen experts compute: `all`; the first `expert_value` (`count`);
            those of at least that weight (`weight`); the fewest first ones whose weights reach
            it (`mass`); those until a weight falls below that part of the sum before it
            (`ratio`). The best one always computes.
        expert_value: see expert_rule.
    """

    il: int
    attn: Act = "run"
    ffn: Act = "run"
    repeat: int = 0
    store: bool = False
    keep: int = 100
    expert_rule: ExpertRule = "all"
    expert_value: float = 0.0

    @property
    def reads(self) -> bool:
        """Whether any of the layer's own weights are needed."""
        return self.attn == "run" or self.ffn == "run" or self.store

    @property
    def approximates(self) -> bool:
        """Whether a stand-in is needed."""
        return "approximate" in (self.attn, self.ffn)


Steps = tuple[Step, ...]


def all_run(layers: Iterable[int]) -> Steps:
    """Return the steps that compute these layers in full."""
    return tuple(Step(il) for il in layers)


def n_repeats(steps: Sequence[Step]) -> int:
    """Return how many further passes over layers there are."""
    return max((step.repeat for step in steps), default=0)
