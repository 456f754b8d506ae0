"""`edgeroute doctor` and `edgeroute plan`: what they say, and that it agrees with the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import edgeroute
from edgeroute.cli import cli
from edgeroute.commands import doctor_facts, doctor_table
from edgeroute.config import RunParams
from edgeroute.runtime import machine
from edgeroute.runtime.errors import LibraryError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import measure
from edgeroute.tools.synth import make


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
    decode = found["decode"]
    assert decode["ceiling_tok_s"] > decode["ceiling_tok_s_full_context"] > 0
    speed = decode["bandwidth_bytes_s"] / found["weight_read_bytes"]
    assert decode["ceiling_tok_s"] == pytest.approx(speed, rel=0.01)


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
    ("hardware", "what", "words"),
    [
        ({"nvidia": True}, "CUDA", "-DGGML_CUDA=ON"),
        ({"nvidia": True, "cuda_toolkit": True}, "CUDA", "-DGGML_CUDA=ON"),
        ({"render_nodes": ["/dev/dri/renderD128"]}, "Vulkan", "-DGGML_VULKAN=ON"),
        ({"apple_gpu": True}, "Metal", "-DGGML_METAL=ON"),
        ({}, None, ""),
    ],
)
def test_a_gpu_build_is_advised_only_where_there_is_a_gpu(
    facts: dict[str, Any], hardware: dict[str, Any], what: str | None, words: str
) -> None:
    seen = {"nvidia": False, "cuda_toolkit": False, "render_nodes": [], "vulkan_loader": True,
            "apple_gpu": False} | hardware  # fmt: skip
    cpu = {"devices": [{"kind": "cpu"}]}
    base = facts | {"hardware": seen, "ggml": cpu, "build": {"rpc": True, "features": []},
                    "models": {"installed": ["one"]}}  # fmt: skip
    found = doctor_facts.missing(base)
    assert [each["what"] for each in found] == ([what] if what else [])
    for each in found:
        assert words in each["command"] and "llama-cpp-python==" in each["command"]
        assert ("nvcc" in each["why"]) == (what == "CUDA" and not seen["cuda_toolkit"])
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
    from edgeroute.commands import plan_model

    for n_ctx in (plan_model._MIN_N_CTX, plan_model._MAX_N_CTX):
        RunParams(n_ctx=n_ctx)
    for n_ctx in (plan_model._MIN_N_CTX - 1, plan_model._MAX_N_CTX + 1):
        with pytest.raises(UsageError):
            RunParams(n_ctx=n_ctx)
