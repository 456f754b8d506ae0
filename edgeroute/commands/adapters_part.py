"""Adapters on the command line: what is asked for, and what served, said on one line."""

import os
from typing import Any

import click


def read_adapter(given: dict[str, Any]) -> str | dict[str, float] | None:
    """Read --adapter, and let --adapters default to the library where it is given.

    Raises:
        UsageError: a mixture is malformed.
    """
    text = given["adapter"]
    if text is not None and given["adapters"] is None:
        from edgeroute.models.adapter_library import library_folder

        given["adapters"] = str(library_folder())
    return None if text is None else _mixture("--adapter", text)


def read_small_adapter(given: dict[str, Any]) -> str | dict[str, float] | None:
    """Read --small-adapter.

    Raises:
        UsageError: a mixture is malformed, or there is no library to take it from.
    """
    text = given["small_adapter"]
    if text is None:
        return None
    if given["small_adapters"] is None and not os.environ.get("EDGEROUTE_SMALL_ADAPTERS"):
        raise click.UsageError(f"--small-adapter {text} needs --small-adapters, a folder with it")
    return _mixture("--small-adapter", text)


def _mixture(option: str, text: str) -> str | dict[str, float]:
    """Read the value of an option that names adapters."""
    if "=" not in text:
        return str(text)
    mixture: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            mixture[name.strip()] = float(weight)
        except ValueError:
            raise click.UsageError(
                f"{option} {text!r}: write a mixture as name=factor,name=factor"
            ) from None
    return mixture


def adapters_part(adapters: dict[str, Any]) -> str:
    """Say which adapters served an answer, of its model and of a small one.

    Args:
        adapters: `GenerationStats.adapters`.
    """
    told = [_held_part(adapters)] if "used" in adapters else []
    if "small" in adapters:
        told.append(f"the small model's {_held_part(adapters['small'])}")
    return "; ".join(told)


def _held_part(held: dict[str, Any]) -> str:
    used = [name if weight == 1 else f"{name} x {weight:g}"
            for name, weight in held["used"].items()]  # fmt: skip
    if not used:
        return "no adapter"
    came = "in memory" if held["hit"] else f"loaded in {1e3 * held['wait_s']:.0f} ms"
    return f"adapter {', '.join(used)}, {came}"
