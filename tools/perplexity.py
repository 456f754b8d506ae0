"""How well a model predicts text, and how far one model's predictions are from another's.

Text is cut into windows of `n_ctx` tokens; every token but a window's first is predicted
from those before it in the window. Perplexities compare only between runs over the same
text, tokenizer and `n_ctx`.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import click
import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Piece
from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.errors import ComputeError, UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.sampler import log_softmax
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.tools.bench.peer import Peer, PeerParams
from edgeroute.tools.convert.moe_text import code_documents, prose_documents, read_text

Logits = npt.NDArray[np.float32]
Scorer = Callable[[Sequence[int]], Logits]
"""Computes a window afresh: logits after each of its tokens, F32 (n_tokens, n_vocab)."""

EngineName = Literal["edgeroute", "llama.cpp"]
_ROWS_AT_ONCE: Final = 64  # of a vocabulary each, in double precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Mean negative log-likelihood of `n_tokens` predicted tokens."""

    n_tokens: int
    nats: float

    @property
    def ppl(self) -> float:
        """The perplexity: e to the nats."""
        return math.exp(self.nats)


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A model's predictions against a reference's at the same `n_tokens` places.

    Attributes:
        nats_reference, nats: mean negative log-likelihood of the text under either.
        kl_nats: mean divergence of the model's distribution from the reference's.
        top1_ratio: share of places where both hold the same token likeliest.
    """

    n_tokens: int
    nats_reference: float
    nats: float
    kl_nats: float
    top1_ratio: float


def perplexity(
    path: Path, texts: Sequence[str], n_ctx: int = 512, *,
    threads: int = 1, engine: EngineName = "edgeroute",
) -> Perplexity:  # fmt: skip
    """Score texts under a model file.

    Args:
        path: the model.
        texts: scored apart, never as one text's continuation.
        n_ctx: tokens of a window, at least 2.
        threads: compute threads.
        engine: whose arithmetic. llama.cpp ends the process on a graph too large for it.

    Raises:
        UsageError: no text has two tokens, or `n_ctx` is too small.
        ModelFileError, UnsupportedModelError, CapacityError: the model cannot be loaded.
    """
    cut = windows(path, texts, n_ctx)
    with open_scorer(path, n_ctx, threads=threads, engine=engine) as score:
        return measure(score, cut)


def measure(score: Scorer, cut: Sequence[Sequence[int]]) -> Perplexity:
    """Score windows of token ids."""
    total, n_tokens = 0.0, 0
    for window in cut:
        for logs, ids in _log_probabilities(score(window), window):
            total -= float(logs[np.arange(len(ids)), ids].sum())
            n_tokens += len(ids)
    return Perplexity(n_tokens=n_tokens, nats=total / n_tokens)


def compare(reference: Scorer, score: Scorer, cut: Sequence[Sequence[int]]) -> Divergence:
    """Score windows of token ids under two models, place by place."""
    sums = np.zeros(4)  # nats of the reference, nats, divergence, same top
    n_tokens = 0
    for window in cut:
        theirs = np.array(reference(window))  # a scorer may lend memory that the next run reuses
        pairs = zip(_log_probabilities(theirs, window),
                    _log_probabilities(score(window), window), strict=True)  # fmt: skip
        for (wanted, ids), (found, _) in pairs:
            rows = np.arange(len(ids))
            divergence = np.einsum("ij,ij->i", np.exp(wanted), wanted - found)
            same = wanted.argmax(axis=1) == found.argmax(axis=1)
            sums += [-wanted[rows, ids].sum(), -found[rows, ids].sum(), divergence.sum(),
                     same.sum()]  # fmt: skip
            n_tokens += len(ids)
    means = [float(value) for value in sums / n_tokens]
    return Divergence(n_tokens=n_tokens, nats_reference=means[0], nats=means[1],
                      kl_nats=means[2], top1_ratio=means[3])  # fmt: skip


def windows(path: Path, texts: Sequence[str], n_ctx: int = 512) -> list[list[int]]:
    """Cut texts into windows with the model's own tokenizer, each opened as it expects.

    Raises:
        UsageError: nothing to predict.
    """
    with GGUFFile.open(path) as file, Tokenizer.open(file) as tokenizer:
        start = tokenizer.encode("", add_special=True, parse_special=False)
        n_text = n_ctx - len(start)
        found = []
        for text in texts:
            ids = tokenizer.encode(text, add_special=False, parse_special=False)
            parts = [start + ids[at : at + n_text] for at in range(0, len(ids), max(1, n_text))]
            found += [part for part in parts if len(part) > 1]
    if n_text < 1 or not found:
        raise UsageError(f"{len(texts)} texts in windows of {n_ctx} tokens leave nothing to "
                         "predict; two tokens of one text are needed")  # fmt: skip
    return found


def held_out_texts(n_chars: int = 24_000) -> tuple[list[str], list[str]]:
    """Return prose and code from this Python installation that no calibration ever sees.

    Args:
        n_chars: about so much of each.
    """
    found: list[list[str]] = []
    for documents in (prose_documents(1, True), code_documents(1, True)):
        texts: list[str] = []
        for text in documents:
            if sum(len(t) for t in texts) >= n_chars:
                break
            texts.append(text[: n_chars // 4])
        found.append(texts)
    return found[0], found[1]


@contextlib.contextmanager
def open_scorer(
    path: Path, n_ctx: int, *, threads: int = 1, engine: EngineName = "edgeroute"
) -> Iterator[Scorer]:
    """Load a model to score windows of up to `n_ctx` tokens with."""
    n_cells = round_cells(n_ctx)
    if engine == "llama.cpp":
        settings = PeerParams(n_ctx=n_cells, threads=threads, n_ubatch=n_cells)
        with Peer(path, settings) as peer:
            yield lambda window: _run_peer(peer, window)
        return
    params = RunParams(n_ctx=n_cells, n_ubatch=n_cells, threads=threads)
    with contextlib.closing(LoadedModel(path, params)) as loaded:
        loaded.device.set_threads(threads)
        yield scorer_of(loaded)


def scorer_of(loaded: LoadedModel) -> Scorer:
    """Score windows with a model that is loaded already; takes all of its free cells."""
    region = loaded.kv.allocate(loaded.kv.n_cells)
    if region is None:
        raise ComputeError("scoring needs all cells of the model's KV cache; some are in use")

    def score(window: Sequence[int]) -> Logits:
        piece = Piece(tokens=window, pos=0, region=region, n_out=len(window))
        logits = loaded.forward.run([piece])
        if logits is None:
            raise ComputeError("the computation was stopped")
        return logits

    return score


def _run_peer(peer: Peer, window: Sequence[int]) -> Logits:
    peer.clear()
    return peer.decode(window, 0, n_out=len(window))


def _log_probabilities(
    logits: Logits, window: Sequence[int]
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """Yield rows of log-probabilities with the tokens that came, a few at a time."""
    ids = np.array(window[1:], np.int64)
    for at in range(0, len(ids), _ROWS_AT_ONCE):
        part = ids[at : at + _ROWS_AT_ONCE]
        yield log_softmax(logits[at : at + len(part)].astype(np.float64)), part


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--text",
    "files",
    multiple=True,
    help="Text file; default: this Python's own.",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--reference",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Model to measure the divergence from.",
)
@click.option("--n-ctx", default=512, show_default=True, type=click.IntRange(2, 1 << 20))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 512))
@click.option("--engine", default="edgeroute", type=click.Choice(["edgeroute", "llama.cpp"]))
def main(
    model: Path, files: tuple[Path, ...], reference: Path | None, n_ctx: int, threads: int,
    engine: EngineName,
) -> None:  # fmt: skip
    """Print the perplexity of MODEL on text, one JSON object a line."""
    groups = {str(path): [read_text(path)] for path in files}
    if not files:
        groups["prose"], groups["code"] = held_out_texts()
    with contextlib.ExitStack() as stack:
        score = stack.enter_context(open_scorer(model, n_ctx, threads=threads, engine=engine))
        other = reference and stack.enter_context(
            open_scorer(reference, n_ctx, threads=threads, engine=engine)
        )
        for name, texts in groups.items():
            cut = windows(model, texts, n_ctx)
            found = compare(other, score, cut) if other else measure(score, cut)
            line = {"text": name, "ppl": math.exp(found.nats)} | asdict(found)
            click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
