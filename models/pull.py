"""From the name of a model to its file: `resolve` finds it, `pull` brings it.

A pull tries its sources in order and gives a file its final name only after its hash agreed.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeroute.models import store
from edgeroute.models.catalogue import CATALOGUE, HubSource, Source, lookup
from edgeroute.models.sources import (
    Fetched,
    FetchRequest,
    HashMismatchError,
    OfflineError,
    PullProgress,
    Report,
    SourceError,
)
from edgeroute.runtime.errors import CapacityError, CatalogueError

__all__ = ["PullProgress", "PullResult", "pull", "remove", "resolve"]

_CHUNK_BYTES = 4 << 20
_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """Where a model's file is and how it came there. `cached`: nothing was downloaded."""

    path: Path
    n_bytes: int
    sha256: str
    source: str
    seconds: float
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """A file of the store that is wanted; None where only the source will know."""

    spec: str
    path: Path
    n_bytes: int | None
    sha256: str | None
    sources: tuple[Source, ...]


def resolve(spec: str) -> Path:
    """Return the local file of a model, never downloading.

    Args:
        spec: a catalogue name, `hf:owner/repo/file.gguf[@revision]`, or a path to a .gguf.

    Raises:
        CatalogueError: the name is unknown, or its file is not here; the message says how
            to get it.
    """
    target = _target(spec)
    if isinstance(target, Path):
        return target
    if not target.path.is_file():
        raise CatalogueError(
            f"{target.spec} is not on this machine ({target.path} is missing); "
            f"get it with `edgeroute pull {target.spec}`"
        )
    n_bytes = target.path.stat().st_size
    if target.n_bytes is not None and n_bytes != target.n_bytes:
        raise CatalogueError(
            f"{target.path} has {n_bytes} bytes, {target.spec} has {target.n_bytes}; "
            f"replace it with `edgeroute pull --force {target.spec}`"
        )
    return target.path


def pull(spec: str, *, progress: Report | None = None, force: bool = False) -> PullResult:
    """Make a model's file present and verified; resume, verify or do nothing as needed.

    Args:
        spec: as for `resolve`; the file at a path is only hashed.
        progress: called in this thread with each step; keep it quick.
        force: download again even if the file is here, and from the first byte.

    Raises:
        CatalogueError: the name is unknown, or no source could deliver the file.
        CapacityError: the disk has no room; nothing was downloaded.
    """
    started, target, report = time.monotonic(), _target(spec), progress or _ignore
    if isinstance(target, Path):
        try:
            sha256 = _hash(target, spec, report)
        except OSError as error:
            raise CatalogueError(f"model file {spec!r} cannot be read: {error}") from error
        return _result(target, (sha256, "this machine"), started, cached=True)
    with _disk_errors(target):
        known = None if force else _verified(target, report)
        if known is not None:
            return _result(target.path, known, started, cached=True)
        waited = False

        def on_wait() -> None:
            nonlocal waited
            waited = True
            message = f"another process is pulling {target.spec}; waiting for it"
            report(PullProgress(name=target.spec, phase="wait", message=message))

        with store.locked(target.path, on_wait):
            # Whoever held the lock may have brought what is wanted here, forced or not.
            known = _verified(target, report) if waited or not force else None
            if known is not None:
                return _result(target.path, known, started, cached=True)
            brought = _bring(target, report, force)
            return _result(target.path, brought, started, cached=False)


def remove(spec: str) -> int:
    """Delete a pulled model and what broken pulls left of it; return the bytes freed.

    Raises:
        CatalogueError: not a pulled model, or a pull of it is running.
    """
    if not spec.startswith("hf:") and spec.strip().lower() not in CATALOGUE and _is_path(spec):
        raise CatalogueError(f"{spec} is a file of yours, not a pulled model; delete it yourself")
    target = _target(spec)
    if isinstance(target, Path):
        raise CatalogueError(f"{spec} is a file of yours, not a pulled model; delete it yourself")
    with _disk_errors(target):
        return store.remove(target.path)


def _ignore(progress: PullProgress) -> None:
    """The progress callback of callers who want none."""


def _is_path(spec: str) -> bool:
    return spec.lower().endswith(".gguf") or os.sep in spec or "/" in spec


def _target(spec: str) -> _Target | Path:
    """Read a spec: a file of the store, or the path of a file that is there."""
    if "\0" in spec:
        raise CatalogueError(f"a model name must not contain a zero byte, got {spec[:80]!r}")
    if spec.startswith("hf:"):
        source = store.parse_hub_spec(spec)
        return _Target(
            spec=store.hub_spec(source),
            path=store.hub_path(source),
            n_bytes=None,
            sha256=None,
            sources=(source,),
        )
    if _is_path(spec):
        path = Path(spec).expanduser()
        store.refuse_shard(path.name)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise CatalogueError(f"model file {spec!r} {what}; pass the path of a .gguf file")
        return path.absolute()
    entry = lookup(spec)
    return _Target(
        spec=entry.name,
        path=store.entry_path(entry),
        n_bytes=entry.n_bytes,
        sha256=entry.sha256,
        sources=entry.sources,
    )


