"""`edgeroute generate`, as typed: text and figures, files, refusals, Ctrl-C, broken pipes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import edgeroute
from edgeroute.cli import cli
from edgeroute.commands import generate_shared
from edgeroute.config import RunParams
from edgeroute.models import pull as pulling
from edgeroute.models.catalogue import DEFAULT_MODEL
from edgeroute.models.sources import PullProgress, Report
from edgeroute.tools.forecast.forecast import Ask
from edgeroute.tools.forecast.records import Range

LINE = re.compile(
    r"\[(\d+) tokens, [\d.]+ tok/s; first token after [\d.]+ s; "
    r"prompt (\d+) tokens at \d+ tok/s; memory [\d.]+ [KMG]iB of [\d.]+ [KMG]iB; "
    r"\d+ threads?; [\d.e-]+ J/token, (?:estimated|by \w+)(; ended at --max-tokens or --n-ctx)?\]\n"
)
ENDLESS = "root ::= b{10}\nb ::= a{100}\na ::= [a-z]{100}\n"  # a hundred thousand letters


def run(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["generate", *arguments], input=text)


def start(*arguments: str) -> "subprocess.Popen[bytes]":
    """`edgeroute generate` in a process of its own, with pipes."""
    command = [sys.executable, "-m", "edgeroute", "generate", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def long(tmp_path: Path) -> tuple[str, ...]:
    """Options of an answer that takes a minute at least: nothing may end it."""
    (tmp_path / "endless.gbnf").write_text(ENDLESS)
    grammar = ("--grammar-file", str(tmp_path / "endless.gbnf"))
    return ("--raw", "--n-ctx", "65536", "--max-tokens", "65000", *grammar)


@pytest.fixture
def model(tiny_path: Path) -> str:
    return str(tiny_path)


def test_streams_text_then_one_line_of_statistics(model: str) -> None:
    result = run("Once upon a time", "--raw", "-m", model, "-n", "12")
    assert result.exit_code == 0, result.output
    line = LINE.fullmatch(result.stderr)
    assert line is not None and line[1] == "12" and line[3], result.stderr
    with edgeroute.Runtime(model) as runtime:
        assert result.stdout == runtime.generate("Once upon a time", max_tokens=12).text + "\n"


def test_json_is_one_object_and_nothing_else(model: str) -> None:
    result = run("Hello", "--raw", "-m", model, "-n", "9", "--seed", "7", "--json",
                 "--temperature", "1.5")  # fmt: skip
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert found.keys() == {"text", "token_ids", "finish_reason", "stats", "model", "seed"}
    assert found["model"] == model and found["seed"] == 7 and found["finish_reason"] == "length"
    assert len(found["token_ids"]) == found["stats"]["n_generated"] == 9
    again = run("Hello", "--raw", "-m", model, "-n", "9", "--seed", "7", "--json",
                "--temperature", "1.5")  # fmt: skip
    assert json.loads(again.stdout)["token_ids"] == found["token_ids"]


def test_a_model_with_a_template_chats_unless_raw(model: str) -> None:
    n_prompt = {}
    for flags in ((), ("--chat",), ("--raw",), ("--system", "Be kind.")):
        result = run("Hello", *flags, "-m", model, "-n", "2", "--json")
        n_prompt[flags] = json.loads(result.stdout)["stats"]["n_prompt"]
    assert n_prompt[()] == n_prompt[("--chat",)] > n_prompt[("--raw",)]
    assert n_prompt[("--system", "Be kind.")] > n_prompt[()]


def test_a_system_message_needs_a_chat(model: str) -> None:
    result = run("Hello", "--raw", "--system", "Be kind.", "-m", model)
    assert result.exit_code == 2 and "--system needs a chat" in result.stderr


def test_the_prompt_comes_from_a_file_or_standard_input(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Grüße", encoding="utf-8")
    common = ("--raw", "-m", model, "-n", "5", "--json")
    results = [
        run("Grüße", *common),
        run("--prompt-file", str(tmp_path / "prompt.txt"), *common),
        run("--prompt-file", "-", *common, text="Grüße".encode()),
    ]
    assert len({tuple(json.loads(r.stdout)["token_ids"]) for r in results}) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a PROMPT or --prompt-file"),
        (("Hi", "--prompt-file", "x"), "not both"),
        (("--prompt-file", "no-such-file"), "No such file"),
        (("Hi", "--grammar-file", "no-such-file"), "--grammar-file no-such-file"),
        (("Hi", "--temperature", "-1"), "temperature must be between"),
        (("Hi", "--n-ctx", "3"), "n_ctx must be"),
        (("Hi", "--memory", "lots"), "byte count"),
        (("Hi", "--kv-type", "q3"), "kv_type must be one of"),
        (("Hi", "--timeout", "-1"), "timeout_s must be"),
    ],
)
def test_wrong_usage_is_code_2(model: str, arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments, "-m", model, "--json")
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert words in json.loads(result.stdout.splitlines()[-1])["error"]["message"]


def test_bad_values_are_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    result = run("Hi", "-m", str(tmp_path / "missing.gguf"), "--top-p", "2")
    assert result.exit_code == 2 and "top_p" in result.stderr


def test_bytes_that_are_no_text_are_refused(model: str) -> None:
    result = run("--prompt-file", "-", "-m", model, text=b"\xff\xfe")
    assert result.exit_code == 2 and "not UTF-8" in result.stderr


def test_grammar_and_schema_come_from_files(model: str, tmp_path: Path) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "yes" | "no"')
    (tmp_path / "s.json").write_text('{"type": "boolean"}')
    (tmp_path / "bad.gbnf").write_text("root ::= (")
    common = ("--raw", "-m", model, "-n", "8", "--json")
    found = run("Well?", "--grammar-file", str(tmp_path / "g.gbnf"), *common)
    assert json.loads(found.stdout)["text"] in ("yes", "no")
    found = run("Well?", "--json-schema", str(tmp_path / "s.json"), *common)
    assert json.loads(found.stdout)["text"].strip() in ("true", "false")
    refused = run("Well?", "--grammar-file", str(tmp_path / "bad.gbnf"), *common)
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"]["type"] == "GrammarError"


def test_what_does_not_fit_is_code_4(model: str) -> None:
    result = run("Hi", "-m", model, "--memory", "1MiB", "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["error"]["type"] == "NeverFitsError"


def test_a_bad_file_is_code_3(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    result = run("Hi", "-m", str(tmp_path / "bad.gguf"))
    assert result.exit_code == 3 and result.stderr.startswith("edgeroute: error: ")


def test_a_model_that_is_not_here_names_the_pull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEROUTE_MODELS", str(tmp_path))
    result = run("Hi", "-m", "gemma3-270m")
    assert result.exit_code == 3 and "`edgeroute pull gemma3-270m`" in result.stderr


def test_the_default_model_is_pulled_with_progress(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEROUTE_MODELS", str(tmp_path))

    def pull(spec: str, *, progress: Report) -> pulling.PullResult:
        progress(PullProgress(name=spec, phase="download", n_done=1, n_total=1))
        return pulling.PullResult(path=tiny_path, n_bytes=1, sha256="", source="here", seconds=0.0,
                                  cached=False)  # fmt: skip

    monkeypatch.setattr(pulling, "pull", pull)
    result = run("Hi", "-n", "2")
    assert result.exit_code == 0, result.output
    assert f"pulling the default model, {DEFAULT_MODEL}" in result.stderr
    assert f"download {DEFAULT_MODEL}: 100 %" in result.stderr


def test_a_timeout_ends_the_answer(model: str, long: tuple[str, ...]) -> None:
    result = run("Hi", *long, "-m", model, "--timeout", "0.2")
    assert result.exit_code == 0 and "; ended by --timeout]" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_the_answer_with_its_statistics(
    model: str, long: tuple[str, ...], as_json: bool
) -> None:
    if as_json:  # nothing is printed until the end, so a timer has to do
        watcher = (
            "import os, signal, sys, threading\n"
            "from edgeroute.commands import generate_shared as shared\n"
            "from edgeroute.cli import main\n"
            "take, seen = shared._take, []\n"
            "def spy(*a):\n"
            "    seen.append(1)\n"
            "    if len(seen) == 20: os.kill(os.getpid(), signal.SIGINT)\n"
            "    take(*a)\n"
            "shared._take = spy\n"
            "main(sys.argv[1:])\n"
        )
        command = [sys.executable, "-c", watcher, "generate", "Hi", *long, "-m", model, "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    else:
        process = start("Hi", *long, "-m", model)
        assert process.stdout is not None
        process.stdout.read(40)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    if as_json:
        found = json.loads(out.decode().splitlines()[-1])
        assert found["finish_reason"] == "cancelled"
        assert 0 < found["stats"]["n_generated"] == len(found["token_ids"]) < 65000
    else:
        assert re.search(rb"\n?\[\d+ tokens?.*memory .*; stopped\]\n\Z", err), err
        assert b"Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_ctrl_c_stops_a_long_prompt_before_its_first_token(model: str, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("All work and no play. " * 12000)
    process = start("--prompt-file", str(tmp_path / "long.txt"), "--raw", "-m", model,
                    "--n-ctx", "400000", "--threads", "1")  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err, err


@pytest.mark.skipif(os.name != "posix", reason="pipes break otherwise elsewhere")
def test_a_reader_that_leaves_ends_it_quietly(model: str, long: tuple[str, ...]) -> None:
    process = start("Hi", *long, "-m", model)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_a_real_model_answers(smollm2_path: Path) -> None:
    result = run("The capital of France is", "--raw", "-m", str(smollm2_path), "-n", "8")
    assert result.exit_code == 0 and "Paris" in result.stdout


def test_a_models_text_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), "a\ufffd]0;owned\ufffd\tb\n"), (io.StringIO(), None)):
        monkeypatch.setattr("sys.stdout", stream)
        text = "a\x1b]0;owned\x07\tb\n"
        generate_shared.writer()(text)
        assert stream.getvalue() == (shown or text)


def test_a_speed_that_was_forecast_is_set_beside_the_one_that_was_had(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only from what is remembered of the machine, and only for answers that say something."""
    asked = []

    def predicted(path: Path, params: RunParams, ask: Ask) -> Range:
        asked.append((path, params.memory, ask.n_prompt))
        return Range(low=11.0, likely=12.0, high=13.0)

    arguments = ("-m", str(tiny_path), "--raw", "--threads", "1", "--n-ctx", "128", "Once upon")
    assert "forecast" not in run(*arguments, "--max-tokens", "20").stderr  # nothing remembered
    monkeypatch.setattr("edgeroute.tools.forecast.predicted.predicted_tok_s", predicted)
    assert " tok/s (forecast 11.0 to 13.0); first" in run(*arguments, "--max-tokens", "20").stderr
    ((path, budget, n_prompt),) = asked
    assert path == tiny_path and isinstance(budget, int) and n_prompt > 1
    assert "forecast" not in run(*arguments, "--max-tokens", "8").stderr
    found = json.loads(run(*arguments, "--max-tokens", "20", "--json").stdout)["stats"]
    said = found["forecast_tok_s"]  # by now as the first answer had it, whatever that was
    assert said["low"] / 11.0 == pytest.approx(said["likely"] / 12.0)
    assert said["high"] / 13.0 == pytest.approx(said["likely"] / 12.0) != 1.0
