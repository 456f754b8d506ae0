"""Packages that only some uses need: which extra brings each, and how a missing one is told."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Final

from edgeroute.runtime.errors import UsageError

EXTRAS: Final[Mapping[str, str]] = {
    "gguf": "tools", "torch": "train", "safetensors": "train", "tokenizers": "train",
    "onnxruntime": "predict", "pyarrow": "report", "resvg_py": "report", "starlette": "serve",
    "uvicorn": "serve", "msgspec": "serve", "prometheus_client": "serve",
}  # fmt: skip
"""The extra by package, both as they are imported and asked for."""


def check_extra(what: str, *packages: str, otherwise: str | None = None) -> None:
    """Refuse to begin something without the packages that it needs.

    Args:
        what: needs them; begins the sentence.
        packages: of one extra.
        otherwise: what can be done without them.

    Raises:
        UsageError: some are not installed; the message says how to install them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise _refusal(what, missing, otherwise)


def missing_extra(error: ModuleNotFoundError) -> UsageError | None:
    """Say how to install the package that a command missed; None where it is of no extra."""
    package = (error.name or "").partition(".")[0]
    return _refusal("this command", [package], None) if package in EXTRAS else None


def _refusal(what: str, missing: Sequence[str], otherwise: str | None) -> UsageError:
    names = ", ".join(name.replace("_", "-") for name in missing)
    return UsageError(
        f"{what} needs {names}, which {'are' if missing[1:] else 'is'} not installed; install "
        f"with: pip install 'edgeroute[{EXTRAS[missing[0]]}]'"
        f"{'' if otherwise is None else f', or {otherwise}'}"
    )
