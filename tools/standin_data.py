"""What stand-ins are fitted to: a model computed in numpy, layer by layer, on windows of text.

Two residual streams advance together: the full model's, and that of the model with the
stand-ins fitted so far. All tokens pass a layer before the next layer's weights are read, so
that memory holds two streams and one layer, whatever the size of the model.
"""

from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.convert.moe_activations import ROWS_AT_ONCE, Array, DenseModel, FeedForward
from edgeroute.tools.standin_fit import Sample
from edgeroute.tools.standin_records import Part

Windows = npt.NDArray[np.int32]

CHECKED_ONE_IN: Final = 8
"""Of the windows, those kept apart to choose strengths and to judge by."""


class Streams:
    """The full model's residual stream and the approximated model's, over the same windows.

    The last windows, one in CHECKED_ONE_IN, are kept apart: fits never see them.

    Args:
        model: the dense model.
        windows: token ids (n_windows, n_window).

    Raises:
        UsageError: fewer than two windows, or windows of fewer than two tokens, or ids that
            the model does not have.
    """

    def __init__(self, model: DenseModel, windows: Windows) -> None:
        check_windows(windows, model.hparams.n_vocab)
        self.model = model
        self.windows = windows
        self.n_window = int(windows.shape[1])
        n_check = max(1, len(windows) // CHECKED_ONE_IN)
        self.n_fit = (len(windows) - n_check) * self.n_window
        """Tokens to fit to; those after them judge."""
        self.full = model.embed(windows.reshape(-1))
        self.ours = self.full.copy()
        self.diverged = False
        """Whether a stand-in came before; until then both streams are one."""

    def add_attention(self, il: int) -> None:
        """Advance the full stream by a layer's attention."""
        self.model.add_attention(il, self.full, self.n_window)

    def add_ffn(self, il: int) -> None:
        """Advance the full stream by a layer's feed-forward."""
        self.add_feed_forward(il, self.model.feed_forward(il), self.full)

    def follow(self, il: int, part: Part) -> None:
        """Advance our stream by what the full one was just advanced by."""
        if not self.diverged:
            self.ours[...] = self.full
            return
        if part != "ffn":
            self.model.add_attention(il, self.ours, self.n_window)
        if part != "attn":
            self.add_feed_forward(il, self.model.feed_forward(il), self.ours)

    def add_to_ours(self, outputs: Array) -> None:
        """Advance our stream by a stand-in's outputs; the full one goes by itself."""
        self.ours += outputs
        self.diverged = True

    def split(self, inputs: Array, targets: Array, weights: Array) -> tuple[Sample, Sample]:
        """Part tokens into those to fit to and those to judge by."""
        whole = Sample(inputs=inputs, targets=targets, weights=weights)
        fit, check = np.s_[: self.n_fit], np.s_[self.n_fit :]
        return (
            replace(whole, inputs=inputs[fit], targets=targets[fit], weights=weights[fit]),
            replace(whole, inputs=inputs[check], targets=targets[check], weights=weights[check]),
        )

    def add_feed_forward(self, il: int, ff: FeedForward, x: Array) -> None:
        """Add what a layer's feed-forward adds to any stream, in place."""
        for at in range(0, len(x), ROWS_AT_ONCE):
            part = np.s_[at : at + ROWS_AT_ONCE]
            u = self.model.norm(f"blk.{il}.ffn_norm", x[part])
            x[part] += ff.hidden(u) @ ff.down.T


def check_windows(windows: Windows, n_vocab: int) -> None:
    """Refuse windows that cannot be fitted to.

    Raises:
        UsageError: see Streams.
    """
    if windows.ndim != 2 or windows.shape[0] < 2 or windows.shape[1] < 2:
        raise UsageError(
            f"windows of token ids have extents {list(windows.shape)}; at least two windows of "
            "at least two tokens are needed, one of them to judge by"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= n_vocab:
        raise UsageError(
            f"windows hold token ids from {low} to {high}; the model has 0 to {n_vocab - 1}"
        )
