"""The thread policy on a played machine: a lost core is noticed, a free one is used."""

from dataclasses import dataclass, field

from edgeroute.runtime.threads import ThreadPolicy


@dataclass
class Machine:
    """Two cores, `n_busy` other processes; ggml's spinning barrier decides step times."""

    n_cores: int = 2
    n_busy: int = 0
    now: float = 0.0
    last_read: float = 0.0
    sees_load: bool = True
    log: list[int] = field(default_factory=list)

    def step_s(self, n_threads: int) -> float:
        if n_threads + self.n_busy <= self.n_cores:
            return 0.02 / n_threads
        if n_threads == 1:
            return 0.02 * (1.0 if self.n_busy < self.n_cores else 1.2)
        return 0.02 / n_threads * (3 if self.n_busy == 1 else 60)

    @property
    def age_s(self) -> float:
        return self.now - self.last_read

    def read(self) -> tuple[float, float]:
        covered, self.last_read = self.age_s, self.now
        return (float(min(self.n_busy, self.n_cores)) if self.sees_load else 0.0), covered

    def run(self, policy: ThreadPolicy, seconds: float) -> float:
        """Decode for so long; return tokens per second."""
        began, n = self.now, 0
        while self.now - began < seconds:
            step = self.step_s(policy.n_threads)
            self.now += step
            policy.observe(1, step)
            self.log.append(policy.n_threads)
            n += 1
        return n / (self.now - began)


def make(machine: Machine, *, fixed: bool = False) -> ThreadPolicy:
    return ThreadPolicy(machine.n_cores, machine, lambda: machine.now, fixed=fixed)


def test_an_idle_machine_keeps_all_threads() -> None:
    machine = Machine()
    policy = make(machine)
    assert machine.run(policy, 10) > 99
    assert policy.n_changes == 0


def test_load_costs_a_thread_within_two_seconds_and_gives_it_back_within_two() -> None:
    machine = Machine()
    policy = make(machine)
    machine.run(policy, 3)
    for n_busy in (1, 2):
        machine.n_busy = n_busy
        machine.run(policy, 2)
        assert policy.n_threads == 1
        assert machine.run(policy, 5) > 0.95 / machine.step_s(1)
        machine.n_busy = 0
        machine.run(policy, 2)
        assert policy.n_threads == 2
        assert machine.run(policy, 5) > 99


def test_slow_steps_alone_are_enough_where_load_cannot_be_seen() -> None:
    """A container may hide other processes; the steps still tell."""
    machine = Machine(sees_load=False)
    policy = make(machine)
    machine.run(policy, 1)
    machine.n_busy = 2
    machine.run(policy, 3)
    assert policy.n_threads == 1
    rate = machine.run(policy, 30)
    assert rate > 0.75 / machine.step_s(1), "failed trials must become rare"


def test_steady_slowness_at_one_thread_becomes_the_new_usual() -> None:
    machine = Machine()
    policy = make(machine)
    machine.n_busy = 2
    machine.run(policy, 4)
    assert policy.n_threads == 1
    usual = policy.usual_s(1)
    assert usual is not None and abs(usual - machine.step_s(1)) < 1e-3


def test_a_given_number_is_kept() -> None:
    machine = Machine()
    policy = make(machine, fixed=True)
    machine.n_busy = 2
    machine.run(policy, 5)
    assert policy.n_threads == 2 and policy.n_changes == 0


def test_prefill_looks_at_the_load_first() -> None:
    machine = Machine(n_busy=1, now=1.0)
    policy = make(machine)
    policy.before_prefill()
    assert policy.n_threads == 1
    machine.n_busy, machine.now = 0, 2.0
    policy.before_prefill()
    assert policy.n_threads == 2


def test_eight_cores_give_up_as_many_as_others_use() -> None:
    machine = Machine(n_cores=8)
    policy = make(machine)
    machine.run(policy, 2)
    machine.n_busy = 3
    machine.run(policy, 2)
    assert policy.n_threads == 5


def test_passes_of_many_sizes_are_compared_with_their_own() -> None:
    """Drafted passes take longer the more tokens they verify: that is no lost core."""
    machine = Machine()
    policy = make(machine)

    def run(seconds: float) -> None:
        began, i = machine.now, 0
        while machine.now - began < seconds:
            n_tokens = (1, 9, 2, 5, 1, 16)[i % 6]
            step = machine.step_s(policy.n_threads) * (0.5 + 0.5 * n_tokens)
            machine.now += step
            policy.observe(n_tokens, step)
            i += 1

    run(10)
    assert policy.n_threads == 2 and policy.n_changes == 0
    machine.n_busy = 1
    run(4)
    assert policy.n_threads == 1
    machine.n_busy = 0
    run(6)
    assert policy.n_threads == 2
    run(5)
    assert policy.n_threads == 2 and policy.n_changes <= 4


def test_what_others_did_in_a_pause_is_not_load_after_it() -> None:
    changes = {}
    for resumed in (True, False):
        machine = Machine()
        policy = make(machine)
        machine.run(policy, 1)
        machine.n_busy = 2
        machine.now += 5  # nothing to compute here
        if resumed:
            policy.resume()
        machine.n_busy = 0 if resumed else 2
        machine.run(policy, 1)
        changes[resumed] = policy.n_changes
    assert changes[True] == 0 and changes[False] > 0
