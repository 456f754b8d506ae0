"""Perplexity and divergence: right by hand, zero against itself, refused without text."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.runtime.errors import ComputeError, UsageError
from edgeroute.tools import perplexity
from edgeroute.tools.synth import make

TEXT = "the time of day is what you have, and that is all there will be about it "


def fixed(rows: list[list[float]]) -> perplexity.Scorer:
    """A model that gives the logarithms of these probabilities whatever it reads."""
    return lambda window: np.log(np.array(rows, np.float32))[: len(window)]


def test_by_hand() -> None:
    """Two windows; the last row of each predicts a token that nobody knows."""
    rows = [[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [1.0, 0.5, 0.5]]
    found = perplexity.measure(fixed(rows), [[2, 0, 1], [0, 1]])
    wanted = -(math.log(0.5) + math.log(0.75) + math.log(0.25)) / 3
    assert found.n_tokens == 3 and found.nats == pytest.approx(wanted, rel=1e-6)
    assert found.ppl == pytest.approx(math.exp(wanted), rel=1e-6)


def test_divergence_by_hand() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    found = perplexity.compare(fixed([p, p]), fixed([q, p]), [[0, 1]])
    assert found.kl_nats == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert found.nats_reference == pytest.approx(-math.log(0.25), rel=1e-6)
    assert found.nats == pytest.approx(-math.log(0.5), rel=1e-6) and found.top1_ratio == 0
    same = perplexity.compare(fixed([p, p]), fixed([p, p]), [[0, 1]])
    assert same.kl_nats == 0 and same.top1_ratio == 1 and same.nats == same.nats_reference


def test_a_reference_that_lends_its_memory_is_copied() -> None:
    """Both models may hand out one buffer; the second must not overwrite the first's rows."""
    buffer = np.zeros((2, 3), np.float32)

    def lend(row: list[float]) -> perplexity.Scorer:
        def score(window: Sequence[int]) -> perplexity.Logits:
            buffer[:] = np.log(row)
            return buffer

        return score

    found = perplexity.compare(lend([0.5, 0.25, 0.25]), lend([0.25, 0.5, 0.25]), [[0, 1]])
    assert found.kl_nats > 0.1


def test_both_engines_agree_and_windows_are_independent(tiny_path: Path) -> None:
    ours = perplexity.perplexity(tiny_path, [TEXT, TEXT], 24)
    theirs = perplexity.perplexity(tiny_path, [TEXT, TEXT], 24, engine="llama.cpp")
    assert ours == theirs
    # One text twice is not one long text: each window is computed afresh.
    once = perplexity.perplexity(tiny_path, [TEXT], 24)
    assert once.nats == pytest.approx(ours.nats, rel=1e-9) and 2 * once.n_tokens == ours.n_tokens


def test_windows_cover_the_text_and_begin_as_the_model_expects(
    tiny_path: Path, tmp_path: Path
) -> None:
    cut = perplexity.windows(tiny_path, [TEXT], 16)
    assert all(1 < len(window) <= 16 for window in cut) and len(cut) > 1
    make("gemma3", tmp_path / "bos.gguf", n_layer=1)
    opened = perplexity.windows(tmp_path / "bos.gguf", [TEXT], 16)
    assert all(window[0] == 2 for window in opened)


@pytest.mark.parametrize(("texts", "n_ctx"), [([], 16), ([""], 16), (["a"], 16), ([TEXT], 1)])
def test_nothing_to_predict_is_refused(texts: list[str], n_ctx: int, tiny_path: Path) -> None:
    with pytest.raises(UsageError, match="leave nothing to predict"):
        perplexity.windows(tiny_path, texts, n_ctx)


def test_cells_in_use_are_refused(tiny_path: Path) -> None:
    with perplexity.open_scorer(tiny_path, 256) as score:
        loaded = score.__closure__  # type: ignore[attr-defined]
        model = next(c.cell_contents for c in loaded if hasattr(c.cell_contents, "forward"))
        with pytest.raises(ComputeError, match="scoring needs all cells"):
            perplexity.scorer_of(model)


def test_command_line_prints_a_line_per_text(tiny_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    args = [str(tiny_path), "--text", str(text), "--reference", str(tiny_path), "--n-ctx", "64"]
    result = CliRunner().invoke(perplexity.main, args)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["text"] == str(text) and found["kl_nats"] == 0 and found["top1_ratio"] == 1
