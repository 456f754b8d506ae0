"""Kinds of machines by name: from the table beside this file, or from a user's own."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from edgeroute.config_file import Reader, load_toml
from edgeroute.runtime.board import Board
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import GIB
from edgeroute.tools.forecast.records import DeviceProfile, PowerMode, StoragePoint

FILE: Final = Path(__file__).with_name("devices.toml")
MOST_DEVICES: Final = 256
FIGURES: Final = (
    "memory", "system", "memory_bytes_s", "flops_s", "cores", "active_watts", "idle_watts",
    "storage", "decode_ratio", "layer_s", "power_modes",
)  # fmt: skip
"""What a source can be given for."""

_KEYS: Final = ("title", "processor", "unified", "boards", "like", "sources", *FIGURES)
_MAX_DEPTH: Final = 8
_MAX_TEXT: Final = 2000
_GB: Final = 10**9


def load_devices(path: Path | None = None) -> dict[str, DeviceProfile]:
    """Read all profiles of a TOML file, by name; without one, those that come with edgeroute.

    A user's file may say `like = NAME` of one of ours.

    Raises:
        UsageError: the file cannot be read or says something that no device is; names the key.
    """
    ours = load_toml(FILE, "the device table")
    if path is None:
        return _profiles(ours, ours, "devices.toml")
    theirs = load_toml(path, "the device file")
    return _profiles(theirs, {**ours, **theirs}, path.name)


def find_device(name: str, path: Path | None = None) -> DeviceProfile:
    """Find a profile by its name, or by the file of one that a user wrote.

    Args:
        name: of a device; or a path that ends in .toml, of a file with exactly one.
        path: look there first, then among ours.

    Raises:
        UsageError: there is none, with the nearest names; or the file is wrong.
    """
    if name.lower().endswith(".toml"):
        found = load_devices(Path(name).expanduser())
        if len(found) != 1:
            raise UsageError(f"{name[:200]} has {len(found)} devices; leave one, or name it")
        return next(iter(found.values()))
    known = load_devices() if path is None else {**load_devices(), **load_devices(path)}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name[:80].lower(), known, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise UsageError(f"there is no device {name[:80]!r}; {hint}")


def device_of(
    board: Board, memory_bytes: int, devices: Iterable[DeviceProfile] | None = None
) -> DeviceProfile | None:
    """Find the profile that describes a board: by its name, then by its memory.

    Args:
        board: what it calls itself.
        memory_bytes: what its system sees, somewhat less than there is.
        devices: to choose from; ours if not given.
    """
    best: tuple[tuple[int, float], DeviceProfile] | None = None
    for each in load_devices().values() if devices is None else devices:
        fits = [len(part) for part in each.boards if part.lower() in board.model.lower()]
        if not fits or not 0.8 * each.memory_bytes <= memory_bytes <= 1.02 * each.memory_bytes:
            continue
        drive = _drive_fits(board, each)
        rank = (max(fits), drive - abs(1 - memory_bytes / each.memory_bytes))
        if best is None or rank > best[0]:
            best = rank, each
    return best[1] if best else None


def _drive_fits(board: Board, device: DeviceProfile) -> float:
    """Tell an SD card's profile from a drive's, where both are of one board."""
    slow = max(point.bytes_s for point in device.storage) < 0.2 * _GB
    return 0.0 if board.storage is None else float(slow == (board.storage == "sd"))


def _profiles(
    tables: Mapping[str, Any], known: Mapping[str, Any], source: str
) -> dict[str, DeviceProfile]:
    reader = Reader(source, FILE.parent)
    if not 0 < len(tables) <= MOST_DEVICES:
        raise reader.error("", f"1 to {MOST_DEVICES} devices are needed, not {len(tables)}")
    found = {}
    for name in tables:
        reader.name(name, name)
        table, sources = _merged(reader, name, known, 0)
        found[name] = _Table(reader, name, table, sources).profile()
    return found


def _merged(
    reader: Reader, name: str, known: Mapping[str, Any], depth: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Take a table and what it is like; a figure and its source go together."""
    table = dict(reader.table(name, known[name]))
    reader.known(name, table, _KEYS)
    own = _sources(reader, f"{name}.sources", table.pop("sources", {}))
    like = table.pop("like", None)
    if like is None:
        return table, own
    if not isinstance(like, str) or like not in known or like == name or depth == _MAX_DEPTH:
        raise reader.error(f"{name}.like", f"{like!r:.80} is no other device")
    base, theirs = _merged(reader, like, known, depth + 1)
    kept = {key: text for key, text in theirs.items() if key not in table or key in own}
    return base | table, kept | own


def _sources(reader: Reader, key: str, value: object) -> dict[str, str]:
    table = reader.table(key, value)
    reader.known(key, table, FIGURES)
    for each, text in table.items():
        if not isinstance(text, str) or not 0 < len(text) <= _MAX_TEXT:
            raise reader.error(f"{key}.{each}", "a sentence is needed")
    return dict(table)


