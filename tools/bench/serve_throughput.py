"""Tokens per second of 1, 4 and 16 clients of our server against those of llama.cpp's servers."""

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from edgeroute.runtime.errors import EdgerouteError
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.serve_http import Address, Exchange, request_bytes
from edgeroute.tools.bench.serve_servers import (
    ServedModel,
    ServerPlan,
    native_peer,
    our_server,
    python_peer,
    running,
)

OURS: Final = "edgeroute"
WORDS: Final = (
    *("river", "window", "copper", "garden", "engine", "winter", "signal", "harbour", "paper"),
    *("mountain", "lantern", "bridge", "orchard", "compass", "kettle", "meadow", "archive"),
)
_ANSWER_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputParams:
    """What is compared.

    Attributes:
        n_clients: how many ask at once; each number is measured by itself.
        n_tokens: of each answer.
        n_words: of each prompt, a token each or little more.
        python_peer: a Python that has llama-cpp-python with its server; None leaves it out.
        native_peer: llama.cpp's `llama-server`; None leaves it out.
        max_batch: our server is measured with this setting as well; None leaves that out.
    """

    n_clients: tuple[int, ...] = (1, 4, 16)
    n_tokens: int = 64
    n_words: int = 48
    python_peer: str | None = None
    native_peer: str | None = None
    max_batch: int | None = 16


class Answered(NamedTuple):
    """One streamed answer: when its first text came, when it ended, its tokens."""

    first: float
    ended: float
    n_tokens: int


def run(params: BenchParams, progress: pairs.Progress, wanted: ThroughputParams) -> Report:
    """Start all servers, then let each be asked in turn by as many clients as wanted.

    Every prompt is a new one, so that no server answers from what it kept of an earlier run.

    Raises:
        EdgerouteError: a server could not be started, or an answer was not whole.
    """
    model = ServedModel(path=params.path, threads=params.threads,
                        n_ctx=_n_ctx(wanted), n_seq=max(wanted.n_clients))  # fmt: skip
    plans = _plans(model, wanted)
    found: dict[int, dict[str, pairs.Series]] = {}
    firsts: dict[int, dict[str, list[float]]] = {}
    with running(plans) as servers:
        for n_clients in wanted.n_clients:
            progress(f"{n_clients} clients, {wanted.n_tokens} tokens each")
            round_ = Rounds(n_clients, wanted, params.warmup)
            runners = {name: round_.runner(name, each.address) for name, each in servers.items()}
            found[n_clients] = pairs.alternate(runners, params.plan, progress)
            firsts[n_clients] = round_.firsts
    return _report(params, plans, found, firsts)


class Rounds:
    """Asks servers the same questions: those of a server's first run, of its second and so on."""

    def __init__(self, n_clients: int, wanted: ThroughputParams, warmup: int) -> None:
        self._n_clients, self._wanted, self._warmup = n_clients, wanted, warmup
        self._n_runs: dict[str, int] = {}
        self.firsts: dict[str, list[float]] = {}

    def runner(self, name: str, address: Address) -> pairs.Runner:
        """Return what measures one server: tokens per second in sum, from asking to the end."""

        def measure() -> float:
            run = self._n_runs[name] = self._n_runs.get(name, 0) + 1
            bodies = [question((self._n_clients, run, i), self._wanted)
                      for i in range(self._n_clients)]  # fmt: skip
            began = time.monotonic()
            answers = asyncio.run(_ask_all(address, bodies))
            seconds = max(each.ended for each in answers) - began
            if run > self._warmup:
                self.firsts.setdefault(name, []).extend(each.first - began for each in answers)
            return sum(each.n_tokens for each in answers) / seconds

        return measure


def question(seed: tuple[int, ...], wanted: ThroughputParams) -> dict[str, Any]:
    """Make a prompt that no other seed begins alike, and a long answer's request."""
    rng = random.Random(repr(seed))
    words = " ".join(rng.choices(WORDS, k=wanted.n_words))
    content = f"{rng.randrange(10**6)} {words}. Write a very long story with these words."
    return {"model": "base", "messages": [{"role": "user", "content": content}], "stream": True,
            "temperature": 0.0, "max_tokens": wanted.n_tokens}  # fmt: skip


