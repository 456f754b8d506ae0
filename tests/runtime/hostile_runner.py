"""Opens every file of a folder under limits and prints one JSON object per file.

Run as a script in a process of its own, so that a crash or a hang takes down that process
and not the test run. Each line is flushed before the next file is touched: the last name
printed tells which file was fatal.
"""

import json
import signal
import sys
import time
import tracemalloc
from pathlib import Path
from types import FrameType

from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.vocab_check import check_vocab

MEMORY_LIMIT_BYTES = 64 << 20
SECONDS_PER_FILE = 5


class TooSlow(BaseException):
    """A file took longer than its limit; not an Exception, so that nothing catches it."""


def main(folder: Path) -> None:
    """Check the files in name order."""
    limit_memory()
    has_alarm = hasattr(signal, "SIGALRM")
    if has_alarm:
        signal.signal(signal.SIGALRM, _on_alarm)
    for path in sorted(folder.iterdir()):
        print(json.dumps({"name": path.name}), flush=True)
        if has_alarm:
            signal.alarm(SECONDS_PER_FILE)
        print(json.dumps(check(path)), flush=True)
        if has_alarm:
            signal.alarm(0)


def check(path: Path) -> dict[str, object]:
    """Return how one file was received."""
    started = time.perf_counter()
    tracemalloc.start()
    error, message = "", ""
    try:
        with GGUFFile.open(path) as file:
            check_vocab(file)
    except (Exception, TooSlow) as caught:
        error, message = type(caught).__name__, str(caught)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "name": path.name,
        "error": error,
        "message": message,
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes,
    }


def limit_memory() -> None:
    """Allow this process little more address space than it has, where the system can."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ModuleNotFoundError, FileNotFoundError):
        return  # Not Linux; the peak that is printed is still checked.
    limit = pages * resource.getpagesize() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _on_alarm(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"over {SECONDS_PER_FILE} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
