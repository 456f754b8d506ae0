"""The benchmarks' own logic on fake runners, and each benchmark's shape on a tiny model.

No speed is asserted anywhere.
"""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from edgeroute.commands import bench as command
from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.tools.bench import (
    batch,
    contention,
    decode,
    engines,
    load,
    pairs,
    parity,
    prefill,
    report,
)
from edgeroute.tools.bench.busy import BusyProcesses
from edgeroute.tools.bench.child import peak_rss_bytes
from edgeroute.tools.bench.pairs import Plan, Series, alternate, ratio
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.settle import settle_s
from edgeroute.tools.bench.text import PROMPTS
from edgeroute.tools.bench.workers import Worker


def quiet(line: str) -> None:
    """Drop a line of progress."""


@pytest.fixture
def params(tiny_path: Path) -> BenchParams:
    return BenchParams(
        path=tiny_path, name="tiny", threads=1, reps=1, tokens=12, warmup=0, pause_s=0.0,
        window_s=0.4,
    )  # fmt: skip


# alternation, medians, noise


class FakeProbe:
    """Others use what the list says, run by run."""

    def __init__(self, *others: float) -> None:
        self._others = itertools.chain(others, itertools.repeat(0.0))
        self.running = False

    def start(self) -> None:
        assert not self.running
        self.running = True

    def stop(self) -> float:
        self.running = False
        return next(self._others)


def test_runs_alternate_and_the_order_turns_around() -> None:
    order: list[str] = []
    values = {"a": iter([9.0, 1.0, 2.0, 6.0]), "b": iter([9.0, 2.0, 4.0, 4.0])}

    def runner(name: str) -> pairs.Runner:
        return lambda: (order.append(name), next(values[name]))[1]

    lines: list[str] = []
    slept: list[float] = []
    found = alternate({"a": runner("a"), "b": runner("b")}, Plan(reps=3, warmup=1, pause_s=0.5),
                      lines.append, probe=FakeProbe(), sleep=slept.append)  # fmt: skip
    assert "".join(order) == "baabbaab"
    assert found["a"].values == (1.0, 2.0, 6.0), "the warm-up must not count"
    assert found["a"].median == 2.0 and found["b"].median == 4.0
    assert ratio(found["a"], found["b"]) == 0.5
    assert slept == [0.5] * 8
    assert lines[0].startswith("warm-up") and lines[-1].startswith("run 3/3")


def test_disturbed_runs_are_counted_and_marked() -> None:
    lines: list[str] = []
    probe = FakeProbe(0.0, 0.21, 0.2, 1.5)
    found = alternate({"a": lambda: 1.0, "b": lambda: 1.0}, Plan(reps=2, warmup=0), lines.append,
                      probe=probe, sleep=lambda s: None)  # fmt: skip
    assert found["a"].others == (0.0, 1.5) and found["b"].others == (0.21, 0.2)
    assert found["a"].n_noisy == found["b"].n_noisy == 1
    assert lines == ["run 1/2: a 1, b 1!", "run 2/2: b 1, a 1!"]
    assert report.noise(found["a"], found["b"]) == "2 of 4 noisy"


def test_quartiles_and_json() -> None:
    series = Series(values=(4.0, 1.0, 3.0, 2.0, 5.0), others=(0.0,) * 5)
    assert series.quartiles == (2.0, 4.0)
    assert series.to_dict()["iqr"] == 2.0
    assert report.spread(series) == "3.0 [2.0 to 4.0]"
    one = Series(values=(7.0,), others=(0.0,))
    assert one.quartiles == (7.0, 7.0)
    nothing = Series(values=(0.0,), others=(0.0,))
    assert report.pair_result({}, "tok/s", one, nothing)["ratio"] is None  # JSON has no infinity


def test_a_plan_without_runs_is_refused() -> None:
    with pytest.raises(UsageError, match="reps"):
        Plan(reps=0)


def test_what_we_and_our_children_use_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times:
        def __init__(self, **times: float) -> None:
            self.__dict__.update(times)

    child = Times(user=5.0, system=1.0, children_user=0.5, children_system=0.5)
    process = Times()
    process.__dict__["children"] = lambda recursive: [Times(cpu_times=lambda: child)]
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(user=20.0, system=4.0, idle=99.0))
    own = Times(user=2.0, system=1.0, children_user=3.0, children_system=1.0)
    monkeypatch.setattr(pairs.os, "times", lambda: own)
    assert pairs._others_s() == 24.0 - 7.0 - 7.0


# settling, overlapping, windows


def steps(start: float, *parts: tuple[float, float]) -> list[tuple[float, int]]:
    """Stamps of one token each: parts are (seconds, tokens per second)."""
    stamps = []
    for seconds, rate in parts:
        n = round(seconds * rate)
        stamps += [(start + (i + 1) / rate, 1) for i in range(n)]
        start += seconds
    return stamps