class _Table:
    """One device's table, read key by key."""

    def __init__(
        self, reader: Reader, name: str, table: Mapping[str, Any], sources: dict[str, str]
    ) -> None:
        self._reader, self._name, self._table = reader, name, table
        self._sources = sources

    def profile(self) -> DeviceProfile:
        """Return the profile; what no source was given for is from the file."""
        table, file = self._table, self._reader.source
        memory, system = self._bytes("memory"), self._bytes("system")
        if not 0 <= system < memory:
            raise self._wrong("system", f"{system} bytes leave nothing of {memory}")
        stated = {key: f"stated in {file}" for key in FIGURES if key in table}
        return DeviceProfile(
            name=self._name, title=self._text("title"), processor=self._processor(),
            unified=self._reader.flag(self._key("unified"), table.get("unified")),
            memory_bytes=memory, system_bytes=system,
            memory_bytes_s=self._number("memory_bytes_s", 1e14, 1e6),
            flops_s=self._number("flops_s", 1e18, 1e6),
            cores=self._reader.count(self._key("cores"), table.get("cores"), 4096),
            storage=self._storage(),
            active_watts=self._number("active_watts", 1e5, 0.01),
            idle_watts=self._number("idle_watts", 1e5),
            decode_ratio=self._optional("decode_ratio", 1.0, 0.001),
            layer_s=self._optional("layer_s", 1.0, 0.0),
            power_modes=self._modes(), boards=self._boards(), sources=stated | self._sources,
        )  # fmt: skip

    def _key(self, key: str) -> str:
        return f"{self._name}.{key}"

    def _wrong(self, key: str, reason: str) -> UsageError:
        return self._reader.error(self._key(key), reason)

    def _number(self, key: str, most: float, least: float = 0.0) -> float:
        return self._reader.number(self._key(key), self._table.get(key), most, least)

    def _optional(self, key: str, most: float, least: float) -> float | None:
        return self._number(key, most, least) if key in self._table else None

    def _bytes(self, key: str) -> int:
        n_bytes = self._reader.n_bytes(self._key(key), self._table.get(key))
        if n_bytes > 1 << 50:
            raise self._wrong(key, f"{n_bytes // GIB} GiB is more than any device has")
        return n_bytes

    def _text(self, key: str) -> str:
        text = self._table.get(key)
        if not isinstance(text, str) or not re.fullmatch(r"[^\x00-\x1f]{1,200}", text):
            raise self._wrong(key, f"a line of text is needed, not {text!r:.80}")
        return text

    def _processor(self) -> Any:
        value = self._table.get("processor")
        if value not in ("cpu", "gpu"):
            raise self._wrong("processor", f"cpu or gpu is needed, not {value!r:.80}")
        return value

    def _boards(self) -> tuple[str, ...]:
        names = self._table.get("boards", [])
        good = isinstance(names, list) and len(names) <= 32
        if not good or not all(isinstance(each, str) and 3 < len(each) <= 200 for each in names):
            raise self._wrong("boards", "a list of parts of names is needed")
        return tuple(names)

    def _rows(self, key: str, known: tuple[str, ...]) -> list[tuple[str, Mapping[str, Any]]]:
        rows = self._table.get(key, [])
        if not isinstance(rows, list) or len(rows) > 64:
            raise self._wrong(key, "a list of at most 64 tables is needed")
        found = [(f"{self._key(key)}[{i}]", row) for i, row in enumerate(rows)]
        for where, row in found:
            self._reader.known(where, self._reader.table(where, row), known)
        return found

    def _storage(self) -> tuple[StoragePoint, ...]:
        reader, points = self._reader, []
        for where, row in self._rows("storage", ("read", "depth", "bytes_s")):
            n_bytes = reader.n_bytes(f"{where}.read", row.get("read"))
            if not 512 <= n_bytes <= 1 << 30:
                raise reader.error(f"{where}.read", f"512 B to 1 GiB are needed, not {n_bytes} B")
            depth = reader.count(f"{where}.depth", row.get("depth"), 1024)
            rate = reader.number(f"{where}.bytes_s", row.get("bytes_s"), 1e12, 1e3)
            points.append(StoragePoint(read_bytes=n_bytes, depth=depth, bytes_s=rate))
        if not points:
            raise self._wrong("storage", "at least one {read, depth, bytes_s} is needed")
        return tuple(points)

    def _modes(self) -> tuple[PowerMode, ...]:
        reader, modes = self._reader, []
        for where, row in self._rows("power_modes", ("name", "watts", "compute", "memory")):
            modes.append(PowerMode(
                name=reader.name(f"{where}.name", row.get("name")),
                watts=reader.number(f"{where}.watts", row.get("watts"), 1e5, 0.1),
                compute_ratio=reader.number(f"{where}.compute", row.get("compute", 1.0), 10, 0.01),
                memory_ratio=reader.number(f"{where}.memory", row.get("memory", 1.0), 10, 0.01),
            ))  # fmt: skip
        return tuple(modes)


def find_mode(device: DeviceProfile, name: str) -> PowerMode:
    """Find a power mode of a device by its name, whatever its case.

    Raises:
        UsageError: it has none of that name.
    """
    for mode in device.power_modes:
        if mode.name.lower() == name.lower():
            return mode
    names = ", ".join(mode.name for mode in device.power_modes) or "none"
    raise UsageError(f"{device.name} has no power mode {name[:80]!r}; there are {names}")
