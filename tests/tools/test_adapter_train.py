"""Training adapters: the torch forward right, runs reproducible, folders whole and exact.

What needs torch is skipped where it is not installed.
"""

import errno
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edgeroute.tools
from edgeroute.cli import cli
from edgeroute.commands.adapters_train import train as command
from edgeroute.runtime.errors import (
    CapacityError,
    ComputeError,
    UnsupportedModelError,
    UsageError,
)
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.tools import synth
from edgeroute.tools.adapter_tasks import examples, write_jsonl
from edgeroute.tools.adapter_train_data import Encoded
from edgeroute.tools.bench.parity import Deviation
from edgeroute.tools.perplexity import open_scorer

HAVE_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "safetensors"))
needs_torch = pytest.mark.skipif(not HAVE_TORCH, reason="needs edgeroute[train]")


def nmse(found: Any, reference: Any) -> float:
    seen = Deviation()
    seen.add(found, reference)
    return seen.nmse


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "config.jsonl"
    write_jsonl(path, examples("temperature", 60, "train", 1))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    synth.make("llama", path, n_layer=2)
    return path


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An empty folder; `tmp_path` also holds notes on checked vocabularies."""
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


# --- the torch forward --------------------------------------------------------------------


def torch_base(path: Path) -> Any:
    from edgeroute.tools.adapter_train import open_base

    with GGUFFile.open(path) as file:
        return open_base(file, "f32")


def torch_logits(base: Any, tokens: list[int], adapter: Any = None) -> Any:
    import torch

    with torch.inference_mode():
        return base.logits(base.hidden(torch.tensor([tokens]), adapter))[0].numpy()


def engine_logits(path: Path, tokens: list[int]) -> Any:
    with open_scorer(path, 256) as score:
        return np.array(score(tokens))


def random_tokens(n_tokens: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(3).integers(4, 384, n_tokens)]


@needs_torch
@pytest.mark.parametrize(
    "arch", ["llama", "llama-bias", "llama-linear", "llama-rope-freqs", "qwen2"]
)
def test_logits_are_the_engine_s(arch: str, tmp_path: Path) -> None:
    synth.make(arch, tmp_path / "m.gguf", n_layer=2)
    tokens = random_tokens(40)
    found = torch_logits(torch_base(tmp_path / "m.gguf"), tokens)
    assert nmse(found, engine_logits(tmp_path / "m.gguf", tokens)) < 1e-5


@needs_torch
def test_logits_of_the_default_model_are_the_engine_s(smollm2_path: Path) -> None:
    """The engine rounds activations to eight bits for this file, torch does not: 1e-3 or so."""
    with GGUFFile.open(smollm2_path) as file, Tokenizer.open(file) as tokenizer:
        text = "The robot drives to the charging station, because its battery is nearly empty."
        tokens = tokenizer.encode(text * 3, add_special=True, parse_special=False)
    found = torch_logits(torch_base(smollm2_path), tokens)
    reference = engine_logits(smollm2_path, tokens)
    assert nmse(found, reference) < 5e-3
    assert np.mean(found.argmax(1) == reference.argmax(1)) > 0.8


@needs_torch
@pytest.mark.parametrize("arch", ["gemma3", "olmoe", "llama-yarn"])
def test_what_cannot_be_computed_is_refused(arch: str, tmp_path: Path) -> None:
    synth.make(arch, tmp_path / "m.gguf", n_layer=2)
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf"):
        torch_base(tmp_path / "m.gguf")


@needs_torch
def test_answers_with_a_cache_are_the_likeliest_tokens(small: Path) -> None:
    from edgeroute.tools.torch_llama import greedy

    base = torch_base(small)
    prompts = [random_tokens(n) for n in (5, 12, 9)]
    answers = greedy(base, prompts, 6, frozenset())
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = torch_logits(base, prompt + answer)[len(prompt) - 1 : -1]
        chosen = logits[np.arange(6), answer]
        assert len(answer) == 6 and np.all(chosen >= logits.max(1) - 1e-3)
    ended = greedy(base, prompts, 6, frozenset({answers[1][2]}))
    assert ended[1] == answers[1][: answers[1].index(answers[1][2])]
    for row in (0, 2):
        assert ended[row] == answers[row][: len(ended[row])], "an ended row disturbs no other"


@needs_torch
def test_padding_and_prompts_do_not_count(small: Path) -> None:
    from edgeroute.tools.adapter_train import loss_of

    base = torch_base(small)
    long = Encoded(ids=tuple(random_tokens(20)), n_prompt=11, completion="")
    short = Encoded(ids=tuple(random_tokens(8)[::-1]), n_prompt=5, completion="")
    alone = [float(loss_of(base, None, [e])) for e in (long, short)]
    together = float(loss_of(base, None, [long, short]))
    assert together == pytest.approx((9 * alone[0] + 3 * alone[1]) / 12, rel=1e-4)
    logits = torch_logits(base, list(short.ids)).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert alone[1] == pytest.approx(-np.mean([logs[at - 1, short.ids[at]] for at in (5, 6, 7)]))


# --- training -----------------------------------------------------------------------------


def params(**changes: Any) -> Any:
    from edgeroute.tools.adapter_train import TrainParams

    base = TrainParams(rank=4, alpha=8.0, targets=("q", "k", "v", "down"), n_steps=12, n_batch=4,
                       lr=1e-2, n_warmup=2, n_held_out=6, dtype="f32", store="f32")  # fmt: skip
    return replace(base, **changes)


def trained(small: Path, data: Path, out: Path, **changes: Any) -> Any:
    from edgeroute.tools.adapter_train import train

    return train(small, data, out, params(**changes))


@needs_torch
def test_a_seed_gives_the_same_adapter_and_the_loss_falls(
    small: Path, data: Path, tmp_path: Path
) -> None:
    reports = [trained(small, data, tmp_path / name, seed=seed)
               for name, seed in (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip
    stored = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert stored[0] == stored[1] != stored[2]
    assert reports[0].losses == reports[1].losses
    assert np.mean(reports[0].losses[-3:]) < np.mean(reports[0].losses[:3]) - 0.5
    assert reports[0].adapter.nats < reports[0].base.nats
    assert reports[0].n_held_out == 6 and len(reports[0].losses) == 12


@needs_torch
def test_training_ends_early_once_the_loss_is_low(small: Path, data: Path, tmp_path: Path) -> None:
    report = trained(small, data, tmp_path / "a", stop_nats=100.0)
    assert len(report.losses) == 10
    assert "| steps | 10 |" in (tmp_path / "a" / "README.md").read_text()


@needs_torch
def test_only_the_adapter_learns(small: Path, data: Path) -> None:
    import torch

    from edgeroute.tools.adapter_train import loss_of, new_adapter

    base = torch_base(small)
    adapter = new_adapter(base, params())
    tokens = random_tokens(16)
    before = torch_logits(base, tokens)
    assert np.array_equal(torch_logits(base, tokens, adapter), before), "B starts as zeros"
    example = Encoded(ids=tuple(tokens), n_prompt=4, completion="")
    loss_of(base, adapter, [example]).backward()
    grads = [matrix.grad for matrix in adapter.parameters()]
    assert all(grad is not None for grad in grads) and len(grads) == 2 * 4 * 2
    assert all(float(pair[1].grad.abs().sum()) > 0 for pair in adapter.pairs.values())
    weights = [m for layer in base._layers for m in layer.matrices.values()]
    assert not any(w.requires_grad or w.grad is not None for w in [*weights, base._embedding])
    with torch.inference_mode():
        for _, b in adapter.pairs.values():
            b.add_(0.1)
    assert np.array_equal(torch_logits(base, tokens), before), "the base stays"
    assert nmse(torch_logits(base, tokens, adapter), before) > 1e-6


@needs_torch
def test_the_folder_is_peft_s_and_gives_the_trained_adapter_back(
    small: Path, data: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load

    from edgeroute.tools.adapter_suite import read_adapter

    trained(small, data, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    wanted = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False,
              "target_modules": ["down_proj", "k_proj", "q_proj", "v_proj"]}  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    stored = load((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    stem = "base_model.model.model.layers"
    shapes = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (256, 128),
              "self_attn.v_proj": (256, 128), "mlp.down_proj": (512, 256)}  # fmt: skip
    assert {name: array.shape for name, array in stored.items()} == {
        f"{stem}.{il}.{module}.lora_{which}.weight": (4, n_in) if which == "A" else (n_out, 4)
        for il in range(2) for module, (n_in, n_out) in shapes.items() for which in "AB"
    }  # fmt: skip
    assert all(array.dtype == np.float32 for array in stored.values())
    # A head of width 64: the file's neighbours 2i and 2i + 1 are rows i and 32 + i there.
    base = torch_base(small)
    adapter = read_adapter(base, tmp_path / "a")
    for part, module, n_head in (("q", "q_proj", 4), ("k", "k_proj", 2)):
        theirs = stored[f"{stem}.1.self_attn.{module}.lora_B.weight"]
        mine = adapter.pairs[1, part][1].numpy()
        for head in range(n_head):
            for i in range(32):
                for j in range(2):
                    row = theirs[64 * head + 32 * j + i]
                    assert np.array_equal(mine[64 * head + 2 * i + j], row)
    assert np.array_equal(adapter.pairs[0, "v"][1].numpy(),
                          stored[f"{stem}.0.self_attn.v_proj.lora_B.weight"])  # fmt: skip
    card = (tmp_path / "a" / "README.md").read_text()
    assert "Licence: " in card and "library_name: peft" in card and "| seed | 1 |" in card


@needs_torch
def test_a_merged_base_answers_as_the_adapter_does(small: Path, data: Path, tmp_path: Path) -> None:
    from edgeroute.tools.adapter_suite import read_adapter

    trained(small, data, tmp_path / "a")
    base = torch_base(small)
    adapter = read_adapter(base, tmp_path / "a")
    tokens = random_tokens(20)
    found = torch_logits(base, tokens, adapter)
    for (il, part), (a, b) in adapter.pairs.items():
        base._layers[il].matrices[part] += adapter.scale * (b @ a)
    assert nmse(torch_logits(base, tokens), found) < 1e-9


@needs_torch
def test_f16_holds_the_same_values_in_half_the_bytes(
    small: Path, data: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load

    sizes = [
        trained(small, data, tmp_path / store, store=store).n_bytes for store in ("f32", "f16")
    ]
    full, half = (load((tmp_path / store / "adapter_model.safetensors").read_bytes())
                  for store in ("f32", "f16"))  # fmt: skip
    assert sizes[1] < 0.6 * sizes[0]
    assert all(np.array_equal(half[name], full[name].astype(np.float16)) for name in full)


# --- nothing half-written -----------------------------------------------------------------


@needs_torch
def test_ctrl_c_leaves_nothing_and_harms_nothing(small: Path, data: Path, room: Path) -> None:
    import torch

    from edgeroute.tools.adapter_train import TrainStep, train

    def interrupt(step: TrainStep) -> None:
        if step.phase == "train" and step.n_done == 3:
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        train(small, data, room / "a", params(), interrupt)
    assert list(room.iterdir()) == []
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@needs_torch
@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_leaves_what_was_there(
    existed: bool, small: Path, data: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeroute.tools import adapter_train_peft

    if existed:
        trained(small, data, room / "a", n_steps=2)
    before = {p: p.read_bytes() for p in room.rglob("*") if p.is_file()}

    def full(path: Path, content: bytes) -> None:
        if path.name == "README.md":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(adapter_train_peft, "_write", full)
    with pytest.raises(CapacityError, match="the disk became full"):
        trained(small, data, room / "a", n_steps=2, seed=2, replace=True)
    assert {p: p.read_bytes() for p in room.rglob("*") if p.is_file()} == before
    assert len(list(room.iterdir())) == existed


@needs_torch
def test_only_an_adapter_is_ever_replaced(small: Path, data: Path, room: Path) -> None:
    (room / "mine").mkdir()
    (room / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="exists; name another folder, or give --force"):
        trained(small, data, room / "mine")
    with pytest.raises(UsageError, match="is no adapter's folder"):
        trained(small, data, room / "mine", replace=True)
    with pytest.raises(UsageError, match="make that folder first"):
        trained(small, data, room / "no" / "a")
    assert (room / "mine" / "letter.txt").read_text() == "dear"
    trained(small, data, room / "a", n_steps=2)
    old = (room / "a" / "adapter_model.safetensors").read_bytes()
    trained(small, data, room / "a", n_steps=2, seed=2, replace=True)
    assert (room / "a" / "adapter_model.safetensors").read_bytes() != old
    assert sorted(p.name for p in room.iterdir()) == ["a", "mine"]


@needs_torch
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ("q", "x")}, "targets are q,x; name some of q,k,v,o,gate,up,down"),
        ({"targets": ()}, "targets are none"),
        ({"targets": ("q", "q")}, "each once"),
        ({"rank": 0}, "rank is 0, outside 1 to 1024"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"n_warmup": 99}, "99 warm-up steps do not fit 12 steps"),
        ({"n_held_out": -1}, "-1 examples cannot be held out"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"max_tokens": 4}, r"line 1: the example has \d+ tokens, the limit is 4"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(
    changes: dict[str, Any], said: str, small: Path, data: Path, room: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        trained(small, data, room / "a", **changes)
    assert list(room.iterdir()) == []


@needs_torch
def test_a_loss_that_is_no_number_ends_the_run(small: Path, data: Path, room: Path) -> None:
    with pytest.raises(ComputeError, match="nothing was written: train with a lower --lr"):
        trained(small, data, room / "a", lr=1e30, n_warmup=0)
    assert list(room.iterdir()) == []


# --- the command --------------------------------------------------------------------------


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [n for n in sys.modules if n == "torch" or n.startswith("torch.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("adapter_train", "torch_llama", "adapter_suite"):
        monkeypatch.delitem(sys.modules, f"edgeroute.tools.{name}", raising=False)
        monkeypatch.delattr(edgeroute.tools, name, raising=False)
    yield


def test_without_torch_the_remedy_is_named(
    no_torch: None, small: Path, data: Path, room: Path
) -> None:
    options = [str(small), str(data), "--out", str(room / "a")]
    done = CliRunner().invoke(cli, ["adapters", "train", *options])
    assert done.exit_code == 2 and "pip install 'edgeroute[train]'" in done.stderr
    assert list(room.iterdir()) == []


def test_help_has_an_example_and_needs_no_torch(no_torch: None) -> None:
    done = CliRunner().invoke(command, ["--help"])
    assert done.exit_code == 0
    assert "edgeroute adapters train smollm2-135m-instruct robot.jsonl --out" in done.output


@needs_torch
def test_the_command_prints_what_it_did(small: Path, data: Path, room: Path) -> None:
    args = [str(small), str(data), "--out", str(room / "a"), "--steps", "20", "--batch", "2",
            "--rank", "2", "--hold-out", "4", "--about", "a class", "--base-name", "we/base",
            "--raw", "--json"]  # fmt: skip
    done = CliRunner().invoke(command, args)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["path"] == str(room / "a") and found["n_held_out"] == 4
    assert len(found["losses"]) == 20 and found["nats_adapter"] < found["nats_base"]
    assert "train: 20 of 20, loss" in done.stderr
    done = CliRunner().invoke(command, [*args[:-1], "--force"])
    assert "exactly right" in done.stdout and done.exit_code == 0
    config = json.loads((room / "a" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 4, "twice the rank unless told otherwise"
    assert config["base_model_name_or_path"] == "we/base"
    assert "What it does: a class." in (room / "a" / "README.md").read_text()


# --- the suite ----------------------------------------------------------------------------


@needs_torch
def test_a_suite_goes_on_where_it_stopped(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeroute.tools import adapter_suite as suite

    wanted = suite.SuiteParams(tasks=("config", "temperature"), n_train=40, n_test=4, n_steps=3)
    suite.train_all(small, tmp_path, wanted)
    outcomes = suite.answer_all(small, tmp_path, wanted)
    never = SimpleNamespace(calls=0)

    def count(*args: object) -> None:
        never.calls += 1

    monkeypatch.setattr(suite, "train", count)
    monkeypatch.setattr(suite, "greedy", count)
    suite.train_all(small, tmp_path, wanted)
    again = suite.answer_all(small, tmp_path, wanted)
    assert never.calls == 0
    assert outcomes.arms == again.arms == ("base", "config", "temperature")
    assert outcomes.scores.shape == (8, 3) and outcomes.contexts.shape == (8, 256)
    again.save(tmp_path / "outcomes.npz")
    read = suite.load_outcomes(tmp_path / "outcomes.npz")
    assert np.array_equal(read.scores, outcomes.scores) and read.prompts == outcomes.prompts
    assert np.array_equal(read.contexts, outcomes.contexts) and read.tasks == wanted.tasks
    assert [row["task"] for row in suite.table(read)] == ["config", "temperature"]
    with pytest.raises(UsageError, match="holds a suite with other n_steps; name another folder"):
        suite.train_all(small, tmp_path, replace(wanted, n_steps=4))
