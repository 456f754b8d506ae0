"""A router's state through a file: restarts, changed adapters, crashes and hostile files."""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from edgeroute.offload import polar_state
from edgeroute.offload.polar import AdapterRouter, PolarParams
from edgeroute.offload.polar_controller import EpochParams
from edgeroute.offload.polar_state import (
    PolarStateError,
    decode_state,
    encode_state,
    read_state,
    write_state,
)

D = 4
PARAMS = PolarParams(d=D, space="model seed 0", epochs=EpochParams(first_epoch=50, max_epoch=100))
IDENTITIES = {"a": "1", "b": "2", "c": "3"}


def _used() -> AdapterRouter:
    router = AdapterRouter(PARAMS, (), 2, seed=0)
    for name, identity in IDENTITIES.items():
        router.add(name, 0.2, identity)
    rng = np.random.default_rng(0)
    resident: tuple[str, ...] = ()
    for _ in range(180):
        plan = router.wanted()
        resident = resident if plan is None else plan.names
        x = rng.standard_normal(D) / 2
        choice = router.choose(x, resident)
        if choice.bypass and choice.arm is not None:
            router.paid(choice.arm, float(rng.random()))
        router.learn(x, choice.arm, float(rng.random()))
    return router


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "router.polar"
    router = _used()
    write_state(path, router.to_state())
    state = read_state(path)
    assert state is not None
    again = AdapterRouter.from_state(PARAMS, state, IDENTITIES, 2, seed=9)
    first = again.wanted()
    assert first is not None and set(first.names) == set(router.to_state().resident)
    rng = np.random.default_rng(1)
    for _ in range(20):
        x = rng.standard_normal(D) / 2
        old, new = (dict(zip(r._bandit.names, zip(*r._bandit.score(x), strict=True), strict=True))
                    for r in (router, again))  # fmt: skip
        assert old.keys() == new.keys()
        for arm, pair in old.items():
            assert new[arm] == pytest.approx(pair, abs=1e-9)
    assert again.stats()["controller"] == router.stats()["controller"]
    assert np.array_equal(again.to_state().contexts, router.to_state().contexts)
    for name, facts in router.stats()["adapters"].items():
        assert again.stats()["adapters"][name]["paging_s"] == facts["paging_s"]


def test_adapters_added_removed_and_replaced_meanwhile() -> None:
    router = _used()
    now = {"b": "2", "c": "another file", "d": "4"}
    again = AdapterRouter.from_state(PARAMS, router.to_state(), now, 2, seed=0)
    assert set(again.names) == set(now)
    before, after = router.stats()["adapters"], again.stats()["adapters"]
    assert before["b"]["n_plays"] == after["b"]["n_plays"] > 0
    assert before["c"]["n_plays"] > 0 and after["c"]["n_plays"] == after["d"]["n_plays"] == 0
    x = np.ones(D)
    again.choose(x, [])
    again.learn(x, "d", 1.0)
    plan = again.wanted()
    assert plan is None or set(plan.names) <= set(now)


@pytest.mark.parametrize("params", [PolarParams(d=5, space="model seed 0"), PolarParams(d=D)])
def test_another_feature_space_is_refused(params: PolarParams) -> None:
    with pytest.raises(PolarStateError, match="feature space"):
        AdapterRouter.from_state(params, _used().to_state(), IDENTITIES, 2, seed=0)


def test_other_settings_may_change() -> None:
    params = PolarParams(d=D, space="model seed 0", base_arm=False, ridge=2.0, alpha=0.0)
    again = AdapterRouter.from_state(params, _used().to_state(), {}, 0, seed=0)
    assert again.names == ()


def test_a_state_of_nothing_survives() -> None:
    empty = AdapterRouter(PolarParams(d=D, base_arm=False), (), 0, 0).to_state()
    found = decode_state(encode_state(empty), "it")
    assert found.arms == () and found.contexts.shape == (0, D)


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "router.polar"
    state = _used().to_state()
    write_state(path, state)
    old = path.read_bytes()

    def fail(*_args: object) -> None:
        raise OSError("no space left")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(polar_state.os, name, fail)
            with pytest.raises(OSError, match="no space"):
                write_state(path, AdapterRouter(PARAMS, (), 0, 0).to_state())
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == [path.name]


