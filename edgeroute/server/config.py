"""What a server serves, and how: from `edgeroute.toml` or the command line, checked.

[server]                                # all optional; see ServerParams
host = "127.0.0.1"                      # any other than loopback needs an API key
port = 8080
memory = "6GiB"                         # over all open models; measured where not given
api_key_file = "edgeroute.key"          # one key a line, relative to this file; or the
                                        # environment's EDGEROUTE_API_KEY. Never in here.
allowed_hosts = ["robot.local"]         # names that clients may call this machine by
max_waiting = 64
idle_s = 900                            # close a model that was unused for so long
max_body_bytes = "8MiB"

[models.coder]                          # the first one is the default, also called `base`
model = "qwen2.5-coder-1.5b-instruct"   # catalogue name, hf:owner/repo/file.gguf, or a path
small = "tiny"                          # another entry's name, or a model
steps = "auto"                          # any setting of a Runtime, as in RunParams
n_ctx = 8192

[models.tiny]
model = "qwen2.5-coder-0.5b-instruct"
memory = "1GiB"                         # pages what does not fit into it; optional
adapters = "adapters"                   # a folder; more can be added to it while it runs
"""

import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgeroute.config import LIBRARIES, TEXTS, RunParams, merge_settings
from edgeroute.config_file import Reader, load_toml
from edgeroute.models.catalogue import CATALOGUE
from edgeroute.options import Settings
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import GIB, KIB, MIB
from edgeroute.server.records import ALIAS, ServerParams
from edgeroute.shelf_plan import ShelfModel

