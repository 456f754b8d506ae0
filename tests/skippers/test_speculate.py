"""The speculation policy in played worlds: it finds what pays, and leaves what does not."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from edgeroute.skippers.speculate import (
    CONTROL_EVERY,
    JUDGED_ENOUGH,
    LENGTHS,
    PLAIN,
    Acceptance,
    Choice,
    Line,
    Speculator,
)

LONGEST = 15


def chain(drafted: int, accepted: int) -> list[bool]:
    """What became of guesses one behind the other, the first of which were right."""
    return [i < accepted for i in range(drafted)]


@dataclass
class World:
    """Passes of `pass_s(k)` seconds, of which `waiting` is no arithmetic; and sources of drafts.

    A source is (probability that a token is accepted, seconds of a drafted token, how often it
    can draft at all).
    """

    pass_s: Callable[[int], float]
    waiting: float
    sources: dict[str, tuple[float, float, float]]
    noise: float = 0.15
    seed: int = 1

    def play(self, policy: Speculator, n_tokens: int) -> tuple[float, dict[Choice, int]]:
        """Decode; return the speed over plain decoding, and how often what was chosen."""
        rng, seconds, n_done = random.Random(self.seed), 0.0, 0
        used: dict[Choice, int] = {}
        while n_done < n_tokens:
            ready = [name for name, (_, _, often) in self.sources.items() if rng.random() < often]
            choice = policy.choose(dict.fromkeys(ready, LONGEST))
            used[choice] = used.get(choice, 0) + 1
            k = choice.n_tokens + 1
            pass_s = self.pass_s(k) * max(0.5, rng.gauss(1, self.noise))
            accepted, draft_s = 0, 0.0
            if choice.source is not None:
                chance, each_s, _ = self.sources[choice.source]
                while accepted < choice.n_tokens and rng.random() < chance:
                    accepted += 1
                draft_s = each_s * choice.n_tokens
                policy.observe_draft(choice.source, chain(k - 1, accepted), (draft_s, pass_s))
            computing_s = k * self.pass_s(1) * (1 - self.waiting) if self.waiting else pass_s
            policy.observe_pass(k, pass_s, computing_s)
            seconds += pass_s + draft_s
            n_done += accepted + 1
        return n_done * self.pass_s(1) / seconds, used

    def best(self) -> float:
        """Speed of the best source at its best length, where one can draft always."""
        return max(
            sum(chance**i for i in range(n + 1)) * self.pass_s(1) / (self.pass_s(n + 1) + cost * n)
            for chance, cost, often in self.sources.values() if often == 1
            for n in (0, *LENGTHS)
        )  # fmt: skip


def streamed(k: int) -> float:
    return max(0.6, 0.05 * k)


def resident(k: int) -> float:
    return 0.05 * k


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chance", [0.5, 0.8, 0.95])
def test_where_passes_wait_it_nears_the_best_length(chance: float, seed: int) -> None:
    world = World(streamed, 0.9, {"self": (chance, 0.02, 1)}, seed=seed)
    policy = Speculator(LONGEST)
    world.play(policy, 500)
    speed, _ = world.play(policy, 3000)
    assert speed > 0.85 * world.best()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chance", [0.0, 0.05])
def test_a_hopeless_source_costs_next_to_nothing(chance: float, seed: int) -> None:
    """It is tried, left, and tried again ever more seldom."""
    sources = {"self": (chance, 0.05, 1.0), "small": (chance, 0.1, 1.0)}
    world = World(streamed, 0.9, sources, seed=seed, noise=0.05)
    speed, used = world.play(Speculator(LONGEST), 3000)
    assert speed > 0.98
    n_tries = sum(n for choice, n in used.items() if choice != PLAIN)
    assert 6 <= n_tries < 120


@pytest.mark.parametrize("waiting", [0.0, 0.3])
def test_where_a_pass_costs_its_tokens_nothing_is_even_tried(waiting: float) -> None:
    world = World(resident, 0.0, {"lookup.2": (0.7, 0.0, 0.5), "self": (0.9, 0.02, 1)})
    speed, used = world.play(Speculator(LONGEST), 1500)
    assert speed > 0.97 and used[PLAIN] > 1490


def test_the_best_of_several_sources_drafts() -> None:
    sources = {"lookup.1": (0.1, 0.0, 0.4), "self": (0.1, 0.02, 1.0), "small": (0.75, 0.03, 1.0)}
    world = World(streamed, 0.9, sources)
    speed, used = world.play(Speculator(LONGEST), 2000)
    by_small = sum(n for choice, n in used.items() if choice.source == "small")
    assert by_small > 0.8 * sum(used.values())
    assert speed > 0.88 * world.best()


def test_a_source_that_becomes_good_is_found_and_one_that_becomes_bad_left() -> None:
    world = World(streamed, 0.9, {"self": (0.0, 0.02, 1.0)})
    policy = Speculator(LONGEST)
    assert world.play(policy, 500)[0] > 0.96
    world.sources["self"] = (0.85, 0.02, 1.0)
    world.play(policy, 500)
    assert world.play(policy, 1500)[0] > 3.0
    world.sources["self"] = (0.0, 0.02, 1.0)
    speed, used = world.play(policy, 600)
    assert speed > 0.95 and used[PLAIN] > 450


def test_a_machine_that_becomes_another_is_noticed() -> None:
    """All that streamed is in memory suddenly: passes cost their tokens."""
    world = World(streamed, 0.9, {"self": (0.75, 0.03, 1.0)})
    policy = Speculator(LONGEST)
    world.play(policy, 500)
    assert policy.on
    world.pass_s, world.waiting = resident, 0.0
    world.play(policy, 500)
    _, used = world.play(policy, 500)
    assert used.get(PLAIN, 0) > 400


def test_plain_passes_keep_their_price_known() -> None:
    world = World(streamed, 0.9, {"self": (0.9, 0.01, 1.0)})
    _, used = world.play(Speculator(LONGEST), 4000)
    n_passes = sum(used.values())
    assert n_passes / CONTROL_EVERY - 2 <= used[PLAIN] <= 2 * n_passes / CONTROL_EVERY + 6


def test_forced_drafts_always_even_at_first_and_at_a_loss() -> None:
    policy = Speculator(2, forced=True)
    assert policy.choose({"self": 15}) == Choice("self", 2)
    assert policy.choose({}) == PLAIN and policy.choose({"self": 0}) == PLAIN
    world = World(resident, 0.0, {"self": (0.0, 0.05, 1)})
    _, used = world.play(policy, 200)
    assert used == {Choice("self", 2): used[Choice("self", 2)], Choice("self", 1): used[
        Choice("self", 1)]}  # fmt: skip
    assert policy.on


def test_nothing_is_drafted_before_plain_passes_were_measured() -> None:
    policy = Speculator(LONGEST)
    for _ in range(3):
        assert policy.choose({"self": 15}) == PLAIN
        policy.observe_pass(1, 0.6, 0.05)
    assert policy.choose({"self": 15}).source == "self"
    assert policy.choose({"self": 2}).n_tokens <= 2
    assert policy.stats() == {}


def test_a_line_through_noisy_means() -> None:
    rng, line = random.Random(1), Line()
    assert line.seconds(1) is None
    line.observe(1, 0.6)
    line.slope_guess = 0.05
    assert line.seconds(1) == pytest.approx(0.6) and line.seconds(5) == pytest.approx(0.8)
    for i in range(30):
        for k in (1, 4, 9):
            line.observe(k, (0.5 + 0.01 * k) * rng.uniform(0.9, 1.1))
        if i % 3 == 0:
            line.observe(4, 50.0)  # the disk stood still
    assert line.seconds(1) == pytest.approx(0.51, abs=0.05)
    assert line.seconds(9) == pytest.approx(0.59, abs=0.06)
    flat = Line()
    for k in (1, 3, 5, 1, 3, 5):
        flat.observe(k, 1.0 - 0.1 * k)
    assert flat.seconds(9) == pytest.approx(0.7), "more tokens are never taken to cost less"


def test_expected_tokens() -> None:
    sure, never = Acceptance(15), Acceptance(15)
    for _ in range(200):
        sure.observe(chain(8, 8))
        never.observe(chain(8, 0))
    assert sure.expected(0) == never.expected(0) == 1.0
    assert 8.8 < sure.expected(8) <= 9.0
    assert 1.0 < never.expected(8) < 1.05
    mixed = Acceptance(15)
    for i in range(400):
        mixed.observe(chain(4, 2 if i % 2 else 0))  # half the time two, never three
    assert mixed.expected(4) == pytest.approx(2.0, abs=0.15)


def test_guesses_may_be_longer_than_drafts() -> None:
    """Look-up is judged by eight tokens also where a pass verifies fewer."""
    policy = Speculator(3)
    for _ in range(5):
        policy.observe_pass(1, 0.6, 0.05)
    for _ in range(JUDGED_ENOUGH):
        policy.observe_guess("lookup.2", 8, 8)
    assert policy.choose({"lookup.2": 8}) == Choice("lookup.2", 3)


def test_counts_of_a_source() -> None:
    policy = Speculator(LONGEST)
    policy.observe_pass(5, 0.6, 0.1)
    policy.observe_draft("self", chain(4, 3), (0.1, 0.6))
    policy.observe_draft("self", chain(4, 0), (0.1, 0.6))
    found = policy.stats()["self"]
    assert isinstance(found, dict)
    assert (found["drafted"], found["accepted"], found["passes"]) == (8, 3, 2)


def test_counts_are_read_while_sources_come() -> None:
    """By a server's thread, say; here a source comes in the very middle of the reading."""
    policy = Speculator(LONGEST)

    class Reading:
        @property
        def rounds(self) -> int:
            policy.observe_draft(f"source {len(policy._sources)}", [True], (0.1, 0.6))
            return 0

    policy._sources["first"] = Reading()  # type: ignore[assignment]
    assert policy.stats() == {}
    assert len(policy._sources) == 2


@pytest.mark.parametrize(("right", "drafts"), [(0, False), (7, True)])
def test_a_judged_source_drafts_by_what_was_judged_and_is_never_tried(
    right: int, drafts: bool
) -> None:
    policy = Speculator(LONGEST)
    for _ in range(5):
        policy.observe_pass(1, 0.6, 0.05)
    for _ in range(JUDGED_ENOUGH):
        assert not policy.judged("lookup.2")
        policy.observe_guess("lookup.2", min(8, right + 1), right)
    assert policy.judged("lookup.2")
    choice = policy.choose({"lookup.2": LONGEST})
    assert (choice.source == "lookup.2") == drafts
    assert policy.on == drafts


def test_a_judged_source_gives_way_to_a_better_one() -> None:
    """A cheap guess that is often wrong does not displace a draft that is mostly right."""
    world = World(streamed, 0.9, {"self": (0.8, 0.02, 1.0)})
    policy = Speculator(LONGEST)
    world.play(policy, 300)
    for _ in range(20):
        policy.observe_guess("lookup.1", 2, 1)
    chosen = [policy.choose({"lookup.1": LONGEST, "self": LONGEST}).source for _ in range(5)]
    assert "lookup.1" not in chosen and "self" in chosen
