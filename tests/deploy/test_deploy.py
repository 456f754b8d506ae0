"""What stands around the program: examples that run, a node that answers, a unit that is valid."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fake_ros.py"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def node(tiny_path: Path) -> Iterator[Any]:
    """The ROS node over the tiny model, not configured yet."""
    fake = _load(FAKE)
    with fake.ros() as base:
        base.given = {"model": str(tiny_path), "memory": "1GiB", "max_tokens": 300,
                      "max_waiting": 2}  # fmt: skip
        made = _load(ROOT / "deploy" / "ros2" / "edgeroute_node.py").EdgerouteNode()
        yield made
        made.on_shutdown(None)


def _until(happened: Callable[[], object]) -> None:
    for _ in range(1000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def _ask(node: Any, text: str) -> None:
    node.listeners["~/prompt"](type("Message", (), {"data": text})())


def test_the_ros_node_streams_an_answer(node: Any) -> None:
    assert node.on_configure(None) == "success"
    _ask(node, "too early")
    assert "not active" in node.log[0]
    node.on_activate(None)
    node.parameters["max_tokens"] = 12
    _ask(node, "Hello")
    _until(lambda: node.topics["~/answer"].sent)
    answer = json.loads(node.topics["~/answer"].sent[0].data)
    if "error" in answer:  # the tiny model has no chat template, and that is said
        assert "template" in answer["error"]
    else:
        assert answer["text"] == "".join(each.data for each in node.topics["~/tokens"].sent)


def test_the_ros_node_that_is_configured_again_hears_once(node: Any) -> None:
    node.on_configure(None)
    node.on_cleanup(None)
    node.on_configure(None)
    _ask(node, "too early")
    assert len(node.log) == 1


def test_the_ros_node_cancels_and_refuses_too_many(node: Any) -> None:
    node.on_configure(None)
    runtime = node._runtime
    plain = runtime.stream

    def stream(*, messages: list[dict[str, str]], **options: Any) -> Any:
        return plain(messages[-1]["content"], **options)

    runtime.stream = stream
    node.on_activate(None)
    _ask(node, "Once upon a time")
    _until(lambda: node.topics["~/tokens"].sent)
    for n in range(3):
        _ask(node, f"{n}. waits")
    assert "2 prompts wait" in json.loads(node.topics["~/answer"].sent[0].data)["error"]
    node.listeners["~/cancel"](None)
    _until(lambda: len(node.topics["~/answer"].sent) > 1)
    ended = json.loads(node.topics["~/answer"].sent[1].data)
    assert ended["finish_reason"] == "cancelled"
    assert ended["text"].startswith(node.topics["~/tokens"].sent[0].data)
    assert node._waiting.empty()
    node.on_deactivate(None)
    node.on_cleanup(None)
    assert node._runtime is None


def test_the_ros_node_stays_unconfigured_without_its_model(node: Any) -> None:
    node.parameters["model"] = "no-such-model"
    assert node.on_configure(None) == "failure"
    assert "no-such-model" in node.log[0]


@pytest.mark.parametrize("name", ["embed_sync", "embed_asyncio"])
def test_examples_run(name: str, smollm2_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), str(smollm2_path)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tok/s" in done.stdout or "gave up after: '" in done.stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_unit_is_valid_and_shut_in(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "systemd" / "edgeroute.service").read_text(encoding="utf-8")
    unit = tmp_path / "edgeroute.service"
    unit.write_text(text.replace("/opt/edgeroute/bin/edgeroute", "/bin/true"), encoding="utf-8")
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True,
                             text=True, check=False)  # fmt: skip
    assert checked.returncode == 0 and "Unknown" not in checked.stderr, checked.stderr


def test_the_service_s_configuration_is_one() -> None:
    from edgeroute.server.config import read_config

    found = read_config(ROOT / "deploy" / "systemd" / "edgeroute.toml", {})
    assert found.params.host == "127.0.0.1" and [each.name for each in found.models] == ["smollm2"]
