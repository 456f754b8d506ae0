"""What a server's configuration takes, and what it refuses by file and key."""

from pathlib import Path
from typing import Any

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import GIB, MIB
from edgeroute.server.config import (
    KEY_ENV,
    MAX_MODELS,
    SETTINGS,
    ServerConfig,
    is_loopback,
    one_model,
    read_config,
)
from edgeroute.server.records import ServerParams

KEY = "k" * 24
TEXT = """
[server]
host = "0.0.0.0"
port = 9000
memory = "6GiB"
api_key_file = "keys"
allowed_hosts = ["robot.local"]
cors_origins = ["https://app.example", "http://localhost:3000"]
max_waiting = 8
timeout_s = 30
idle_s = 900.5
max_body_bytes = "2MiB"
sessions = "talks"
dashboard = false

[models.coder]
model = "big.gguf"
small = "tiny"
small_adapters = ["loras", "more"]
steps = "random:0.3"
steps_state = "learned.json"
n_ctx = 512

[models.tiny]
model = "small.gguf"
memory = "1GiB"
adapters = "adapters"
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_path: Path) -> Path:
    for name in ("big.gguf", "small.gguf"):
        (tmp_path / name).write_bytes(tiny_path.read_bytes())
    (tmp_path / "keys").write_text(f"# mine\n{KEY}\n\n  {KEY[1:]}x \n")
    return tmp_path


def read(folder: Path, text: str, **given: Any) -> ServerConfig:
    (folder / "edgeroute.toml").write_text(text)
    return read_config(folder / "edgeroute.toml", given)


def test_a_file_is_read_and_its_paths_are_relative_to_it(folder: Path) -> None:
    found = read(folder, TEXT)
    params = found.params
    assert (params.host, params.port, params.memory) == ("0.0.0.0", 9000, 6 * GIB)
    assert params.api_keys == (KEY, KEY[1:] + "x")
    assert params.allowed_hosts == ("robot.local",)
    assert params.cors_origins == ("https://app.example", "http://localhost:3000")
    assert (params.max_waiting, params.timeout_s, params.idle_s) == (8, 30.0, 900.5)
    assert (params.max_body_bytes, params.dashboard) == (2 * MIB, False)
    assert params.sessions == folder / "talks"
    assert params.watchdog_s == ServerParams().watchdog_s
    coder, tiny = found.models
    assert (coder.name, coder.path, coder.memory) == ("coder", folder / "big.gguf", None)
    assert coder.params.small == str(folder / "small.gguf")
    assert (coder.params.n_ctx, coder.params.steps) == (512, "random:0.3")
    assert coder.params.small_adapters == (str(folder / "loras"), str(folder / "more"))
    assert coder.params.steps_state == str(folder / "learned.json")
    assert (tiny.name, tiny.memory) == ("tiny", GIB)
    assert tiny.params.adapters == (str(folder / "adapters"),)


def test_what_is_given_overrides_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    found = read(folder, TEXT, host="127.0.0.1", port=0, memory="2GiB", api_key_file=None)
    assert (found.params.host, found.params.port, found.params.memory) == ("127.0.0.1", 0, 2 * GIB)
    with pytest.raises(UsageError, match="cannot be read"):
        read(folder, TEXT, api_key_file="keys")  # that one is relative to where we are


def test_the_environment_gives_a_key_and_a_budget(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "environment-key")
    monkeypatch.setenv("EDGEROUTE_MEMORY", "3GiB")
    text = '[server]\nhost = "::"\n[models.a]\nmodel = "big.gguf"'
    found = read(folder, text).params
    assert (found.api_keys, found.host, found.memory) == (("environment-key",), "::", 3 * GIB)
    assert read(folder, TEXT).params.api_keys[0] == "environment-key"
    assert read(folder, TEXT).params.memory == 6 * GIB


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("host = 3", r"server\.host"),
        ('host = "a b"', r"server\.host"),
        ("port = 70000", r"server\.port: .*from 0 to 65535"),
        ("port = true", r"server\.port"),
        ('memory = "lots"', r"server\.memory"),
        ('memory = "1KiB"', r"server\.memory"),
        ('api_keys = ["x"]', r"server\.api_keys: .*api_key_file"),
        ('api_key = "x"', "did you mean api_key_file"),
        ('api_key_file = "none"', r"server\.api_key_file: .*cannot be read"),
        ("api_key_file = 3", r"server\.api_key_file"),
        ('allowed_hosts = ["a/b"]', r"server\.allowed_hosts"),
        ("allowed_hosts = 3", r"server\.allowed_hosts"),
        ('cors_origins = ["*"]', r"server\.cors_origins: an origin"),
        ('cors_origins = "https://a/path"', r"server\.cors_origins"),
        ("max_waiting = 0", r"server\.max_waiting"),
        ("max_waiting = 1.5", r"server\.max_waiting"),
        ("timeout_s = 0", r"server\.timeout_s"),
        ("timeout_s = nan", r"server\.timeout_s"),
        ("watchdog_s = inf", r"server\.watchdog_s"),
        ("idle_s = -1", r"server\.idle_s"),
        ("max_body_bytes = 1", r"server\.max_body_bytes"),
        ("max_json_depth = 100000", r"server\.max_json_depth"),
        ("max_tokens = 0", r"server\.max_tokens"),
        ("sessions = 3", r"server\.sessions"),
        ("dashboard = 1", r"server\.dashboard: true or false"),
        ("dashbord = true", "did you mean dashboard"),
    ],
)
def test_a_bad_setting_is_refused_by_file_and_key(folder: Path, content: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"edgeroute\.toml: .*" + words):
        read(folder, f"[server]\n{content}\n[models.a]\nmodel = 'big.gguf'")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "1 to 32 models"),
        ("[models]", "1 to 32 models"),
        ("[model.a]", "did you mean models"),
        ("models = 3", "models: a table"),
        ("[models]\na = 1", r"models\.a: a table"),
        ("[models.a]", r"models\.a: it has no model"),
        ('[models."../a"]\nmodel = "big.gguf"', "no name"),
        ('[models."a:b"]\nmodel = "big.gguf"', "no name"),
        ("[models.a]\nmodel = 'none.gguf'", r"models\.a\.model: .*does not exist"),
        ("[models.a]\nmodel = 3", r"models\.a\.model"),
        ("[models.a]\nmodel = 'no-such-model'", r"models\.a\.model: .*no-such-model"),
        ("[models.a]\nmodel = 'big.gguf'\nn_ctxx = 3", "did you mean n_ctx"),
        ("[models.a]\nmodel = 'big.gguf'\nn_ctx = 1", r"models\.a: n_ctx"),
        ("[models.a]\nmodel = 'big.gguf'\nn_ctx = 'x'", r"models\.a: n_ctx"),
        ("[models.a]\nmodel = 'big.gguf'\nkv_type = 8", r"models\.a\.kv_type: a text"),
        ("[models.a]\nmodel = 'big.gguf'\nkv_type = 'f64'", r"models\.a: kv_type"),
        ("[models.a]\nmodel = 'big.gguf'\nmemory = 'x'", r"models\.a\.memory"),
        ("[models.a]\nmodel = 'big.gguf'\nsessions = 'x'", "no key 'sessions'"),
        ("[models.a]\nmodel = 'big.gguf'\nsmall = 'a'", r"models\.a\.small: .*of itself"),
        ("[models.a]\nmodel = 'big.gguf'\nsmall = 'b'", r"models\.a\.small"),
        ("[models.a]\nmodel = 'big.gguf'\nadapters = 3", r"models\.a\.adapters: a path"),
        ("[models.a]\nmodel = 'big.gguf'\nadapters = [3]", r"models\.a\.adapters: a path"),
        ("[models.a]\nmodel = 'big.gguf'\n[models.base]\nmodel = 'big.gguf'", "put this one first"),
        ("[models.a\n", "line 1"),
    ],
)
def test_a_bad_model_is_refused_by_file_and_key(folder: Path, content: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"edgeroute\.toml.*" + words):
        read(folder, content)


def test_too_many_models_are_refused(folder: Path) -> None:
    text = "".join(f"[models.m{i}]\nmodel = 'big.gguf'\n" for i in range(MAX_MODELS + 1))
    with pytest.raises(UsageError, match="this one has 33"):
        read(folder, text)


@pytest.mark.parametrize(
    "content",
    ["", "# only this\n", "short", "has a space in it", "k" * 600, "\x80" * 20, "äöü" * 9],
)
def test_a_key_file_without_usable_keys_is_refused_and_never_shown(
    folder: Path, content: str
) -> None:
    (folder / "keys").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match="api_key_file") as caught:
        read(folder, TEXT)
    assert not content.strip() or content.strip() not in str(caught.value)


def test_a_key_in_the_environment_is_checked_and_never_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "ab c")
    with pytest.raises(UsageError, match=KEY_ENV) as caught:
        read(folder, TEXT)
    assert "ab c" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "robot.local", "127.0.0.1.evil"])
def test_other_machines_need_a_key(folder: Path, host: str) -> None:
    text = f'[server]\nhost = "{host}"\n[models.a]\nmodel = "big.gguf"'
    with pytest.raises(UsageError, match=rf"server\.host: .*{KEY_ENV}.*or listen on 127\.0\.0\.1"):
        read(folder, text)
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "LOCALHOST", "::1", "[::1]", "127.9.9.9"]
)
def test_this_machine_needs_none(folder: Path, host: str) -> None:
    text = f'[server]\nhost = "{host}"\n[models.a]\nmodel = "big.gguf"'
    assert not read(folder, text).params.api_keys


def test_one_model_from_the_command_line(folder: Path) -> None:
    settings = {"n_ctx": 512, "memory": "1GiB", "threads": None}
    found = one_model("big.gguf", folder / "big.gguf", settings, {"port": None, "memory": "1GiB"})
    (model,) = found.models
    assert (model.name, model.path, model.memory) == ("big", folder / "big.gguf", None)
    assert (model.params.n_ctx, found.params.memory, found.params.port) == (512, GIB, 8080)
    path = folder / "Größe 7B (x).gguf"
    assert one_model(str(path), path, {}, {}).models[0].name == "Gr-e-7B-x-"
    named = one_model("SmolLM2-135M-Instruct", path, {}, {}).models[0]
    assert named.name == "smollm2-135m-instruct"
    with pytest.raises(UsageError, match=r"server\.port"):
        one_model("big.gguf", path, {}, {"port": -1})


def test_every_setting_of_a_runtime_but_the_servers_own_may_be_given() -> None:
    assert {"n_ctx", "small", "adapters", "steps", "depth", "remote", "max_batch"} <= set(SETTINGS)
    assert not {"memory", "sessions", "sessions_bytes"} & set(SETTINGS)
