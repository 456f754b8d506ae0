"""Training a route predictor: known structure is learned, and what is worthless is not written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.offload.prefetch import make_predictor
from edgeroute.offload.prefetch_learned import load, read_model
from edgeroute.offload.replay import replay_predictor
from edgeroute.offload.trace import Trace, TraceMeta, TraceWriter, make_step
from edgeroute.runtime.errors import UsageError
from edgeroute.tools import train_routes
from edgeroute.tools.train_routes import (
    judge,
    main,
    on_numpy,
    run,
    shape_of,
    tokens_of,
    train,
    write,
)

META = TraceMeta(
    model="tiny.gguf", n_layer=6, n_expert=16, n_expert_used=2, page_bytes=9, layers=(1, 2, 3, 5)
)


def chained_trace(n_steps: int, seed: int = 1, *, chained: bool = True) -> Trace:
    """Layer l + 1 chooses by a fixed permutation of layer l's choice; or everything by chance."""
    rng = np.random.default_rng(seed)
    order = np.random.default_rng(0).permutation(META.n_expert)
    steps = []
    for _ in range(n_steps):
        ids = rng.choice(META.n_expert, META.n_expert_used, replace=False)
        chosen = []
        for il in META.layers:
            chosen.append((il, ids))
            ids = order[ids]
            if not chained:
                ids = rng.choice(META.n_expert, META.n_expert_used, replace=False)
        steps.append(make_step(META, False, chosen))
    return Trace(meta=META, steps=tuple(steps))


def named(report: train_routes.Report) -> dict[str, train_routes.Judged]:
    return {each.name: each for each in report.judged}


def test_a_chain_of_layers_is_learned() -> None:
    model, report = run(chained_trace(500))
    found = named(report)
    assert [*found] == ["learned", "frequency", "eam"]
    assert (report.n_trained, report.n_held_out) == (400, 100)
    assert found["learned"].recall > 0.99
    assert found["frequency"].recall < 0.4 and found["eam"].recall < 0.4
    assert sorted(found["learned"].layers) == [2, 3]  # 1 is the first, 4 has no experts
    assert model.weight.shape == (6, 96, 16)


def test_a_state_that_persists_is_learned() -> None:
    """Every layer keeps its choice for some tokens: the last token tells it."""
    rng = np.random.default_rng(3)
    route = {il: rng.choice(16, 2, replace=False) for il in META.layers}
    steps = []
    for _ in range(800):
        for il in META.layers:
            if rng.random() < 0.1:
                route[il] = rng.choice(16, 2, replace=False)
        steps.append(make_step(META, False, list(route.items())))
    found = named(run(Trace(meta=META, steps=tuple(steps)))[1])
    assert found["learned"].recall > 0.85
    assert found["learned"].recall > found["frequency"].recall + 0.1
    assert found["learned"].recall_more >= found["learned"].recall


def test_recall_is_what_replay_counts() -> None:
    """One after the other layer, without what cannot be predicted, both count alike."""
    layers = (0, 1, 2, 3)
    meta = TraceMeta(
        model="t", n_layer=4, n_expert=16, n_expert_used=2, page_bytes=9, layers=layers
    )
    rng = np.random.default_rng(8)
    steps = [
        make_step(meta, False, [(il, np.minimum(rng.geometric(0.3, 2), 15)) for il in layers])
        for _ in range(150)
    ]
    trace = Trace(meta=meta, steps=tuple(steps))
    tokens = tokens_of(trace)
    model = train(meta, tokens).model
    for make in (lambda: on_numpy(model), lambda: make_predictor("frequency", 4, 16)):
        mine = judge(make(), meta, [], tokens)
        assert mine.recall == replay_predictor(trace, make(), 2).recall
        assert mine.recall_more == replay_predictor(trace, make(), 3).recall


def test_prompts_are_split_into_tokens() -> None:
    steps = (
        make_step(META, True, [(1, [1, 2, 3, 4, 5, 6]), (2, [7, 8, 9, 10, 11, 12]), (5, [13, 14])]),
        make_step(META, False, [(1, [1, 2, 3, 4]), (5, [5, 6, 7, 8])]),
    )
    found = tokens_of(Trace(meta=META, steps=steps))
    assert [token.starts for token in found] == [True, False, False, False]
    assert found[0].chosen == [(1, [1, 2]), (2, [7, 8])]
    assert found[2].chosen == [(1, [5, 6]), (2, [11, 12]), (5, [13, 14])]
    assert found[3].chosen == [(1, [1, 2, 3, 4]), (5, [5, 6, 7, 8])]


