"""Is it the same model? Logits bit for bit and greedy answers, against llama.cpp."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.engine import Runtime
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Piece
from edgeroute.runtime.cells import Region, round_cells
from edgeroute.runtime.errors import ComputeError
from edgeroute.tools.bench import pairs
from edgeroute.tools.bench.peer import Peer, PeerParams
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.text import PROMPTS, text_tokens

Logits = npt.NDArray[np.float32]

N_POSITIONS, N_GREEDY, N_UBATCH = 512, 128, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Logits of two engines over one text. NMSE is squared error over reference power.

    Attributes:
        n_positions: positions computed in one batch; `n_single` of them also one by one.
        equal_batched, equal_single: positions whose logits are bit-identical.
        own_nmse: llama.cpp's single positions against its batched ones.
        layers_equal: positions where one graph per layer gave the bits of one graph.
    """

    n_positions: int
    n_single: int
    equal_batched: int
    equal_single: int
    nmse_batched: float
    nmse_single: float
    own_nmse: float
    layers_equal: int
    layers_single_equal: int

    @property
    def identical(self) -> bool:
        """Whether every logit has llama.cpp's bits, batched and one by one."""
        return self.equal_batched == self.n_positions and self.equal_single == self.n_single

    @property
    def layers_identical(self) -> bool:
        """Whether spans change nothing."""
        return self.layers_equal == self.n_positions and self.layers_single_equal == self.n_single


class Deviation:
    """Squared error and reference power, summed over rows."""

    def __init__(self) -> None:
        self.error = self.power = 0.0
        self.n_equal = 0

    def add(self, found: Logits, reference: Logits) -> None:
        """Add rows; both F32 (n, n_vocab)."""
        for a, b in zip(found, reference, strict=True):
            wide = b.astype(np.float64)
            self.error += float(np.sum((a - wide) ** 2))
            self.power += float(np.sum(wide**2))
            self.n_equal += np.array_equal(a, b)

    @property
    def nmse(self) -> float:
        return self.error / self.power if self.power else float("nan")


class Engine:
    """Our forward on one region of cells, without scheduler and sampler."""

    def __init__(self, path: Path, n_cells: int, threads: int, kv_type: str) -> None:
        params = RunParams(n_ctx=n_cells, n_ubatch=N_UBATCH, threads=threads, kv_type=kv_type)
        self.loaded = LoadedModel(path, params)
        self.loaded.device.set_threads(threads)
        region = self.loaded.kv.allocate(n_cells)
        if region is None:
            raise ComputeError(f"a pool of {n_cells} cells had no room for {n_cells}")
        self._region: Region = region

    def run(self, tokens: Sequence[int], pos: int, *, by_layer: bool = False) -> Logits:
        """Compute tokens at `pos` on: logits of all of them, F32 (n, n_vocab)."""
        forward = self.loaded.forward
        piece = Piece(tokens=tokens, pos=pos, region=self._region, n_out=len(tokens))
        logits = forward.run([piece], forward.by_layer() if by_layer else None)
        if logits is None:
            raise ComputeError("the computation was stopped")
        return logits

    def close(self) -> None:
        """Free everything."""
        self.loaded.close()


def compare(
    path: Path, tokens: Sequence[int], *, n_single: int | None = None, threads: int = 1,
    kv_type: str = "f16",
) -> Comparison:  # fmt: skip
    """Compare logits at every position of a text, batched and then token by token."""
    n, n_single = len(tokens), len(tokens) if n_single is None else n_single
    n_cells = round_cells(n)
    batched, single, own, layers, layers_single = (Deviation() for _ in range(5))
    engine = Engine(path, n_cells, threads, kv_type)
    settings = PeerParams(n_ctx=n_cells, threads=threads, n_ubatch=N_UBATCH, kv_type=kv_type)
    try:
        with Peer(path, settings) as peer:
            for start in range(0, n, N_UBATCH):
                part = tokens[start : start + N_UBATCH]
                ours = engine.run(part, start)
                batched.add(ours, peer.decode(part, start, n_out=len(part)))
                layers.add(engine.run(part, start, by_layer=True), ours)
            reference = _rows(peer, tokens[:n_single])
            for pos, token in enumerate(tokens[:n_single]):
                ours = engine.run([token], pos)
                theirs = peer.step(token, pos)[None]
                single.add(ours, theirs)
                own.add(theirs, reference[pos : pos + 1])
                layers_single.add(engine.run([token], pos, by_layer=True), ours)
    finally:
        engine.close()
    return Comparison(
        n_positions=n, n_single=n_single, equal_batched=batched.n_equal,
        equal_single=single.n_equal, nmse_batched=batched.nmse, nmse_single=single.nmse,
        own_nmse=own.nmse, layers_equal=layers.n_equal, layers_single_equal=layers_single.n_equal,
    )  # fmt: skip


