"""Configurations of pools: what is read, and what is refused by line or key."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeroute import Pool
from edgeroute.config_file import MAX_FILE_BYTES
from edgeroute.pool import PoolSettings, state_path
from edgeroute.pool_config import MAX_MODELS, read_pool
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import GIB, MIB

TEXT = """
[pool]
memory = "3GiB"
tolerance = 0.2
weights = { math = 2.5 }

[models.a]
path = "a.gguf"
capabilities = { math = 0.1, code = 0.2, reasoning = 0.3, language = 0.4, instruction = 1 }
cost = 0.02
memory = "512MiB"

[models."b.c"]
path = "a.gguf"
capabilities = 0.7
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_path: Path) -> Path:
    (tmp_path / "a.gguf").write_bytes(tiny_path.read_bytes())
    return tmp_path


def of(folder: Path, **changed: Any) -> dict[str, Any]:
    return {"models": {"a": {"path": str(folder / "a.gguf"), "capabilities": 1} | changed}}


def test_a_file_is_read_and_paths_are_relative_to_it(folder: Path) -> None:
    (folder / "pool.toml").write_text(TEXT)
    found = read_pool(folder / "pool.toml", {"tolerance": None, "max_tries": 2})
    a, b = found.models.values()
    assert (a.name, a.path, a.cost_s, a.memory) == ("a", folder / "a.gguf", 0.02, 512 * MIB)
    assert np.array_equal(a.capabilities, [0.1, 0.2, 0.3, 0.4, 1.0])
    assert (b.name, b.cost_s, b.memory) == ("b.c", None, None)
    assert np.array_equal(b.capabilities, np.full(5, 0.7))
    assert (found.memory, found.tolerance, found.max_tries) == (3 * GIB, 0.2, 2)
    assert np.array_equal(found.weights, [2.5, 1, 1, 1, 1])


def test_what_is_given_overrides_the_file(folder: Path) -> None:
    (folder / "pool.toml").write_text(TEXT)
    found = read_pool(folder / "pool.toml", {"memory": "1GiB", "tolerance": 0})
    assert (found.memory, found.tolerance) == (GIB, 0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"path": "missing.gguf"}, r"models\.a\.path: .*does not exist"),
        ({"path": "no-such-model"}, r"models\.a\.path: .*no-such-model"),
        ({"path": 3}, r"models\.a\.path"),
        ({"path": ""}, r"models\.a\.path"),
        ({"path": "x" * 5000}, r"models\.a\.path"),
        ({"path": "a\0.gguf"}, r"models\.a\.path"),
        ({"capabilities": 1.1}, r"models\.a\.capabilities: .*from 0 to 1"),
        ({"capabilities": float("nan")}, r"models\.a\.capabilities"),
        ({"capabilities": True}, r"models\.a\.capabilities"),
        ({"capabilities": {"math": 0.5}}, r"code, reasoning, language, instruction is missing"),
        ({"capabilities": dict.fromkeys(("maths",), 1)}, "did you mean math"),
        ({"capabilities": [1, 1, 1, 1, 1]}, r"models\.a\.capabilities"),
        ({"cost": -1}, r"models\.a\.cost"),
        ({"cost": float("inf")}, r"models\.a\.cost"),
        ({"cost": 10**400}, r"models\.a\.cost"),
        ({"cost": "cheap"}, r"models\.a\.cost"),
        ({"memory": "lots"}, r"models\.a\.memory"),
        ({"memory": 1.5}, r"models\.a\.memory"),
        ({"memory": -1}, r"models\.a\.memory"),
        ({"pth": "x"}, "did you mean path"),
    ],
)
def test_a_bad_profile_is_refused_by_its_key(
    folder: Path, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        read_pool(of(folder, **changed), {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "1 to 32 models"),
        ({"models": {}}, "1 to 32 models"),
        ({"models": []}, "models: a table"),
        ({"models": {"a": 1}}, r"models\.a: a table"),
        ({"models": {"a": {}}}, r"models\.a: it has no path"),
        ({"models": {"../a": {}}}, "no name"),
        ({"models": {3: {}}}, "no name"),
        ({"models": {"a" * 65: {}}}, "no name"),
        ({"models": {str(i): {} for i in range(MAX_MODELS + 1)}}, "this one has 33"),
        ({"model": {}}, "did you mean models"),
        ({"models": {}, "pool": {"tolerence": 1}}, "did you mean tolerance"),
    ],
)
def test_a_bad_shape_is_refused(content: dict[Any, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_pool(content, {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tolerance": 1.5}, r"pool\.tolerance"),
        ({"max_tries": 0}, r"pool\.max_tries"),
        ({"max_tries": True}, r"pool\.max_tries"),
        ({"memory": "much"}, r"pool\.memory"),
        ({"weights": {"math": -1}}, r"pool\.weights\.math"),
        ({"weights": 1e9}, r"pool\.weights"),
    ],
)
def test_a_bad_setting_is_refused(folder: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_pool(of(folder) | {"pool": settings}, {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[models.a]\npath = \n", "line 2"),
        (b"\xff\xfe", "not TOML"),
        (b"a = " + b"9" * 5000, "not TOML|no key"),
        (b"a = " + b"[" * 20000, "not TOML"),
        (b"#" * (MAX_FILE_BYTES + 1), "1 MiB"),
        (b"[models.a]\n[models.a]\n", "not TOML"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "pool.toml").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_pool(tmp_path / "pool.toml", {})


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.toml"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_pool(path, {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tolerence": 0.1}, "did you mean tolerance"),
        ({"small": "x"}, "no setting 'small'"),
        ({"n_ctx": 1}, "n_ctx"),
        ({"kv_type": "f64"}, "kv_type"),
    ],
)
def test_a_pool_has_no_other_settings(folder: Path, settings: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Pool(of(folder), **settings)


def test_the_environment_cannot_add_what_a_pool_lacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEROUTE_SMALL", "smollm2-135m-instruct")
    with pytest.raises(UsageError, match="EDGEROUTE_SMALL"):
        Pool(of(folder), state="off")


def test_the_state_is_the_users_own_unless_told(folder: Path) -> None:
    params = read_pool(of(folder), {})
    assert state_path(params, "off") is None
    assert state_path(params, folder / "x") == folder / "x"
    mine = state_path(params, None)
    assert mine is not None and mine.parent.name == "pools"
    assert mine == state_path(read_pool(of(folder, capabilities=0.5), {}), None)
    assert PoolSettings.__optional_keys__ >= {"memory", "state"}
