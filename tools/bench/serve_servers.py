"""Servers as processes of their own: ours, llama-cpp-python's and llama.cpp's, set up alike."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Final

import psutil

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.tools.bench.serve_http import Address, BrokenAnswer, fetch

N_UBATCH: Final = 512
_READY_S: Final = 120.0
_STOP_S: Final = 20.0
_TAIL: Final = 1500
KEY: Final = "sk-edgeroute-bench"
COMMAND: Final = (sys.executable, "-m", "edgeroute", "serve", "--config",
                  "{folder}/edgeroute.toml", "--port", "{port}")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """A server to start.

    Attributes:
        command: with `{port}` where the port belongs, and `{folder}` where `files` are.
        files: names and contents of files that are written for it.
        ready: path that answers 200 once requests can be answered.
        key: what clients must send.
        told: the settings that matter, for the report.
    """

    name: str
    command: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/v1/models"
    key: str | None = None
    told: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What all servers are given alike.

    Attributes:
        n_ctx: most tokens of one request, prompt and answer together.
        n_seq: requests that are computed at once.
    """

    path: Path
    threads: int
    n_ctx: int
    n_seq: int


class Served(Closing):
    """A server that runs until closed; its output goes to a file, of which errors show the end.

    Args:
        plan: what to start.
        port: to listen on; None is any free one.

    Raises:
        EdgerouteError: it ended, or did not answer in time.
    """

    def __init__(self, plan: ServerPlan, port: int | None = None) -> None:
        self.plan = plan
        self.address = Address(port=port or free_port(), key=plan.key)
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._log = Path(self._folder.name, "output")
        for name, content in plan.files.items():
            Path(self._folder.name, name).write_text(content, encoding="utf-8")
        places = {"{port}": str(self.address.port), "{folder}": self._folder.name}
        command = [reduce(lambda text, place: text.replace(*place), places.items(), part)
                   for part in plan.command]  # fmt: skip
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C at the terminal reaches us, who end it in order.
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                            stdin=subprocess.DEVNULL, start_new_session=True,
                                            env=_environment())  # fmt: skip
        try:
            asyncio.run(self._wait_ready())
        except BaseException:
            self.close()
            raise

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the process and what it started.

        Raises:
            EdgerouteError: it has ended.
        """
        try:
            process = psutil.Process(self.process.pid)
            return sum(each.memory_info().rss for each in (process, *process.children(True)))
        except psutil.Error as error:
            raise self.failure(f"{self.plan.name} ended") from error

    def failure(self, what: str) -> EdgerouteError:
        """Make an error of what happened and the end of the server's output."""
        return EdgerouteError(f"{what}; the end of its output:\n{self.output()}")

    def output(self) -> str:
        """Return the last of what the server wrote."""
        return self._log.read_bytes()[-_TAIL:].decode(errors="replace")

    def close(self) -> None:
        """End the server; safe to call twice."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._folder.cleanup()

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self.failure(f"{self.plan.name} ended with status {self.process.returncode}")
            with contextlib.suppress(OSError, BrokenAnswer, TimeoutError):
                async with asyncio.timeout(10):
                    head, _ = await fetch(self.address, self.plan.ready)
                if head.status == 200:
                    return
            await asyncio.sleep(0.05)
        raise self.failure(f"{self.plan.name} did not answer within {_READY_S:.0f} s")


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Let a polite end of this program (SIGTERM) be one of its servers' as well."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(plans: Sequence[ServerPlan]) -> Iterator[dict[str, Served]]:
    """Run several servers beside each other; those that have no request compute nothing."""
    with ending_in_order(), contextlib.ExitStack() as stack:
        yield {plan.name: stack.enter_context(Served(plan)) for plan in plans}


def python_peer(python: str, model: ServedModel) -> ServerPlan:
    """Plan llama-cpp-python's server: one request at a time, whoever asks.

    By default a new request ends the stream under way; that is switched off, and so are the
    logits of every prompt token, which nobody asks for here.
    """
    settings = {
        "model": str(model.path), "n_threads": str(model.threads),
        "n_threads_batch": str(model.threads), "n_ctx": str(model.n_ctx),
        "n_batch": str(N_UBATCH), "n_ubatch": str(N_UBATCH), "flash_attn": "true",
        "logits_all": "false", "interrupt_requests": "false", "verbose": "false",
        "host": "127.0.0.1", "port": "{port}",
    }  # fmt: skip
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return ServerPlan(
        name="llama-cpp-python", command=(python, "-m", "llama_cpp.server", *options),
        told=f"n_ctx {model.n_ctx}, flash attention, requests do not interrupt each other",
    )  # fmt: skip


def native_peer(binary: str, model: ServedModel) -> ServerPlan:
    """Plan llama.cpp's own server, with a slot for each request computed at once."""
    options = (
        "-m", str(model.path), "-t", str(model.threads), "-tb", str(model.threads),
        "-np", str(model.n_seq), "-c", str(model.n_ctx * model.n_seq), "-b", "2048",
        "-ub", str(N_UBATCH), "-fa", "on", "--host", "127.0.0.1", "--port", "{port}",
    )  # fmt: skip
    return ServerPlan(
        name="llama.cpp server", command=(binary, *options), ready="/health",
        told=f"{model.n_seq} slots of {model.n_ctx} cells, flash attention",
    )  # fmt: skip


