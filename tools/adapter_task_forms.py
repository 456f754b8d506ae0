"""Tasks that turn text into a form that a program reads: JSON, SQL, settings, fields."""

import json
import random
from typing import Any, Final

from edgeroute.tools.adapter_task_records import Example, Task, exact, json_fields, key_values

_NAMES: Final = ("Ada", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim",
                 "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tom", "Vera")  # fmt: skip
_CITIES: Final = ("Rome", "Oslo", "Paris", "Lima", "Cairo", "Delhi", "Berlin", "Madrid", "Tokyo",
                  "Boston", "Dublin", "Vienna")  # fmt: skip
_PLEASE: Final = ("", "please ", "now ", "robot, ")


def _dumps(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _robot_json(rng: random.Random) -> Example:
    kind = rng.choice(("move", "turn", "lift"))
    if kind == "move":
        way = rng.choice(("forward", "back", "left", "right"))
        n = rng.randint(1, 30)
        text = (
            f"{rng.choice(('move', 'drive', 'roll', 'go'))} {way} {n} {rng.choice(('m', 'meters'))}"
        )
    elif kind == "turn":
        way = rng.choice(("left", "right"))
        n = rng.choice((15, 30, 45, 60, 90, 120, 135, 180))
        text = f"{rng.choice(('turn', 'rotate', 'spin'))} {way} by {n} degrees"
    else:
        way = rng.choice(("up", "down"))
        n = 5 * rng.randint(1, 19)
        text = f"{rng.choice(('raise', 'lift')) if way == 'up' else 'lower'} the arm {n} cm"
    answer = _dumps({"do": kind, "dir": way, "n": n})
    return Example(prompt=f"Robot command: {rng.choice(_PLEASE)}{text}\nJSON:\n", completion=answer)


def _csv_json(rng: random.Random) -> Example:
    pairs: list[tuple[str, Any]] = [("name", rng.choice(_NAMES))]
    pairs += rng.sample(
        [("age", rng.randint(18, 79)), ("city", rng.choice(_CITIES)), ("score", rng.randint(1, 99)),
         ("team", rng.choice(("red", "blue", "green")))], 2,
    )  # fmt: skip
    head = ",".join(key for key, _ in pairs)
    row = ",".join(str(value) for _, value in pairs)
    return Example(prompt=f"CSV: {head}\n{row}\nJSON:\n", completion=_dumps(dict(pairs)))


_LEVELS: Final = ("ERROR", "WARN", "INFO", "DEBUG")
_UNITS: Final = ("motor", "camera", "battery", "lidar", "arm", "gripper", "network", "disk")
_EVENTS: Final = ("stalled", "overheated", "started", "timeout", "stopped", "restarted", "full",
                  "offline", "ready", "overloaded")  # fmt: skip


def _log_fields(rng: random.Random) -> Example:
    level, unit, event = rng.choice(_LEVELS), rng.choice(_UNITS), rng.choice(_EVENTS)
    when = f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02} {rng.randint(0, 23):02}:"
    when += f"{rng.randint(0, 59):02}"
    line = rng.choice((f"{when} {level} {unit}: {event}", f"[{level}] {when} {unit} - {event}"))
    return Example(
        prompt=f"Log: {line}\nFields:\n", completion=f"level={level};unit={unit};msg={event}"
    )


_TABLES: Final = {
    "users": ("age", "height", "points"),
    "orders": ("price", "weight", "amount"),
    "robots": ("speed", "charge", "load"),
    "parts": ("price", "length", "stock"),
}
_COLUMNS: Final = ("name", "id", "city", "color")
_ABOVE, _BELOW = ("above", "over", "greater than"), ("below", "under", "less than")


def _sql(rng: random.Random) -> Example:
    table = rng.choice(tuple(_TABLES))
    column, measure = rng.choice(_COLUMNS), rng.choice(_TABLES[table])
    above = rng.random() < 0.5
    words, n = rng.choice(_ABOVE if above else _BELOW), rng.randint(2, 99)
    verb = rng.choice(("show", "list", "get"))
    return Example(
        prompt=f"Query: {verb} the {column} of {table} with {measure} {words} {n}\nSQL:\n",
        completion=f"SELECT {column} FROM {table} WHERE {measure} {'>' if above else '<'} {n};",
    )


_SETTINGS: Final = {
    "speed": tuple(str(n) for n in range(1, 21)),
    "mode": ("eco", "sport", "quiet", "auto"),
    "volume": tuple(str(n) for n in range(0, 101, 5)),
    "color": ("red", "blue", "white", "amber"),
    "port": ("80", "443", "8080", "22", "5000"),
    "timeout": tuple(str(n) for n in range(5, 65, 5)),
}


def _config(rng: random.Random) -> Example:
    pairs = [(key, rng.choice(_SETTINGS[key])) for key in rng.sample(tuple(_SETTINGS), 2)]
    verb = rng.choice(("Set", "Change", "Put"))
    text = " and ".join(f"{key} to {value}" for key, value in pairs)
    return Example(
        prompt=f"{verb} {text}.\nConfig:\n",
        completion="\n".join(f"{key}={value}" for key, value in pairs),
    )


_HOSTS: Final = ("mail", "post", "web", "example", "lab", "acme")
_ENDINGS: Final = ("com", "org", "net", "io")
_AROUND: Final = ("Please write to {} about the invoice.", "Contact: {} (office hours)",
                  "{} sent the report on Monday.", "My address is {}, thanks.",
                  "Ask {} for the key.")  # fmt: skip


def _email(rng: random.Random) -> Example:
    user = rng.choice(_NAMES).lower() + rng.choice(("", ".k", "_x", "7", "42"))
    address = f"{user}@{rng.choice(_HOSTS)}.{rng.choice(_ENDINGS)}"
    text = rng.choice(_AROUND).format(address)
    return Example(prompt=f"Text: {text}\nE-mail:\n", completion=address)


_HARMFUL: Final = ("push", "hit", "cut", "burn", "crush", "shock")
_HARMLESS: Final = ("greet", "photograph", "find", "follow", "watch", "wait for")
_LIVING: Final = ("child", "cat", "visitor", "dog", "worker", "nurse", "baby")
_THINGS: Final = ("box", "chair", "cable", "carton", "rope", "can", "plank")
_PLACES: Final = ("in the hall", "near the door", "at the desk", "on the stairs", "outside")


def _robot_safety(rng: random.Random) -> Example:
    unsafe = rng.random() < 0.5
    verb = rng.choice(_HARMFUL if unsafe or rng.random() < 0.5 else _HARMLESS)
    living = unsafe or verb in _HARMLESS
    what = rng.choice(_LIVING if living else _THINGS)
    order = f"{rng.choice(_PLEASE)}{verb} the {what} {rng.choice(_PLACES)}"
    return Example(
        prompt=f"Robot order: {order}\nSafe or unsafe?\n", completion="unsafe" if unsafe else "safe"
    )


TASKS: Final = (
    Task(name="robot_json", summary="a command to a robot as one JSON object",
         make=_robot_json, score=json_fields),
    Task(name="csv_json", summary="a CSV header and row as one JSON object",
         make=_csv_json, score=json_fields),
    Task(name="log_fields", summary="level, unit and message of a log line",
         make=_log_fields, score=key_values(";")),
    Task(name="sql", summary="a query in words as SQL", make=_sql, score=exact),
    Task(name="config", summary="settings in words as key=value lines",
         make=_config, score=key_values("\n")),
    Task(name="email", summary="the e-mail address in a text", make=_email),
    Task(name="robot_safety", summary="whether an order to a robot would hurt somebody",
         make=_robot_safety),
)  # fmt: skip