async def ask(address: Address, body: Mapping[str, Any]) -> Answered:
    """Read one streamed answer; times are of `time.monotonic`.

    Raises:
        EdgerouteError: the request was refused, or the answer is not whole.
    """
    first, n_texts, finish, done = 0.0, 0, None, False
    async with asyncio.timeout(_ANSWER_S), await Exchange.open(address) as exchange:
        await exchange.send(request_bytes(address, "/v1/chat/completions", body))
        head = await exchange.head()
        if head.status != 200:
            raise EdgerouteError(f"status {head.status}: {(await exchange.body())!r:.300}")
        async for data in exchange.events():
            if data == "[DONE]":
                done = True
                continue
            for choice in json.loads(data).get("choices", ()):
                if choice.get("delta", {}).get("content"):
                    first, n_texts = first or time.monotonic(), n_texts + 1
                finish = choice.get("finish_reason") or finish
    if not done or finish is None:
        raise EdgerouteError(f"a stream ended without its end: finish_reason {finish}")
    # A text may be of several tokens, where only together they make whole characters.
    n_tokens = int(body["max_tokens"]) if finish == "length" else n_texts
    return Answered(first or time.monotonic(), time.monotonic(), n_tokens)


async def _ask_all(address: Address, bodies: Sequence[Mapping[str, Any]]) -> list[Answered]:
    return await asyncio.gather(*(ask(address, body) for body in bodies))


def _n_ctx(wanted: ThroughputParams) -> int:
    """Cells for a prompt, its template and its answer; llama.cpp pads a slot to 256."""
    return -(-(4 * wanted.n_words + 128 + wanted.n_tokens) // 256) * 256


def _plans(model: ServedModel, wanted: ThroughputParams) -> list[ServerPlan]:
    plans = [our_server(model)]
    if wanted.max_batch is not None:
        plans.append(our_server(model, max_batch=wanted.max_batch))
    if wanted.python_peer is not None:
        plans.append(python_peer(wanted.python_peer, model))
    if wanted.native_peer is not None:
        plans.append(native_peer(wanted.native_peer, model))
    return plans


def _report(
    params: BenchParams, plans: Sequence[ServerPlan], found: Mapping[int, dict[str, pairs.Series]],
    firsts: Mapping[int, dict[str, list[float]]],
) -> Report:  # fmt: skip
    rows, results, criteria = [], [], []
    for n_clients, measured in found.items():
        ours = measured[OURS]
        best = max((name for name in measured if name.startswith(OURS)),
                   key=lambda name: measured[name].median)  # fmt: skip
        for name, each in measured.items():
            waits = sorted(firsts[n_clients][name])
            over = f"{pairs.ratio(ours, each):.3f}" if name != OURS else ""
            rows.append((f"{n_clients} x {name}", report.spread(each),
                         f"{waits[len(waits) // 2]:.3f}", over, report.noise(each)))  # fmt: skip
            if not name.startswith(OURS):
                criteria.append(
                    Criterion(what=f"{n_clients} clients of {best} over {name}",
                              value=pairs.ratio(measured[best], each), limit=1.0)
                )  # fmt: skip
        results.append({
            "n_clients": n_clients, "unit": "tok/s in sum",
            "servers": {name: each.to_dict() for name, each in measured.items()},
            "first_token_s": {name: [report.plain(x) for x in waits]
                              for name, waits in firsts[n_clients].items()},
            "ratios": {f"{OURS} over {name}": report.plain(pairs.ratio(ours, each))
                       for name, each in measured.items() if name != OURS},
        })  # fmt: skip
    return Report(
        bench="serve: throughput", params=params, rows=tuple(rows), results=results,
        columns=("clients x server", "tok/s in sum", "first token s", "edgeroute over it", "runs"),
        criteria=tuple(criteria), notes=tuple(f"{plan.name}: {plan.told}" for plan in plans),
    )  # fmt: skip
