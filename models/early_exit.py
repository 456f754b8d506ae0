"""Decode a token with a look in the middle: leave there, keys stored, or go on."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.depth import Step, all_run
from edgeroute.runtime.errors import UsageError

Logits = npt.NDArray[np.float32]
Leaves = Callable[[Logits], bool]
"""Judges the logits of the middle, (n_vocab,)."""


class EarlyExit:
    """Spans of a model around one layer, and the passes that they make.

    Later layers store keys and values of a token that left, from the state it left with, so
    that tokens which stay can attend to it.

    Raises:
        UsageError: `layer` is not inside the model.
    """

    def __init__(self, forward: Forward, layer: int) -> None:
        n_layer = forward.model.hparams.n_layer
        if not 1 <= layer < n_layer:
            raise UsageError(f"a model of {n_layer} layers cannot be left after {layer}")
        self._forward = forward
        stores = tuple(Step(il, "skip", "skip", store=True) for il in range(layer, n_layer))
        self.before = Span(all_run(range(layer)), embed=True, output=False)
        self.look = Span((), embed=False, output=True)
        self.keys = Span(stores, embed=False, output=False)
        self.rest = Span(all_run(range(layer, n_layer)), embed=False, output=True)

    def decode(self, piece: Piece, leaves: Leaves) -> tuple[Logits, bool] | None:
        """Compute one token.

        Returns:
            Its logits (1, n_vocab) and whether it left early; None when it was stopped, its
            cells undefined.
        """
        run, silent = self._forward.run, piece._replace(n_out=0)
        if run([silent], [self.before]) is None:
            return None
        seen = run([piece], [self.look])
        if seen is None:
            return None
        if leaves(seen[0]):
            return None if run([silent], [self.keys]) is None else (seen, True)
        found = run([piece], [self.rest])
        return None if found is None else (found, False)
