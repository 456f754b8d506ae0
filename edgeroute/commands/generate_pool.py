"""`edgeroute generate --pool FILE`: the cheapest capable of several models answers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

import click

from edgeroute.commands.generate_shared import (
    SETTINGS,
    Answer,
    has_chat_template,
    hear,
    pick,
)

if TYPE_CHECKING:
    from edgeroute.options import Options
    from edgeroute.pool import Pool
    from edgeroute.pool_answer import PoolGeneration, PoolSettings

SHARED: Final = ("memory", "threads", "n_ctx", "kv_type", "device")
"""Settings of a Runtime that hold for all models of a pool."""
_OF_ONE: Final = ("adapter", "small_adapter", "session")
"""Options of an answer that mean nothing with several models."""


def open_pool(given: dict[str, Any]) -> "Pool":
    """Open the pool that --pool names.

    Raises:
        UsageError: the file is no pool, or an option is given that is for one model.
        EdgerouteError: see Pool.
    """
    names = [name for name in (*SETTINGS, *_OF_ONE) if name not in SHARED]
    if given["show_steps"]:
        raise click.UsageError("--show-steps shows two models of one answer, and --pool takes one")
    for name in names:
        if given.get(name) is not None:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} is for one model; with --pool, say in the file what "
                                   f"is true of each, or leave {option} out")  # fmt: skip
    from edgeroute.pool import Pool

    return Pool(given["pool"], **cast("PoolSettings", pick(given, SHARED)))


def pool_chats(pool: "Pool", given: dict[str, Any]) -> bool:
    """Tell whether all models of a pool, or the one that was named, were trained to chat.

    Raises:
        ModelFileError: a header is malformed.
    """
    profiles = pool.params.models
    asked = [profiles[given["model"]]] if given["model"] in profiles else profiles.values()
    return all(has_chat_template(each.path) for each in asked)


def pool_answer(
    pool: "Pool", prompt: str | None, asked: tuple[str | None, "Options"],
    write: Callable[[str], None],
) -> tuple[Answer, dict[str, object]]:  # fmt: skip
    """Ask a pool, and pass the text on as it comes.

    Args:
        pool: who answers.
        prompt: where there are no messages.
        asked: the model, or None for the pool's choice; and options of the answer.
        write: takes the text.

    Returns:
        The answer, and which model gave it and why: `Route.to_dict`.
    """
    model, options = asked
    with pool.stream(prompt, model=model, **options) as stream:
        answer, generation = hear(stream, write)
    return answer, cast("PoolGeneration", generation).pool.to_dict()


def route_part(route: dict[str, Any]) -> str:
    """Say on one line which model answered, and why."""
    tries = cast("list[dict[str, Any]]", route["tries"])
    waited = sum(each["wait_s"] for each in tries)
    return (f"answered by {route['model']}, {route['why']}, shortfall {route['shortfall']:.2f}; "
            f"{waited:.1f} s until it was open")  # fmt: skip