KEY_ENV: Final = "EDGEROUTE_API_KEY"
MAX_MODELS: Final = 32
MIN_KEY_CHARS, MAX_KEY_CHARS, MAX_KEYS = 8, 512, 64
_DAY_S: Final = 86_400
_HOST: Final = re.compile(r"[A-Za-z0-9._:%\[\]-]{1,255}")
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]{0,20}://[^\s/?#]{1,255}")
_KEY: Final = re.compile(r"[!-~]+")
_FILES: Final = frozenset({"depth_file", "steps_file", "steps_state", "trace", "adapter_state"})
_OURS: Final = frozenset({"memory", "sessions", "sessions_bytes"})
"""Settings of a Runtime that the server sets itself."""
SETTINGS: Final = tuple(name for name in Settings.__annotations__ if name not in _OURS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """A server's settings and its models, the default one first."""

    params: ServerParams
    models: tuple[ShelfModel, ...]


def read_config(path: str | Path, given: Mapping[str, Any]) -> ServerConfig:
    """Read a configuration file.

    Args:
        path: of a TOML file, see above.
        given: keys of `[server]` that override the file's; None is not given.

    Raises:
        UsageError: it is no such configuration; the message names the line or the key.
    """
    path = Path(path)
    content = load_toml(path, "the configuration")
    reader = _Reader(str(path), path.absolute().parent)
    reader.known("", content, ("models", "server"))
    stated = reader.table("server", content.get("server", {}))
    own = {**stated, **_absolute(given)}
    return ServerConfig(params=reader.server(own), models=reader.models(content.get("models")))


def one_model(
    model: str, path: Path, settings: Mapping[str, Any], given: Mapping[str, Any]
) -> ServerConfig:
    """Make the configuration of a server with one model.

    Args:
        model: as it was asked for: a catalogue name, `hf:...` or a path.
        path: its file.
        settings: of its Runtime; `memory` is the server's.
        given: keys of `[server]`; None is not given.

    Raises:
        UsageError: a setting is out of range.
    """
    reader = _Reader("edgeroute serve", Path.cwd())
    params = merge_settings({name: settings.get(name) for name in SETTINGS})
    spec = model.strip().lower()
    named = spec if spec in CATALOGUE else path.stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", named).lstrip("._-")[:64] or ALIAS
    return ServerConfig(
        params=reader.server({key: each for key, each in given.items() if each is not None}),
        models=(ShelfModel(name=name, path=path, params=params),),
    )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address; other names count as reachable."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """Take what was given; its paths are not relative to a file."""
    found = {key: each for key, each in given.items() if each is not None}
    if "api_key_file" in found:
        found["api_key_file"] = os.path.abspath(str(found["api_key_file"]))
    return found


class _Reader(Reader):
    """Reads what a server is made of."""

    def server(self, table: Mapping[str, Any]) -> ServerParams:
        """Read `[server]`, and the keys from where they are."""
        if "api_keys" in table:
            raise self.error(
                "server.api_keys", "a key has no place in a file that is shown around; name a "
                f"file with it by api_key_file, or set {KEY_ENV}",
            )  # fmt: skip
        self.known("server", table, (*_CHECKS, "api_key_file"))
        found: dict[str, Any] = {
            name: _CHECKS[name](self, f"server.{name}", value)
            for name, value in table.items() if name != "api_key_file"
        }  # fmt: skip
        if "memory" not in found and (text := os.environ.get("EDGEROUTE_MEMORY")) is not None:
            found["memory"] = self.n_bytes("EDGEROUTE_MEMORY", text)
        params = ServerParams(**found, api_keys=self._keys(table.get("api_key_file")))
        if not params.api_keys and not is_loopback(params.host):
            raise self.error(
                "server.host", f"{params.host} can be reached from other machines, and there is no "
                f"API key; put a long random one into {KEY_ENV} or a file that api_key_file "
                "names, or listen on 127.0.0.1",
            )  # fmt: skip
        return params

    def _keys(self, file: object) -> tuple[str, ...]:
        """Collect the API keys; no message shows one."""
        found = []
        text = os.environ.get(KEY_ENV)
        if text is not None and text.strip():
            found.append(self._key(f"the environment's {KEY_ENV}", text.strip()))
        if file is not None:
            path = self.path("server.api_key_file", file)
            try:
                lines = path.read_text(encoding="ascii", errors="replace")[:MIB].splitlines()
            except OSError as error:
                raise self.error(
                    "server.api_key_file", f"{path} cannot be read: {error.strerror}; write one "
                    "key a line into it",
                ) from error  # fmt: skip
            lines = [line.strip() for line in lines]
            kept = [line for line in lines if line and not line.startswith("#")]
            if not 1 <= len(kept) <= MAX_KEYS:
                raise self.error("server.api_key_file", f"{path} has {len(kept)} keys; it needs 1 "
                                 f"to {MAX_KEYS}, one a line")  # fmt: skip
            found += [self._key(f"server.api_key_file: {path}", line) for line in kept]
        return tuple(dict.fromkeys(found))

    def _key(self, where: str, text: str) -> str:
        if not MIN_KEY_CHARS <= len(text) <= MAX_KEY_CHARS or not _KEY.fullmatch(text):
            raise self.error(where, f"a key has {MIN_KEY_CHARS} to {MAX_KEY_CHARS} visible ASCII "
                             "characters and no space in it")  # fmt: skip
        return text

    def models(self, value: object) -> tuple[ShelfModel, ...]:
        """Read `[models.NAME]`."""
        tables = self.table("models", {} if value is None else value)
        if not 1 <= len(tables) <= MAX_MODELS:
            raise UsageError(
                f"{self.source}: a server has 1 to {MAX_MODELS} models, as [models.NAME]; this one "
                f"has {len(tables)}"
            )
        return tuple(self._model(name, tables) for name in tables)

    def _model(self, name: str, tables: Mapping[str, Any]) -> ShelfModel:
        key = f"models.{self.name('models', name)}"
        table = dict(self.table(key, tables[name]))
        self.known(key, table, ("model", "memory", *SETTINGS))
        if "model" not in table:
            raise self.error(key, "it has no model; give a catalogue name or a path")
        if name == ALIAS and next(iter(tables)) != ALIAS:
            raise self.error(key, f"{ALIAS} also names the first model; put this one first, or "
                             "rename it")  # fmt: skip
        memory = table.pop("memory", None)
        path = self.model(f"{key}.model", table.pop("model"))
        return ShelfModel(
            name=name, path=path, params=self._settings(key, table, (name, tables)),
            memory=None if memory is None else self.n_bytes(f"{key}.memory", memory),
        )  # fmt: skip

    def _settings(
        self, key: str, table: Mapping[str, Any], among: tuple[str, Mapping[str, Any]]
    ) -> RunParams:
        found: dict[str, Any] = {}
        for name, value in table.items():
            where = f"{key}.{name}"
            if name == "small":
                value = self._small(where, value, among)
            elif name in LIBRARIES:
                value = [str(self.path(where, each)) for each in self._list(where, value)]
            elif name in _FILES and value != "off":
                value = str(self.path(where, value))
            elif name in TEXTS and not isinstance(value, str):
                raise self.error(where, f"a text is needed, not {value!r:.80}")
            found[name] = value
        try:
            return merge_settings(found)
        except UsageError as error:
            raise self.error(key, str(error)) from error

    def _small(self, key: str, value: object, among: tuple[str, Mapping[str, Any]]) -> str:
        """Find the small model: another entry's, or one by itself."""
        own, tables = among
        if value == own:
            raise self.error(key, f"{own!r} cannot be the small model of itself")
        if isinstance(value, str) and value in tables:
            other = self.table(f"models.{value}", tables[value])
            value = other.get("model")
        return str(self.model(key, value))

    def _list(self, key: str, value: object) -> Iterator[object]:
        """Take a list, or one thing as a list of it."""
        each = value if isinstance(value, list) else [value]
        if len(each) > 256:
            raise self.error(key, f"256 at most are read, not {len(each)}")
        yield from each

    def texts(self, key: str, value: object, kind: re.Pattern[str], what: str) -> tuple[str, ...]:
        """Take a list of texts of one kind."""
        found = []
        for each in self._list(key, value):
            if not isinstance(each, str) or not kind.fullmatch(each):
                raise self.error(key, f"{what} is needed, not {each!r:.80}")
            found.append(each)
        return tuple(found)

    def host(self, key: str, value: object) -> str:
        """Take an address to listen on."""
        if not isinstance(value, str) or not _HOST.fullmatch(value):
            raise self.error(key, f"an address such as 127.0.0.1 is needed, not {value!r:.80}")
        return value.strip("[]")


Check = Callable[[_Reader, str, Any], object]


def _count(least: int, most: int) -> Check:
    return lambda reader, key, value: reader.count(key, value, most, least)


def _seconds(least: float) -> Check:
    return lambda reader, key, value: reader.number(key, value, _DAY_S, least)


def _bytes(least: int, most: int) -> Check:
    def check(reader: _Reader, key: str, value: object) -> int:
        return reader.count(key, reader.n_bytes(key, value), most, least)

    return check


_CHECKS: Final[Mapping[str, Check]] = {
    "host": lambda reader, key, value: reader.host(key, value),
    "port": _count(0, 65_535),
    "memory": _bytes(MIB, 1 << 50),
    "allowed_hosts": lambda reader, key, value: reader.texts(
        key, value, _HOST, "a host name such as robot.local"
    ),
    "cors_origins": lambda reader, key, value: reader.texts(
        key, value, _ORIGIN, "an origin such as https://app.example"
    ),
    "max_waiting": _count(1, 4096),
    "timeout_s": _seconds(0.1),
    "stall_s": _seconds(0.1),
    "watchdog_s": _seconds(0.1),
    "idle_s": _seconds(0.1),
    "max_body_bytes": _bytes(KIB, GIB),
    "max_json_depth": _count(4, 512),
    "max_header_bytes": _bytes(KIB, MIB),
    "max_tokens": _count(1, 1 << 20),
    "sessions": lambda reader, key, value: reader.path(key, value),
    "sessions_bytes": _bytes(MIB, 1 << 50),
    "dashboard": lambda reader, key, value: reader.flag(key, value),
    "grace_s": _seconds(0.0),
}
"""Keys of `[server]`, but for those of API keys."""