def our_server(model: ServedModel, *, max_batch: int | None = None) -> ServerPlan:
    """Plan edgeroute's server with room for all requests; `max_batch` as in RunParams."""
    more = {} if max_batch is None else {"max_batch": max_batch}
    name = "edgeroute" if max_batch is None else f"edgeroute, max_batch {max_batch}"
    return ServerPlan(
        name=name, ready="/health/ready", command=COMMAND,
        files={"edgeroute.toml": configuration(model, {}, more)},
        told=f"{model.n_ctx * model.n_seq} cells, "
        f"max_batch {max_batch or 'by default: answers do not depend on who shares a pass'}",
    )  # fmt: skip


def loaded_server(
    model: ServedModel, *, max_body_bytes: int, stall_s: float, max_waiting: int
) -> ServerPlan:
    """Plan edgeroute's server with a key and narrow limits, all of which clients will meet."""
    server = {"max_body_bytes": max_body_bytes, "stall_s": stall_s, "max_waiting": max_waiting,
              "api_key_file": "key", "sessions": "sessions"}  # fmt: skip
    return ServerPlan(
        name="edgeroute", ready="/health/ready", command=COMMAND, key=KEY,
        files={"key": KEY + "\n", "edgeroute.toml": configuration(model, server, {})},
        told=f"{model.n_ctx * model.n_seq} cells; {max_waiting} requests at once; bodies up to "
        f"{max_body_bytes} bytes; readers may pause {stall_s:g} s",
    )  # fmt: skip


def configuration(
    model: ServedModel, server: Mapping[str, object], more: Mapping[str, object]
) -> str:
    """Write an `edgeroute.toml` with one model, called `base`.

    Args:
        server: keys of `[server]`.
        more: settings of the model beside those of all servers.
    """
    settings = {"model": str(model.path), "threads": model.threads, "n_ctx": model.n_ctx,
                "n_kv": model.n_ctx * model.n_seq, "n_ubatch": N_UBATCH, **more}  # fmt: skip
    tables = {"server": server, "models.base": settings}
    return "\n".join(
        line for name, table in tables.items()
        # JSON's texts and numbers are TOML's as well.
        for line in (f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}"
                                    for key, value in table.items()))
    ) + "\n"  # fmt: skip


def _environment() -> dict[str, str]:
    """Return our environment without settings that one of the servers alone would follow."""
    kept = {"EDGEROUTE_MODELS"}
    return {name: value for name, value in os.environ.items()
            if name in kept or not name.startswith("EDGEROUTE_")}  # fmt: skip