def _rows(peer: Peer, tokens: Sequence[int]) -> Logits:
    """Compute a text afresh in batches and leave the context empty."""
    peer.clear()
    parts = [
        peer.decode(part, start, n_out=len(part))
        for start in range(0, len(tokens), N_UBATCH)
        if (part := tokens[start : start + N_UBATCH])
    ]
    peer.clear()
    return np.concatenate(parts)


def greedy(
    path: Path, prompts: Sequence[str], n_tokens: int, threads: int, progress: pairs.Progress
) -> tuple[int, list[str]]:
    """Answer prompts greedily with both engines.

    Returns:
        How many answers have the same tokens, and a sentence for each that has not.
    """
    n_ctx = round_cells(n_tokens + 128)
    differences = []
    with (
        Runtime(path, threads=threads, n_ctx=n_ctx) as runtime,
        Peer(path, PeerParams(n_ctx=n_ctx, threads=threads)) as peer,
    ):
        for i, prompt in enumerate(prompts):
            ids = runtime.encode(prompt)
            ours = list(runtime.generate(prompt_ids=ids, max_tokens=n_tokens, temperature=0.0,
                                         seed=1, prefix="off").token_ids)  # fmt: skip
            theirs = greedy_peer(peer, ids, n_tokens)
            if ours != theirs:
                at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                          min(len(ours), len(theirs)))  # fmt: skip
                differences.append(f"{prompt[:40]!r} differs from token {at} of {len(theirs)} on")
            progress(f"greedy {i + 1}/{len(prompts)}: {len(differences)} differ")
    return len(prompts) - len(differences), differences


def greedy_peer(peer: Peer, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Decode greedily with llama.cpp until the model ends or `n_tokens` are there."""
    peer.clear()
    token = int(np.argmax(peer.prefill(prompt)))
    found: list[int] = []
    while not peer.is_end(token):
        found.append(token)
        if len(found) == n_tokens:
            break
        token = int(np.argmax(peer.step(token, len(prompt) + len(found) - 1)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityParams:
    """How much to compare; `exact` demands llama.cpp's bits and its greedy tokens."""

    n_positions: int = N_POSITIONS
    n_prompts: int = len(PROMPTS)
    n_greedy: int = N_GREEDY
    exact: bool = True


def run(params: BenchParams, progress: pairs.Progress, parity: ParityParams) -> Report:
    """Compare logits over a fixed text, and greedy answers to fixed prompts."""
    progress(f"logits over {parity.n_positions} positions, batched and one by one")
    tokens = _tokens(params, parity.n_positions)
    found = compare(params.path, tokens, threads=params.threads)
    progress("greedy answers")
    prompts = PROMPTS[: parity.n_prompts]
    n_same, differences = greedy(params.path, prompts, parity.n_greedy, params.threads, progress)
    n = found.n_positions
    rows = (
        ("batched, bit-identical positions", f"{found.equal_batched} of {n}"),
        ("one by one, bit-identical positions", f"{found.equal_single} of {found.n_single}"),
        ("batched, NMSE", f"{found.nmse_batched:.3g}"),
        ("one by one, NMSE", f"{found.nmse_single:.3g}"),
        ("llama.cpp's own, one by one against batched, NMSE", f"{found.own_nmse:.3g}"),
        ("one graph per layer, bit-identical positions",
         f"{found.layers_equal} of {n}, {found.layers_single_equal} of {found.n_single}"),
        (f"greedy answers of {parity.n_greedy} tokens, identical", f"{n_same} of {len(prompts)}"),
    )  # fmt: skip
    result: dict[str, object] = asdict(found) | {
        "identical": found.identical,
        "greedy_same": n_same,
        "greedy_prompts": len(prompts),
        "greedy_tokens": parity.n_greedy,
    }
    return Report(
        bench="parity", params=params, columns=("", "found"), rows=rows, results=[result],
        criteria=tuple(_criteria(found, n_same, len(prompts), parity)), notes=tuple(differences),
        timed=False,
    )  # fmt: skip


def _criteria(
    found: Comparison, n_same: int, n_prompts: int, parity: ParityParams
) -> list[Criterion]:
    made = [Criterion(what="positions where a graph per layer gives the same bits",
                      value=found.layers_equal + found.layers_single_equal,
                      limit=found.n_positions + found.n_single)]  # fmt: skip
    if parity.exact or found.identical:
        made += [
            Criterion(what="bit-identical positions, batched", value=found.equal_batched,
                      limit=found.n_positions),
            Criterion(what="bit-identical positions, one by one", value=found.equal_single,
                      limit=found.n_single),
            Criterion(what="identical greedy answers", value=n_same, limit=n_prompts),
        ]  # fmt: skip
    else:
        made += [
            Criterion(what=f"NMSE {how}, at most llama.cpp's own", value=value,
                      limit=found.own_nmse, at_most=True)
            for how, value in (("batched", found.nmse_batched), ("one by one", found.nmse_single))
        ]  # fmt: skip
    return made


def _tokens(params: BenchParams, n_positions: int) -> list[int]:
    with Runtime(params.path, threads=1, n_ctx=256) as runtime:
        return text_tokens(runtime.encode, n_positions)
