"""Proofs of levers: what is kept, what is believed, what a Runtime makes of them."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute import lever_proofs
from edgeroute.config import RunParams
from edgeroute.lever_choice import apply_proofs, choose_levers
from edgeroute.lever_proofs import Fingerprint, Proof, fingerprint, load_proofs, save_proofs
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile

HERE = Fingerprint(model="ab" * 16, machine="m", power_mode="", version="1/2", budget="4/8")


def proof(lever: str = "prefetch", value: Any = "gate", off: Any = "off", **how: Any) -> Proof:
    given: dict[str, Any] = {
        "settings": {lever: value}, "off": {lever: off}, "gain": 0.2, "low": 0.1, "high": 0.3,
        "kl": 0.0, "verdict": "wins", "n_pairs": 6, "when": int(time.time()),
    }  # fmt: skip
    return Proof(lever=lever, **(given | how))


def loser(lever: str, value: Any, off: Any) -> Proof:
    return proof(lever, value, off, gain=-0.2, low=-0.3, high=-0.1, verdict="loses")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    where = tmp_path / "cache"
    monkeypatch.setattr(lever_proofs, "cache_path", lambda name: where / name)
    return where


def test_what_was_saved_is_loaded_for_its_fingerprint_only() -> None:
    kept = [proof(), proof("policy", "lfru", "lru")]
    save_proofs(HERE, kept)
    assert load_proofs(HERE) == tuple(kept)
    for name in ("machine", "power_mode", "version", "budget", "model"):
        assert load_proofs(replace(HERE, **{name: "other"})) == ()
    save_proofs(replace(HERE, budget="all"), [proof("threads", 1, None)])
    newer = proof(gain=0.5)
    save_proofs(HERE, [newer])
    assert load_proofs(HERE) == (kept[1], newer)


def test_old_proofs_count_for_nothing() -> None:
    now = int(time.time())
    save_proofs(HERE, [proof(when=now - lever_proofs.VALID_S - 1), proof("policy", "lfu", "lru")])
    assert [each.lever for each in load_proofs(HERE)] == ["policy"]
    save_proofs(HERE, [proof(when=now + 3600)])
    assert "prefetch" not in [each.lever for each in load_proofs(HERE)]


def test_files_stay_bounded(cache: Path) -> None:
    for budget in range(3 * lever_proofs.MAX_ENTRIES):
        save_proofs(replace(HERE, budget=f"{budget}/8"), [proof(note="x" * 300)] * 2)
    file = next((cache / "levers").iterdir())
    assert len(json.loads(file.read_text())["entries"]) == lever_proofs.MAX_ENTRIES
    save_proofs(HERE, [proof("read_bytes", n, None) for n in range(1000)])
    assert len(load_proofs(HERE)) == lever_proofs.MAX_PROOFS
    assert file.stat().st_size <= lever_proofs.MAX_FILE_BYTES


def _changed(change: Callable[[dict[str, Any]], None]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        found = json.loads(text)
        change(found["entries"][0]["proofs"][0])
        return json.dumps(found)

    return apply


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-2],
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: text.replace('"version": 1,', '"version": 2,', 1),
        lambda text: text + " " * lever_proofs.MAX_FILE_BYTES,
        lambda text: text.replace('"entries"', '"entry"'),
        lambda text: text.replace('"machine": "m"', '"machine": 7'),
        _changed(lambda p: p.update(gain=float("nan"))),
        _changed(lambda p: p.update(low=True)),
        _changed(lambda p: p.update(n_pairs=-1)),
        _changed(lambda p: p.update(when=1e9)),
        _changed(lambda p: p.update(verdict="great")),
        _changed(lambda p: p.update(note="x" * 301)),
        _changed(lambda p: p.update(extra=1)),
        _changed(lambda p: p.update(settings={"prefetch": "learned:/etc/passwd"})),
        _changed(lambda p: p.update(settings={"trace": ["x"]})),
        _changed(lambda p: p.update(settings={str(n): n for n in range(9)})),
        _changed(lambda p: p.pop("off")),
    ],
)
def test_hostile_content_is_not_there(spoil: Callable[[str], str], cache: Path) -> None:
    save_proofs(HERE, [proof()])
    file = cache / "levers" / f"{HERE.model}.json"
    file.write_text(spoil(file.read_text()), encoding="ascii")
    assert load_proofs(HERE) == ()
    save_proofs(HERE, [proof("policy", "lfu", "lru")])  # and is written over
    assert [each.lever for each in load_proofs(HERE)] == ["policy"]


def test_winners_are_used_where_nothing_was_asked_for() -> None:
    proofs = [proof(), proof("policy", "lfu", "lru"), proof("io_threads", 4, None),
              proof("threads", 1, None), loser("overlap", "auto", "off")]  # fmt: skip
    levers = apply_proofs(RunParams(), proofs)
    params = levers.params
    assert (params.prefetch, params.policy, params.io_threads) == ("gate", "lfu", 4)
    assert params.overlap == "off" and set(levers.proofs) == {each.lever for each in proofs}
    assert params.threads is None and levers.most_threads == 1  # fewer still may be used
    asked = RunParams(prefetch="eam", policy="lru", io_threads=2, threads=2, overlap="on")
    levers = apply_proofs(asked, proofs)
    assert levers.params == asked and levers.most_threads is None and not levers.proofs


def test_the_surest_winner_counts_and_auto_where_it_is_as_good() -> None:
    better = replace(proof(value="eam", low=0.15), gain=0.18)
    assert apply_proofs(RunParams(), [proof(), better]).params.prefetch == "eam"
    auto = replace(proof(value="auto", low=0.05, high=0.3), gain=0.175)
    assert apply_proofs(RunParams(), [proof(), better, auto]).params.prefetch == "auto"
    worse = replace(auto, gain=0.12)
    assert apply_proofs(RunParams(), [proof(), better, worse]).params.prefetch == "eam"


def test_off_is_used_only_where_all_lost() -> None:
    lost = loser("prefetch", "gate", "off")
    level = proof(value="eam", low=-0.1, verdict="level")
    failed = proof(value="frequency", verdict="failed")
    assert apply_proofs(RunParams(), [lost, failed]).params.prefetch == "off"
    assert apply_proofs(RunParams(), [lost, level]).params.prefetch == "auto"
    assert apply_proofs(RunParams(), [failed]).params.prefetch == "auto"


def test_lossy_and_impossible_proofs_change_nothing() -> None:
    for each in (
        proof("depth", "half", "full", kl=0.01), proof("kv_type", "q8_0", "f16"),
        proof("policy", "best", "lru"), proof("speculate", "small", "off"),
        proof("threads", 100_000, None), proof("trace", "file", None), proof("memory", 1, None),
        proof("read_bytes", 1, None),
    ):  # fmt: skip
        assert apply_proofs(RunParams(), [each]).params == RunParams()
        assert apply_proofs(RunParams(), [each]).most_threads is None


def test_modes(tiny_path: Path) -> None:
    budget = 1 << 30
    with GGUFFile.open(tiny_path) as file:
        assert choose_levers(file, RunParams(), budget).params == RunParams()
        save_proofs(fingerprint(file, budget), [proof("policy", "lfu", "lru")])
        assert choose_levers(file, RunParams(), budget).params.policy == "lfu"
        assert choose_levers(file, RunParams(), budget // 2**20).params.policy == "auto"
        asked = RunParams(levers="asked")
        assert choose_levers(file, asked, budget).params == asked
        off = choose_levers(file, RunParams(levers="off", prefetch="gate"), budget).params
    assert (off.prefetch, off.policy, off.overlap) == ("off", "lru", "off")
    assert (off.speculate, off.depth, off.steps) == ("off", "full", "off")


def test_fingerprints_tell_models_and_budgets_apart(tiny_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    content = bytearray(tiny_path.read_bytes())
    with GGUFFile.open(tiny_path) as file:
        mine = fingerprint(file, file.size_bytes)
        assert mine.budget == "8/8"
        assert fingerprint(file, 100 * file.size_bytes).budget == "all"
        at = bytes(content).index(b"general.name") if b"general.name" in content else 32
    content[at] ^= 1  # a letter of a key
    other.write_bytes(content)
    with GGUFFile.open(other) as file:
        assert fingerprint(file, file.size_bytes).model != mine.model


@pytest.mark.parametrize(
    "wrong", [{"levers": "best"}, {"overlap": "maybe"}, {"read_bytes": "5KiB"}, {"read_bytes": 1},
              {"direct_io": 7}]
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        RunParams(**wrong)
