"""Rules for experts: paged and resident give the same bits, and what is left out is not read."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeroute.models.forward import Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.depth import ExpertRule, Step, all_run
from edgeroute.skippers import experts
from edgeroute.skippers.experts import LayerRule
from edgeroute.tools import synth
from edgeroute.tools.expert_routes import WatchedModel
from tests.edgeroute import paged_lab as lab

MOE = [name for name, spec in synth.ARCHITECTURES.items() if spec.n_expert]
SMALL = replace(lab.SMALL, n_expert_used=6)
RULES: list[tuple[ExpertRule, float]] = [
    ("count", 1), ("count", 3), ("weight", 0.1), ("weight", 0.5), ("mass", 0.4), ("mass", 0.75),
    ("ratio", 0.3), ("ratio", 0.9),
]  # fmt: skip
STEPS = [*lab.LESS, [("b", 16, 3)], [("b", 2, 0)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("ruled")
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Any]:
    synth.write(SMALL, folder / "small.gguf")
    opened = lab.Lab(folder / "small.gguf")
    yield opened
    opened.close()


class Ruled:
    """A forward whose every pass is the same steps."""

    def __init__(self, forward: Any, steps: Sequence[Step]) -> None:
        self.kv, self._forward = forward.kv, forward
        self._spans: tuple[Span, ...] = forward.spans(tuple(steps))

    def run(self, pieces: Sequence[Piece]) -> Any:
        return self._forward.run(pieces, self._spans)


def ruled(n_layer: int, *rules: tuple[ExpertRule, float]) -> tuple[Step, ...]:
    """Steps whose layers take turns in some rules."""
    return tuple(
        Step(il, expert_rule=rules[il % len(rules)][0], expert_value=rules[il % len(rules)][1])
        for il in range(n_layer)
    )


def both(opened: Any, paged: Any, steps: Sequence[Step], passes: Any = STEPS) -> list[Any]:
    """Run passes paged and resident; they must be the same bits."""
    ours = lab.play(Ruled(paged.forward, steps), passes)
    theirs = lab.play(Ruled(opened.forward, steps), passes)
    paged.check()
    assert lab.equal(ours, theirs)
    return ours


@pytest.mark.parametrize("arch", MOE)
def test_every_architecture_and_rule(arch: str, folder: Path) -> None:
    """Layers with different rules in one pass, with the fewest slots and with many."""
    path = folder / f"{arch}.gguf"
    synth.make(arch, path)
    opened = lab.Lab(path)
    mixed = (("weight", 0.2), ("mass", 0.5), ("ratio", 0.6), ("count", 2), ("all", 0.0))
    try:
        for slots, forced in ((None, True), (opened.pools[0].n_expert // 2, False)):
            with opened.paged(slots=slots, prefetch="gate", forced=forced) as paged:
                for at in range(0, len(mixed), 2):
                    both(opened, paged, ruled(opened.n_layer, *mixed[at:], *mixed[:at]))
                paged.settle()
    finally:
        opened.close()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_rule_leaves_experts_out(rule: tuple[ExpertRule, float], small: Any) -> None:
    """Other answers than the whole model's, the same ones paged, and fewer bytes."""
    with small.paged() as paged:
        full = lab.play(paged.forward, STEPS)
        everything = paged.counts()
        answers = both(small, paged, ruled(SMALL.n_layer, rule))
        counts = paged.counts()
    assert not lab.equal(answers, full)
    assert counts.demand_bytes - everything.demand_bytes < everything.demand_bytes


def test_all_is_what_it_was(small: Any) -> None:
    """Steps that say `all`, and rules that keep all, are the plain pass's bits."""
    whole = small.resident(STEPS)
    never = [("all", 0.0), ("count", 6), ("count", 99), ("weight", 0), ("mass", 9), ("ratio", 0)]
    with small.paged(slots=4) as paged:
        assert lab.equal(paged.run(STEPS), whole)
        assert lab.equal(both(small, paged, all_run(range(SMALL.n_layer))), whole)
        for rule in never[1:3]:
            assert lab.equal(both(small, paged, ruled(SMALL.n_layer, rule)), whole)
        for rule in never[3:]:  # weights divided by their sum twice: all but the last bits
            found = both(small, paged, ruled(SMALL.n_layer, rule))
            for ours, theirs in zip(found, whole, strict=True):
                assert np.square(ours - theirs).sum() <= 0.01 * np.square(theirs).sum()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_exactly_what_the_rule_keeps_is_leased(
    rule: tuple[ExpertRule, float], small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rule's own definition, of what the routers answer where the rule holds."""
    rules = [LayerRule(*rule)] * SMALL.n_layer
    leased: list[tuple[int, set[int]]] = []
    loaded = SimpleNamespace(model=small.model, file=small.file, experts=None, kv=small.kv,
                             tokenizer=None,
                             device=small.device, forward=small.forward)  # fmt: skip
    tokens = np.random.default_rng(2).integers(4, 380, 40).tolist()
    with WatchedModel(loaded, len(tokens)) as watched, small.paged(slots=8) as paged:  # type: ignore[arg-type]
        for n in (1, 3, len(tokens)):
            logits = watched.run(tokens[:n], rules).copy()
            wanted = [
                set(ids[experts.kept(weights, *rule)].tolist())
                for ids, weights in zip(watched.chosen(), watched.routes(), strict=True)
            ]
            _listen(paged.store, leased, monkeypatch)
            leased.clear()
            ours = _once(Ruled(paged.forward, ruled(SMALL.n_layer, rule)), tokens[:n])
            assert np.array_equal(ours, logits)
            assert leased == list(enumerate(wanted))
            paged.check()


def _once(forward: Any, tokens: list[int]) -> Any:
    """Compute tokens of a new sequence, all with logits."""
    region = forward.kv.allocate(256)
    assert region is not None
    try:
        return forward.run([Piece(tokens, 0, region, len(tokens))]).copy()
    finally:
        forward.kv.release(region)


def _listen(store: Any, leased: list[tuple[int, set[int]]], patch: pytest.MonkeyPatch) -> None:
    """Note which experts of which layer are asked for, at once or in turn."""
    for name in ("lease", "in_turn"):
        ask = getattr(type(store), name)

        def noted(il: int, wanted: Any, *rest: Any, ask: Any = ask) -> Any:
            leased.append((il, set(wanted)))
            return ask(store, il, wanted, *rest)

        patch.setattr(store, name, noted)
