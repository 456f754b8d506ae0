"""Experts in three tiers over a slow link: who computes what the device misses, against both
fixed choices.

The device is a process of its own behind ggml's RPC on loopback, its link slowed down to what is
asked for. Each way has a server and a runtime of its own, which live on from run to run: what
the gate learns takes some tokens.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from edgeroute.engine import Runtime, Settings
from edgeroute.models.base import MoeModel
from edgeroute.models.registry import describe
from edgeroute.offload.eviction_registry import POLICIES
from edgeroute.offload.expert_pool import ExpertLayer, plan_pools
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import MIB, format_bytes
from edgeroute.tools.bench import pairs, tiers_report
from edgeroute.tools.bench.report import BenchParams, Report
from edgeroute.tools.bench.rpc_servers import rpc_server, slow_links
from edgeroute.tools.bench.tiers_report import MODES, Found, Life, say_link
from edgeroute.tools.bench.workers import Worker

PROMPT: Final = (5, 6)
N_FIRST: Final = 12
"""Tokens of the first answer, prompt included: what is paid before anything was learned."""
MIN_TOKENS: Final = 4
_LEAST_BYTES: Final = 1 * MIB
"""A budget that nothing fits: the refusal says what would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersParams:
    """What this benchmark is told beyond BenchParams.

    Attributes:
        links_bytes_s: speeds of the link, bytes per second.
        dram_ratio: DRAM slots over all experts.
        device_ratio: device slots over all experts.
        policies: eviction policies that are tried one by one, beside the Runtime's own.
        n_warm: uncounted tokens of the way that measures for itself.
        most_ratio: the target: its time per token over that of the better fixed choice.
    """

    links_bytes_s: tuple[int, ...]
    dram_ratio: float = 0.25
    device_ratio: float = 0.1
    policies: tuple[str, ...] = ()
    n_warm: int = 128
    most_ratio: float = 1.05

    def __post_init__(self) -> None:
        if not self.links_bytes_s or any(each <= 0 for each in self.links_bytes_s):
            raise UsageError("name at least one speed of the link, in bytes per second: 100MB")
        for name, ratio in (("dram", self.dram_ratio), ("device", self.device_ratio)):
            if not 0 < ratio <= 1:
                raise UsageError(f"--{name} {100 * ratio:g}% is no share of the experts; give "
                                 "more than 0% and up to 100%")  # fmt: skip
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown:
            raise UsageError(f"there is no policy {unknown[0]!r}; there are {', '.join(POLICIES)}, "
                             "or all")  # fmt: skip


def parse_share(text: str) -> float:
    """Read `25%`.

    Raises:
        UsageError: it is no share.
    """
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float("nan")
    except ValueError:
        raise UsageError(f"{text!r} is no share of the experts; write 25%") from None


