"""Find, load and check the ggml and llama libraries inside llama-cpp-python.

The package itself is never imported here: it would load everything it has, which
costs several times what edgeroute needs before the first token.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeroute.runtime.errors import LibraryError

GGML_VERSION_PREFIX = "0.25."
"""Tested range of `ggml_version()`: structs and enums are bound by layout."""

REMEDY = (
    "install the tested version with: "
    "CMAKE_ARGS=-DGGML_RPC=ON pip install 'llama-cpp-python>=0.3.36,<0.3.37'"
)


@dataclass(frozen=True, slots=True)
class Libraries:
    """The loaded shared libraries, and what ggml says its version is.

    `held` is `base` again, for functions that only describe or copy a few bytes: other threads of
    the process do not get the interpreter while they run. Else, with other threads waiting, every
    one of the thousand calls that describe a graph could cost a turn of theirs.

    Lifetime: they stay loaded until the process ends.
    """

    base: ctypes.CDLL
    held: ctypes.PyDLL
    cpu: ctypes.CDLL | None
    ggml: ctypes.CDLL
    llama: ctypes.CDLL
    version: str
    folder: Path


@functools.cache
def libraries() -> Libraries:
    """Load the libraries once and check that they are the ones edgeroute was written for.

    Raises:
        LibraryError: not installed, not loadable, or another version; nothing is left half
            bound.
    """
    folder = _find_folder()
    base = _load(folder, "ggml-base")
    cpu = _load(folder, "ggml-cpu", optional=True)
    ggml = _load(folder, "ggml")
    llama = _load(folder, "llama")
    version = _version(base, folder)
    return Libraries(base, ctypes.PyDLL(base._name), cpu, ggml, llama, version, folder)


def bind(library: ctypes.CDLL, name: str) -> "ctypes._NamedFuncPointer":
    """Look a function up; a missing one is a sentence, not an AttributeError.

    Raises:
        LibraryError: the library does not export `name`.
    """
    try:
        return getattr(library, name)  # type: ignore[no-any-return]
    except AttributeError:
        raise LibraryError(f"{library._name} has no function {name}; {REMEDY}") from None


def _version(base: ctypes.CDLL, folder: Path) -> str:
    function = bind(base, "ggml_version")
    function.restype = ctypes.c_char_p
    version = (function() or b"").decode(errors="replace")
    if not version.startswith(GGML_VERSION_PREFIX):
        raise LibraryError(
            f"found ggml {version or 'of unknown version'} in {folder}, but edgeroute is bound "
            f"to ggml {GGML_VERSION_PREFIX}x; {REMEDY}"
        )
    return version


def _find_folder() -> Path:
    """Locate the folder with the shared libraries; LLAMA_CPP_LIB_PATH overrides, as upstream."""
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override:
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise LibraryError(f"llama-cpp-python is not installed; {REMEDY}")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def _load(folder: Path, stem: str, *, optional: bool = False) -> ctypes.CDLL:
    for path in _candidates(folder, stem):
        if path.is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                raise LibraryError(f"cannot load {path}: {error}; {REMEDY}") from error
    if optional:  # a build with loadable backends has one library per CPU variant instead
        return None  # type: ignore[return-value]
    raise LibraryError(f"there is no {stem} library in {folder}; {REMEDY}")


def _candidates(folder: Path, stem: str) -> Iterator[Path]:
    if sys.platform == "win32":
        yield folder / f"{stem}.dll"
        yield folder / f"lib{stem}.dll"
    elif sys.platform == "darwin":
        yield folder / f"lib{stem}.dylib"
        yield folder / f"lib{stem}.so"
    else:
        yield folder / f"lib{stem}.so"
