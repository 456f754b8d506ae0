"""Traces to measure locality on: drawn with some reuse, or written out token by token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from edgeroute.offload.trace import Mark, Trace, TraceMeta, make_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What a drawn trace is like. `keep` is the chance of an expert to be used again at once."""

    n_layer: int
    n_expert: int
    n_expert_used: int
    n_step: int
    keep: float = 0.5
    max_tokens: int = 1
    skip: float = 0.0


def meta_of(n_layer: int, n_expert: int, n_expert_used: int) -> TraceMeta:
    return TraceMeta(
        model="lab",
        n_layer=n_layer,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        page_bytes=1,
        layers=tuple(range(n_layer)),
    )


def any_draw(rng: random.Random) -> Draw:
    """A small trace of any kind: several tokens in a step, layers left out, all or no reuse."""
    used = rng.randint(1, 4)
    return Draw(
        n_layer=rng.randint(1, 4),
        n_expert=rng.randint(used, 10),
        n_expert_used=used,
        n_step=rng.randint(1, 60),
        keep=rng.random(),
        max_tokens=rng.choice([1, 1, 3]),
        skip=rng.choice([0.0, 0.1]),
    )


def drawn(draw: Draw, rng: random.Random) -> Trace:
    """Decode steps whose experts are partly those of the step before, partly drawn, in any order.

    Smaller numbers are drawn more often.
    """
    meta = meta_of(draw.n_layer, draw.n_expert, draw.n_expert_used)
    steps = []
    route: dict[int, list[int]] = {}
    for _ in range(draw.n_step):
        chosen = []
        for il in meta.layers:
            if il and rng.random() < draw.skip:
                continue
            ids: list[int] = []
            for _ in range(rng.randint(1, draw.max_tokens)):
                token = [expert for expert in route.get(il, ()) if rng.random() < draw.keep]
                while len(token) < draw.n_expert_used:
                    expert = int(rng.triangular(0, draw.n_expert, 0))
                    if expert < draw.n_expert and expert not in token:
                        token.append(expert)
                rng.shuffle(token)
                route[il] = token
                ids += token
            chosen.append((il, ids))
        steps.append(make_step(meta, False, chosen))
    return Trace(meta=meta, steps=tuple(steps))


def written(
    meta: TraceMeta, tokens: Sequence[Sequence[Sequence[int]]], *marks: tuple[int, str]
) -> Trace:
    """One decode step for each token, which gives every layer its experts."""
    steps = tuple(make_step(meta, False, list(enumerate(token))) for token in tokens)
    return Trace(
        meta=meta, steps=steps, marks=tuple(Mark(step=at, label=label) for at, label in marks)
    )
