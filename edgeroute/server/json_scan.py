"""A look at JSON before it is parsed: how deep it nests and how many values it has.

Parsers recurse, and each value of a parsed text takes far more memory than its bytes. The scan
is linear, takes the text in pieces as they arrive, and works on whole pieces in numpy.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.server.errors import ApiError

QUOTE, BACKSLASH, COMMA = 0x22, 0x5C, 0x2C
MAX_VALUES: Final = 500_000
"""Values of one text; a prompt of 100,000 token ids has as many."""
BLOCK_BYTES: Final = 1 << 16
"""Of text that is looked at together, so that its arrays stay in the core's cache."""


def _steps() -> npt.NDArray[np.int8]:
    steps = np.zeros(256, np.int8)
    steps[[ord("["), ord("{")]] = 1
    steps[[ord("]"), ord("}")]] = -1
    return steps


_STEP: Final = _steps()


class JsonScan:
    """Counts as the text arrives. Whether it is JSON at all is for the parser to say.

    Args:
        max_depth: of arrays and objects inside each other.
        max_values: of commas and brackets outside strings, an upper bound of its values.
    """

    def __init__(self, max_depth: int, max_values: int = MAX_VALUES) -> None:
        self._max_depth, self._max_values = max_depth, max_values
        self._inside = False  # a string
        self._held = b""  # a backslash whose partner has not come yet
        self.depth = 0
        self.n_values = 1

    def feed(self, piece: bytes) -> None:
        """Look at the next piece.

        Raises:
            ApiError: 400, the text nests too deep or has too many values.
        """
        for start in range(0, len(piece), BLOCK_BYTES):
            self._block(piece[start : start + BLOCK_BYTES])

    def _block(self, text: bytes) -> None:
        text = self._held + text
        self._held = b""
        if BACKSLASH in text:
            # In a run of backslashes every second one is escaped by the one before it; the one
            # that may be left escapes what follows.
            text = text.replace(b"\\\\", b"")
            if text.endswith(b"\\"):
                text, self._held = text[:-1], b"\\"
            text = text.replace(b'\\"', b"")
        codes = np.frombuffer(text, np.uint8)
        if not codes.size:
            return
        # 1 from an opening quote up to the one that closes it.
        inside = np.bitwise_xor.accumulate((codes == QUOTE).view(np.uint8))
        if self._inside:
            inside ^= 1
        self._inside = bool(inside[-1])
        outside = inside == 0
        steps = _STEP[codes] * outside
        depths = np.cumsum(steps, dtype=np.int32)
        deepest = self.depth + int(depths.max())
        self.depth += int(depths[-1])
        self.n_values += int(np.count_nonzero(steps > 0))
        self.n_values += int(np.count_nonzero((codes == COMMA) & outside))
        self._check(deepest)

    def _check(self, deepest: int) -> None:
        if deepest > self._max_depth:
            raise ApiError(
                400, f"the JSON body nests {deepest} or more levels deep; the limit is "
                f"{self._max_depth}; send flatter JSON", code="json_too_deep",
            )  # fmt: skip
        if self.n_values > self._max_values:
            raise ApiError(
                400, f"the JSON body has more than {self._max_values} values; send fewer",
                code="json_too_large",
            )  # fmt: skip