def _result(path: Path, known: tuple[str, str], started: float, *, cached: bool) -> PullResult:
    """The answer of `pull` from a file's hash and source."""
    return PullResult(
        path=path,
        n_bytes=path.stat().st_size,
        sha256=known[0],
        source=known[1],
        seconds=time.monotonic() - started,
        cached=cached,
    )


def _verified(target: _Target, report: Report) -> tuple[str, str] | None:
    """Hash and source of the file if it is here and right; None if it must be fetched."""
    if not target.path.is_file():
        return None
    receipt = store.read_receipt(target.path)
    if receipt is not None and target.sha256 in (None, receipt.sha256):
        return receipt.sha256, receipt.source
    # Put there by hand: a catalogue model is checked, an hf: file has nothing to check against.
    if target.sha256 is None or target.path.stat().st_size != target.n_bytes:
        return None
    sha256 = _hash(target.path, target.spec, report)
    if sha256 != target.sha256:
        return None
    store.write_receipt(target.path, sha256, "found in the models folder")
    return sha256, "found in the models folder"


def _bring(target: _Target, report: Report, force: bool) -> tuple[str, str]:
    """Fetch, verify and name the file; return its hash and the source's label."""
    folder = store.partial_folder(target.path)
    if force:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    request = FetchRequest(
        name=target.spec,
        folder=folder,
        n_bytes=target.n_bytes,
        sha256=target.sha256,
        report=report,
    )
    failures: list[SourceError] = []
    for i, source in enumerate(target.sources):
        try:
            fetched = _fetch(source, request)
            sha256 = _verify(fetched, request)
        except SourceError as error:
            failures.append(error)
            if i + 1 < len(target.sources):
                reason = str(error).splitlines()[0]
                message = f"{reason}; trying {target.sources[i + 1].label}"
                report(PullProgress(name=target.spec, phase="note", message=message))
            continue
        target.path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched.path, target.path)
        store.write_receipt(target.path, sha256, source.label)
        shutil.rmtree(folder, ignore_errors=True)
        return sha256, source.label
    raise _failure(target, failures)


def _fetch(source: Source, request: FetchRequest) -> Fetched:
    # Imported here: who has the model already should not wait for what would fetch it.
    if isinstance(source, HubSource):
        from edgeroute.models.hub import fetch_hub

        return fetch_hub(source, request)
    from edgeroute.models.wheels import fetch_wheels

    return fetch_wheels(source, request)


def _failure(target: _Target, failures: list[SourceError]) -> CatalogueError:
    """One error out of those of all sources, with what the user can do."""
    reasons = "\n".join(f"  - {failure}" for failure in failures)
    if all(isinstance(failure, OfflineError) for failure in failures):
        return OfflineError(
            f"{target.spec} cannot be pulled because no source can be reached:\n{reasons}\n"
            f"connect and run `edgeroute pull {target.spec}` again (it resumes), or copy the "
            f"file from another machine to {target.path}"
        )
    if len(failures) == 1:
        return failures[0]
    return SourceError(f"no source could deliver {target.spec}:\n{reasons}")


def _verify(fetched: Fetched, request: FetchRequest) -> str:
    """Hash the whole file and return its sha256.

    Raises:
        HashMismatchError: it is another file; it was deleted, so that no pull resumes it.
    """
    with fetched.path.open("rb+") as file:
        os.fsync(file.fileno())
        magic = file.read(len(_MAGIC))
    sha256 = _hash(fetched.path, request.name, request.report)
    expected = [("sha256", wanted, sha256) for wanted in (request.sha256, fetched.sha256) if wanted]
    if fetched.git_sha1 is not None:
        git_sha1 = _hash(fetched.path, request.name, request.report, git_blob=True)
        expected.append(("git sha1", fetched.git_sha1, git_sha1))
    for kind, wanted, got in expected:
        if wanted != got:
            _discard(fetched.path)
            raise HashMismatchError(
                f"the file that arrived for {request.name} has {kind} {got}, wanted {wanted}; "
                "it was deleted; pull again, and if this repeats the source is not to be trusted"
            )
    if magic != _MAGIC:
        _discard(fetched.path)
        raise SourceError(f"{request.name} is not a GGUF file: it begins with {magic!r}; deleted")
    return sha256


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_suffix(".json").unlink(missing_ok=True)


def _hash(path: Path, name: str, report: Report, *, git_blob: bool = False) -> str:
    """The file's sha256, or the sha1 of its git blob, by which hubs name files outside LFS."""
    n_total, n_done = path.stat().st_size, 0
    digest = hashlib.sha256()
    if git_blob:
        digest = hashlib.sha1(b"blob %d\0" % n_total, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            n_done += len(chunk)
            report(PullProgress(name=name, phase="verify", n_done=n_done, n_total=n_total))
    return digest.hexdigest()


@contextlib.contextmanager
def _disk_errors(target: _Target) -> Iterator[None]:
    """Say which disk failed, and how, for errors of the operating system."""
    try:
        yield
    except OSError as error:
        folder = store.models_folder()
        if error.errno == errno.ENOSPC:
            raise CapacityError(
                f"the disk of {folder} filled up while pulling {target.spec}; free some room "
                "and pull again, which resumes, or point EDGEROUTE_MODELS at another disk"
            ) from error
        raise CatalogueError(
            f"the models folder {folder} cannot be used: {error}; check its permissions or "
            "point EDGEROUTE_MODELS at another folder"
        ) from error
