"""Bridges: answers are the plain ones, what they take is booked, hostile files are refused."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from edgeroute import Runtime
from edgeroute.bridges import SUFFIX, Bridge, bridge_layers
from edgeroute.drafters import Part, SelfDrafter
from edgeroute.models.depth_file import fingerprint
from edgeroute.models.forward import Forward, Piece
from edgeroute.models.layered import LayeredForward
from edgeroute.models.standins import tensor_name
from edgeroute.paging_layers import BRIDGE, FIRST_KEPT
from edgeroute.runtime.depth import all_run
from edgeroute.runtime.errors import DepthFileError, EdgerouteError, ModelFileError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.skippers.guesses import Guess, above, chain
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.skippers.speculate import PLAIN, Choice, Speculator
from edgeroute.tools import synth
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from edgeroute.tools.standin_records import StandInTensor, unit_power
from tests.edgeroute.layered_lab import plain_machine

PARAMS: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "threads": 1}
PROMPTS = [[*range(5, 40), *range(5, 30)], [7, 8, 9] * 12]
N_LAYER, RANK = 10, 32


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_machine(monkeypatch)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("bare") / "model.gguf"
    spec = replace(synth.ARCHITECTURES["llama"], n_layer=N_LAYER, weight_type="Q8_0")
    synth.write(spec, found)
    return found


@pytest.fixture
def path(bare: Path, tmp_path: Path) -> Path:
    """A model with a drafts file beside it: a bridge for every block behind the first layers."""
    found = tmp_path / "model.gguf"
    shutil.copy(bare, found)
    write(found)
    return found


def tensors_of(n_embd: int, end: int) -> dict[str, StandInTensor]:
    rng, kind = np.random.default_rng(end), GGMLQuantizationType.F16

    def matrix(n_out: int, n_in: int) -> StandInTensor:
        values = rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)
        return StandInTensor.matrix(values.astype(np.float32), kind)

    return {
        "norm": StandInTensor.vector(np.ones(n_embd, np.float32)),
        "before": StandInTensor.vector(np.full(n_embd, 0.5, np.float32)),
        "a": matrix(RANK, 2 * n_embd), "b": matrix(n_embd, RANK),
    }  # fmt: skip


def write(model: Path, *, digest: str | None = None, drop: str = "", wide: bool = False) -> None:
    """Write the drafts file of a model, right or wrong."""
    plans, tensors = [], {}
    with GGUFFile.open(model) as file:
        n_embd = file.tensors["token_embd.weight"].ne[0]
        digest = digest or fingerprint(file)
    for end in range(FIRST_KEPT + 1, N_LAYER):
        name = f"bridge-{FIRST_KEPT}-{end}"
        plans.append(DepthPlan(name=name, layers=bridge_layers(FIRST_KEPT, end, N_LAYER)))
        found = tensors_of(2 * n_embd if wide else n_embd, end)
        tensors |= {tensor_name(name, FIRST_KEPT, "layer", part): tensor
                    for part, tensor in found.items() if part != drop}  # fmt: skip
    content = DepthContent(model=digest, data="0" * 64, plans=plans, tensors=tensors)
    write_depth_file(model.with_suffix(SUFFIX), content)


def enough(path: Path) -> int:
    """About a layer less than everything: what two rooms take streams, too."""
    with Runtime(path, **PARAMS, speculate="off") as runtime:
        whole = runtime._loaded.plan.total_bytes
    return whole - path.stat().st_size // 12


class _Always(Speculator):
    """Drafts by the model itself, five tokens each time it can."""

    def choose(self, offers: Any) -> Choice:
        return Choice("self", min(5, offers["self"])) if "self" in offers else PLAIN


def answers(runtime: Runtime) -> list[tuple[int, ...]]:
    return [runtime.generate(prompt_ids=p, max_tokens=16, prefix="off").token_ids for p in PROMPTS]


@pytest.fixture
def plain(path: Path) -> list[tuple[int, ...]]:
    with Runtime(path, **PARAMS, speculate="off", memory=enough(path)) as runtime:
        return answers(runtime)


@pytest.fixture
def drafting(path: Path) -> Iterator[Runtime]:
    with Runtime(path, **PARAMS, speculate="self", memory=enough(path)) as runtime:
        speculation = runtime._scheduler.speculation
        assert speculation is not None
        speculation.policy = _Always(15)
        yield runtime


def test_answers_are_the_plain_ones_with_a_bridge_and_without(
    path: Path, drafting: Runtime, plain: list[tuple[int, ...]]
) -> None:
    assert answers(drafting) == plain
    forward = drafting._loaded.forward
    assert isinstance(forward, LayeredForward) and forward.bridge is not None
    found: Any = drafting.stats()["speculation"]
    assert found["drafted"] > 5 * len(PROMPTS)
    path.with_suffix(SUFFIX).unlink()
    with Runtime(path, **PARAMS, speculate="self", memory=enough(path)) as runtime:
        assert answers(runtime) == plain
        other = runtime._loaded.forward
        assert isinstance(other, LayeredForward) and other.bridge is None


def test_what_a_bridge_takes_is_booked(path: Path, drafting: Runtime) -> None:
    entries: Any = drafting.stats()["memory"]
    n_embd = drafting._loaded.model.hparams.n_embd
    assert entries[BRIDGE] >= 2 * 3 * RANK * n_embd
    with Runtime(path, **PARAMS, speculate="lookup", memory=enough(path)) as runtime:
        others: Any = runtime.stats()["memory"]
    assert BRIDGE not in others


def test_a_bridge_computes_what_its_tensors_say(path: Path, drafting: Runtime) -> None:
    """The draft's logits are those of the resident far layers behind the map, in numpy."""
    loaded = drafting._loaded
    forward = loaded.forward
    assert isinstance(forward, LayeredForward) and forward.bridge is not None
    end, eps = forward.bridge.end, loaded.model.hparams.norm_rms_eps
    region = loaded.kv.allocate(64)
    assert region is not None
    text, last = PROMPTS[0][:20], PROMPTS[0][20]
    assert forward.run([Piece(tokens=text, pos=0, region=region)]) is not None
    before = forward.state_before(end, region, len(text) - 1)
    assert before is not None
    assert forward.state_before(end, region, len(text)) is None
    piece = Piece(tokens=[last], pos=len(text), region=region)
    near_steps = all_run(range(FIRST_KEPT))
    (span,) = Forward.spans(near_steps)
    forward.run([piece], [span._replace(output=False)])
    near = forward.residual(1)
    n_embd = near.shape[1]
    found = {name: tensor.decode() for name, tensor in tensors_of(n_embd, end).items()}
    h = np.concatenate([unit_power(near, eps), 0.5 * unit_power(before[None], eps)], axis=1)
    state = near + (h @ found["a"].T) @ found["b"].T
    forward.set_residual(state)
    (span,) = Forward.spans(all_run(range(end, N_LAYER)))
    expected = forward.run([piece], [span._replace(embed=False)])
    forward.go_on_from(before)
    drafted = forward.run([piece], forward.bridge.spans)
    assert expected is not None and drafted is not None
    np.testing.assert_allclose(drafted, expected, atol=2e-2 * float(np.abs(expected).max()))
    left = forward.state_before(end, region, len(text))
    assert left is not None
    np.testing.assert_allclose(left, state[0], atol=1e-2 * float(np.abs(state).max()))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"digest": "1" * 64}, "another model"), ({"drop": "a"}, "needs norm"),
     ({"drop": "before"}, "extents"), ({"wide": True}, "extents")],
)  # fmt: skip
def test_a_drafts_file_that_does_not_fit_is_refused(
    path: Path, wrong: dict[str, Any], why: str
) -> None:
    memory = enough(path)
    write(path, **wrong)
    with pytest.raises(DepthFileError, match=why):
        Runtime(path, **PARAMS, speculate="self", memory=memory)
    with Runtime(path, **PARAMS, speculate="off", memory=memory) as runtime:
        assert len(answers(runtime)) == len(PROMPTS)


