"""A header by ranges: what it describes is what the file describes, and little of it is read."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgeroute.models.registry import describe
from edgeroute.models.remote_header import RemoteHeader, fetch_header, is_remote
from edgeroute.models.sources import BrokenTransferError, OfflineError, SourceError
from edgeroute.runtime.errors import CatalogueError, ClosedError, ModelFileError
from edgeroute.runtime.gguf import GGUFFile
from tests.models import hub_server
from tests.models.hub_server import SPEC

pytestmark = pytest.mark.usefixtures("isolated_hub")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """Serve a body: `hub(body, redirect="none", ...)`."""
    running = []

    def serve(body: bytes, **behaviour):
        context = hub_server.serving(hub_server.Behaviour(body=body, **behaviour))
        found = context.__enter__()
        running.append(context)
        monkeypatch.setenv("HF_ENDPOINT", found.endpoint)
        return found

    yield serve
    for context in running:
        context.__exit__(None, None, None)


def _file(path: Path, n_tokens: int = 12_000, n_rows: int = 4_000) -> bytes:
    """A file with a vocabulary that needs many ranges, and much data behind it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(n_tokens)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(n_tokens)])
    writer.add_array("llama.layers", [1, 2, 3])
    writer.add_array("tokenizer.ggml.token_type", [1] * n_tokens)
    writer.add_string("general.name", "after the arrays")
    for i in range(40):
        writer.add_tensor(f"t{i}", np.full((n_rows, 32), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _same(remote: GGUFFile, local: GGUFFile) -> None:
    assert dict(remote.tensors) == dict(local.tensors)
    assert list(remote.metadata) == list(local.metadata)
    assert remote.data_offset == local.data_offset and remote.size_bytes == local.size_bytes
    assert remote.alignment == local.alignment and remote.version == local.version


def test_the_header_is_the_files_and_nothing_else_is_read(hub, tmp_path: Path) -> None:
    body = _file(tmp_path / "m.gguf", 30_000, 10_000)
    server = hub(body)
    seen: list[int] = []
    found = fetch_header(SPEC, seen.append)
    with GGUFFile.open(tmp_path / "m.gguf") as local, found.file as file:
        _same(file, local)
        assert found.n_fetched == server.n_sent == seen[-1] < 0.02 * len(body)
        # Scores and kinds of tokens, 8 bytes a token, are mostly stepped over.
        assert found.n_fetched < local.data_offset
        assert found.n_ranges == len([s for s in server.bodies() if s.server == "cdn"]) > 3
        assert file.metadata.get_str("general.name") == "after the arrays"
        assert file.metadata.array_len("tokenizer.ggml.scores") == 30_000
        assert file.metadata.get_array("llama.layers", int).tolist() == [1, 2, 3]
        tokens = file.metadata.get_array("tokenizer.ggml.tokens", str)
        assert tokens == local.metadata.get_array("tokenizer.ggml.tokens", str)
        with pytest.raises(ModelFileError, match=r"scores' were not fetched; pull the model"):
            file.metadata.get_array("tokenizer.ggml.scores", float)
        with pytest.raises(ClosedError, match="only its header; pull it to read tensors"):
            file.view(file.tensors["t3"])


def test_a_small_file_comes_in_one_range(hub, tiny_path: Path) -> None:
    body = tiny_path.read_bytes()
    server = hub(body, redirect="none")
    found = fetch_header(f"{SPEC}@v1.0")
    with GGUFFile.open(tiny_path) as local, found.file as file:
        _same(file, local)
        assert describe(file).hparams == describe(local).hparams
    assert found.n_ranges == 1 and server.n_sent <= 64 << 10
    assert found.spec == f"{SPEC}@v1.0"


def test_what_breaks_off_is_asked_for_again(hub, tmp_path: Path) -> None:
    body = _file(tmp_path / "m.gguf", 2000, 2000)
    hub(body, truncations=[1000, 5000], body_statuses=[503])
    with fetch_header(SPEC).file as file, GGUFFile.open(tmp_path / "m.gguf") as local:
        _same(file, local)


def test_what_breaks_off_for_ever_is_told(hub, tmp_path: Path) -> None:
    hub(_file(tmp_path / "m.gguf", 2000, 2000), truncations=[10] * 9)
    with pytest.raises(BrokenTransferError, match=r"broke off|sent 10 of"):
        fetch_header(SPEC)


def test_a_server_without_ranges_gives_the_first_and_then_a_sentence(hub, tmp_path) -> None:
    hub(_file(tmp_path / "m.gguf"), ignore_range=True)
    with pytest.raises(SourceError, match=r"does not serve parts of files; pull sub/tiny-q4\.gguf"):
        fetch_header(SPEC)


def test_a_server_that_lies_is_refused(hub, tmp_path: Path) -> None:
    body = _file(tmp_path / "m.gguf")
    hub(body, lie_range=True)
    with pytest.raises(SourceError, match="answered range"):
        fetch_header(SPEC)
    hub(body, compress=True)
    with pytest.raises(SourceError, match="content-encoding"):
        fetch_header(SPEC)


def _claims(n_strings: int) -> bytes:
    """A header that claims a vocabulary of so many strings, of zeros."""
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little")
    key = b"tokenizer.ggml.tokens"
    head += (1).to_bytes(8, "little") + len(key).to_bytes(8, "little") + key
    return head + b"".join(n.to_bytes(w, "little") for n, w in ((9, 4), (8, 4), (n_strings, 8)))


def test_a_header_without_end_is_not_fetched(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeroute.models.remote_header.MAX_HEADER_BYTES", 1 << 20)
    server = hub(_claims(400_000).ljust(8 << 20, b"\0"))
    with pytest.raises(SourceError, match="which no model needs"):
        fetch_header(SPEC)
    assert server.n_sent <= 1 << 20


@pytest.mark.parametrize("body", [b"GGML" * 99, b"GG", _claims(1 << 40) + bytes(99)])
def test_no_model_is_refused(hub, body: bytes) -> None:
    hub(body)
    with pytest.raises(ModelFileError, match=r"hf:owner/repo/sub/tiny-q4\.gguf"):
        fetch_header(SPEC)


def test_a_file_cut_short_is_told_by_its_header(hub, tmp_path: Path) -> None:
    hub(_file(tmp_path / "m.gguf", 100, 2000)[:-4096])
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        fetch_header(SPEC)


def test_every_cut_of_a_header_says_where_it_goes_on(tmp_path: Path, hub, monkeypatch) -> None:
    """Ranges of a few bytes: each place where the parser may stop is one where it goes on."""
    monkeypatch.setattr("edgeroute.models.remote_header.MIN_RANGE_BYTES", 7)
    body = _file(tmp_path / "m.gguf", 60, 4)
    hub(body, redirect="none")
    found: RemoteHeader = fetch_header(SPEC)
    with found.file as file, GGUFFile.open(tmp_path / "m.gguf") as local:
        _same(file, local)
        assert found.n_fetched <= local.data_offset + 7


def test_names_that_a_hub_may_have() -> None:
    assert is_remote(SPEC) and is_remote("Qwen2.5-coder-0.5b-instruct")
    assert not is_remote("gemma3-270m") and not is_remote("./x.gguf")
    with pytest.raises(CatalogueError, match="whole files; get it with `edgeroute pull gemma3"):
        fetch_header("gemma3-270m")
    with pytest.raises(OfflineError):
        fetch_header("qwen2.5-coder-0.5b-instruct")
