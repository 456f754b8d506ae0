"""Names of models: which are read, which are refused, and what `resolve` answers."""

from pathlib import Path

import pytest

from edgeroute.models.pull import pull, remove, resolve
from edgeroute.runtime.errors import CatalogueError
from tests.models.hub_server import BODY, HUB, SPEC, add_entry

pytestmark = pytest.mark.usefixtures("isolated_hub")


@pytest.mark.parametrize(
    "spec",
    [
        "hf:owner/repo/../../x.gguf",
        "hf:../repo/x.gguf",
        "hf:owner/../x.gguf",
        "hf:owner/repo/..gguf",
        "hf:owner/repo//x.gguf",
        "hf:/owner/repo/x.gguf",
        "hf://owner/repo/x.gguf",
        "hf:owner/repo/.hidden.gguf",
        "hf:owner/repo/a./x.gguf",
        "hf:owner/re..po/x.gguf",
        "hf:owner/repo/a\\b.gguf",
        "hf:owner/repo/C:x.gguf",
        "hf:owner/repo/x.gguf\n",
        "hf:owner/repo/x\0.gguf",
        "hf:owner/repo/x.gguf@../main",
        "hf:owner/repo/x.gguf@a/b",
        "hf:owner/repo/x.gguf@",
        "hf:owner/repo/x.gguf?a=b",
        "hf:owner/repo/x%2e%2e.gguf",
        "hf:owner/repo/x.bin",
        "hf:owner/x.gguf",
        "hf:owner/repo/con/x.gguf",
        "hf:owner/repo/" + "d/" * 9 + "x.gguf",
        "hf:owner/repo/" + "x" * 300 + ".gguf",
        "hf:",
    ],
)
def test_traversal_and_malformed_names_are_refused(server, spec: str, tmp_path: Path) -> None:
    """CVE-2026-7020: nothing of a refused name may reach a path or an address."""
    for function in (pull, resolve, remove):
        with pytest.raises(CatalogueError):
            function(spec)
    assert server.requests == [] and not (tmp_path / "models").exists()


@pytest.mark.parametrize("spec", ["hf:o/r/m-00001-of-00003.gguf", "./m-00002-of-00003.gguf"])
def test_shards_are_refused_with_a_sentence(spec: str) -> None:
    with pytest.raises(CatalogueError, match="one shard of a split model"):
        pull(spec)


def test_resolve_finds_files_and_tells_the_command_for_the_rest(tmp_path, monkeypatch) -> None:
    add_entry(monkeypatch, HUB)
    path = tmp_path / "m.gguf"
    path.write_bytes(BODY)
    monkeypatch.chdir(tmp_path)
    assert resolve("m.gguf") == path
    (tmp_path / "d.gguf").mkdir()
    for spec, words in [
        ("tiny", "`edgeroute pull tiny`"),
        (SPEC, f"`edgeroute pull {SPEC}`"),
        ("no.gguf", "does not exist"),
        ("d.gguf", "is a folder"),
        ("tinny", "did you mean tiny"),
    ]:
        with pytest.raises(CatalogueError, match=words):
            resolve(spec)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(CatalogueError, match=r"has 4 bytes.*--force tiny"):
        resolve("tiny")
