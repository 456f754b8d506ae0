"""The command line as a whole: what it imports, how it fails, which code it ends with."""

import json
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

from edgeroute import __version__, cli
from edgeroute.runtime import errors

HEAVY = ("numpy", "rich", "huggingface_hub", "llama_cpp", "edgeroute.engine", "asyncio",
         "starlette", "uvicorn", "msgspec")  # fmt: skip


def loaded_after(*calls: list[str]) -> set[str]:
    """Modules that a fresh process has loaded after these command lines."""
    code = (
        "import sys, json\n"
        "from click.testing import CliRunner\n"
        "from edgeroute.cli import cli\n"
        "before = set(sys.modules)\n"
        f"for call in {list(calls)!r}:\n"
        "    result = CliRunner().invoke(cli, call)\n"
        "    assert result.exit_code == 0, result.output\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Callable[..., Result]:
    """A command line whose `models` command raises `error`."""

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def command(as_json: bool) -> None:
        raise error

    monkeypatch.setattr("edgeroute.commands.models.command", command)
    return lambda *arguments: CliRunner().invoke(cli.cli, ["models", *arguments])


def test_help_lists_every_command_and_imports_none() -> None:
    result = CliRunner().invoke(cli.cli, ["--help"])
    for name, text in cli.COMMANDS.items():
        assert f"  {name}" in result.stdout and text in result.stdout
    loaded = loaded_after(["--help"], ["--version"])
    assert not [name for name in loaded if name.startswith("edgeroute.commands")]
    assert not loaded.intersection(HEAVY)


def test_a_commands_help_has_an_example_and_loads_no_engine() -> None:
    for name in cli.COMMANDS:
        result = CliRunner().invoke(cli.cli, [name, "--help"])
        assert f"\n    edgeroute {name}" in result.stdout, name
        assert "--json" in result.stdout, name
    assert not loaded_after(*([name, "--help"] for name in cli.COMMANDS)).intersection(HEAVY)


def test_version() -> None:
    result = CliRunner().invoke(cli.cli, ["--version"])
    assert result.stdout == f"edgeroute, version {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.ContextError("x"), 2),
        (errors.GrammarError("x"), 2),
        (click.BadParameter("x"), 2),
        (errors.ModelFileError("x"), 3),
        (errors.UnsupportedModelError("x"), 3),
        (errors.TemplateError("x"), 3),
        (errors.CatalogueError("x"), 3),
        (errors.LibraryError("x"), 3),
        (errors.CapacityError("x"), 4),
        (errors.ComputeError("x"), 1),
        (errors.ClosedError("x"), 1),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_each_error_has_its_exit_code_one_line_and_an_object(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    run = failing(monkeypatch, error)
    plain, as_json = run(), run("--json")
    assert plain.exit_code == as_json.exit_code == code
    assert plain.stdout == ""
    assert plain.stderr.startswith("edgeroute: error: ") and plain.stderr.count("\n") == 1
    found = json.loads(as_json.stdout.splitlines()[-1])["error"]
    assert found["type"] == type(error).__name__
    assert plain.stderr == f"edgeroute: error: {found['message']}\n"


def test_no_entry_of_the_table_hides_a_later_one() -> None:
    kinds = [kind for kind, _ in cli.EXIT_CODES]
    hidden = [(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :] if issubclass(b, a)]
    assert hidden == []
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.EdgerouteError):
            assert cli.exit_code(kind("x")) is not None


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    run = failing(monkeypatch, ZeroDivisionError("a bug"))
    result = run("--json")
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)
    assert json.loads(result.stdout)["error"] == {"type": "ZeroDivisionError", "message": "a bug"}
    assert run().stdout == ""


def test_a_wrong_command_is_answered_with_the_nearest() -> None:
    result = CliRunner().invoke(cli.cli, ["modls", "--json"])
    assert result.exit_code == 2
    assert "did you mean models?" in result.stderr
    assert "did you mean models?" in json.loads(result.stdout)["error"]["message"]


def test_a_wrong_option_names_the_commands_help() -> None:
    result = CliRunner().invoke(cli.cli, ["plan", "x", "--n-ctxx", "3"])
    assert result.exit_code == 2
    assert result.stderr.startswith("edgeroute: error: No such option '--n-ctxx'")
    assert "(see edgeroute plan --help)" in result.stderr.replace("cli plan", "edgeroute plan")


def test_json_after_two_dashes_is_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli.cli, ["plan", "--", "--json"])
    assert result.exit_code == 3 and result.stdout == ""


def test_the_hubs_telemetry_is_off_unless_asked_for() -> None:
    code = "import os, edgeroute.cli; print(os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_a_package_of_an_extra_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    done = failing(monkeypatch, ModuleNotFoundError("No module named 'gguf'", name="gguf"))()
    assert done.exit_code == cli.EXIT_USAGE
    assert "pip install 'edgeroute[tools]'" in done.stderr and "Traceback" not in done.stderr
