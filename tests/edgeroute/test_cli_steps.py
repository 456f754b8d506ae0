"""Steps on the command line: options, colours and marks, the line of statistics, calibrating."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeroute.cli import cli
from edgeroute.commands import generate_shared
from edgeroute.commands.answer_writer import COLOURS, StepWriter
from edgeroute.commands.steps_part import steps_part
from edgeroute.stats import Chunk


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def part(index: int, model: str, n_tokens: int, **more: Any) -> dict[str, Any]:
    """A part as `GenerationStats.to_dict` gives it."""
    plain = {"n_refused": 0, "read_small": 0, "read_large": 0, "seconds": 0.1, "score": None,
             "entropy_nats": None, "reason": None}  # fmt: skip
    return {"index": index, "model": model, "n_tokens": n_tokens} | plain | more


def on(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Make a stream standard output: in the test itself, since pytest sets its own before that."""
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_a_terminal_shows_each_model_in_its_colour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = on(Terminal(), monkeypatch)
    write = StepWriter()
    for model, text in (("small", "a"), ("small", "b\n"), ("large", "c"), (None, "d")):
        write.turn(model)  # type: ignore[arg-type]
        write(text)
    shown = terminal.getvalue()
    cyan, yellow, end = "\x1b[36m", "\x1b[33m", "\x1b[0m"
    assert shown == f"{cyan}a{end}{cyan}b\n{end}{yellow}c{end}d"
    legend = "[the small model in cyan, the large model in yellow]\n"  # said once
    assert capsys.readouterr().err == legend


def test_a_models_text_cannot_steer_the_terminal_in_colour_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on(Terminal(), monkeypatch)
    write = StepWriter()
    write.turn("large")
    write("a\x1b]0;owned\x07\tb\n")
    assert terminal.getvalue() == "\x1b[33ma\ufffd]0;owned\ufffd\tb\n\x1b[0m"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_without_colours_marks_say_who_begins(
    on_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_COLOR on a terminal, and any pipe."""
    stream = on(Terminal() if on_terminal else io.StringIO(), monkeypatch)
    if on_terminal:
        monkeypatch.setenv("NO_COLOR", "1")
    write = StepWriter()
    for model, text in (("small", "One.\n\n"), ("small", "Two.\n\n"), ("large", "Three."),
                        (None, ""), ("large", "Next answer.")):  # fmt: skip
        write.turn(model)  # type: ignore[arg-type]
        write(text)
    shown = "[small] One.\n\nTwo.\n\n[large] Three.[large] Next answer."
    assert stream.getvalue() == shown


def test_chunks_say_whose_turn_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = on(io.StringIO(), monkeypatch)
    answer, write = generate_shared.Answer(), StepWriter()
    for chunk in (Chunk(text="One.\n\n", model="small"), Chunk(text=""),
                  Chunk(text="Still one.", model="small"),
                  Chunk(text="Two.", model="large")):  # fmt: skip
        generate_shared._take(answer, chunk, write)
    assert stream.getvalue() == "[small] One.\n\nStill one.[large] Two."
    assert answer.text == "One.\n\nStill one.Two."


def test_both_models_have_a_colour_of_their_own() -> None:
    assert set(COLOURS) == {"small", "large"} and len(set(COLOURS.values())) == 2


def test_the_line_of_statistics_counts_steps_tokens_and_reading() -> None:
    parts = [
        part(0, "small", 10, read_small=30),
        part(1, "small", 4, n_refused=5, read_small=9, read_large=39),
        part(1, "large", 6, read_large=6),
        part(2, "small", 5, read_small=11, reason="fallback"),
    ]
    assert steps_part(parts) == (
        "steps: 3, 1 by the large model (24% of tokens), 5 drafted tokens refused, read: 50 tokens "
        "by the small model, 45 by the large one, 1 by the small model because the remote one "
        "failed"
    )
    assert "refused" not in steps_part(parts[:1]) and "failed" not in steps_part(parts[:1])


def test_showing_steps_and_one_object_exclude_each_other(tiny_path: Path) -> None:
    found = run("generate", "Hi", "-m", str(tiny_path), "--show-steps", "--json")
    assert found.exit_code == 2 and "read stats.steps" in found.stderr


def test_a_policy_that_is_none_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.gguf")
    found = run("generate", "Hi", "-m", missing, "--small", missing, "--steps", "nonsense:1")
    assert found.exit_code == 2 and "nonsense" in found.stderr


def test_the_options_are_in_the_help() -> None:
    for command in ("generate", "chat"):
        text = run(command, "--help").output
        for option in ("--small", "--steps", "--remote", "--show-steps"):
            assert option in text
    assert "--steps SMALL LARGE" in run("calibrate", "--help").output


# calibrate


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a MODEL, or two by --steps"),
        (("model.gguf", "--steps", "a", "b"), "takes its two models itself; leave 'model.gguf'"),
        (("model.gguf", "--tasks", "t.jsonl"), "--tasks needs --steps SMALL LARGE"),
        (("model.gguf", "--target-accuracy", "0.9"), "--target-accuracy needs --steps"),
        (("model.gguf", "--html", "x.html"), "--html needs --steps"),
        (("model.gguf", "--n", "9"), "--n needs --steps"),
        (("--steps", "a", "b", "--max-kl", "1"), "--max-kl calibrates the layers of one model"),
        (("--steps", "a", "b", "--no-fits"), "calibrates the layers of one model"),
        (("--steps", "a", "b", "--data", "x"), "--data calibrates the layers of one model"),
        (("--steps", "a", "b", "--n", "3"), "8<=x<=1000"),
        (("--steps", "a", "b", "--target-accuracy", "1.5"), "0<x<=1"),
    ],
)
def test_options_that_do_not_go_together_are_code_2(arguments: tuple[str, ...], words: str) -> None:
    found = run("calibrate", *arguments, "--json")
    assert found.exit_code == 2, found.output
    assert words in found.stderr
    assert words in json.loads(found.stdout.splitlines()[-1])["error"]["message"]


def test_a_page_without_a_folder_is_refused_at_once(tiny_path: Path, tmp_path: Path) -> None:
    model = str(tiny_path)
    found = run("calibrate", "--steps", model, model, "--html", str(tmp_path / "no" / "x.html"))
    assert found.exit_code == 2 and "there is no folder" in found.stderr


def test_tasks_that_are_none_are_refused_at_once(tiny_path: Path, tmp_path: Path) -> None:
    model, tasks = str(tiny_path), tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "a"}\n')
    found = run("calibrate", "--steps", model, model, "--tasks", str(tasks))
    assert found.exit_code == 2 and "answer of line 1 of tasks.jsonl" in found.stderr
