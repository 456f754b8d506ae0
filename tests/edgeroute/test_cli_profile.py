"""`edgeroute profile`: a model run and analysed, its files, and what it refuses."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeroute import paging
from edgeroute.cli import cli
from edgeroute.commands import profile_work
from edgeroute.engine import Runtime
from edgeroute.offload.replay import replay
from edgeroute.offload.trace import read_trace
from edgeroute.runtime.errors import CapacityError
from edgeroute.stream import Stream
from edgeroute.tools import synth
from edgeroute.tools.forecast import plan as planning

SPEC = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=6, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
    n_head_kv=1, n_embd_head=64, n_expert=64, n_expert_used=3,
)  # fmt: skip
"""72 MiB of experts in pages of 192 KiB."""
HOW = ("--n-ctx", "256", "--threads", "1", "--tokens", "5")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("profile") / "moe.gguf"
    synth.write(SPEC, found)
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two domains, short: a token each per byte."""
    found = tmp_path / "prompts.json"
    found.write_text('{"sea": ["calm", "a wave"], "land": ["hills"]}')
    return found


@pytest.fixture(autouse=True)
def _slim_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's own memory, which is larger than any model here, counts as nothing."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(planning, "PROGRAM_BYTES", 0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["profile", *map(str, arguments)])


def as_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_a_model_is_run_analysed_and_written(path: Path, prompts: Path, tmp_path: Path) -> None:
    trace, page, table = (tmp_path / name for name in ("a.trace", "a.html", "a.csv"))
    found = as_json(path, "--prompts", prompts, *HOW, "--prefetch", "off", "--trace-out", trace,
                    "--html", page, "--export", table)  # fmt: skip
    subject, live = found["subject"], found["live"]
    assert subject["domains"] == ["sea", "land"] and subject["n_decode_token"] == 3 * 4
    assert subject["arch"] == "qwen3moe" and subject["file_bytes"] == path.stat().st_size
    # It would have fitted: the budget chosen pages, and is named.
    assert 0.3 < live["n_slots"] / subject["n_page"] < 0.9
    assert any("fits" in note and "about 50% of its experts" in note for note in found["notes"])
    assert live["budget_bytes"] == found["live"]["budget_bytes"] > live["slots_bytes"] > 0
    assert live["replay_equal"] is True and live["decode_tok_s"] > 0
    recorded = read_trace(trace)
    again = replay(recorded, live["policy"], live["n_slots"])
    assert live["hit_ratio"] == pytest.approx(again.hit_ratio)
    assert page.read_text(encoding="utf-8").startswith("<!") and table.stat().st_size > 1000
    # What was recorded is analysed alike later; the model gives it budgets.
    later = as_json(path, "--from-trace", trace, *HOW)
    assert later["hits"] == found["hits"] and later["advice"] == found["advice"]
    alone = as_json("--from-trace", trace)
    assert alone["subject"]["arch"] == "unknown architecture"
    assert {each["budget_bytes"] for each in alone["advice"]} == {0}
    compared = as_json("--compare", trace, trace)
    assert compared["load_pearson"] == pytest.approx(1)


