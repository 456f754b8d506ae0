"""Stand-ins fitted to planted structure: what does not matter goes, what is linear is found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from edgeroute.runtime.depth import Step
from edgeroute.runtime.errors import UnsupportedModelError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools import standin_parts, synth
from edgeroute.tools.convert.moe_activations import DenseModel
from edgeroute.tools.standin_data import Streams
from edgeroute.tools.standin_fit import Ridge, Sample, reduce_rank, token_weights
from edgeroute.tools.standin_records import StandInTensor, StandInValues, down_kind
from edgeroute.tools.standin_study import LayerStudy, Rival, Study, study
from edgeroute.tools.standins import StandInParams, StandInShape, fit_plan, steps_of

Floats = npt.NDArray[np.float32]
N_FF, N_EMBD, KEPT = 512, 256, 320


def windows(n: int = 24, n_window: int = 64, seed: int = 3) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(4, 384, (n, n_window)).astype(np.int32)


def edit(source: Path, out: Path, changes: dict[str, Any]) -> None:
    """Write a model again with some of its F32 tensors changed by functions."""
    reader = GGUFReader(source)
    field = reader.fields["general.architecture"]
    writer = GGUFWriter(out, str(field.contents()))
    for name, kept in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        sub_type = kept.types[-1] if len(kept.types) > 1 else None
        writer.add_key_value(name, kept.contents(), kept.types[0], sub_type)
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        change = changes.get(tensor.name)
        writer.add_tensor(tensor.name, data if change is None else change(data),
                          raw_dtype=tensor.tensor_type)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    synth.make("qwen2", path, n_layer=3)
    return path


@pytest.fixture(scope="module")
def idle(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, npt.NDArray[Any]]:
    """A model of whose second layer some neurons are never heard, and which do speak."""
    speaking = np.sort(np.random.default_rng(5).permutation(N_FF)[:KEPT])

    def silence(down: Floats) -> Floats:
        found = np.zeros_like(down)
        found[:, speaking] = down[:, speaking]
        return found

    path = tmp_path_factory.mktemp("idle") / "idle.gguf"
    edit(plain, path, {"blk.1.ffn_down.weight": silence})
    return path, speaking


def narrow(il: int = 1, width: int = KEPT, rank: int = 0) -> StandInShape:
    return StandInShape(il=il, part="ffn", width=width, rank=rank)


def test_neurons_that_never_matter_go_without_loss(
    idle: tuple[Path, npt.NDArray[Any]],
) -> None:
    path, speaking = idle
    found = fit_plan(path, windows(), [narrow()], StandInParams(down_type="F16"))
    assert found.explained_ratio["blk.1.ffn"] > 0.9999
    with GGUFFile.open(path) as file:
        model = DenseModel(file)
        for part in ("gate", "up"):  # the file's own rows, bit for bit
            rows = model.matrix(f"blk.1.ffn_{part}.weight")[speaking]
            assert np.array_equal(found.tensors[f"blk.1.ffn.{part}"].decode(), rows)
    assert found.n_weights == 3 * KEPT * N_EMBD and found.n_replaced == 3 * N_FF * N_EMBD
    assert found.saved_ratio == pytest.approx(3 * (N_FF - KEPT) * N_EMBD / found.n_model)


def test_a_refit_speaks_for_neurons_that_are_gone(plain: Path, tmp_path: Path) -> None:
    """A quarter of the neurons are softer twins of others: these can say what twins said."""
    n_twins = N_FF // 4

    def twin(rows: Floats) -> Floats:
        return np.concatenate([rows[:-n_twins], rows[:n_twins]])

    def soften(down: Floats) -> Floats:
        found = down.copy()
        found[:, -n_twins:] *= np.float32(0.25)
        return found

    path = tmp_path / "twins.gguf"
    edit(plain, path, {
        "blk.1.ffn_gate.weight": twin, "blk.1.ffn_up.weight": twin, "blk.1.ffn_down.weight": soften,
    })  # fmt: skip
    shape = narrow(width=N_FF - n_twins)
    missed = {}
    for strength in (0.01, 1e6):  # as good as none, and so strong that nothing is refitted
        params = StandInParams(down_type="F16", strengths=(strength,))
        found = fit_plan(path, windows(), [shape], params)
        missed[strength] = 1 - found.explained_ratio["blk.1.ffn"]
    assert missed[0.01] < 0.1 * missed[1e6] < 0.1


def test_a_planted_map_of_low_rank_is_found(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that is linear in its normed input, of rank 5, with a constant."""
    rng = np.random.default_rng(7)
    planted = (rng.standard_normal((N_EMBD, 5)) @ rng.standard_normal((5, N_EMBD)) / 16).astype(
        np.float32
    )

    def add_linear(self: DenseModel, il: int, x: Floats, n_window: int) -> None:
        x += self.norm(f"blk.{il}.attn_norm", x) @ planted + np.float32(0.25)

    monkeypatch.setattr(DenseModel, "add_attention", add_linear)
    params = StandInParams(strengths=(1e-4,))
    shape = StandInShape(il=1, part="attn", rank=5)
    found = fit_plan(plain, windows(64), [shape], params)
    assert found.explained_ratio["blk.1.attn"] > 0.99
    a, b = (found.tensors[f"blk.1.attn.{name}"] for name in "ab")
    assert a.rows.shape == (5, N_EMBD) and b.rows.shape == (N_EMBD, 5)
    poorer = fit_plan(plain, windows(64), [replace(shape, rank=3)], params)
    assert poorer.explained_ratio["blk.1.attn"] < 0.95


