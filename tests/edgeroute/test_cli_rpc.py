"""`edgeroute rpc-server`, as a user runs it."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from edgeroute.cli import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_USAGE, cli
from edgeroute.commands import rpc_server
from edgeroute.runtime.device import Device
from edgeroute.runtime.ggml.api import ggml

pytestmark = pytest.mark.skipif(
    ggml().ggml_backend_reg_by_name(b"RPC") is None, reason="this ggml is built without RPC"
)
_MAIN = "from edgeroute.cli import main; main()"


@pytest.fixture
def process() -> Iterator["subprocess.Popen[str]"]:
    arguments = ["rpc-server", "--port", "0", "--memory", "32MiB", "--threads", "1"]
    found = subprocess.Popen(
        [sys.executable, "-c", _MAIN, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield found
    found.kill()
    found.communicate()


def test_it_lends_tells_who_came_and_ends_with_ctrl_c(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("lending cpu at 127.0.0.1:")
    assert line.endswith(": 32 MiB of memory, 1 thread, one client at a time\n")
    name = "rpc:" + line.split()[3].removesuffix(":")
    assert name in process.stdout.readline()
    with Device.open(name) as device:
        device.allocate(1 << 20).free()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert "is served" in said and "and held 1 MiB at most" in said
    assert "WARNING" not in said and said.endswith("edgeroute: error: interrupted\n")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["rpc-server", *arguments])
    return result.exit_code, result.output


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = run("--port", str(taken.getsockname()[1]))
    assert code == EXIT_USAGE and "cannot listen on 127.0.0.1" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--memory", "much"), EXIT_USAGE, "cannot read 'much' as a byte count"),
        (("--port", "65536"), EXIT_USAGE, "65536"),
        (("--threads", "0"), EXIT_USAGE, "0"),
        (("--port", "0", "--device", "warp9"), EXIT_REFUSED, "there is no device 'warp9'"),
        (("--host", "no.such.host.invalid"), EXIT_USAGE, "cannot listen on no.such.host.invalid"),
        (("--cache", "/dev/null/no"), EXIT_USAGE, "cannot make the folder"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], code: int, message: str) -> None:
    found, said = run(*arguments)
    assert found == code and message in said


def test_an_open_address_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches it may use it: said where everybody may."""
    monkeypatch.setattr("edgeroute.runtime.rpc_front.RpcFront.serve", lambda _: None)
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        code, said = run("--host", host, "--port", "0", "--json")
        assert code == 0
        told = json.loads(said.splitlines()[-1])
        assert told["address"].startswith(f"{host}:") and told["memory_bytes"] > 0
        assert ("WARNING" in said and "ssh -N -L" in said) == warned


def test_the_help_says_what_trust_it_needs() -> None:
    _, said = run("--help")
    assert "no password and no encryption" in said and rpc_server.command.name == "rpc-server"
