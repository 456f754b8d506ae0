"""The user's library of adapters: a folder of PEFT folders and files, each by its name.

An adapter is whole in the library or not in it: it is copied beside its place under a hidden
name, and renamed.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from edgeroute.models import adapter_peft
from edgeroute.models.adapter_file import AdapterFile, adapter_name, find_adapters
from edgeroute.models.adapter_records import check_name
from edgeroute.runtime.errors import AdapterFileError, UsageError

ENV = "EDGEROUTE_LIBRARY"
CARD = "README.md"


def library_folder() -> Path:
    """Return the library: `EDGEROUTE_LIBRARY`, or a folder with the user's data."""
    chosen = os.environ.get(ENV)
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_data_path("edgeroute", appauthor=False) / "adapters"


def entries(folder: Path) -> list[Path]:
    """List a library's adapters by path; a folder that is missing or empty has none."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    return find_adapters(folder)


def find(folder: Path, name: str) -> Path:
    """Return the path of an adapter in a library.

    Raises:
        UsageError: there is none of that name.
    """
    known = {adapter_name(path): path for path in entries(folder)}
    if name not in known:
        names = ", ".join(sorted(known)) or "none"
        raise UsageError(f"there is no adapter {name!r:.80} in {folder}; there are: {names}")
    return known[name]


def add(file: AdapterFile, folder: Path, name: str | None = None, *, replace: bool = False) -> Path:
    """Copy an adapter into a library, every number checked.

    Args:
        file: the adapter, opened against its base model.
        folder: the library; made where it is missing.
        name: what to call it; None keeps its name.
        replace: take the place of one of the same name, which is an error otherwise.

    Returns:
        Where it lies now.

    Raises:
        AdapterFileError: a number is not finite, or it cannot be copied.
        UsageError: there is one of that name.
    """
    for _ in file.read():  # refuses what is not a number
        pass
    name = check_name(name or file.name, file.path)
    old = {adapter_name(path): path for path in entries(folder)}.get(name)
    if old is not None and not replace:
        raise UsageError(f"the library has an adapter {name!r}; replace it, or give another name")
    is_gguf = file.format == "gguf"
    target = folder / (f"{name}.gguf" if is_gguf else name)
    with _errors(f"cannot copy adapter {name!r} to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with _beside(folder) as draft:
            if is_gguf:
                shutil.copyfile(file.data_path, draft)
            else:
                draft.mkdir()
                beside = file.data_path.parent
                shutil.copyfile(file.data_path, draft / adapter_peft.DATA_NAME)
                shutil.copyfile(_settings(file.data_path), draft / adapter_peft.CONFIG_NAME)
                if (beside / CARD).is_file():
                    shutil.copyfile(beside / CARD, draft / CARD)
            if old is not None:
                _delete(old)
            os.replace(draft, target)
    return target


def remove(folder: Path, name: str) -> None:
    """Delete an adapter from a library.

    Raises:
        UsageError: there is none of that name.
        AdapterFileError: it cannot be deleted.
    """
    path = find(folder, name)
    with _errors(f"cannot delete adapter {name!r} from {folder}"):
        _delete(path)


def _settings(data: Path) -> Path:
    """Return where the settings of a data file are: NAME.json of a lone file, or PEFT's name."""
    own = data.with_suffix(".json")
    alone = data.name != adapter_peft.DATA_NAME and own.exists()
    return own if alone else data.parent / adapter_peft.CONFIG_NAME


def _delete(path: Path) -> None:
    """Delete an adapter; a folder first gets a hidden name, so that it is never half there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    hidden = _hidden(path.parent)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _hidden(folder: Path) -> Path:
    return folder / f".{uuid.uuid4().hex[:12]}.part"


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Give a hidden path in the folder; what is still there at the end is deleted."""
    draft = _hidden(folder)
    try:
        yield draft
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterFileError(f"{what}: {error.strerror or error}") from error
