"""Joules of a request: how they are shared, and where they are told."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

import edgeroute
from edgeroute import Runtime
from edgeroute.commands.generate_shared import Answer, stats_line
from edgeroute.config import RunParams, merge_settings
from edgeroute.energy_book import READ_EVERY_S, EnergyBook, _gpu
from edgeroute.models.forward import Piece
from edgeroute.request import Request
from edgeroute.runtime.energy import EnergyMeter
from edgeroute.runtime.errors import UsageError

TINY: dict[str, Any] = {"threads": 1, "n_ctx": 256, "n_ubatch": 64}


@dataclass
class FakeMeter:
    """A meter that tells what a test says."""

    told: float = 100.0
    source: str = "rapl"
    estimated: bool = False
    scope: str = "package, all processes"
    notes: tuple[str, ...] = ()
    n_read: int = 0

    def joules(self) -> float:
        self.n_read += 1
        return self.told


@dataclass
class FakeRequest:
    """What the book writes into a request."""

    token_ids: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    energy_j: float = 0.0
    energy_s: float = 0.0


class Lab:
    """A book over a fake meter, with a clock of its own."""

    def __init__(self) -> None:
        self.meter, self.now = FakeMeter(), 0.0
        self.book = EnergyBook(cast(EnergyMeter, self.meter), lambda: self.now)

    def passed(self, requests: Sequence[FakeRequest], tokens: Sequence[int], seconds: float,
               joules: float) -> None:  # fmt: skip
        self.now += seconds
        self.meter.told += joules
        pieces = [Piece(tokens=[0] * n, pos=0, region=cast(Any, None)) for n in tokens]
        self.book.passed(pieces, cast(list[Request], requests), seconds)

    def end(self, request: FakeRequest) -> float:
        self.book.settle(cast(Request, request))
        return request.energy_j

    def total(self) -> float:
        found = self.book.stats()["joules"]
        assert isinstance(found, float)
        return found


def test_a_lone_request_pays_for_all_and_nothing_before_it() -> None:
    lab, request = Lab(), FakeRequest()
    lab.meter.told += 1000  # while nobody asked
    lab.book.wake()
    for _ in range(3):
        lab.passed([request], [1], 0.01, 2.0)
    assert lab.end(request) == pytest.approx(6)
    assert lab.total() == pytest.approx(6)
    assert lab.book.stats()["joules_per_token"] == pytest.approx(1.5)


def test_a_pass_is_shared_by_tokens_and_passes_by_seconds() -> None:
    """A prompt of 1000 tokens beside an answer of one token a pass pays for its batch alone."""
    lab, prompt, answer, other = Lab(), FakeRequest(), FakeRequest(), FakeRequest()
    lab.passed([prompt], [1000], 0.03, 0.0)
    lab.passed([answer, other], [1, 1], 0.01, 8.0)
    assert lab.end(prompt) == pytest.approx(6)
    lab.passed([answer, other], [1, 3], 0.01, 4.0)
    assert lab.end(other) == pytest.approx(1 + 3)
    assert lab.end(answer) == pytest.approx(1 + 1)
    assert lab.total() == pytest.approx(12)


def test_several_pieces_of_one_request_are_its_own() -> None:
    lab, request = Lab(), FakeRequest()
    lab.passed([request], [1, 1, 1], 0.01, 3.0)
    assert lab.end(request) == pytest.approx(3)


def test_what_was_used_while_a_request_waited_is_its_own() -> None:
    """Another machine wrote it, say: no pass ran here, and yet this machine was on for it."""
    lab, request = Lab(), FakeRequest(token_ids=[])
    lab.meter.told += 5
    assert lab.end(request) == pytest.approx(5)
    assert "joules_per_token" not in lab.book.stats()


def test_all_that_is_spent_is_somebodys() -> None:
    lab, requests = Lab(), [FakeRequest() for _ in range(5)]
    for i in range(200):
        some = requests[i % 3 : i % 3 + 3]
        lab.passed(some, [1 + (i * j) % 7 for j in range(len(some))], 0.001 * (i % 5), 0.25)
    spent = sum(lab.end(each) for each in requests)
    assert spent == pytest.approx(50) == pytest.approx(lab.total())


def test_the_meter_is_read_seldom() -> None:
    lab, request = Lab(), FakeRequest()
    before = lab.meter.n_read
    for _ in range(1000):
        lab.passed([request], [1], 0.001, 0.1)
    assert lab.meter.n_read - before <= 1.01 / READ_EVERY_S


def test_joules_are_kept_apart_by_what_told_them() -> None:
    lab, request = Lab(), FakeRequest()
    lab.passed([request], [1], 1.0, 5.0)
    lab.meter.source, lab.meter.estimated, lab.meter.notes = "estimate", True, ("rapl is gone",)
    lab.passed([request], [1], 1.0, 3.0)
    lab.end(request)
    found = lab.book.stats()
    assert (found["measured"], found["modelled"]) == ({"rapl": 5.0}, {"estimate": 3.0})
    assert (found["joules"], found["source"], found["estimated"]) == (8.0, "estimate", True)
    assert found["notes"] == ["rapl is gone"]


def test_a_runtime_tells_the_joules_of_every_answer(tiny_path: Path) -> None:
    with Runtime(tiny_path, energy="estimate:8", **TINY) as runtime:
        found = runtime.generate("a b c", max_tokens=8, logit_bias={2: -100.0})
        told: Any = found.stats.to_dict()["energy"]
        assert told["joules"] > 0
        per_token = told["joules"] / found.stats.n_generated
        assert told["joules_per_token"] == pytest.approx(per_token, abs=2e-6)
        assert (told["source"], told["estimated"]) == ("estimate", True)
        assert told["scope"] == "this process, estimated"
        whole: Any = runtime.stats()["energy"]
        assert whole["joules"] == pytest.approx(told["joules"], abs=2e-6)
        assert any("8 W for a busy core" in note for note in whole["notes"])


def test_answers_that_run_together_share(tiny_path: Path) -> None:
    with Runtime(tiny_path, energy="estimate", n_kv=1024, **TINY) as runtime:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda i: runtime.generate(f"a {i}", max_tokens=24), range(8)))
        each: list[Any] = [one.stats.energy for one in found]
        whole: Any = runtime.stats()["energy"]
    assert all(one["joules"] > 0 for one in each)
    assert sum(one["joules"] for one in each) == pytest.approx(whole["joules"], rel=1e-3, abs=1e-4)


def test_an_embedding_counts_but_not_per_token(tiny_path: Path) -> None:
    with Runtime(tiny_path, energy="estimate", **TINY) as runtime:
        runtime.embed(["a b c d e"])
        told: Any = runtime.stats()["energy"]
    assert told["joules"] > 0 and "joules_per_token" not in told


def test_it_can_be_switched_off(tiny_path: Path) -> None:
    with Runtime(tiny_path, energy="off", **TINY) as runtime:
        found = runtime.generate("a b c", max_tokens=2)
        assert "energy" not in found.stats.to_dict() and "energy" not in runtime.stats()


def test_the_setting_is_checked_and_has_its_variable() -> None:
    assert RunParams().energy == "auto"
    assert merge_settings({}, {"EDGEROUTE_ENERGY": "estimate:3"}).energy == "estimate:3"
    with pytest.raises(UsageError, match="energy must be"):
        RunParams(energy="on")
    assert "energy" in edgeroute.engine.Settings.__annotations__


@pytest.mark.parametrize(
    ("device", "index"), [("CUDA0", 0), ("CUDA12", 12), ("CPU", None), ("Vulkan0", None),
                          ("CUDA", None), ("CUDAx", None)],
)  # fmt: skip
def test_a_gpu_is_known_by_its_name(device: str, index: int | None) -> None:
    assert _gpu(device) == index


@pytest.mark.parametrize(
    ("energy", "words"),
    [({"joules_per_token": 0.1234, "estimated": True, "source": "estimate"}, "0.12 J/token, est"),
     ({"joules_per_token": 1.5, "estimated": False, "source": "rapl"}, "1.5 J/token, by rapl"),
     ({"joules_per_token": None, "estimated": False, "source": "rapl"}, None)],
)  # fmt: skip
def test_the_line_behind_an_answer_tells_it(energy: dict[str, object], words: str | None) -> None:
    stats = {"n_generated": 1, "decode_tok_s": 2.0, "ttft_s": 0.1, "n_prompt": 3, "n_cached": 0,
             "prefill_tok_s": 9.0, "memory_bytes": 5, "threads": 1, "energy": energy}  # fmt: skip
    line = stats_line(Answer(stats=stats), 100)
    assert (words in line) if words else "J/token" not in line
