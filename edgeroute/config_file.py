"""Configuration files: TOML read with care, and checks whose messages name file, key and value."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from edgeroute.models.pull import resolve
from edgeroute.runtime.errors import CatalogueError, UsageError
from edgeroute.runtime.units import MIB, format_bytes, parse_bytes

MAX_FILE_BYTES: Final = MIB
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_PATH_CHARS: Final = 4096


def load_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: it is, for messages: `the pool`.

    Raises:
        UsageError: it cannot be read, is larger than MAX_FILE_BYTES, or is no TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{what} {str(path)[:400]} cannot be read: {why}") from error
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"{what} {path} has over {format_bytes(MAX_FILE_BYTES)}; none needs so")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} {path} is not TOML: {str(error)[:200]}") from error


class Reader:
    """Checks a configuration key by key; every message begins with where it is.

    Args:
        source: what messages call the configuration.
        folder: that paths in it are relative to.
    """

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.folder = source, folder

    def name(self, key: str, value: object) -> str:
        """Take the name of something: up to 64 letters, digits and `._-`."""
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise self.error(key, f"{value!r:.80} is no name of up to 64 letters, digits, ._-")
        return value

    def model(self, key: str, value: object) -> Path:
        """Find the file of a model: a catalogue name, `hf:...`, or a path."""
        if not isinstance(value, str | Path) or not 0 < len(str(value)) <= _MAX_PATH_CHARS:
            raise self.error(key, f"a catalogue name or a path is needed, not {value!r:.80}")
        spec = str(value)
        if spec.lower().endswith(".gguf") and not spec.startswith(("hf:", "~")):
            spec = str(self.folder / spec)  # which leaves an absolute path as it is
        try:
            return resolve(spec)
        except (CatalogueError, OSError) as error:
            raise self.error(key, str(error)) from error

    def path(self, key: str, value: object) -> Path:
        """Take a path, relative to the folder; whether it is there is not looked at."""
        is_text = isinstance(value, str) and "\0" not in value
        if not is_text or not 0 < len(str(value)) <= _MAX_PATH_CHARS:
            raise self.error(key, f"a path is needed, not {value!r:.80}")
        return self.folder / Path(str(value)).expanduser()

    def number(self, key: str, value: object, most: float, least: float = 0.0) -> float:
        """Take a number within bounds."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and least <= value <= most:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        raise self.error(key, f"a number from {least:g} to {most:g} is needed, not {value!r:.80}")

    def count(self, key: str, value: object, most: int, least: int = 1) -> int:
        """Take a whole number within bounds."""
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(
                key, f"a whole number from {least} to {most} is needed, not {value!r:.80}"
            )
        return value

    def flag(self, key: str, value: object) -> bool:
        """Take true or false."""
        if not isinstance(value, bool):
            raise self.error(key, f"true or false is needed, not {value!r:.80}")
        return value

    def n_bytes(self, key: str, value: object) -> int:
        """Take bytes such as `2GiB`."""
        if not isinstance(value, str | int):
            raise self.error(key, f"bytes such as 2GiB are needed, not {value!r:.80}")
        try:
            return parse_bytes(value)
        except UsageError as error:
            raise self.error(key, str(error)) from error

    def table(self, key: str, value: object) -> Mapping[str, Any]:
        """Take a table."""
        if not isinstance(value, Mapping):
            raise self.error(key, f"a table is needed, not {value!r:.80}")
        return value

    def known(self, key: str, table: Mapping[Any, object], known: Iterable[str]) -> None:
        """Refuse keys that mean nothing, naming the nearest that does."""
        names = list(known)
        for each in table:
            if each not in names:
                near = difflib.get_close_matches(str(each)[:80], names, 1)
                hint = f"; did you mean {near[0]}" if near else f"; known: {', '.join(names)}"
                raise self.error(key, f"there is no key {each!r:.80}{hint}")

    def error(self, key: str, reason: str) -> UsageError:
        """Make an error that says where it is."""
        where = f"{self.source}: {key}" if key else self.source
        return UsageError(f"{where}: {reason}")
