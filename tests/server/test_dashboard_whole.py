"""The stream over a real model: requests show up as figures, and a pair's writers by name."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edgeroute import Runtime
from edgeroute.server import api, dashboard, live
from edgeroute.server.records import ServerParams, Services
from tests.server import lab


@pytest.fixture(scope="module")
def base(tiny_path: Path) -> Iterator[str]:
    """A server over a pair of models that take turns by chance."""
    settings: dict[str, Any] = {"n_ctx": 512, "n_kv": 2048, "threads": 1}
    with Runtime(tiny_path, small=tiny_path, steps="random:0.5", **settings) as runtime:
        models = lab.OneModel(runtime)
        watch = live.Live(models, period_s=0.02)
        services = Services(params=ServerParams(), models=models, observers=(watch,))
        routes = [*api.routes(services), *live.routes(services), *dashboard.routes(services)]
        with lab.serving(services, routes) as found:
            yield found


def ask(base: str, **body: Any) -> list[dict[str, Any]]:
    given = {"model": "base", "prompt": "the secret prompt", "stream": True} | body
    answer = httpx2.post(f"{base}/v1/completions", json=given, timeout=60)
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_pieces_of_a_pair_say_who_wrote_them(base: str) -> None:
    chunks = ask(base, max_tokens=60, temperature=1.0, seed=3)
    told = [chunk.get("edgeroute", {}) for chunk in chunks if chunk["choices"]]
    steps = told[-1]["stats"]["steps"]
    writers = [each["model"] for each in told if "model" in each]
    assert set(writers) == {part["model"] for part in steps if part["n_tokens"]}
    order = [who for i, who in enumerate(writers) if i == 0 or writers[i - 1] != who]
    known = [part["model"] for part in steps if part["n_tokens"]]
    assert order[0] == known[0]
    alone = ask(base, max_tokens=8, edgeroute={"steps": "off"})
    assert not any("model" in chunk.get("edgeroute", {}) for chunk in alone)


def test_a_request_shows_up_without_its_words(base: str) -> None:
    ask(base, max_tokens=20, temperature=0)
    until, text = time.monotonic() + 20, ""
    with httpx2.stream("GET", f"{base}/edgeroute/live", timeout=20) as stream:
        for piece in stream.iter_text():
            text += piece
            if "event: jobs" in text and text.endswith("\n\n"):
                break
            assert time.monotonic() < until
    assert "secret" not in text
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    snapshot = json.loads(data[0])
    rows = next(value["rows"] for value in map(json.loads, data) if "rows" in value)
    assert rows[0]["status"] == 200 and rows[0]["n_generated"] == 20
    assert rows[0]["endpoint"] == "completions" and rows[0]["ttft_s"] > 0
    model = snapshot["models"]["base"]
    assert model["tokens"] >= 20 and model["steps"]["policy"] == "random:0.5"
    assert model["memory"]["used_bytes"] == sum(model["memory"]["owners"].values())
    assert str(Path.home()) not in text and ".gguf" not in text