def test_ctrl_c_ends_the_run_and_what_came_is_analysed(
    path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal, n = Stream.__next__, 0

    def interrupted(stream: Stream) -> object:
        nonlocal n
        n += 1
        if n == 8:  # in the second answer
            raise KeyboardInterrupt
        return normal(stream)

    monkeypatch.setattr(Stream, "__next__", interrupted)
    result = run(path, "--prompts", prompts, *HOW, "--json")
    assert result.exit_code == 130, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["interrupted"] and 4 <= found["subject"]["n_decode_token"] < 12
    assert "stopped by Ctrl-C after 2 of 3 prompts" in found["notes"]


def test_a_model_without_experts_is_told_what_makes_sense(tiny_path: Path, prompts: Path) -> None:
    found = as_json(tiny_path, "--prompts", prompts, *HOW)
    assert found["format"] == "edgeroute-profile-dense"
    assert found["n_decode_token"] == 12 and found["decode_tok_s"] > 0
    assert found["layers_streamed"] == 0 and found["layers_resident"] == found["n_layer"] + 1
    shown = run(tiny_path, "--prompts", prompts, *HOW)
    assert "every token uses all weights" in shown.stdout
    refused = run(tiny_path, "--prompts", prompts, "--html", prompts.parent / "a.html")
    assert refused.exit_code == 2 and "no experts" in refused.stderr


def test_a_forecast_says_where_each_figure_is_from(
    path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, memory = [], []

    def foresee(file: Any, params: Any, where: Any, progress: Any) -> Any:
        from edgeroute.tools.forecast.records import Forecast, Range

        asked.append(where)
        memory.append((params.memory, params.threads))
        likely = Range(low=1.0, likely=2.0, high=3.0)
        made = Forecast(machine="x", verdict="PAGES", pages="experts", budget_bytes=1 << 30,
                        smallest_bytes=1, hit_ratio=Range(low=0.1, likely=0.5, high=0.9),
                        read_bytes_token=4096.0, decode_tok_s=likely, prefill_tok_s=likely,
                        ttft_s=likely, joules_token=None, parts={"reads": 1.0})  # fmt: skip
        speeds = SimpleNamespace(origins={"storage": "stated", "layer_s": "computed"}, notes=())
        return SimpleNamespace(forecast=made, speeds=speeds)

    def emulate(path: Path, device: Any, params: Any, **speeds: Any) -> Any:
        assert device.name == "rpi5-8gb-nvme" and params.n_tokens == 5
        raise CapacityError("the kernel ended it")

    monkeypatch.setattr(profile_work, "foresee", foresee)
    monkeypatch.setattr(profile_work, "emulate", emulate)
    result = run(path, "--prompts", prompts, *HOW, "--device", "rpi5-8gb-nvme", "--device", "here",
                 "--emulate", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [where.device for where in asked] == ["rpi5-8gb-nvme", None]
    assert memory == [(None, None), (None, 1)]  # a device has its own
    assert all(where.hits is not None and where.hits.origin == "measured" for where in asked)
    found = json.loads(result.stdout.splitlines()[-1])["forecasts"]
    assert found["rpi5-8gb-nvme"]["decode_tok_s"]["likely"] == 2.0
    assert found["rpi5-8gb-nvme"]["origins"] == {"storage": "stated", "layer_s": "computed"}
    assert (
        "Forecast: rpi5-8gb-nvme" in result.stdout and "50 % (10 to 90), measured" in result.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a MODEL to run"),
        (("x.gguf", "--compare", "a", "b"), "--compare A B takes two files"),
        (("--from-trace", "a", "--trace-out", "b"), "leave --trace-out out"),
        (("--from-trace", "a", "--device", "rpi5-8gb-nvme"), "name MODEL beside --from-trace"),
        (("x.gguf", "--emulate"), "--emulate is of a --device"),
        (("x.gguf", "--power-mode", "15W"), "--power-mode is of a --device"),
        (("x.gguf", "--export", "a.xlsx"), "must end in .csv or .parquet"),
        (("x.gguf", "--html", "no/such/folder/a.html"), "there is no such folder"),
        (("x.gguf", "--policy", "best"), "policy must be one of"),
        (("x.gguf", "--device", "rpi9"), "no device 'rpi9'"),
        (("x.gguf", "--device", "orin-nano-8gb", "--power-mode", "3W"), "no power mode '3W'"),
        (("x.gguf", "--tokens", "1"), "not in the range"),
        (("x.gguf", "--prompts", "no/such/file"), "no such file or folder"),
        (("--from-trace", "no/such/file"), "cannot read the trace"),
        (("--compare", "no/such", "no/such"), "cannot read"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(
    arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stdout == ""


def test_a_file_in_use_a_long_prompt_and_another_model_are_refused(
    path: Path, prompts: Path, tmp_path: Path
) -> None:
    used = tmp_path / "used.trace"
    used.write_bytes(b"x")
    result = run(path, "--prompts", prompts, *HOW, "--trace-out", used)
    assert result.exit_code == 2 and "record to another file" in result.stderr
    (tmp_path / "long.txt").write_text("word " * 200)
    result = run(path, "--prompts", tmp_path / "long.txt", *HOW)
    assert result.exit_code == 2 and "raise --n-ctx" in result.stderr
    other = tmp_path / "other.gguf"
    synth.write(replace(SPEC, n_expert=8), other)
    trace = tmp_path / "a.trace"
    assert run(path, "--prompts", prompts, *HOW, "--trace-out", trace).exit_code == 0
    result = run(other, "--from-trace", trace)
    assert result.exit_code == 2 and "of 64 experts used; other.gguf has" in result.stderr
    assert "too small to be paged" in run(other, "--prompts", prompts, *HOW).stderr


@pytest.fixture(autouse=True)
def _still(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other programs' memory takes no slots away."""
    made = Runtime.__init__

    def init(self: Runtime, *args: Any, **settings: Any) -> None:
        made(self, *args, **settings)
        if self._loaded.experts is not None:
            self._loaded.experts._next_reading = float("inf")

    monkeypatch.setattr(Runtime, "__init__", init)
    yield