def test_a_corrupted_drafts_file_is_refused(path: Path) -> None:
    memory, file = enough(path), path.with_suffix(SUFFIX)
    whole = file.read_bytes()
    for cut in (3, 40, len(whole) // 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(ModelFileError):
            Runtime(path, **PARAMS, memory=memory)
    rng = np.random.default_rng(1)
    for _ in range(20):  # whatever is in the header, no more than an error comes of it
        raw = bytearray(whole)
        for at in rng.integers(0, min(len(raw), 3000), 8):
            raw[at] = int(rng.integers(0, 256))
        file.write_bytes(raw)
        try:
            Runtime(path, **PARAMS, memory=memory).close()
        except EdgerouteError as error:
            assert str(error)


@pytest.mark.parametrize("change", ["skips more", "runs more", "at the beginning", "at the end"])
def test_a_plan_that_crosses_no_block_is_no_bridge(change: str) -> None:
    layers = list(bridge_layers(2, 5, 8))
    if change == "skips more":
        layers[6] = LayerDepth(attn="skip", ffn="skip")
    elif change == "runs more":
        layers[3] = LayerDepth(ffn="skip")
    elif change == "at the beginning":
        layers = list(bridge_layers(0, 5, 8))
    else:
        layers = list(bridge_layers(2, 8, 8))
    with pytest.raises(DepthFileError, match="no bridge"):
        Bridge.of(DepthPlan(name="x", layers=tuple(layers)))


def test_a_bridge_serves_only_while_just_its_block_streams(
    drafting: Runtime, plain: list[tuple[int, ...]]
) -> None:
    store = drafting._loaded.layers
    assert store is not None
    forward = drafting._loaded.forward
    assert isinstance(forward, LayeredForward) and forward.bridge is not None
    assert forward.bridge.block == store.streamed
    speculation = drafting._scheduler.speculation
    assert speculation is not None
    part: Any = speculation._drafters["self"]
    part._part._bridge = forward.bridge._replace(block=frozenset({1}))
    part._part._found.clear()
    assert answers(drafting) == plain
    (found,) = part._part._found.values()
    assert found.entered is None and len(found.spans) == 1


def test_bridges_are_for_drafts_only(path: Path) -> None:
    """As a depth plan, one would be told nothing of the token before."""
    shutil.move(path.with_suffix(SUFFIX), path.with_suffix(".depth"))
    with pytest.raises(DepthFileError, match="only drafts"):
        Runtime(path, **PARAMS, depth=f"bridge-{FIRST_KEPT}-5")


class _Says:
    """A forward whose likeliest token has a given probability, of ten."""

    def __init__(self, chance: float) -> None:
        rest = np.log((1 - chance) / 9)
        self._logits = np.full((1, 10), rest, np.float32)
        self._logits[0, 7] = np.log(chance)
        self.kv = SimpleNamespace(is_host=False)
        self.model = SimpleNamespace(n_swa=None)
        self.device = SimpleNamespace(n_threads=1)
        self.ran = 0

    def run(self, pieces: Any, spans: Any, *, borrow: bool) -> Any:
        self.ran += 1
        return self._logits


def drafted(forward: Any, n_tokens: int = 8) -> list[Guess]:
    sequence = SimpleNamespace(tokens=[1], n_past=0, region=None)
    request: Any = SimpleNamespace(sequence=sequence, interrupted=lambda: False, lora=None)
    return SelfDrafter(forward, lambda _: Part(()), lambda _: False).draft(request, n_tokens)


@pytest.mark.parametrize(
    ("chance", "length"), [(0.16, 1), (0.2, 2), (0.5, 3), (0.6, 4), (0.999, 8)]
)
def test_a_chain_ends_where_it_is_hardly_right(chance: float, length: int) -> None:
    assert drafted(_Says(chance)) == chain([7] * length)


@pytest.mark.parametrize(("chance", "depth", "ran"), [(0.2, 2, 2), (0.5, 3, 3), (0.999, 8, 8)])
def test_a_tree_grows_where_its_draft_is_sure(chance: float, depth: int, ran: int) -> None:
    """Guesses for one place where it is not, one behind the other where it is."""
    forward = _Says(chance)
    forward.kv.is_host = True
    found = drafted(forward)
    assert len(found) == 8
    assert max(len(above(found, i)) for i in range(8)) + 1 == depth
    assert forward.ran == ran
