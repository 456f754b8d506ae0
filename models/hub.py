"""Fetching one file of a Hugging Face repository over HTTP, with ranges.

huggingface_hub names files, finds the token and reads the metadata. Its downloader is not
used: it neither checks the hash nor bounds the body that it writes.
"""

import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urljoin, urlsplit

from edgeroute.models.catalogue import HubSource
from edgeroute.models.sources import (
    REPORT_BYTES,
    BrokenTransferError,
    Fetched,
    FetchRequest,
    HashMismatchError,
    OfflineError,
    PullProgress,
    SourceError,
    file_size,
)
from edgeroute.models.store import check_room, read_json, write_atomically
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

CONNECT_TIMEOUT_S = 5.0  # nobody waits longer than this to learn that a source is out of reach
HEAD_DEADLINE_S = 8.0  # name lookup and every address of the host together
READ_TIMEOUT_S = 15.0
BACKOFF_S = 0.5  # doubled after each attempt that brought nothing
N_IDLE_ATTEMPTS = 5  # attempts in a row without a byte before giving up
N_IDLE_UNREACHED = 2  # the same while the hub has not yet said where the file is
N_ATTEMPTS = 100  # however little each of them brings
N_REDIRECTS = 5

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """What the hub says of a file. `url` is the hub's own address, `location` the file's."""

    url: str
    location: str
    etag: str
    n_bytes: int


def fetch_hub(source: HubSource, request: FetchRequest) -> Fetched:
    """Download one file of a hub repository, resuming what is there.

    Raises:
        OfflineError: the hub could not be reached.
        SourceError: it refused, announced another file, or broke off again and again.
        CapacityError: the disk has no room for it.
    """
    part, n_idle, n_idle_max = request.folder / "hub.part", 0, N_IDLE_UNREACHED
    for _ in range(N_ATTEMPTS):
        n_before = file_size(part)
        try:
            announced = announce(source, request.n_bytes, request.sha256)
            n_idle_max = N_IDLE_ATTEMPTS
            _align(part, announced)
            check_room(request.folder, announced.n_bytes - file_size(part), request.name)
            if file_size(part) < announced.n_bytes:
                _download(announced, part, source, request)
            return _fetched(part, announced)
        except (OfflineError, BrokenTransferError) as error:
            if isinstance(error, OfflineError) and n_idle_max == N_IDLE_UNREACHED:
                raise
            n_idle = 0 if file_size(part) > n_before else n_idle + 1
            if n_idle >= n_idle_max:
                kept = format_bytes(file_size(part))
                raise SourceError(
                    f"{error}; gave up after {n_idle} attempts without a byte, {kept} are kept "
                    "and the next pull resumes there"
                ) from error
            time.sleep(BACKOFF_S * 2 ** max(0, n_idle - 1))
    raise SourceError(f"{source.label}: {N_ATTEMPTS} attempts did not bring {source.file} whole")


def _fetched(part: Path, announced: Announced) -> Fetched:
    is_sha256 = _SHA256.fullmatch(announced.etag) is not None
    return Fetched(
        path=part,
        n_bytes=announced.n_bytes,
        sha256=announced.etag if is_sha256 else None,
        git_sha1=None if is_sha256 else announced.etag,
    )


