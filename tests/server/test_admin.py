"""Admin calls: only with a key, and no path from a request reaches the file system."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edgeroute.server import admin
from edgeroute.server.fleet import Fleet
from edgeroute.server.records import ServerParams, Services
from tests.edgeroute.adapter_lab import make as make_adapter
from tests.server.fleet_lab import GIB, make_files, shelf_model, states
from tests.server.lab import serving

KEY = "0123456789abcdef"


@contextmanager
def serving_fleet(fleet: Fleet, keys: tuple[str, ...] = (KEY,)) -> Iterator[str]:
    services = Services(params=ServerParams(api_keys=keys), models=fleet)
    with serving(services, admin.routes(services)) as url:
        yield f"{url}/edgeroute/models"
    assert fleet.close(20)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return make_files(tmp_path)


@pytest.fixture
def library(tmp_path: Path, files: dict[str, Path]) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    make_adapter(folder / "first.gguf", files["red"])
    (tmp_path / "secret.gguf").write_bytes((folder / "first.gguf").read_bytes())
    return folder


@pytest.fixture
def fleet(files: dict[str, Path], library: Path) -> Fleet:
    settings: dict[str, Any] = {"adapters": (str(library),), "adapter_state": "off"}
    models = [
        shelf_model("red", files["red"], 1 << 28, **settings),
        shelf_model("green", files["green"]),
    ]
    return Fleet(ServerParams(memory=GIB), models)


def refusal(answer: httpx2.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


def test_models_are_loaded_and_unloaded(fleet: Fleet) -> None:
    with serving_fleet(fleet) as url:
        told = httpx2.post(f"{url}/green/load").json()
        assert (told["name"], told["state"]) == ("green", "open")
        assert httpx2.post(f"{url}/base/load").json()["name"] == "red"
        assert states(fleet) == {"red": "open", "green": "open"}
        assert httpx2.post(f"{url}/green/unload").json()["state"] == "closed"
        refusal(httpx2.post(f"{url}/grene/load"), 404)
        assert httpx2.get(f"{url}/green/load").status_code == 405


def test_without_a_configured_key_all_are_refused_with_the_remedy(fleet: Fleet) -> None:
    with serving_fleet(fleet, ()) as url:
        for answer in (
            httpx2.post(f"{url}/red/load"),
            httpx2.post(f"{url}/red/unload"),
            httpx2.get(f"{url}/red/adapters"),
            httpx2.post(f"{url}/red/adapters", json={"name": "first"}),
            httpx2.delete(f"{url}/red/adapters/first"),
        ):
            assert "EDGEROUTE_API_KEY" in refusal(answer, 403)
        assert set(states(fleet).values()) == {"closed"}


def test_adapters_are_added_by_the_name_they_have_in_the_folder(
    fleet: Fleet, library: Path, files: dict[str, Path]
) -> None:
    with serving_fleet(fleet) as url:
        assert httpx2.get(f"{url}/red/adapters").json() == {"adapters": ["first"], "available": []}
        make_adapter(library / "second", files["red"], rank=4)
        assert httpx2.get(f"{url}/red/adapters").json()["available"] == ["second"]
        added = httpx2.post(f"{url}/red/adapters", json={"name": "second"})
        assert added.json() == {"adapters": ["first", "second"]}
        assert fleet.facts("red").adapters == ("first", "second")
        gone = httpx2.delete(f"{url}/red/adapters/first")
        assert gone.json() == {"adapters": ["second"]}
        assert (library / "first.gguf").exists()
        refusal(httpx2.delete(f"{url}/red/adapters/first"), 404)


@pytest.mark.parametrize(
    "name",
    ["../secret", "..", ".", "/etc/passwd", "first.gguf/../../secret", "a\0b", "", "x" * 65, "CON:",
     "..%2fsecret", "\u2025/secret", "secret"],
)  # fmt: skip
def test_a_name_is_no_path(fleet: Fleet, name: str) -> None:
    with serving_fleet(fleet) as url:
        answer = httpx2.post(f"{url}/red/adapters", json={"name": name})
        refusal(answer, 404 if name == "secret" else 400)
        if name == "secret":
            assert httpx2.delete(f"{url}/red/adapters/..%2f..%2fsecret").status_code == 404
        assert fleet.facts("red").adapters == ("first",)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"name": 3}', b'{"name": "first", "path": "/etc"}', b"\xff",
     b"[" * 5000, b'{"nam": "first"}'],
)  # fmt: skip
def test_a_body_that_is_none_is_400(fleet: Fleet, body: bytes) -> None:
    with serving_fleet(fleet) as url:
        refusal(httpx2.post(f"{url}/red/adapters", content=body), 400)


def test_what_lies_in_the_folder_may_be_anything(fleet: Fleet, library: Path) -> None:
    with serving_fleet(fleet) as url:
        assert httpx2.post(f"{url}/red/load").status_code == 200
        (library / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
        told = refusal(httpx2.post(f"{url}/red/adapters", json={"name": "bad"}), 422)
        assert "bad" in told and str(library) not in told
        assert httpx2.get(f"{url}/red/adapters").json()["adapters"] == ["first"]


def test_a_model_without_a_folder_has_none_to_add(fleet: Fleet) -> None:
    with serving_fleet(fleet) as url:
        told = refusal(httpx2.post(f"{url}/green/adapters", json={"name": "first"}), 409)
        assert "models.green.adapters" in told
        assert httpx2.get(f"{url}/green/adapters").json() == {"adapters": [], "available": []}


def test_a_folder_may_be_empty_at_first(fleet: Fleet, library: Path, tmp_path: Path) -> None:
    shutil.move(library / "first.gguf", tmp_path / "first.gguf")
    with serving_fleet(fleet) as url:
        assert httpx2.get(f"{url}/red/adapters").json() == {"adapters": [], "available": []}
        shutil.move(tmp_path / "first.gguf", library / "first.gguf")
        added = httpx2.post(f"{url}/red/adapters", json={"name": "first"})
        assert added.json() == {"adapters": ["first"]}, added.text
