"""The text of a calibration, cut by what it is for: to search with, to fit to, to judge by."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.convert.moe_text import (
    Encode,
    TextParams,
    default_windows,
    file_windows,
    read_text,
)

Windows = npt.NDArray[np.int32]

N_WINDOW: Final = 256
N_SEARCH, N_FIT, N_CHECK = 8, 96, 16
"""Windows at most; those to fit to include those to search with."""
MIN_WINDOWS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """Token ids, int32 (n_windows, n_window) each, and the hash of all of them.

    Attributes:
        search: what plans are chosen by.
        fit: what stand-ins are fitted to, `search` among it.
        check: what plans are judged by; neither of the others has seen it.
        digest: sha256 in hex.
    """

    search: Windows
    fit: Windows
    check: Windows
    digest: str


def calibration_texts(
    encode: Encode, files: Sequence[Path], n_window: int = N_WINDOW,
    n_wanted: int = N_FIT + N_CHECK,
) -> Texts:  # fmt: skip
    """Cut the user's files, or else prose and code that come with Python, by turns.

    Of Python's text, documents that `edgeroute bench` judges by are left out.

    Args:
        encode: the model's.
        files: the user's; none for Python's text.
        n_window: tokens of a window.
        n_wanted: windows in all, of the user's files at most; N_CHECK of them judge, or a third.

    Raises:
        UsageError: a file cannot be read as UTF-8, or all have too little text.
    """
    if files:
        n_wanted = min(n_wanted, _n_windows(encode, files, n_window))
        found = file_windows(files, encode, TextParams(n_tokens=n_wanted * n_window,
                                                       n_window=n_window))  # fmt: skip
    else:
        found = default_windows(encode, TextParams(n_tokens=n_wanted * n_window,
                                                   n_window=n_window))  # fmt: skip
    n_check = min(N_CHECK, len(found) // 3)
    fit, check = found[:-n_check], found[-n_check:]
    digest = hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest()
    return Texts(search=fit[:N_SEARCH], fit=fit, check=check, digest=digest)


def _n_windows(encode: Encode, files: Sequence[Path], n_window: int) -> int:
    """Count the windows that files surely have.

    Raises:
        UsageError: too few.
    """
    n_pieces = 0
    n_chars = 4 * n_window  # of a piece, as file_windows cuts them
    for path in files:
        text = read_text(path)[: 4 * n_chars * (N_FIT + N_CHECK)]
        n_pieces += sum(
            len(encode(text[at : at + n_chars], False)) for at in range(0, len(text), n_chars)
        )
    n_windows = int(0.9 * n_pieces) // n_window
    if n_windows < MIN_WINDOWS:
        raise UsageError(
            f"the {len(files)} --data files have about {n_pieces} tokens; at least "
            f"{MIN_WINDOWS * n_window * 10 // 9} are needed, better {(N_FIT + N_CHECK) * n_window}"
            "; name more text, or none for the text that comes with Python"
        )
    return n_windows