def test_what_makes_the_state_at_position_0_runs(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for all the same, it is left out: nothing may stand in for it."""
    real = DenseModel.add_attention

    def make_state(self: DenseModel, il: int, x: Floats, n_window: int) -> None:
        real(self, il, x, n_window)
        if il == 1:
            x[::n_window, 7] += 500

    monkeypatch.setattr(DenseModel, "add_attention", make_state)
    shapes = [StandInShape(il=il, part="attn", rank=32) for il in range(3)]
    found = fit_plan(plain, windows(), shapes)
    assert found.shapes == (shapes[0], shapes[2])
    assert {name.rpartition(".")[0] for name in found.tensors} == {"blk.0.attn", "blk.2.attn"}
    assert found.steps(3)[1] == Step(1)


@pytest.mark.parametrize("part", ["attn", "ffn", "layer"])
def test_on_text_kept_apart_it_explains_more_than_a_constant(plain: Path, part: Any) -> None:
    shapes = [StandInShape(il=1, part=part, rank=64)]
    found = fit_plan(plain, windows(128, 32), shapes)
    assert 0.02 < found.explained_ratio[f"blk.1.{part}"] < 1


def test_position_0_gets_nothing_and_weighs_nothing(plain: Path) -> None:
    found = fit_plan(plain, windows(), [StandInShape(il=0, part="layer", rank=8, width=64)])
    values = StandInValues.of({n.rpartition(".")[2]: t for n, t in found.tensors.items()})
    x = np.random.default_rng(2).standard_normal((128, N_EMBD)).astype(np.float32)
    y = values.outputs(x, 64, 1e-5)
    assert not y[[0, 64]].any() and y[1:64].any(axis=1).all()
    weights = token_weights(x, 64)
    assert not weights[[0, 64]].any() and weights[1:64].min() > 0
    x[[0, 64]] *= 1e4  # a huge state there changes no other token's weight
    assert np.array_equal(token_weights(x, 64), weights)


def test_repair_makes_up_for_what_came_before(plain: Path) -> None:
    """With a poor stand-in below, the one above does better if it may make up for it."""
    shapes = [StandInShape(il=0, part="ffn", width=192), narrow(width=448)]
    text = windows(64)

    def missed(repair: float) -> float:
        with GGUFFile.open(plain) as file:
            model = DenseModel(file)
            streams = Streams(model, text)
            for il, shape in enumerate(shapes):
                streams.add_attention(il)
                streams.follow(il, "attn")
                streams.add_ffn(il)
                found = standin_parts.fit_narrow(streams, shape, StandInParams(repair=repair))
                streams.add_to_ours(found.outputs)
            at = streams.n_fit
            return float(((streams.full - streams.ours)[at:] ** 2).sum())

    assert missed(1.0) < missed(0.0)


def test_a_stopped_fit_goes_on_where_it_stopped(plain: Path, tmp_path: Path) -> None:
    shapes = [narrow(il, 384) for il in range(3)]
    whole = fit_plan(plain, windows(), shapes)

    class Stopped(Exception):
        pass

    def stop(phase: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        fit_plan(plain, windows(), shapes, StandInParams(work=tmp_path / "w", progress=stop))
    seen: list[tuple[int, int]] = []
    again = StandInParams(work=tmp_path / "w", progress=lambda _, n, total: seen.append((n, total)))
    found = fit_plan(plain, windows(), shapes, again)
    assert seen == [(3, 3)]
    assert found.explained_ratio == whole.explained_ratio
    for name, tensor in whole.tensors.items():
        assert np.array_equal(found.tensors[name].rows, tensor.rows), name
    # Another fit in the same folder begins afresh; so does one whose state is half written.
    fit_plan(plain, windows(seed=4), shapes[:1], replace(again, work=tmp_path / "w"))
    assert seen[1:] == [(1, 1)]
    (tmp_path / "w" / "streams.npz").write_bytes(b"PK\x03\x04 half")
    fit_plan(plain, windows(seed=4), shapes[:1], again)
    assert seen[2:] == [(1, 1)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "no stand-in is asked for"),
        ([StandInShape(il=3, part="ffn", width=64)], "ffn of layer 3"),
        ([StandInShape(il=0, part="attn", width=64)], "no neurons"),
        ([StandInShape(il=0, part="ffn")], "neither rank nor width"),
        ([StandInShape(il=0, part="ffn", width=513)], "width 513"),
        ([StandInShape(il=0, part="attn", rank=257)], "rank 257"),
        ([narrow(), narrow()], "twice"),
        ([narrow(), StandInShape(il=1, part="layer", rank=8)], "another for a part"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(
    plain: Path, shapes: list[StandInShape], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fit_plan(plain, windows(), shapes)


def test_text_and_settings_that_make_no_sense_are_refused(plain: Path, tmp_path: Path) -> None:
    for text, message in (
        (windows(1), "at least two windows"),
        (windows()[:, :1], "at least two tokens"),
        (windows() + 10_000, "token ids from"),
    ):
        with pytest.raises(UsageError, match=message):
            fit_plan(plain, text, [narrow()])
    for params, message in (
        (StandInParams(down_type="Q4_K"), "Q4_K"),
        (StandInParams(strengths=()), "strengths"),
        (StandInParams(repair=2.0), "repair is 2.0"),
    ):
        with pytest.raises(UsageError, match=message):
            fit_plan(plain, windows(), [narrow()], params)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot keep work"):
        fit_plan(plain, windows(), [narrow()], StandInParams(work=tmp_path / "file"))
    synth.make("gemma3", tmp_path / "gemma.gguf", n_layer=1)
    with pytest.raises(UnsupportedModelError, match="gemma3"):
        fit_plan(tmp_path / "gemma.gguf", windows(), [narrow()])


def test_fewer_tokens_than_inputs_give_the_same_map() -> None:
    """Both ways to solve a ridge agree; 40 tokens of 60 inputs, and the same ones thrice."""
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((40, 60)).astype(np.float32)
    targets = rng.standard_normal((40, 8)).astype(np.float32)
    start = rng.standard_normal((60, 8)).astype(np.float32)
    few = Sample(inputs=inputs, targets=targets, weights=np.ones(40, np.float32))
    many = Sample(inputs=np.tile(inputs, (3, 1)), targets=np.tile(targets, (3, 1)),
                  weights=np.ones(120, np.float32))  # fmt: skip
    for strength in (0.1, 3.0):
        found = [Ridge(sample, start).solve(strength) for sample in (few, many)]
        assert np.allclose(found[0], found[1], atol=1e-4)
    assert np.allclose(Ridge(few, start).solve(1e8), start, atol=1e-4)


def test_rank_is_cut_where_outputs_lose_least() -> None:
    """Input 0 is a thousand times as strong as input 1: rank 1 must keep what it does."""
    linear = np.array([[1, 0], [0, 5]], np.float32)
    moments = np.diag([1e6, 1]).astype(np.float32)
    a, b = reduce_rank(linear, linear.T @ moments @ linear, 1)
    assert np.allclose(a @ b, [[1, 0], [0, 0]], atol=1e-4)


def test_the_study_narrows_what_costs_least(idle: tuple[Path, npt.NDArray[Any]]) -> None:
    path, _ = idle
    found = study(path, windows(40))
    assert [len(layer.lost) for layer in found.layers] == [N_FF // found.step + 1] * 3
    assert found.layers[1].lost[2] == pytest.approx(0, abs=1e-6)
    assert found.layers[1].kl_nats < 0.1 * min(found.layers[0].kl_nats, found.layers[2].kl_nats)
    # 192 idle neurons of 512: what they save is taken there and nowhere else.
    saved = 3 * N_EMBD * 192 / found.n_model
    assert found.shapes(saved * 0.99) == (narrow(width=KEPT),)
    assert sum(N_FF - s.width for s in found.shapes(2 * saved)) >= 2 * 192
    for nonsense in (0.0, 0.99, -1.0):
        with pytest.raises(UsageError, match="cannot save"):
            found.shapes(nonsense)


def test_a_stopped_study_goes_on(plain: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(phase: str, done: int, total: int) -> None:
        seen.append(done)
        if seen == [1, 2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(plain, windows(16), work=tmp_path, progress=stop)
    found = study(plain, windows(16), work=tmp_path, progress=stop)
    assert seen == [1, 2, 3]
    assert found == study(plain, windows(16))


def test_widths_follow_the_marginal_cost() -> None:
    lost = tuple((i / 8) ** 2 for i in range(9))
    layers = (LayerStudy(lost=lost, kl_nats=0.1), LayerStudy(lost=lost, kl_nats=0.3))
    found = Study(n_ff=1024, n_embd=8, n_model=10 * 3 * 8 * 128, step=128, layers=layers)
    # Four steps: the first layer's first three cost 1, 3 and 5 parts, the other's 3 and 9.
    assert {s.il: (1024 - s.width) // 128 for s in found.shapes(0.4)} == {0: 3, 1: 1}


def test_an_attention_is_taken_where_its_time_costs_less() -> None:
    lost = tuple((i / 8) ** 2 for i in range(9))
    layers = (LayerStudy(lost=lost, kl_nats=0.1), LayerStudy(lost=lost, kl_nats=0.1))
    found = Study(n_ff=1024, n_embd=8, n_model=10 * 3 * 8 * 128, step=128, layers=layers)
    attn = StandInShape(il=1, part="attn", rank=2)
    # A step of neurons costs 0.025 and 0.075 nats, and takes an eighth of its layer's time; the
    # attention saves as many weights as two steps. The second layer's time is twice the first's.
    rival = Rival(attn, 0.06, 2 * 3 * 8 * 128, 1.0)

    def shapes(saved: float, kl: float) -> dict[tuple[int, str], int]:
        chosen = found.shapes(saved, (8.0, 16.0), [rival._replace(kl_nats=kl)])
        return {(s.il, s.part): s.width for s in chosen}

    assert shapes(0.2, 0.024) == {(1, "ffn"): 896, (1, "attn"): 0}
    assert shapes(0.2, 0.026) == {(0, "ffn"): 896, (1, "ffn"): 896}
    assert shapes(0.3, 0.026) == {(0, "ffn"): 896, (1, "ffn"): 896, (1, "attn"): 0}


def test_steps_use_what_is_there() -> None:
    shapes = [StandInShape(il=0, part="layer", rank=1), StandInShape(il=2, part="ffn", width=1)]
    acts = [(step.attn, step.ffn) for step in steps_of(shapes, 3)]
    assert acts == [("approximate", "approximate"), ("run", "run"), ("run", "approximate")]


def test_rows_that_blocks_do_not_fit_are_f16() -> None:
    values = np.linspace(-1, 1, 4 * 40, dtype=np.float32).reshape(4, 40)
    tensor = StandInTensor.matrix(values, GGMLQuantizationType.Q8_0)
    assert tensor.kind == GGMLQuantizationType.F16 and tensor.n_values == 160
    fits = StandInTensor.matrix(values[:, :32], GGMLQuantizationType.Q8_0)
    assert fits.kind == GGMLQuantizationType.Q8_0 and fits.n_values == 128
    assert np.allclose(fits.decode(), values[:, :32], atol=0.01)


@pytest.mark.parametrize(
    ("own", "wanted", "width", "kind"),
    [("Q4_K", "own", 512, "Q4_K"), ("Q6_K", "own", 512, "Q6_K"), ("Q4_K", "own", 480, "Q8_0"),
     ("Q4_1", "own", 480, "Q4_1"), ("IQ2_XXS", "own", 512, "Q8_0"), ("F32", "own", 512, "F16"),
     ("Q4_K", "Q5_0", 512, "Q5_0"), ("Q4_K", "F16", 512, "F16")],
)  # fmt: skip
def test_a_refitted_projection_is_stored_as_the_models_own(
    own: str, wanted: str, width: int, kind: str
) -> None:
    kinds = GGMLQuantizationType
    assert down_kind(kinds[own], wanted, width) == kinds[kind]


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "F16", "F32"])
def test_what_is_stored_comes_back(kind: str) -> None:
    values = np.random.default_rng(1).standard_normal((6, 512)).astype(np.float32)
    found = StandInTensor.matrix(values, GGMLQuantizationType[kind])
    assert found.n_values == values.size
    lost = ((found.decode() - values) ** 2).mean() / (values**2).mean()
    assert lost < (0.01 if "4" in kind else 0.003)