def announce(source: HubSource, n_bytes: int | None, sha256: str | None) -> Announced:
    """Read the hub's metadata of a file and refuse what cannot be the file.

    Args:
        source: the file.
        n_bytes, sha256: what it must have, where that is known.

    Raises:
        OfflineError: the hub could not be reached.
        SourceError: it refused, or announced another file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    with _translated(source):
        url = hf_hub_url(source.repo, source.file, revision=source.revision, endpoint=endpoint)
        found = _within(
            HEAD_DEADLINE_S,
            lambda: get_hf_file_metadata(url, timeout=CONNECT_TIMEOUT_S, endpoint=endpoint),
        )
    etag = (found.etag or "").lower()
    if not _SHA256.fullmatch(etag) and not _GIT_SHA1.fullmatch(etag):
        raise SourceError(f"{source.label} names no hash for {source.file} (ETag {etag[:80]!r})")
    if found.size is None or found.size <= 0:
        raise SourceError(f"{source.label} announces {found.size} bytes for {source.file}")
    if n_bytes is not None and found.size != n_bytes:
        raise SourceError(
            f"{source.label} announces {found.size} bytes for {source.file}, "
            f"the catalogue's file has {n_bytes}"
        )
    if sha256 is not None and _SHA256.fullmatch(etag) and etag != sha256:
        raise HashMismatchError(
            f"{source.label} announces sha256 {etag} for {source.file}, the catalogue's is {sha256}"
        )
    location = _redirected(url, found.location)
    return Announced(url=url, location=location, etag=etag, n_bytes=found.size)


def _align(part: Path, announced: Announced) -> None:
    """Drop a part file that belongs to another version of the file or is too long."""
    state = part.with_suffix(".json")
    if read_json(state).get("etag") != announced.etag or file_size(part) > announced.n_bytes:
        part.unlink(missing_ok=True)
        write_atomically(state, {"etag": announced.etag})


def _download(announced: Announced, part: Path, source: HubSource, request: FetchRequest) -> None:
    """Append the missing bytes of a file, never more than were announced."""
    with _translated(source), part.open("ab") as out, _open(announced, out.tell()) as response:
        if _starts_at(response, out.tell(), announced) == 0:
            out.truncate(0)
        n_done = n_reported = out.seek(0, 2)
        for chunk in response.iter_raw():
            n_done += len(chunk)
            if n_done > announced.n_bytes:
                out.truncate(0)
                raise SourceError(
                    f"{source.label} sent more than the {announced.n_bytes} bytes it announced"
                )
            out.write(chunk)
            if n_done - n_reported >= REPORT_BYTES or n_done == announced.n_bytes:
                n_reported = n_done
                request.report(
                    PullProgress(
                        name=request.name,
                        phase="download",
                        source=source.label,
                        n_done=n_done,
                        n_total=announced.n_bytes,
                    )
                )
    if n_done < announced.n_bytes:
        raise BrokenTransferError(
            f"{source.label} broke off at {n_done} of {announced.n_bytes} bytes"
        )


def fetch_range(announced: Announced, source: HubSource, start: int, end: int) -> bytes:
    """Read bytes `start` to `end` of a file, and no more of it.

    Raises:
        OfflineError, BrokenTransferError: trying again may help.
        SourceError: the server does not serve parts of files, or sent something else.
    """
    with _translated(source), _open(announced, start, end) as response:
        if _starts_at(response, start, announced) != start:
            raise SourceError(f"{source.label} does not serve parts of files; pull {source.file}")
        found = bytearray()
        for chunk in response.iter_raw():
            found += chunk[: end - start - len(found)]
            if len(found) == end - start:
                return bytes(found)
    raise BrokenTransferError(
        f"{source.label} sent {len(found)} of {end - start} bytes of {source.file} from {start} on"
    )


def _starts_at(response: "httpx2.Response", offset: int, announced: Announced) -> int:
    """The offset at which a response's body begins, after refusing every other answer."""
    host, status = urlsplit(str(response.url)).netloc, response.status_code
    if status in (408, 429) or status >= 500 or (status == 403 and offset):
        retry_after = response.headers.get("retry-after", "")[:40]
        wait = f", retry after {retry_after} s" if retry_after else ""
        raise BrokenTransferError(f"{host} answered {status}{wait}")
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise SourceError(f"{host} sent content-encoding {encoding[:40]!r} unasked; not decoded")
    if status == 200:
        return 0
    if status != 206:
        raise SourceError(f"{host} answered {status} to a request for bytes from {offset} on")
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if match is None or (int(match[1]), int(match[3])) != (offset, announced.n_bytes):
        raise SourceError(
            f"{host} answered range {response.headers.get('content-range', '')[:80]!r} "
            f"to a request for {offset} on of {announced.n_bytes}"
        )
    return offset


@contextlib.contextmanager
def _open(announced: Announced, offset: int, end: int | None = None) -> "Iterator[httpx2.Response]":
    """Open the file's body from `offset`, following redirects without taking the token along."""
    import httpx2
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = announced.location
    for _ in range(N_REDIRECTS):
        headers = build_hf_headers(token=None if _origin(url) == _origin(announced.url) else False)
        headers["accept-encoding"] = "identity"
        if offset or end is not None:
            headers["range"] = f"bytes={offset}-{'' if end is None else end - 1}"
        timeout = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        with get_session().stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=False
        ) as response:
            if not response.has_redirect_location:
                yield response
                return
            url = _redirected(url, response.headers["location"])
    raise SourceError(f"more than {N_REDIRECTS} redirects from {announced.url}")


def _redirected(url: str, location: str) -> str:
    """The address that a redirect leads to, refusing to leave https."""
    target = urljoin(url, location)
    if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
        raise SourceError(f"{urlsplit(url).netloc} redirects from https to {target[:120]!r}")
    return target


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """Run a call that may hang in a name lookup, which no socket timeout reaches.

    Raises:
        TimeoutError: no result in time; the call's thread is left to end by itself.
    """
    answers: queue.SimpleQueue[tuple[bool, _T | Exception]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((True, call()))
        except Exception as error:
            answers.put((False, error))

    threading.Thread(target=run, name="edgeroute-hub-metadata", daemon=True).start()
    try:
        _, answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def _translated(source: HubSource) -> Iterator[None]:
    """Turn the errors of huggingface_hub and of the HTTP client into ours."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise OfflineError(
            f"{source.label} was not asked: HF_HUB_OFFLINE is set; unset it to download"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(source, error) from error
    except (httpx2.ConnectError, httpx2.TimeoutException, TimeoutError) as error:
        raise OfflineError(f"{source.label} cannot be reached: {_sentence(error)}") from error
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, errors.HFValidationError) as error:
        raise SourceError(f"{source.label}: {_sentence(error)}") from error
    except httpx2.HTTPError as error:
        raise BrokenTransferError(f"{source.label} broke off: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    """The first line of an error, short and never empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _refusal(source: HubSource, error: "HfHubHTTPError") -> SourceError:
    """Say in one sentence what the hub's status and error code mean for the user."""
    from huggingface_hub import errors

    status = error.response.status_code
    retry_after = error.response.headers.get("retry-after", "")[:40]
    if status in (408, 429) or status >= 500:
        wait = f"; it asks to wait {retry_after} s" if retry_after else ""
        return BrokenTransferError(f"{source.label}: the hub answered {status}{wait}")
    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            f"{source.label} is gated: accept its terms on the hub's page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"{source.label} has no revision {source.revision!r}")
    if isinstance(error, errors.EntryNotFoundError):
        return SourceError(f"{source.label} has no file {source.file!r} at {source.revision!r}")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return SourceError(
            f"{source.label} does not exist or is private (status {status}); check the name, or "
            "log in with `hf auth login` or set HF_TOKEN"
        )
    return SourceError(f"{source.label}: the hub answered {status} for {source.file!r}")
