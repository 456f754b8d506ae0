"""The models folder: names to paths, receipts, locks, room on the disk.

<folder>/NAME.gguf                        a catalogue model
<folder>/hf/OWNER/REPO/REVISION/FILE      a file pulled by an hf: name
<folder>/**/FILE.json                     its receipt: hash, size, where it came from
<folder>/.partial/KEY/                    what a broken pull left, to be resumed
<folder>/.partial/KEY.lock                held while a pull of that name runs
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from edgeroute.models.catalogue import CATALOGUE, CatalogueEntry, HubSource
from edgeroute.runtime.errors import CapacityError, CatalogueError
from edgeroute.runtime.units import format_bytes
from edgeroute.runtime.whole_file import replacing

# One path component: no leading dot, no `..`, no trailing dot (Windows drops it), no separator.
_PIECE = r"[A-Za-z0-9_](?:[A-Za-z0-9_+-]|\.(?=[A-Za-z0-9_+-])){0,127}"
_HUB_SPEC = re.compile(
    rf"hf:(?P<repo>{_PIECE}/{_PIECE})/(?P<file>(?:{_PIECE}/){{0,8}}{_PIECE}\.gguf)"
    rf"(?:@(?P<revision>{_PIECE}))?"
)
_SHARD = re.compile(r".*-[0-9]{5}-of-[0-9]{5}\.gguf", re.IGNORECASE | re.DOTALL)
_WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Written when a file got its name; trusted only while size and mtime still agree."""

    n_bytes: int
    mtime_ns: int
    sha256: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledModel:
    """One file in the models folder. `name` is what `pull` and `remove` take."""

    name: str
    path: Path
    n_bytes: int
    sha256: str | None
    source: str


def models_folder() -> Path:
    """The folder of all pulled models: `EDGEROUTE_MODELS`, or the user's data folder."""
    chosen = os.environ.get("EDGEROUTE_MODELS")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_data_path("edgeroute", appauthor=False) / "models"


def parse_hub_spec(spec: str) -> HubSource:
    """Read `hf:owner/repo/path/file.gguf[@revision]`.

    Raises:
        CatalogueError: any other form; nothing of it has reached a path or an address.
    """
    match = _HUB_SPEC.fullmatch(spec)
    if match is None:
        raise CatalogueError(
            f"cannot read {spec[:120]!r}; write hf:owner/repo/file.gguf or "
            "hf:owner/repo/folder/file.gguf@revision, with letters, digits and ._+- only"
        )
    source = HubSource(repo=match["repo"], file=match["file"], revision=match["revision"] or "main")
    for piece in (*source.repo.split("/"), *source.file.split("/"), source.revision):
        if _WINDOWS_DEVICE.fullmatch(piece):
            raise CatalogueError(f"{spec!r}: {piece!r} is a device name on Windows; refused")
    refuse_shard(source.file)
    return source


def refuse_shard(name: str) -> None:
    """Refuse one file of a split model, by its name.

    Raises:
        CatalogueError: the name ends like `-00001-of-00003.gguf`.
    """
    if _SHARD.fullmatch(name):
        raise CatalogueError(
            f"{name[-120:]!r} is one shard of a split model, which edgeroute does not read; "
            "use a repository's single file, or merge the shards with llama-gguf-split --merge"
        )


def entry_path(entry: CatalogueEntry) -> Path:
    """Where a catalogue model's file lies once it is whole."""
    return models_folder() / f"{entry.name}.gguf"


def hub_path(source: HubSource) -> Path:
    """Where an `hf:` file lies once it is whole."""
    return models_folder() / "hf" / source.repo / source.revision / source.file


def hub_spec(source: HubSource) -> str:
    """The `hf:` name of a source, the inverse of `parse_hub_spec`."""
    revision = "" if source.revision == "main" else f"@{source.revision}"
    return f"hf:{source.repo}/{source.file}{revision}"


def partial_folder(path: Path) -> Path:
    """The folder that keeps the unfinished download of `path`, on the same file system."""
    relative = path.relative_to(models_folder()).as_posix()
    digest = hashlib.sha256(relative.encode()).hexdigest()[:12]
    return models_folder() / ".partial" / f"{path.stem[:60]}-{digest}"


