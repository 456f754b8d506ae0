"""`edgeroute doctor` and `edgeroute plan`: what they say, and that it agrees with the engine."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import edgeroute
from edgeroute import paging, paging_layers
from edgeroute.cli import cli
from edgeroute.commands import doctor_facts, doctor_table, plan_forecast
from edgeroute.commands.doctor_hardware import Hardware
from edgeroute.config import RunParams
from edgeroute.offload.eviction_cliff import CycleShape, cyclic_trace
from edgeroute.offload.trace import TraceWriter
from edgeroute.runtime import machine
from edgeroute.runtime.errors import LibraryError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.units import MIB
from edgeroute.tools import measure, synth
from edgeroute.tools.forecast import plan as planning
from edgeroute.tools.forecast.records import Speeds
from edgeroute.tools.synth import make
from tests.edgeroute.speeds_lab import SPEEDS


@pytest.fixture(autouse=True)
def known_speeds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No plan measures this machine; what it would have measured is noted."""
    asked: list[Any] = []

    def calibrate(threads: int | None, params: Any, progress: Any) -> Speeds:
        asked.append(params)
        return SPEEDS

    monkeypatch.setattr(plan_forecast, "calibrate", calibrate)
    return asked


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def as_json(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# plan


def test_plan_says_what_loading_then_takes(tiny_path: Path) -> None:
    found = as_json("plan", str(tiny_path), "--n-ctx", "512", "--memory", "1GiB")
    assert found["verdict"] == "FITS" and found["budget_bytes"] == 1 << 30
    with edgeroute.Runtime(tiny_path, n_ctx=512, memory="1GiB") as runtime:
        loaded = runtime.stats()["memory"]
    assert isinstance(loaded, dict)
    for part in ("weights (mapped file)", "KV cache"):
        assert found["parts"][part] == loaded[part]
    # The compute buffer is planned from above.
    assert found["parts"]["compute buffer"] >= loaded["compute buffer"]


def test_plan_counts_parameters_and_types(tiny_path: Path, tmp_path: Path) -> None:
    make("llama", tmp_path / "q8.gguf", weight_type="Q8_0")
    plain, quantised = (
        as_json("plan", str(p), "--n-ctx", "256") for p in (tiny_path, tmp_path / "q8.gguf")
    )
    assert plain["n_params"] == quantised["n_params"]
    assert plain["type_bytes"] == {"F32": 4 * plain["n_params"]}
    assert set(quantised["type_bytes"]) == {"Q8_0", "F32"}
    with GGUFFile.open(tmp_path / "q8.gguf") as file:
        n_bytes = sum(info.nbytes for info in file.tensors.values())
    assert sum(quantised["type_bytes"].values()) == n_bytes


def test_a_token_reads_all_weights_but_one_row_of_the_embedding(tiny_path: Path) -> None:
    found = as_json("plan", str(tiny_path))
    table = 4 * found["n_vocab"] * found["n_embd"]
    total = sum(found["type_bytes"].values())
    assert found["weight_read_bytes"] == total - table + 4 * found["n_embd"]
    forecast = found["forecast"]
    weights_s, overhead_s = found["weight_read_bytes"] / 4e9, 1e-5 * found["n_layer"]
    parts = forecast["parts"]
    assert parts["dense"] + parts["head"] == pytest.approx(weights_s, rel=0.01)
    assert parts["layers"] == pytest.approx(overhead_s)
    tok_s = forecast["decode_tok_s"]
    assert tok_s["likely"] == pytest.approx(1 / sum(parts.values()), rel=1e-3)
    assert 0 < tok_s["low"] < tok_s["likely"] < tok_s["high"]


def test_a_refusal_names_the_budget_and_the_context_that_would_do(tiny_path: Path) -> None:
    """Both remedies are tried: they must fit, and a byte or a bucket more must not."""
    plan = ("plan", str(tiny_path))
    budget = str(as_json(*plan, "--n-ctx", "1024")["total_bytes"] + 1000)
    found = as_json(*plan, "--n-ctx", "2048", "--memory", budget, code=4)
    assert found["verdict"] == "REFUSED" and found["largest_n_ctx"] == 1024
    least = found["smallest_budget_bytes"]
    longer = (*plan, "--n-ctx", "2048", "--memory")
    assert as_json(*longer, str(least))["verdict"] == "FITS"
    assert as_json(*longer, str(least - 1), code=4)["verdict"] == "REFUSED"
    assert as_json(*plan, "--memory", budget, "--n-ctx", "1024")["verdict"] == "FITS"
    assert as_json(*plan, "--memory", budget, "--n-ctx", "1025", code=4)["verdict"] == "REFUSED"
    with edgeroute.Runtime(tiny_path, n_ctx=1024, memory=budget) as runtime:
        assert runtime.generate("Hi", max_tokens=1).token_ids
    text = run(*longer, budget)
    assert text.exit_code == 4 and "REFUSED" in text.stdout and "smallest budget" in text.stdout


def test_when_not_even_the_weights_fit_no_context_is_offered(tiny_path: Path) -> None:
    found = as_json("plan", str(tiny_path), "--memory", "1MiB", code=4)
    assert found["largest_n_ctx"] is None


def test_the_longest_context_ends_where_training_did(tiny_path: Path) -> None:
    found = as_json("plan", str(tiny_path), "--memory", "8GiB")
    assert found["largest_n_ctx"] == found["n_ctx_train"] == 2048


def test_the_kv_type_counts(tiny_path: Path) -> None:
    f16, q8 = (as_json("plan", str(tiny_path), "--kv-type", t) for t in ("f16", "q8_0"))
    assert q8["parts"]["KV cache"] == f16["parts"]["KV cache"] * 34 // 64


def test_plan_reads_no_weights(tmp_path: Path) -> None:
    """Only the header counts, so a plan of a file whose weights are rubbish still works."""
    make("llama", tmp_path / "m.gguf")
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        start = file.data_offset
    with (tmp_path / "m.gguf").open("r+b") as stream:
        size = stream.seek(0, 2)
        stream.seek(start)
        stream.write(b"\xff" * (size - start))
    assert as_json("plan", str(tmp_path / "m.gguf"))["verdict"] == "FITS"


def test_plan_warns_of_a_budget_beyond_the_machine(tiny_path: Path) -> None:
    free = machine.memory().available_bytes
    result = run("plan", str(tiny_path), "--memory", str(2 * free))
    assert result.exit_code == 0 and "more than what is available" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("no-such-model",), 3), (("no-such-file.gguf",), 3), (("x.gguf", "--n-ctx", "1"), 2)],
)
def test_plan_refuses_like_the_engine(arguments: tuple[str, ...], code: int) -> None:
    assert run("plan", *arguments).exit_code == code


