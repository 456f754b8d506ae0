"""The command `adapters`, and --adapter of `generate`."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeroute.cli import cli
from edgeroute.models.adapter_file import base_shapes
from edgeroute.models.registry import describe
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.synth_adapter import AdapterSpec, make_gguf, make_peft

SPEC = AdapterSpec(kind="F16", description="turns lead into gold")


@pytest.fixture
def made(tiny_path: Path, tmp_path: Path) -> Path:
    with GGUFFile.open(tiny_path) as file:
        base = base_shapes(describe(file))
    folder = tmp_path / "made"
    folder.mkdir()
    make_gguf(folder / "gold.gguf", base, SPEC)
    make_peft(folder / "silver", base, SPEC)
    return folder


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return tmp_path / "library"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


def ok(*arguments: object) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def adapters(command: str, *arguments: object, library: Path, model: Path) -> Any:
    where = ["--library", library] + ([] if command == "remove" else ["--model", model])
    return ok("adapters", command, *arguments, *where)


def test_a_library_is_filled_listed_shown_and_emptied(
    tiny_path: Path, made: Path, library: Path
) -> None:
    here: Any = {"library": library, "model": tiny_path}
    assert adapters("list", **here)["adapters"] == []
    assert adapters("add", made / "gold.gguf", **here)["name"] == "gold"
    assert adapters("add", made / "silver", "--name", "moon", **here)["name"] == "moon"
    rows = {row["name"]: row for row in adapters("list", **here)["adapters"]}
    assert set(rows) == {"gold", "moon"} and all(row["fits"] for row in rows.values())
    assert rows["gold"]["format"] == "gguf" and rows["moon"]["format"] == "peft"
    assert rows["gold"]["ranks"] == [8] and rows["gold"]["description"] == SPEC.description
    shown = adapters("show", "moon", **here)
    assert shown["weights"] and {"name", "n_in", "n_out", "rank", "scale"} == set(
        shown["weights"][0]
    )
    assert adapters("remove", "gold", **here) == {"removed": "gold"}
    assert [row["name"] for row in adapters("list", **here)["adapters"]] == ["moon"]
    assert not [path for path in library.iterdir() if path.name.startswith(".")]
    text = call("adapters", "list", "--library", library, "--model", tiny_path).stdout
    assert "moon" in text and "rank 8" in text and str(library) in text


def test_a_name_is_taken_once_unless_replaced(tiny_path: Path, made: Path, library: Path) -> None:
    here = ["--library", library, "--model", tiny_path]
    for name in ("gold.gguf", "silver"):
        assert (
            call("adapters", "add", made / name, "--name", "x", "--replace", *here).exit_code == 0
        )
        assert len(list(library.iterdir())) == 1
    result = call("adapters", "add", made / "silver", "--name", "x", *here)
    assert result.exit_code == 2 and "replace" in result.output


@pytest.mark.parametrize("settings", ["adapter_config.json", "lone.json"])
def test_a_lone_file_enters_with_its_settings(
    tiny_path: Path, made: Path, library: Path, settings: str
) -> None:
    (made / "silver" / "adapter_config.json").rename(made / "silver" / settings)
    lone = made / "silver" / "lone.safetensors"
    (made / "silver" / "adapter_model.safetensors").rename(lone)
    here: Any = {"library": library, "model": tiny_path}
    assert adapters("add", lone, **here)["name"] == "lone"
    (row,) = adapters("list", **here)["adapters"]
    assert row["fits"] and row["name"] == "lone"


def test_what_does_not_fit_is_refused_and_listed_with_its_reason(
    tiny_path: Path, made: Path, library: Path
) -> None:
    here = ["--library", library, "--model", tiny_path]
    data = made / "silver" / "adapter_model.safetensors"
    data.write_bytes(data.read_bytes()[:-8])
    result = call("adapters", "add", made / "silver", *here)
    assert result.exit_code == 3 and not library.exists()
    library.mkdir()
    (library / "broken.gguf").write_bytes(b"GGUF")
    (row,) = adapters("list", library=library, model=tiny_path)["adapters"]
    assert row["name"] == "broken" and not row["fits"] and row["reason"]
    assert call("adapters", "show", "none-such", *here).exit_code == 2
    assert call("adapters", "remove", "none-such", "--library", library).exit_code == 2
    for name in ("../x", ".x", "a/b"):
        bad = call("adapters", "add", made / "gold.gguf", "--name", name, *here)
        assert bad.exit_code == 3, bad.output


def test_numbers_are_checked_before_an_adapter_enters(
    tiny_path: Path, made: Path, library: Path
) -> None:
    data = made / "silver" / "adapter_model.safetensors"
    content = bytearray(data.read_bytes())
    content[-2:] = b"\x00\x7e"  # a half that is not a number
    data.write_bytes(bytes(content))
    result = call("adapters", "add", made / "silver", "--library", library, "--model", tiny_path)
    assert result.exit_code == 3 and not library.exists()


def test_generate_takes_adapters_of_the_small_model(
    tiny_path: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = tmp_path / "same.gguf"
    same.write_bytes(tiny_path.read_bytes())
    asked = ("generate", "--raw", "x", "-n", 3, "-m", tiny_path, "--threads", 1, "--n-ctx", 128)
    pair = (*asked, "--small", same, "--steps", "small")
    alone = ok(*asked, "--adapters", made, "--adapter", "gold")
    one = ok(*pair, "--small-adapters", made, "--small-adapter", "gold")
    assert one["token_ids"] == alone["token_ids"]
    assert one["stats"]["adapters"] == {"small": alone["stats"]["adapters"] | {
        "wait_s": one["stats"]["adapters"]["small"]["wait_s"]}}  # fmt: skip
    both = (*pair, "--small-adapters", made, "--adapters", made, "--adapter", "silver")
    line = call(*both, "--small-adapter", "gold=0.5,silver=0.25").stderr
    assert "adapter silver, loaded" in line
    assert "the small model's adapter gold x 0.5, silver x 0.25, loaded" in line
    bad = call(*pair, "--small-adapter", "gold")
    assert bad.exit_code == 2 and "--small-adapters" in bad.stderr
    for wrong in ("none-such", "gold=x", "auto"):
        refused = call(*pair, "--small-adapters", made, "--small-adapter", wrong)
        assert refused.exit_code == 2 and wrong in refused.stderr
    monkeypatch.setenv("EDGEROUTE_SMALL_ADAPTERS", str(made))
    assert ok(*pair, "--small-adapter", "gold")["token_ids"] == one["token_ids"]


def test_generate_takes_names_mixtures_and_the_library(
    tiny_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", "--raw", "x", "-n", 3, "-m", tiny_path, "--threads", 1, "--n-ctx", 128)
    one = ok(*asked, "--adapters", made, "--adapter", "gold")
    assert one["stats"]["adapters"]["used"] == {"gold": 1.0}
    same = ok(*asked, "--adapters", made, "--adapter", "silver")
    assert same["token_ids"] == one["token_ids"]
    monkeypatch.setenv("EDGEROUTE_LIBRARY", str(made))
    mixed = ok(*asked, "--adapter", "gold=0.5,silver=0.5")
    assert mixed["stats"]["adapters"]["used"] == {"gold": 0.5, "silver": 0.5}
    line = call(*asked, "--adapter", "gold").stderr
    assert "adapter gold" in line
    auto = ok(*asked, "--adapter", "auto")
    assert "auto" in auto["stats"]["adapters"]
    for bad in ("none-such", "gold=x", "gold=nan"):
        assert call(*asked, "--adapter", bad).exit_code == 2
