"""The calls about saved sessions: what is listed, who may delete, and no path gets through."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edgeroute import Runtime
from edgeroute.server import sessions
from edgeroute.server.records import ServerParams, Services
from edgeroute.session_folder import SessionFolder
from edgeroute.tools import synth
from tests.edgeroute.adapter_lab import make as make_adapter
from tests.server.lab import OneModel, serving

PROMPT = [3 + 7 * i % 290 for i in range(80)]


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    synth.make("llama", tmp_path / "m.gguf", n_layer=1)
    (tmp_path / "lora").mkdir()
    make_adapter(tmp_path / "lora" / "style.gguf", tmp_path / "m.gguf", rank=4)
    with Runtime(tmp_path / "m.gguf", n_ctx=256, threads=1, sessions=tmp_path / "s",
                 adapters=tmp_path / "lora", adapter_state="off") as opened:  # fmt: skip
        yield opened


def save(runtime: Runtime, name: str, **options: Any) -> None:
    answer = runtime.generate(prompt_ids=PROMPT, max_tokens=4, session=name, **options)
    assert answer.stats.session is not None and answer.stats.session["saved"] is True
    for _ in range(10_000):
        stats: Any = runtime.stats()["sessions"]
        if not stats["pending"]:
            return
    raise AssertionError("a save never ended")


@pytest.fixture
def keyed(runtime: Runtime, tmp_path: Path) -> Iterator[str]:
    params = ServerParams(api_keys=("k",), sessions=tmp_path / "s", sessions_bytes=12345)
    services = Services(params=params, models=OneModel(runtime))
    with serving(services, sessions.routes(services)) as url:
        yield url


def test_sessions_are_listed_and_deleted(runtime: Runtime, keyed: str, tmp_path: Path) -> None:
    empty = httpx2.get(f"{keyed}/edgeroute/sessions").json()
    assert empty == {"object": "list", "limit_bytes": 12345, "n_sessions": 0, "data": []}
    save(runtime, "a")
    save(runtime, "a", adapter="style")
    save(runtime, "b")
    found = httpx2.get(f"{keyed}/edgeroute/sessions").json()
    assert found["n_sessions"] == 3
    shown = {(each["name"], each["model"], each["adapter"]) for each in found["data"]}
    assert shown == {("a", "base", None), ("a", "base", "style"), ("b", "base", None)}
    assert all(each["n_tokens"] == 83 and each["bytes"] > 1000 for each in found["data"])
    gone = httpx2.delete(f"{keyed}/edgeroute/sessions/a")
    assert gone.json() == {"name": "a", "deleted": True, "files": 2}
    left = httpx2.get(f"{keyed}/edgeroute/sessions").json()["data"]
    assert [each["name"] for each in left] == ["b"]
    again = httpx2.delete(f"{keyed}/edgeroute/sessions/a")
    assert again.status_code == 404 and again.json()["error"]["code"] == "session_not_found"
    assert str(tmp_path) not in httpx2.get(f"{keyed}/edgeroute/sessions").text


def test_sessions_of_models_that_are_closed_can_be_deleted(
    runtime: Runtime, tmp_path: Path
) -> None:
    save(runtime, "a")

    class Closed(OneModel):
        def peek(self, name: str) -> Any:
            return None

    params = ServerParams(api_keys=("k",), sessions=tmp_path / "s")
    services = Services(params=params, models=Closed(runtime))
    with serving(services, sessions.routes(services)) as url:
        assert httpx2.get(f"{url}/edgeroute/sessions").json()["data"] == []
        assert httpx2.delete(f"{url}/edgeroute/sessions/a").json()["files"] == 1
    assert SessionFolder(tmp_path / "s").sessions() == []


def test_without_a_key_nothing_is_deleted(runtime: Runtime, tmp_path: Path) -> None:
    save(runtime, "a")
    services = Services(params=ServerParams(sessions=tmp_path / "s"), models=OneModel(runtime))
    with serving(services, sessions.routes(services)) as url:
        refused = httpx2.delete(f"{url}/edgeroute/sessions/a")
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "no_api_key"
        assert httpx2.get(f"{url}/edgeroute/sessions").json()["n_sessions"] == 1


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "a%00b", "%ff", "a" * 65, "-a"])
def test_names_never_become_paths(keyed: str, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "kept.session"
    outside.write_bytes(b"not yours")
    answer = httpx2.delete(f"{keyed}/edgeroute/sessions/{name}")
    assert answer.status_code in (400, 404, 405)
    assert outside.read_bytes() == b"not yours"


def test_a_server_whose_models_keep_none(tiny: Runtime, tmp_path: Path) -> None:
    params = ServerParams(api_keys=("k",), sessions=tmp_path / "none")
    services = Services(params=params, models=OneModel(tiny))
    with serving(services, sessions.routes(services)) as url:
        assert httpx2.get(f"{url}/edgeroute/sessions").json()["data"] == []
        assert httpx2.delete(f"{url}/edgeroute/sessions/a").status_code == 404