def write_atomically(path: Path, content: dict[str, object]) -> None:
    """Write a small JSON file so that a reader sees the old one or the new one."""
    with replacing(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")


def read_json(path: Path) -> dict[str, object]:
    """Read a small JSON object of ours; a missing or broken one is an empty one.

    Losing such a file costs a hash or a fresh download, never a wrong model.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_receipt(path: Path, sha256: str, source: str) -> None:
    """Record what was verified about the file at `path`."""
    stat = path.stat()
    receipt = Receipt(n_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256, source=source)
    write_atomically(path.with_suffix(".json"), asdict(receipt))


def read_receipt(path: Path) -> Receipt | None:
    """The receipt of `path` if the file has not changed since it was written."""
    found = read_json(path.with_suffix(".json"))
    try:
        stat = path.stat()
    except OSError:
        return None
    sha256, source = found.get("sha256"), found.get("source")
    if not isinstance(sha256, str) or not isinstance(source, str):
        return None
    if (found.get("n_bytes"), found.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns):
        return None
    return Receipt(n_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256, source=source)


def installed() -> list[InstalledModel]:
    """Every whole model in the folder, catalogue models first, each group by name."""
    folder, found = models_folder(), []
    for path in sorted(folder.glob("*.gguf")):
        if path.stem in CATALOGUE:
            found.append(_describe(path.stem, path))
    for path in sorted((folder / "hf").rglob("*.gguf")):
        pieces = path.relative_to(folder / "hf").parts
        if len(pieces) < 4:
            continue
        source = HubSource(repo="/".join(pieces[:2]), revision=pieces[2], file="/".join(pieces[3:]))
        found.append(_describe(hub_spec(source), path))
    return found


def _describe(name: str, path: Path) -> InstalledModel:
    receipt = read_receipt(path)
    return InstalledModel(
        name=name,
        path=path,
        n_bytes=path.stat().st_size,
        sha256=receipt.sha256 if receipt else None,
        source=receipt.source if receipt else "unknown",
    )


def remove(path: Path) -> int:
    """Delete a model of the store with its receipt and leftovers; return the bytes freed.

    Raises:
        CatalogueError: nothing is there, or a pull of it is running.
    """
    partial = partial_folder(path)
    if not path.exists() and not partial.exists():
        raise CatalogueError(f"{path} is not there; `edgeroute models` lists what is installed")
    with locked(path, None):
        n_bytes = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
        n_bytes += path.stat().st_size if path.exists() else 0
        shutil.rmtree(partial, ignore_errors=True)
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
    _drop_empty_folders(path.parent)
    return n_bytes


def _drop_empty_folders(folder: Path) -> None:
    """Remove now empty folders upwards, never the models folder itself."""
    root = models_folder()
    while folder != root and folder.is_relative_to(root) and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None) -> Iterator[None]:
    """Hold the lock of one model's file across processes.

    Args:
        path: the file's final path.
        on_wait: called once if another process holds the lock, before waiting for it;
            None refuses instead of waiting.

    Raises:
        CatalogueError: the lock is held and `on_wait` is None.
    """
    # A file that is here needs no lock, and should not wait for this import.
    import filelock

    partial = partial_folder(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(partial.with_name(partial.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if on_wait is None:
            raise CatalogueError(
                f"{path.name} is being pulled by another process; wait for it or stop it first"
            ) from None
        on_wait()
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def check_room(folder: Path, n_needed: int, what: str) -> None:
    """Refuse a download for which the disk has no room, before the first byte.

    Raises:
        CapacityError: fewer bytes are free than needed; both are in the message.
    """
    free = shutil.disk_usage(folder).free
    if free < n_needed:
        raise CapacityError(
            f"{what} needs {format_bytes(n_needed)} ({n_needed} bytes) and the disk of {folder} "
            f"has {format_bytes(free)} ({free} bytes) free; free "
            f"{format_bytes(n_needed - free)} or point EDGEROUTE_MODELS at another disk"
        )
