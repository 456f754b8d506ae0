"""Calibration text: the user's files, or what every Python installation has on its disk.

The default is half prose (the language reference that `help` reads, docstrings of modules)
and half code (the standard library). One document in eight is held out: no seed ever
calibrates with it, so it can judge the result.
"""

import ast
import importlib
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError

Encode = Callable[[str, bool], Sequence[int]]
"""Text to token ids; the flag asks for what the model expects before a text, such as BOS."""

TOKENS_PER_DOCUMENT: Final = 2048
"""At most so many tokens of one document, so that a few long ones do not fill the sample."""

_HELD_OUT_ONE_IN: Final = 8
_MIN_CODE_BYTES, _MAX_CODE_BYTES = 2_000, 400_000
_MIN_DOCSTRING_CHARS: Final = 500
_SKIPPED_FOLDERS: Final = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextParams:
    """How much text, cut how: `n_tokens` in windows of `n_window`, shuffled by `seed`."""

    n_tokens: int
    n_window: int = 512
    seed: int = 1


def default_windows(
    encode: Encode, params: TextParams, *, held_out: bool = False
) -> npt.NDArray[np.int32]:
    """Return windows of prose and code alternating, int32 (n_windows, n_window).

    Raises:
        UsageError: this Python installation has too little text.
    """
    n_windows = max(2, round(params.n_tokens / params.n_window))
    n_prose = n_windows // 2
    prose = _cut(prose_documents(params.seed, held_out), encode, n_prose, params.n_window)
    code = _cut(code_documents(params.seed, held_out), encode, n_windows - n_prose,
                params.n_window)  # fmt: skip
    if len(prose) < n_prose or len(code) < n_windows - n_prose:
        raise UsageError(
            f"this Python installation has text for {(len(prose) + len(code)) * params.n_window} "
            f"tokens, not for {params.n_tokens}; name files of text by --text, or lower --tokens"
        )
    order = np.argsort(np.r_[np.arange(len(prose)) * 2, np.arange(len(code)) * 2 + 1])
    return np.concatenate([prose, code])[order]


def file_windows(
    paths: Sequence[Path], encode: Encode, params: TextParams
) -> npt.NDArray[np.int32]:
    """Return windows from the user's files in shuffled order, int32 (n_windows, n_window).

    Raises:
        UsageError: a file cannot be read as UTF-8, or all have too little text.
    """
    n_windows = max(2, round(params.n_tokens / params.n_window))
    texts = {str(path): read_text(path) for path in paths}
    # Pieces, not whole files: a sample of one large book should not be its first chapter.
    n_chars = 4 * params.n_window
    pieces = {f"{name}:{at}": text[at : at + n_chars]
              for name, text in texts.items() for at in range(0, len(text), n_chars)}  # fmt: skip
    documents = (pieces[name] for name in _shuffled(pieces, params.seed))
    found = _cut(documents, encode, n_windows, params.n_window)
    if len(found) < n_windows:
        raise UsageError(
            f"the {len(paths)} --text files have {len(found)} windows of {params.n_window} tokens, "
            f"fewer than {n_windows}; name more files, or lower --tokens"
        )
    return found


def prose_documents(seed: int, held_out: bool) -> Iterator[str]:
    """Yield topics of the language reference, then docstrings of modules, shuffled."""
    topics = _topics()
    mine = {name: text for name, text in topics.items() if _is_held_out(name) == held_out}
    kept_back = set() if held_out else _paragraphs(
        text for name, text in topics.items() if _is_held_out(name)
    )  # fmt: skip
    for name in _shuffled(mine, seed):
        # Topics quote each other: no paragraph may be on both sides.
        yield "\n\n".join(p for p in mine[name].split("\n\n") if p.strip() not in kept_back)
    for source in code_documents(seed, held_out):
        try:
            text = ast.get_docstring(ast.parse(source)) or ""
        except (SyntaxError, ValueError):  # a template or deliberately broken example
            continue
        if len(text) >= _MIN_DOCSTRING_CHARS:
            yield text


def code_documents(seed: int, held_out: bool) -> Iterator[str]:
    """Yield sources of the standard library, shuffled."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(inner.parts) and (
            _is_held_out(inner.as_posix()) == held_out
        ):
            found[inner.as_posix()] = path
    for name in _shuffled(found, seed):
        if _MIN_CODE_BYTES <= found[name].stat().st_size <= _MAX_CODE_BYTES:
            yield found[name].read_text(encoding="utf-8", errors="replace")


def _topics() -> Mapping[str, str]:
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError:  # some distributions leave it out; docstrings remain
        return {}
    topics: Mapping[str, str] = module.topics
    return topics


def _paragraphs(texts: Iterable[str]) -> set[str]:
    return {paragraph.strip() for text in texts for paragraph in text.split("\n\n")}


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0


def _shuffled(names: Iterable[str], seed: int) -> list[str]:
    ordered = sorted(names)
    np.random.default_rng(seed).shuffle(ordered)
    return ordered


def _cut(
    documents: Iterable[str], encode: Encode, n_windows: int, n_window: int
) -> npt.NDArray[np.int32]:
    """Join documents and cut them into windows; fewer than asked for if the text ends."""
    start = list(encode("", True))
    n_text = n_window - len(start)
    stream: list[int] = []
    for text in documents:
        if len(stream) >= n_windows * n_text:
            break
        stream += encode(text[: 16 * TOKENS_PER_DOCUMENT], False)[:TOKENS_PER_DOCUMENT]
        stream += encode("\n\n", False)
    n_windows = min(n_windows, len(stream) // n_text)
    body = np.array(stream[: n_windows * n_text], np.int32).reshape(n_windows, n_text)
    return np.concatenate([np.tile(np.array(start, np.int32), (n_windows, 1)), body], axis=1)


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error