def test_a_layer_that_hardly_ran_does_no_harm() -> None:
    """The last layer of prompts runs for one token of many: few samples, and finite weights."""
    whole = chained_trace(300)
    steps = tuple(
        make_step(META, False, [part for part in step.parts() if part[0] != 5 or i % 50 == 0])
        for i, step in enumerate(whole.steps)
    )
    model, report = run(Trace(meta=META, steps=steps))
    assert named(report)["learned"].recall > 0.98
    assert np.isfinite(model.weight).all() and not model.weight[4].any()


def save(trace: Trace, path: Path) -> Path:
    with TraceWriter(path, trace.meta) as writer:
        for step in trace.steps:
            writer.append(step)
    return path


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_the_command_writes_what_the_engine_reads(tmp_path: Path) -> None:
    path, out = save(chained_trace(400), tmp_path / "t.trace"), tmp_path / "routes.onnx"
    done = call(path, out)
    assert done.exit_code == 0, done.output
    last = json.loads(done.output.splitlines()[-1])
    assert last["judged"][0]["name"] == "learned" and last["judged"][0]["recall"] > 0.99
    assert last["n_bytes"] == out.stat().st_size
    model = read_model(out, *shape_of(META))
    tokens = tokens_of(chained_trace(100, seed=2))
    assert judge(on_numpy(model), META, [], tokens).recall > 0.99
    again = call(path, out)
    assert again.exit_code == 1 and "--force" in again.output
    assert call(path, out, "--force").exit_code == 0
    assert [each.name for each in tmp_path.iterdir() if "part" in each.name] == []


def test_a_written_file_runs_in_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, report = run(chained_trace(300))
    write(model, tmp_path / "routes.onnx", replace=False)
    found = judge(
        load(tmp_path / "routes.onnx", *shape_of(META)), META, [], tokens_of(chained_trace(50, 7))
    )
    assert found.recall > 0.99 and report.judged[0].recall > 0.99


def test_what_is_worse_than_counting_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on a chain, judged where another one holds and few experts are popular."""
    rng = np.random.default_rng(4)
    steps = tuple(
        make_step(META, False, [(il, rng.permutation(2) + il) for il in META.layers])
        for _ in range(200)
    )
    other = save(Trace(meta=META, steps=steps), tmp_path / "other.trace")
    path, out = save(chained_trace(400), tmp_path / "t.trace"), tmp_path / "routes.onnx"
    done = call(path, out, "--held-out", other)
    assert done.exit_code == 1 and "not written" in done.output and not out.exists()
    assert call(path, out, "--held-out", other, "--force").exit_code == 0 and out.exists()


def test_short_and_foreign_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="99 tokens; at least 100"):
        run(chained_trace(99))
    smaller = TraceMeta(
        model="t", n_layer=6, n_expert=8, n_expert_used=2, page_bytes=9, layers=(1, 2)
    )
    step = make_step(smaller, False, [(1, [0, 1]), (2, [2, 3])])
    with pytest.raises(UsageError, match="give two of one model"):
        run(chained_trace(100), Trace(meta=smaller, steps=(step,)))
    huge = TraceMeta(
        model="t", n_layer=9, n_expert=9999, n_expert_used=2, page_bytes=9, layers=(1, 8)
    )
    with pytest.raises(UsageError, match="at most 64 MiB"):  # and not by running out of memory
        run(Trace(meta=huge, steps=()))
    (tmp_path / "t.trace").write_bytes(b"no trace")
    done = call(tmp_path / "t.trace", tmp_path / "o.onnx")
    assert done.exit_code == 1 and "magic" in done.output
    done = call(save(chained_trace(100), tmp_path / "u.trace"), tmp_path / "none" / "o.onnx")
    assert done.exit_code == 1 and "cannot write" in done.output


def test_one_layer_in_a_row_cannot_be_judged() -> None:
    meta = TraceMeta(model="t", n_layer=4, n_expert=8, n_expert_used=1, page_bytes=9, layers=(1, 3))
    steps = tuple(make_step(meta, False, [(1, [0]), (3, [1])]) for _ in range(120))
    with pytest.raises(UsageError, match="two layers in a row"):
        run(Trace(meta=meta, steps=steps))