# plan, experts paged

MOE = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=8, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
    n_head_kv=1, n_embd_head=64, n_expert=48, n_expert_used=3,
)  # fmt: skip
"""72 MiB of experts in pages of 192 KiB; a token uses 24 of 384."""
SMALL = ("--n-ctx", "256", "--threads", "1")
PAGE, N_PAGES, TOKEN_PAGES = 192 << 10, 384, 24


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    synth.write(MOE, path)
    return path


@pytest.fixture
def slim(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's own memory, which is larger than the model, counts as nothing."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(planning, "PROGRAM_BYTES", 0)


def plan_moe(path: Path, memory: int, *options: str, code: int = 0) -> dict[str, Any]:
    return as_json("plan", str(path), *SMALL, "--memory", str(memory), *options, code=code)


def budgets(path: Path) -> tuple[int, int]:
    """The smallest budget that pages, and the smallest useful one."""
    experts = plan_moe(path, MIB, code=4)["experts"]
    return experts["smallest_budget_bytes"], experts["useful_budget_bytes"]


def test_a_mixture_that_fits_is_not_paged(moe_path: Path) -> None:
    found = plan_moe(moe_path, 1 << 30)
    assert (found["verdict"], found["fits"], found["slots"]) == ("FITS", True, None)
    assert found["experts"]["n_pages"] == N_PAGES and found["forecast"]["hit_ratio"] is None
    assert found["total_bytes"] == found["resident_bytes"]
    # A token reads few of the experts, and one row of the embeddings.
    weights = sum(found["type_bytes"].values())
    rows = 4 * found["n_vocab"] * found["n_embd"] - 4 * found["n_embd"]
    assert found["weight_read_bytes"] == weights - rows - (N_PAGES - TOKEN_PAGES) * PAGE


def test_a_mixture_that_does_not_fit_is_paged(moe_path: Path, slim: None) -> None:
    smallest, useful = budgets(moe_path)
    found = plan_moe(moe_path, useful + 10 * MIB)
    assert (found["verdict"], found["pages"], found["fits"]) == ("PAGES", "experts", True)
    assert found["total_bytes"] == sum(found["parts"].values()) <= found["budget_bytes"]
    assert found["resident_bytes"] > found["budget_bytes"]
    slots = found["slots"]
    assert TOKEN_PAGES <= slots["n_slots"] < N_PAGES
    assert slots["n_bytes"] == slots["n_slots"] * PAGE == found["parts"]["expert slots"]
    assert (slots["policy"], slots["prefetch"]) == ("lfru", "auto")
    assert not slots["cliff"]["is_below"]
    assert found["experts"]["token_bytes"] == TOKEN_PAGES * PAGE
    assert smallest == found["experts"]["smallest_budget_bytes"] == found["smallest_budget_bytes"]


def test_the_named_budgets_are_the_smallest(moe_path: Path, slim: None) -> None:
    """A page less, and it is refused or falls below the cliff."""
    smallest, useful = budgets(moe_path)
    assert plan_moe(moe_path, smallest)["slots"]["n_slots"] == MOE.n_expert_used
    refused = plan_moe(moe_path, smallest - 1, code=4)
    assert refused["verdict"] == "REFUSED" and not refused["fits"] and refused["slots"] is None
    assert refused["total_bytes"] == smallest < refused["resident_bytes"]
    at, below = (plan_moe(moe_path, n)["slots"]["cliff"] for n in (useful, useful - PAGE))
    assert not at["is_below"] and at["n_slots"] == at["useful_slots"] == TOKEN_PAGES
    assert below["is_below"] and below["fallback"] in below["drifting_hit_ratios"]


def test_below_the_cliff_another_policy_is_named(moe_path: Path, slim: None) -> None:
    smallest, _ = budgets(moe_path)
    slots = plan_moe(moe_path, smallest)["slots"]
    assert slots["policy"] == slots["cliff"]["fallback"] != "lru" and slots["prefetch"] == "off"
    given = plan_moe(moe_path, smallest, "--policy", "lru", "--prefetch", "eam")["slots"]
    assert (given["policy"], given["prefetch"]) == ("lru", "eam")
    text = run("plan", str(moe_path), *SMALL, "--memory", str(smallest))
    assert text.exit_code == 0
    for words in ("PAGES: ", "of its experts", "below it", "of use from", "experts found"):
        assert words in text.stdout
    assert run("plan", str(moe_path), "--policy", "newest").exit_code == 2


def test_the_engine_takes_what_was_planned(moe_path: Path, slim: None) -> None:
    for budget in budgets(moe_path):
        planned = plan_moe(moe_path, budget)
        with edgeroute.Runtime(moe_path, memory=budget, n_ctx=256, threads=1) as runtime:
            stats = runtime.stats()
            assert runtime.generate("Hi", max_tokens=2, prefix="off").token_ids
        loaded, experts = stats["memory"], stats["experts"]
        assert isinstance(loaded, dict) and isinstance(experts, dict)
        for part in ("weights (mapped file)", "KV cache", "expert staging"):
            assert planned["parts"].get(part) == loaded.get(part)
        # What is allowed for loading becomes slots where it was not needed.
        allowed = planned["parts"]["allowance for loading"] // PAGE
        more = experts["n_slots"] - planned["slots"]["n_slots"]
        assert 0 <= more <= allowed + 1 and experts["n_pages"] == N_PAGES


def test_the_longest_context_that_pages(moe_path: Path, slim: None) -> None:
    smallest, _ = budgets(moe_path)
    longest = plan_moe(moe_path, smallest)["largest_n_ctx"]
    assert longest == 256
    assert plan_moe(moe_path, smallest, "--n-ctx", str(longest + 1), code=4)["slots"] is None
    assert plan_moe(moe_path, MIB, code=4)["largest_n_ctx"] is None


def test_a_trace_says_what_is_found(moe_path: Path, slim: None, tmp_path: Path) -> None:
    """One route for all tokens: with a cycle's slots and a page, all but the first hit."""
    _, useful = budgets(moe_path)
    guessed = plan_moe(moe_path, useful + 10 * MIB)["forecast"]
    assert "models like it" in " ".join(guessed["notes"])
    shape = CycleShape(n_layer=8, n_expert=48, n_expert_used=3)
    trace = cyclic_trace(shape, 50, keep=1.0)
    with TraceWriter(tmp_path / "t.trace", trace.meta) as writer:
        for step in trace.steps:
            writer.append(step)
    option = ("--trace", str(tmp_path / "t.trace"))
    traced = plan_moe(moe_path, useful + 10 * MIB, *option)["forecast"]
    assert traced["hit_ratio"]["likely"] > 0.9 > guessed["hit_ratio"]["likely"]
    assert traced["decode_tok_s"]["likely"] > guessed["decode_tok_s"]["likely"]
    missed = (1 - traced["hit_ratio"]["likely"]) * TOKEN_PAGES * PAGE
    assert traced["read_bytes_token"] == pytest.approx(missed)
    assert run("plan", str(moe_path), "--trace", str(moe_path)).exit_code == 2


@pytest.mark.parametrize(
    "arch", ["llama-moe", "qwen2moe", "olmoe", "gpt-oss", "deepseek", "deepseek2"]
)
def test_every_architecture_with_experts_is_planned(arch: str, tmp_path: Path) -> None:
    spec = make(arch, tmp_path / "m.gguf")
    found = as_json("plan", str(tmp_path / "m.gguf"), *SMALL)
    experts = found["experts"]
    n_layer, odd = divmod(experts["n_pages"], spec.n_expert)
    assert not odd and 1 <= n_layer <= spec.n_layer
    assert experts["token_pages"] == n_layer * spec.n_expert_used
    assert found["weight_read_bytes"] < sum(found["type_bytes"].values())


def test_a_model_too_small_to_gain_by_paging_is_refused_as_it_is(tmp_path: Path) -> None:
    """Paging has costs of its own: the remedy is the budget that holds everything."""
    make("qwen3moe", tmp_path / "m.gguf")
    found = as_json("plan", str(tmp_path / "m.gguf"), *SMALL, "--memory", "1MiB", code=4)
    assert found["smallest_budget_bytes"] == found["total_bytes"] == found["resident_bytes"]
    assert found["experts"]["smallest_budget_bytes"] > found["resident_bytes"]


# plan, layers streamed


@pytest.fixture(scope="module")
def dense_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty layers of 2.5 MiB."""
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], n_layer=40), path)
    return path


@pytest.fixture
def slim_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(paging_layers, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(planning, "PROGRAM_BYTES", 0)


def test_a_dense_model_that_fits_streams_nothing(dense_path: Path) -> None:
    found = plan_moe(dense_path, 1 << 30)
    assert (found["verdict"], found["layers"]) == ("FITS", None)
    assert found["forecast"]["read_bytes_token"] == 0


def test_a_dense_model_that_does_not_fit_streams(dense_path: Path, slim_layers: None) -> None:
    smallest = plan_moe(dense_path, MIB, code=4)["smallest_budget_bytes"]
    n_streamed = []
    for budget in (smallest, smallest + 20 * MIB, smallest + 40 * MIB):
        found = plan_moe(dense_path, budget)
        layers, forecast = found["layers"], found["forecast"]
        assert (found["verdict"], found["pages"], found["fits"]) == ("PAGES", "layers", True)
        assert sum(found["parts"].values()) == found["total_bytes"] <= budget
        assert layers["n_resident"] + layers["n_streamed"] == 41
        assert found["smallest_budget_bytes"] == smallest < found["resident_bytes"]
        with edgeroute.Runtime(dense_path, memory=budget, n_ctx=256, threads=1) as runtime:
            stats: Any = runtime.stats()
        # What is allowed for loading holds layers where it was not needed.
        assert layers["n_streamed"] >= stats["layers"]["streamed"]
        # What is read begins and ends where the disk allows it to.
        assert forecast["read_bytes_token"] == pytest.approx(layers["token_bytes"], rel=0.01)
        serial_s = layers["token_bytes"] / 1e8 + found["weight_read_bytes"] / 4e9
        assert forecast["decode_tok_s"]["likely"] == pytest.approx(1 / serial_s, rel=0.05)
        n_streamed.append(layers["n_streamed"])
    assert n_streamed == sorted(n_streamed, reverse=True) and n_streamed[0] == 41 > n_streamed[2]
    assert plan_moe(dense_path, smallest - 1, code=4)["verdict"] == "REFUSED"


def test_streaming_is_told_in_words(dense_path: Path, slim_layers: None) -> None:
    smallest = plan_moe(dense_path, MIB, code=4)["smallest_budget_bytes"]
    arguments = ("plan", str(dense_path), *SMALL, "--memory", str(smallest + 20 * MIB))
    text = run(*arguments)
    assert text.exit_code == 0
    for words in ("layers are streamed", "layer rooms", "from the disk"):
        assert words in text.stdout
    refused = run("plan", str(dense_path), *SMALL, "--memory", "1MiB")
    assert refused.exit_code == 4 and "even with all layers streamed" in refused.stdout


# doctor


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return as_json("doctor", "--no-measure")


def test_doctor_says_what_the_engine_goes_by(facts: dict[str, Any]) -> None:
    assert facts["cpu"]["usable"] == machine.usable_cores()
    assert facts["memory"]["total_bytes"] == machine.memory().total_bytes
    assert facts["ggml"]["version"].startswith("0.25.")
    assert facts["ggml"]["devices"][0]["kind"] == "cpu"
    assert facts["ggml"]["buffer_types"][0] == "CPU"
    assert facts["build"]["features"] and isinstance(facts["build"]["rpc"], bool)
    assert "memory_bandwidth" not in facts


def test_doctor_measures_a_file_of_its_own_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEROUTE_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(doctor_facts, "_PROBE_BYTES", 32 << 20)
    monkeypatch.setattr(doctor_facts, "_build", lambda: {"rpc": True, "features": []})
    found = as_json("doctor")
    disk = found["disk_bandwidth"]
    assert disk["file"] == "a file written for this"
    assert set(disk["by_queue_depth"]) == {"1", "2"}
    assert all(run["n_bytes"] == 16 << 20 for run in disk["by_queue_depth"].values())
    assert found["memory_bandwidth"]["read_bytes_s"] > 0
    assert list(tmp_path.iterdir()) == []
    assert [each["command"] for each in found["missing"] if each["what"] == "a model"] == [
        "edgeroute pull"
    ]


def test_a_failed_measurement_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, n_bytes: int) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setenv("EDGEROUTE_MODELS", str(tmp_path))
    monkeypatch.setattr(measure, "write_probe_file", refuse)
    monkeypatch.setattr(doctor_facts, "_build", lambda: {"rpc": True, "features": []})
    result = run("doctor")
    assert result.exit_code == 0
    assert "failed: PermissionError: [Errno 13] Permission denied" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_doctor_without_ggml_still_reports_and_ends_with_3(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent() -> None:
        raise LibraryError("llama-cpp-python is not installed; install it with: pip ...")

    monkeypatch.setattr(doctor_facts, "libraries", absent)
    result = run("doctor", "--no-measure")
    assert result.exit_code == 3
    assert "memory limit" in result.stdout and "a usable ggml" in result.stdout
    assert "failed: LibraryError: llama-cpp-python is not installed" in result.stdout


@pytest.mark.parametrize(
    ("hardware", "what"),
    [
        ({"nvidia": True}, "CUDA"),
        ({"render_nodes": ["/dev/dri/renderD128"]}, "Vulkan"),
        ({"apple_gpu": True}, "Metal"),
        ({}, None),
    ],
)
def test_a_gpu_build_is_advised_only_where_there_is_a_gpu(
    facts: dict[str, Any], hardware: dict[str, Any], what: str | None
) -> None:
    seen = asdict(Hardware()) | hardware
    cpu = {"devices": [{"kind": "cpu"}]}
    base = facts | {"hardware": seen, "ggml": cpu, "build": {"rpc": True, "features": []},
                    "models": {"installed": ["one"]}}  # fmt: skip
    found = doctor_facts.missing(base)
    assert [each["what"] for each in found] == ([what] if what else [])
    with_gpu = base | {"ggml": {"devices": [{"kind": "cpu"}, {"kind": "gpu"}]}}
    assert doctor_facts.missing(with_gpu) == []
    without_rpc = base | {"build": {"rpc": False, "features": []}}
    assert "-DGGML_RPC=ON" in doctor_facts.missing(without_rpc)[-1]["command"]


def test_tables_show_the_same_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("left [bold]", "right")]
    doctor_table.show("Title", rows)
    plain = capsys.readouterr().out
    assert plain == "Title\n  left [bold]  right\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    doctor_table.show("Title", rows)
    shown = capsys.readouterr().out
    assert "left [bold]" in shown and "right" in shown and shown != plain


def test_run_params_allow_every_context_that_is_offered() -> None:
    for n_ctx in (planning._MIN_N_CTX, planning._MAX_N_CTX):
        RunParams(n_ctx=n_ctx)
    for n_ctx in (planning._MIN_N_CTX - 1, planning._MAX_N_CTX + 1):
        with pytest.raises(UsageError):
            RunParams(n_ctx=n_ctx)