def test_a_fresh_start_only_where_the_caller_says_so(tmp_path: Path) -> None:
    path = tmp_path / "router.polar"
    assert read_state(path) is None
    path.write_bytes(b"rubbish")
    with pytest.raises(PolarStateError, match=r"too few.*delete it to start afresh"):
        read_state(path)
    assert path.exists()
    assert read_state(path, set_aside=True) is None
    assert (tmp_path / "router.polar.refused").read_bytes() == b"rubbish"
    path.mkdir()
    with pytest.raises(PolarStateError, match="not a file"):
        read_state(path)


def _forged(change) -> bytes:
    """A file with a changed header and a checksum that fits."""
    content = encode_state(_used().to_state())
    magic, version, n_header = struct.unpack_from("<8sII", content)
    header = json.loads(content[16 : 16 + n_header])
    values = bytearray(content[16 + n_header : -32])
    changed = change(header, values)
    text = json.dumps(header).encode() if changed is None else changed
    body = struct.pack("<8sII", magic, version, len(text)) + text + bytes(values)
    return body + hashlib.sha256(body).digest()


def _set(*path, value):
    def change(header, values) -> None:
        at = header
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def _write(at: int, value: float):
    def change(header, values) -> None:
        start = 8 * (header["n_contexts"] * D) + at
        struct.pack_into("<d", values, start, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("d", value=33), _set("d", value=0), _set("d", value=True), _set("d", value=5),
        _set("n_contexts", value=4097), _set("n_contexts", value=10**30),
        _set("n_contexts", value=-1), _set("n_contexts", value=1),
        _set("arms", value=[]), _set("arms", value={}), _set("arms", value=[[]] * 20000),
        _set("arms", 0, value=["x", "", 0.0]), _set("arms", 1, 0, value="b" * 300),
        _set("arms", 1, 0, value=""), _set("arms", 1, 0, value=None), _set("arms", 1, 0, value=7),
        _set("arms", 1, 1, value=None), _set("arms", 1, 2, value=-1.0),
        _set("arms", 1, 2, value=float("nan")), _set("arms", 1, 3, value=float("inf")),
        _set("arms", 1, 3, value="9"), _set("counts", value={}), _set("counts", value=None),
        _set("counts", "epoch", value=1.5), _set("counts", "owed_total", value=-1),
        _set("counts", "extra", value=1), _set("resident", value=["zzz"]),
        _set("resident", value=["a", "a"]), _set("resident", value="ab"),
        _set("space", value=3), _set("space", value="s" * 256), _set("more", value=1),
        _write(0, float("nan")), _write(0, float("-inf")), _write(0, -5.0), _write(8, 1e9),
        _write(0, 1e13),
        lambda header, values: b"[" * 100_000, lambda header, values: b"\xff\xfe",
        lambda header, values: b"[]", lambda header, values: b"9" * 5000,
        lambda header, values: values.extend(bytes(8)), lambda header, values: b"",
    ],
)  # fmt: skip
def test_forged_states_are_refused_with_a_sentence(change) -> None:
    with pytest.raises(PolarStateError, match=r"the router's state it cannot be used: .+; delete"):
        decode_state(_forged(change), "it")


def test_the_forger_can_make_a_good_file() -> None:
    assert decode_state(_forged(lambda header, values: None), "it").d == D


def test_damage_anywhere_is_found() -> None:
    content = encode_state(_used().to_state())
    for end in range(0, len(content), 37):
        with pytest.raises(PolarStateError):
            decode_state(content[:end], "it")
    for at in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        with pytest.raises(PolarStateError):
            decode_state(bytes(damaged), "it")
    with pytest.raises(PolarStateError):
        decode_state(content + b"\0", "it")
