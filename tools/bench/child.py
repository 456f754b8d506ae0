"""One engine's whole life in a process: start, load, first token. Run as a script, by path.

It imports nothing of edgeroute unless edgeroute is what is measured, so that the peer pays
for its own imports only. It prints one line when the first token is there, and one with its
peak resident memory.
"""

import json
import sys
from typing import Any


def main(engine: str, path: str, prompt: str, n_ctx: int, threads: int) -> None:
    """Answer `prompt` with one token."""
    if engine == "edgeroute":
        import edgeroute

        with edgeroute.Runtime(path, n_ctx=n_ctx, threads=threads) as runtime:
            text = runtime.generate(prompt, max_tokens=1, temperature=0.0).text
            _tell("first_token", text)
    else:
        import llama_cpp

        model = llama_cpp.Llama(path, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads,
                                flash_attn=True, verbose=False)  # fmt: skip
        answer: Any = model.create_completion(prompt, max_tokens=1, temperature=0.0)
        _tell("first_token", answer["choices"][0]["text"])
        model.close()
    _tell("peak_rss_bytes", peak_rss_bytes())


def peak_rss_bytes() -> int:
    """Read this process's greatest resident memory.

    On Linux not through getrusage: what it says survives exec, so that a child inherits the
    peak of the process that started it.
    """
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _tell(key: str, value: object) -> None:
    print(json.dumps({key: value}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
