"""What jetson-stats knows of a Jetson: its watts and its power mode, where that is installed.

Its service reads the board as root and tells everybody through a socket. That reaches into
containers, in which neither the rails' files nor NVIDIA's programs are. It is asked last, and is
no dependency: without the module `jtop`, or without its service, there is nothing here.

Source: jetson-stats, the class jtop: `power["tot"]["power"]` in mW, `nvpmodel.name`.
"""

import contextlib
import importlib
import math
from typing import Any, Final

from edgeroute.runtime.board_files import clean
from edgeroute.runtime.energy_power import JETSON, Sampled

_MODULE: Final = "jtop"
_SCOPE: Final = "board (jetson-stats), all processes"
_PERIOD_S: Final = 0.5
"""Its service measures no more often."""


class JetsonStats(Sampled):
    """Joules by what the service says of the whole board. A Counter."""

    def __init__(self, client: Any) -> None:
        self._client = client
        super().__init__(JETSON, _SCOPE, lambda: _watts(client), period_s=_PERIOD_S)

    def close(self) -> None:
        """End the thread, then the connection; safe to call twice."""
        super().close()
        self._client.close()


def open_jetson_stats(module: Any = None) -> JetsonStats | None:
    """Begin to sample; None where jetson-stats or its service is not there, or tells no watts.

    Args:
        module: what stands in for jtop.
    """
    client = _connect(module)
    if client is None:
        return None
    if _watts(client) is None:
        client.close()
        return None
    return JetsonStats(client)


def power_mode(module: Any = None) -> str | None:
    """Return the name of the power mode that is set; None where nobody says.

    Args:
        module: what stands in for jtop.
    """
    client = _connect(module)
    if client is None:
        return None
    with contextlib.closing(client):
        return clean(str(getattr(client.nvpmodel, "name", None) or "")) or None


def _connect(module: Any) -> Any:
    """Connect to the service; None where there is none."""
    if module is None:
        try:
            module = importlib.import_module(_MODULE)
        except ImportError:
            return None
    try:
        client = module.jtop()
        client.start()  # which waits for the first figures
    except (module.JtopException, OSError):
        return None
    return client


def _watts(client: Any) -> float | None:
    """Read the board's watts; None where the service does not say."""
    try:
        power = client.power if client.ok(spin=True) else None
    except Exception:  # whatever ended the client's own thread is raised here
        return None
    total = power.get("tot") if isinstance(power, dict) else None
    found = total.get("power") if isinstance(total, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return found / 1e3
