"""`edgeroute pull` and `edgeroute models`, as a user types them."""

import hashlib
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edgeroute.commands import models, pull
from edgeroute.models import catalogue
from edgeroute.models.catalogue import CatalogueEntry
from edgeroute.models.sources import PullProgress
from edgeroute.runtime.errors import CatalogueError

BODY = b"GGUF" + b"x" * 996


@pytest.fixture(autouse=True)
def one_installed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A models folder that holds `tiny`, an entry without sources, so nothing is fetched."""
    monkeypatch.setenv("EDGEROUTE_MODELS", str(tmp_path / "models"))
    entry = CatalogueEntry(
        name="tiny",
        architecture="llama",
        licence="MIT",
        n_bytes=len(BODY),
        sha256=hashlib.sha256(BODY).hexdigest(),
        sources=(),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", entry)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny.gguf").write_bytes(BODY)


def run(command: click.Command, *arguments: str) -> tuple[str, str]:
    """Standard output and standard error of a command that succeeds."""
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_pull_prints_one_json_object_last(tmp_path: Path) -> None:
    out, err = run(pull.command, "tiny", "--json")
    answer = json.loads(out)
    assert answer["path"] == str(tmp_path / "models/tiny.gguf")
    assert (answer["name"], answer["n_bytes"], answer["cached"]) == ("tiny", 1000, True)
    assert err == "verify tiny: 100 % (0.977 KiB of 0.977 KiB)\n"


def test_pull_says_what_is_here() -> None:
    out, _ = run(pull.command, "tiny")
    assert out.startswith("tiny: already here, ") and out.endswith("tiny.gguf\n")


def test_errors_reach_the_command_line_as_they_are() -> None:
    for command, arguments in ((pull.command, ["tinny"]), (models.command, ["--remove", "tinny"])):
        result = CliRunner().invoke(command, arguments)
        assert isinstance(result.exception, CatalogueError)
        assert "did you mean tiny" in str(result.exception)


def test_models_lists_catalogue_and_what_is_installed() -> None:
    lines = run(models.command)[0].splitlines()
    named = {line.split()[0]: line for line in lines}
    assert " installed " in named["tiny"] and "MIT" in named["tiny"]
    assert " - " in named["gemma3-270m"] and "Gemma terms" in named["gemma3-270m"]


def test_models_json_has_the_same() -> None:
    answer = json.loads(run(models.command, "--json")[0])
    rows = {row["name"]: row for row in answer["models"]}
    assert rows["tiny"]["installed"] and not rows["gemma3-270m"]["installed"]
    assert [name for name, row in rows.items() if row["default"]] == [catalogue.DEFAULT_MODEL]


def test_models_remove_frees_the_file(tmp_path: Path) -> None:
    assert json.loads(run(models.command, "--remove", "tiny", "--json")[0])["n_bytes"] == 1000
    assert not (tmp_path / "models/tiny.gguf").exists()


def test_a_log_gets_a_line_for_each_tenth_and_every_message(capsys) -> None:
    with pull.progress_on_stderr() as report:
        for n_done in range(0, 1001, 7):
            report(PullProgress(name="m", phase="download", n_done=n_done, n_total=1000))
        report(PullProgress(name="m", phase="note", message="trying elsewhere"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "trying elsewhere" and len(lines) == 11
    assert lines[0] == "download m: 0 % (0 B of 0.977 KiB)"
