"""What tests of sessions share: questions, what is told of a session, and waiting for saves."""

import time
from typing import Any

from edgeroute import Generation, Runtime

PROMPT = [3 + 7 * i % 290 for i in range(300)]
SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_kv": 2048, "n_ubatch": 64, "threads": 1}
WAIT_S = 30.0


def ask(runtime: Runtime, prompt: list[int] = PROMPT, **options: Any) -> Generation:
    """Answer with the log-probabilities, whose bits tell more than the tokens'."""
    return runtime.generate(prompt_ids=prompt, **{"max_tokens": 12, "logprobs": 2} | options)


def told(answer: Generation) -> dict[str, Any]:
    assert answer.stats.session is not None
    assert answer.stats.to_dict()["session"] == answer.stats.session
    return answer.stats.session


def figures(runtime: Runtime) -> dict[str, Any]:
    found: Any = runtime.stats()["sessions"]
    return dict(found)


def settled(runtime: Runtime) -> dict[str, Any]:
    """Wait until all saves are on the disk; return the statistics."""
    end = time.monotonic() + WAIT_S
    while figures(runtime)["pending"]:
        assert time.monotonic() < end, "a save never ended"
        time.sleep(0.002)
    return figures(runtime)


def cells_accounted(runtime: Runtime) -> bool:
    stats: Any = runtime.stats()
    return bool(stats["kv_free_cells"] + stats["kv_kept_cells"] == stats["kv_cells"])


def same(ours: Generation, theirs: Generation) -> bool:
    return (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs)
