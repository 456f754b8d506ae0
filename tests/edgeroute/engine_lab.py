"""What the tests of an engine seen from outside share."""

import time
from collections.abc import Callable
from typing import Any

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_kv": 2048, "n_ubatch": 64, "threads": 1}
WAIT_S = 20.0


def until(found: Callable[[], object]) -> None:
    """Wait for something that is bound to come."""
    end = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)