def test_settling_is_when_the_slow_part_ends() -> None:
    assert settle_s(steps(100.0, (4.0, 50.0)), 100.0) == 0.0
    slow_first = settle_s(steps(100.0, (1.0, 10.0), (5.0, 50.0)), 100.0)
    assert 0.8 <= slow_first <= 1.1
    assert settle_s(steps(100.0, (0.5, 50.0), (1.0, 5.0), (5.0, 50.0)), 100.0) > 1.2
    assert settle_s([], 100.0) == float("inf")


def test_a_pass_counts_for_every_stream_in_it() -> None:
    """Four streams of 30 passes, each pass's tokens arriving one after another."""
    streams = [[(0.1 * i + 0.001 * late, 1) for i in range(30)] for late in range(4)]
    assert engines.overlap_rate(streams) == pytest.approx(40.0)


def test_rates_count_only_what_they_should() -> None:
    streams = [steps(0.0, (2.0, 10.0)), steps(1.0, (2.0, 10.0))]
    assert engines.overlap_rate(streams) == pytest.approx(20.0, rel=0.1)
    with pytest.raises(UsageError, match="overlap"):
        engines.overlap_rate([steps(0.0, (1.0, 10.0)), steps(5.0, (1.0, 10.0))])
    with pytest.raises(UsageError, match="too few"):
        engines.overlap_rate([[(0.0, 1), (1.0, 1)], [(0.9, 1), (1.9, 1)]])
    stamps = [(0.0, 0), *steps(0.0, (1.0, 5.0), (2.0, 20.0)), (3.0, 0)]
    assert engines.rate_after(stamps, 1.0) == pytest.approx(20.0, rel=0.05)
    assert engines.rate_after([(0.0, 0), (4.0, 0)], 2.0) == 0.5, "no token: less than one"
    assert engines.rate_after([(0.0, 0), (9.0, 1), (10.0, 1)], 20.0) == 0.2


def test_targets_decide_the_verdict(params: BenchParams) -> None:
    good, bad = (Criterion(what="x", value=v, limit=0.98) for v in (0.98, 0.97))
    assert good.met and not bad.met
    assert Criterion(what="x", value=1.0, limit=1.2, at_most=True).met
    shared = {"bench": "b", "params": params, "columns": (), "rows": (), "results": []}
    assert Report(criteria=(good,), **shared).met and not Report(criteria=(good, bad), **shared).met


# processes


def gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_busy_processes_are_gone_afterwards() -> None:
    with BusyProcesses(2) as busy:
        pids = busy.pids
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(KeyboardInterrupt), BusyProcesses(1) as busy:
        pids = busy.pids
        raise KeyboardInterrupt
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_busy_processes_end_when_their_parent_is_killed() -> None:
    code = """
import time
from edgeroute.tools.bench.busy import BusyProcesses
busy = BusyProcesses(1)
busy.start()
print(busy.pids[0], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert gone(pid)


def test_a_schedule_plays_even_when_left_early() -> None:
    busy = BusyProcesses(1)
    with pytest.raises(RuntimeError), contention.busy_schedule(busy, 30.0) as times:
        raise RuntimeError
    assert len(times) == 2 and busy.pids == ()


def test_a_worker_passes_errors_on_and_ends() -> None:
    with pytest.raises(EdgerouteError, match=r"missing\.gguf"):
        Worker(engines.Ours, Path("missing.gguf"), {"threads": 1})


def test_a_worker_is_killed_on_the_way_out(tiny_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Worker(engines.Ours, tiny_path, {"threads": 1, "n_ctx": 256}) as worker,
    ):
        pid = worker.pid
        with pytest.raises(UsageError, match="prompt"):
            worker.call("prefill", [])
        assert worker.call("prefill", [5, 6, 7]) > 0, "an error leaves it usable"
        raise KeyboardInterrupt
    assert pid is not None and not psutil.pid_exists(pid)


# each benchmark on the tiny model


def check_report(found: Report, bench: str, n_results: int) -> list[dict[str, object]]:
    """What every report must have; and it must survive JSON."""
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["bench"] == bench and data["model"] == "tiny" and data["reps"] == 1
    assert len(data["results"]) == n_results
    assert {"cpu", "cores", "load_average", "date"} <= data["machine"].keys()
    assert all({"what", "value", "limit", "met"} <= each.keys() for each in data["criteria"])
    report.show(found)  # the table must fit its columns
    return data["results"]


def check_pair(result: dict[str, object]) -> None:
    for engine in ("edgeroute", "llama_cpp"):
        series = result[engine]
        assert isinstance(series, dict) and series["median"] > 0 and len(series["values"]) == 1
    assert result["ratio"] is not None and "n_noisy" in result


def test_decode(params: BenchParams) -> None:
    found = decode.run(params, quiet, contexts=(8, 40))
    results = check_report(found, "decode", 2)
    for result, context in zip(results, (8, 40), strict=True):
        check_pair(result)
        assert result["context"] == context and result["ceiling_tok_s"] > 0


def test_bytes_per_token_counts_each_matrix_once(tiny_path: Path) -> None:
    from edgeroute.runtime.gguf import GGUFFile
    from edgeroute.tools.bench.ceiling import bytes_per_token

    with GGUFFile.open(tiny_path) as file:
        embedding = file.tensors["token_embd.weight"].nbytes
        everything = sum(tensor.nbytes for tensor in file.tensors.values())
    assert bytes_per_token(tiny_path, 0) == everything - embedding
    # 3 layers of keys and values, 2 heads of 64, half precision
    assert bytes_per_token(tiny_path, 10) - bytes_per_token(tiny_path, 0) == 10 * 3 * 2 * 128 * 2


def test_load(params: BenchParams) -> None:
    results = check_report(load.run(params, quiet), "load", 2)
    for result in results:
        check_pair(result)
    assert results[1]["edgeroute"]["median"] > 1 << 20


def test_load_says_what_went_wrong(params: BenchParams, tmp_path: Path) -> None:
    import dataclasses

    (tmp_path / "bad.gguf").write_bytes(b"GGUFnot really")
    bad = dataclasses.replace(params, path=tmp_path / "bad.gguf")
    with pytest.raises(EdgerouteError, match="status 1"):
        load.start("edgeroute", bad, str(tmp_path / "compiled"))


def test_peak_memory_is_this_processs_own() -> None:
    assert psutil.Process().memory_info().rss <= peak_rss_bytes() * 1.01


def test_batch(params: BenchParams) -> None:
    import dataclasses

    long = dataclasses.replace(params, tokens=150)  # or one might have ended before both are heard
    results = check_report(batch.run(long, quiet, n_streams=2), "batch", 1)
    check_pair(results[0])
    assert len(results[0]["all"]) == 4 and results[0]["batch_over_single"] > 0


def test_contention(params: BenchParams) -> None:
    before = set(psutil.Process().children(recursive=True))
    results = check_report(contention.run(params, quiet, n_busy=(0, 1)), "contention", 2)
    assert [result["n_busy"] for result in results] == [0, 1]
    assert contention.POLICY in results[0]["runs"] and len(results[0]["runs"]) >= 3
    assert len(results[1]["settled_after_load_came_s"]["values"]) == 1
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [child for child in left if "resource_tracker" not in " ".join(child.cmdline())]


def test_llama_cpps_defaults_are_named() -> None:
    counts = contention.peer_thread_counts()
    text = " ".join(counts.values())
    assert "llama_context_default_params" in text and "llama-cpp-python" in text


def test_parity_passes_on_itself_and_fails_on_a_difference(
    params: BenchParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = parity.ParityParams(n_positions=40, n_prompts=2, n_greedy=6)
    found = parity.run(params, quiet, wanted)
    assert found.met, found.to_dict()
    check_report(found, "parity", 1)

    def off_by_a_bit(engine: parity.Engine, tokens: list[int], pos: int, **options: bool):
        logits = real(engine, tokens, pos, **options)
        logits[0, 0] += 1e-3
        return logits

    real = parity.Engine.run
    monkeypatch.setattr(parity.Engine, "run", off_by_a_bit)
    assert not parity.run(params, quiet, wanted).met


def test_command_line_prints_json_last(tiny_path: Path) -> None:
    arguments = ["prefill", "--model", str(tiny_path), "--reps", "1", "--threads", "1", "--json"]
    answer = CliRunner().invoke(command.command, arguments, catch_exceptions=False)
    assert answer.exit_code == 0
    data = json.loads(answer.stdout.strip().splitlines()[-1])
    assert data["bench"] == "prefill" and data["results"][0]["n_prompt"] == prefill.N_PROMPT
    assert "warm-up" in answer.stderr and "run 1/1" in answer.stderr


def test_command_line_fails_when_parity_does(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["parity", "--model", str(tiny_path), "--positions", "20", "--prompts", "1",
                 "--tokens", "8", "--threads", "1"]  # fmt: skip
    assert CliRunner().invoke(command.command, arguments, catch_exceptions=False).exit_code == 0
    monkeypatch.setattr(parity, "greedy_peer", lambda peer, prompt, n_tokens: [])
    answer = CliRunner().invoke(command.command, arguments, catch_exceptions=False)
    assert answer.exit_code == 1 and "MISSED identical greedy answers" in answer.stdout


@pytest.mark.parametrize("name", ["decode", "prefill", "load", "batch", "contention", "parity"])
def test_help_has_examples(name: str) -> None:
    answer = CliRunner().invoke(command.command, [name, "--help"])
    assert answer.exit_code == 0 and f"edgeroute bench {name}" in answer.output


def test_there_are_twenty_different_prompts() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 20