def parse_policies(text: str | None) -> tuple[str, ...]:
    """Read names separated by commas, or `all`."""
    if text is None:
        return ()
    return tuple(POLICIES) if text == "all" else tuple(name.strip() for name in text.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Bytes of slots: for the experts of one token, for all, and how many there are."""

    token_bytes: int
    all_bytes: int


def read_experts(path: Path) -> Experts:
    """Read from a file's header what slots for its experts take.

    Raises:
        UsageError: the model has no experts.
    """
    with GGUFFile.open(path) as file:
        model = describe(file)
        moe = model.hparams.moe
        if moe is None or not isinstance(model, MoeModel):
            raise UsageError(f"{path.name} has no experts; this benchmark is about those")
        layers = [ExpertLayer(il, tuple(file.tensors[name] for name in model.expert_tensors(il)))
                  for il in range(model.hparams.n_layer) if model.is_moe(il)]  # fmt: skip
        pools = plan_pools(layers, moe.n_expert)
        return Experts(token_bytes=moe.n_expert_used * sum(pool.slot_bytes for pool in pools),
                       all_bytes=sum(pool.all_bytes for pool in pools))  # fmt: skip


class Tiered:
    """A Runtime over three tiers, in a process of its own."""

    def __init__(self, path: Path, experts: Experts, shares: tuple[float, float],
                 settings: Settings) -> None:  # fmt: skip
        """Open it with slots for these shares of the experts on the device and in DRAM."""
        # The device first: one that has room for all would need no tiers.
        for name, ratio in zip(("device_memory", "memory"), shares, strict=True):
            fixed = _least(path, settings, name) - experts.token_bytes
            wanted = max(experts.token_bytes, int(ratio * experts.all_bytes))
            settings = cast(Settings, {**settings, name: fixed + wanted})
        self._runtime = Runtime(path, **settings)

    def decode(self, n_tokens: int, seed: int) -> tuple[float, list[int]]:
        """Answer a prompt of two tokens: tokens per second behind the first, and which."""
        ids: list[int] = []
        began = ended = 0.0
        with self._runtime.stream(
            prompt_ids=list(PROMPT), max_tokens=1 + n_tokens, temperature=1.0, seed=seed,
            prefix="off",
        ) as stream:  # fmt: skip
            for chunk in stream:
                if not chunk.token_ids:
                    continue
                ended = time.perf_counter()
                began = began or ended
                ids += chunk.token_ids
        if len(ids) < MIN_TOKENS:
            raise UsageError(f"the model ends its answer after {len(ids)} tokens; use another one")
        return (len(ids) - 1) / (ended - began), ids

    def experts(self) -> Mapping[str, Any]:
        """What the runtime says of its experts."""
        return cast(Mapping[str, Any], self._runtime.stats()["experts"])

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()


def _least(path: Path, settings: Settings, name: str) -> int:
    """Return the smallest budget for one of the memories, by asking for one that is too small.

    Raises:
        UsageError: anything fits.
    """
    try:
        with Runtime(path, **cast(Settings, {**settings, name: _LEAST_BYTES})):
            raise UsageError(f"{path.name} fits {format_bytes(_LEAST_BYTES)} of {name}")
    except CapacityError as error:
        if error.smallest_bytes is None:
            raise
        return error.smallest_bytes


@dataclass(slots=True)
class Bench:
    """The benchmark's runs on one model."""

    params: BenchParams
    wanted: TiersParams
    experts: Experts
    progress: pairs.Progress

    def fixed(self, link_bytes_s: int) -> Found:
        """Measure both fixed choices and the gate's own in turn, over one link."""
        answers: dict[str, list[list[int]]] = {mode: [] for mode in MODES}
        with contextlib.ExitStack() as own:
            workers = {mode: self._open(own, link_bytes_s, mode) for mode in MODES}
            first_s = {mode: self._first(worker) for mode, worker in workers.items()}
            self.progress(f"{say_link(link_bytes_s)}, auto: {self.wanted.n_warm} tokens to learn")
            workers["auto"].call("decode", self.wanted.n_warm, 1)

            def runner(mode: str) -> Callable[[], float]:
                def run() -> float:
                    seed = 2 + len(answers[mode])
                    tok_s, ids = workers[mode].call("decode", self.params.tokens, seed)
                    answers[mode].append(ids)
                    return float(tok_s)

                return run

            series = pairs.alternate(
                {mode: runner(mode) for mode in MODES}, self.params.plan, self.progress
            )
            lives = {mode: Life.of(worker.call("experts")) for mode, worker in workers.items()}
        same = all(each == answers["off"] for each in answers.values())
        return Found(link_bytes_s=link_bytes_s, series=series, lives=lives, same_answers=same,
                     first_s=first_s)  # fmt: skip

    def _first(self, worker: Worker) -> float:
        """Have the first answer of a runtime, and return the seconds that it took."""
        began = time.perf_counter()
        worker.call("decode", N_FIRST, 1)
        return time.perf_counter() - began

    def policy(self, link_bytes_s: int, policy: str) -> Life:
        """Decode under a named policy in both tiers, and count."""
        self.progress(f"policy {policy}")
        with contextlib.ExitStack() as own:
            worker = self._open(own, link_bytes_s, "auto", policy=policy, levers="asked")
            worker.call("decode", self.params.tokens, 1)
            return Life.of(worker.call("experts"))

    def _open(self, own: contextlib.ExitStack, link_bytes_s: int, mode: str, **more: Any) -> Worker:
        """Start a server and a runtime in a process of its own, whose link is slow."""
        threads = max(1, self.params.threads // 2)  # the other half is the device's
        server = own.enter_context(rpc_server(threads=threads))
        n_tokens = max(self.params.tokens, self.wanted.n_warm, N_FIRST)
        settings = {
            "device": server.name, "host_experts": mode, "threads": threads, "n_ubatch": 64,
            "prefetch": "off", "n_ctx": max(64, len(PROMPT) + 1 + n_tokens), "max_batch": 1, **more,
        }  # fmt: skip
        shares = self.wanted.device_ratio, self.wanted.dram_ratio
        with slow_links(link_bytes_s):
            return own.enter_context(
                Worker(Tiered, self.params.path, self.experts, shares, settings)
            )


def run(params: BenchParams, progress: pairs.Progress, wanted: TiersParams) -> Report:
    """Measure every link, then every policy that was named over the last one.

    Raises:
        UsageError: the model has no experts, or ends its answers at once.
        CapacityError: even a token's experts do not fit.
        LibraryError: this ggml is built without RPC.
    """
    bench = Bench(replace(params, warmup=0), wanted, read_experts(params.path), progress)
    found = [bench.fixed(link_bytes_s) for link_bytes_s in wanted.links_bytes_s]
    policies = {name: bench.policy(wanted.links_bytes_s[-1], name) for name in wanted.policies}
    return tiers_report.make_report(bench.params, found, policies, wanted.most_ratio)
