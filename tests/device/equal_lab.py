"""The same scenario on the processor and on a device of another process."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeroute import Generation, Runtime
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.edgeroute.adapter_lab import wait_for

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_kv": 2048, "n_ubatch": 64, "threads": 1,
                            "repack_experts": False}  # fmt: skip
Scenario = Callable[[Runtime], Any]


def ids(n: int, seed: int = 0) -> list[int]:
    """Tokens of a random text."""
    return [int(t) for t in np.random.default_rng(seed).integers(4, 300, n)]


def told(answer: Generation) -> tuple[Any, ...]:
    """What an answer says; log-probabilities show the bits of logits where tokens hide them."""
    return answer.token_ids, answer.logprobs, answer.finish_reason


def ask(runtime: Runtime, n: int = 40, text: int = 0, **options: Any) -> tuple[Any, ...]:
    """Answer one random prompt."""
    settings = {"max_tokens": 10, "logprobs": 2} | options
    return told(runtime.generate(prompt_ids=ids(n, text), **settings))


def together(runtime: Runtime, asks: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Answer several at once, in whatever passes come of it."""
    with ThreadPoolExecutor(len(asks)) as threads:
        return [job.result() for job in [threads.submit(ask, runtime, **a) for a in asks]]


def balanced(runtime: Runtime) -> dict[str, Any]:
    """Check that no cell is held once nobody asks, and nothing is checked beside the answers."""
    found: dict[str, Any] = {}

    def all_free() -> bool:
        found.update(runtime.stats())
        return bool(found["kv_free_cells"] + found["kv_kept_cells"] == found["kv_cells"])

    wait_for(all_free)
    return found


def both(rpc: RpcServer, path: Path, scenario: Scenario, **settings: Any) -> Any:
    """Play a scenario on both; what it returns must be the same. Return that."""
    found = []
    for device in ("cpu", rpc.name):
        with Runtime(path, device=device, **SETTINGS | settings) as runtime:
            found.append(scenario(runtime))
            balanced(runtime)
    assert found[1] == found[0]
    return found[0]


def nmse(found: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Squared error in units of the reference's squares."""
    wide = reference.astype(np.float64)
    return float(np.sum((found - wide) ** 2) / np.sum(wide**2))
