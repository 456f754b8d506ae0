"""The two engines with LoRA adapters: what is timed of each, and nothing else."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeroute.config import merge_settings
from edgeroute.engine import Runtime, Settings
from edgeroute.loaded import LoadedModel
from edgeroute.runtime.errors import AdapterFileError, EdgerouteError, UsageError
from edgeroute.tools.bench.engines import Stamps, Theirs, overlap_rate
from edgeroute.tools.bench.peer import Peer, PeerParams
from edgeroute.tools.bench.text import TEXT, text_tokens

READ_BYTES = 1 << 20


class Switched(NamedTuple):
    """Seconds that a request waited for its adapter, and until its first token."""

    wait_s: float
    ttft_s: float


class Adapted:
    """A Runtime with adapters; all that a user's call passes through is timed."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._runtime = Runtime(path, **settings)

    def text(self, n_tokens: int) -> list[int]:
        """Tokens of the fixed text."""
        return text_tokens(self._runtime.encode, n_tokens)

    def decode(self, prompt: list[int], n_tokens: int, adapter: str | None) -> float:
        """Decode greedily: tokens per second after the first.

        Raises:
            UsageError: the model ended before there were two.
        """
        stats = self._runtime.generate(prompt_ids=prompt, max_tokens=n_tokens, temperature=0.0,
                                       seed=1, prefix="off", adapter=adapter).stats  # fmt: skip
        if stats.n_generated < 2:
            raise UsageError(
                f"the model ends after {stats.n_generated} tokens with adapter {adapter}; this "
                "benchmark needs 2; use another model"
            )
        return stats.decode_tok_s

    def prefill(self, prompt: list[int], adapter: str | None) -> float:
        """Compute a prompt: tokens per second."""
        stats = self._runtime.generate(prompt_ids=prompt, max_tokens=1, temperature=0.0,
                                       prefix="off", adapter=adapter).stats  # fmt: skip
        return stats.prefill_tok_s

    def together(
        self, prompts: Sequence[list[int]], n_tokens: int, adapters: Sequence[str | None]
    ) -> float:
        """Decode all prompts at once, each with its adapter: tokens per second in sum.

        The adapters are in memory before; that is not timed.
        """
        for adapter in dict.fromkeys(adapters):
            self.prefill(prompts[0], adapter)

        def listen(prompt: list[int], adapter: str | None) -> Stamps:
            seen: Stamps = []
            for chunk in self._runtime.stream(
                prompt_ids=prompt, max_tokens=n_tokens, temperature=0.0, seed=1, prefix="off",
                adapter=adapter,
            ):  # fmt: skip
                if chunk.token_ids:
                    seen.append((time.monotonic(), len(chunk.token_ids)))
            return seen

        with ThreadPoolExecutor(len(prompts)) as pool:
            return overlap_rate(list(pool.map(listen, prompts, adapters)))

    def switch(self, prompt: list[int], adapter: str | None, hit: bool) -> Switched:
        """Answer with one token.

        Raises:
            EdgerouteError: the adapter was in memory when it should not have been, or not.
        """
        stats = self._runtime.generate(prompt_ids=prompt, max_tokens=1, temperature=0.0,
                                       prefix="off", adapter=adapter).stats  # fmt: skip
        found = stats.adapters or {"wait_s": 0.0, "hit": True}
        if found["hit"] is not hit:
            raise EdgerouteError(f"adapter {adapter!r} in memory: {found['hit']}, not {hit}")
        wait_s = found["wait_s"]
        assert isinstance(wait_s, float)
        return Switched(wait_s, stats.ttft_s)

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()


class Routed:
    """The router of `adapter="auto"` on the embeddings of a model, over many adapters.

    Only the names of most adapters exist: a choice does not look at their files.
    """

    def __init__(self, path: Path, settings: Settings, n_adapters: int) -> None:
        self._loaded = LoadedModel(path, merge_settings(settings))
        adapters = self._loaded.adapters
        if adapters is None:
            raise UsageError("routing is measured with adapters; give this engine some")
        self._adapters = adapters
        for i in range(len(adapters.store.names), n_adapters):
            adapters.routing.add(f"named-{i}", f"{i}")

    def choose(self, n_prompt: int, n_prompts: int) -> list[float]:
        """Choose for that many prompts: seconds each, features included.

        Each choice is rewarded, so that the router has something to weigh. The first one,
        which also looks the vocabulary's centre up, is left out.
        """
        loaded, routing = self._loaded, self._adapters.routing
        encode = loaded.tokenizer.encode
        tokens = text_tokens(
            lambda text: encode(text, add_special=False, parse_special=False), len(TEXT)
        )
        rng, seconds = np.random.default_rng(1), []
        for i in range(n_prompts + 1):
            start = int(rng.integers(0, max(1, len(tokens) - n_prompt)))
            prompt = tokens[start : start + n_prompt]
            began = time.perf_counter()
            turn = routing.choose(prompt, "auto")
            seconds.append(time.perf_counter() - began)
            routing.remember(str(i), turn)
            routing.feedback(str(i), float(rng.random()))
        return seconds[1:]

    def close(self) -> None:
        """Free everything."""
        self._loaded.close()


class TheirAdapted(Theirs):
    """llama.cpp with adapters of its own."""

    def __init__(self, path: Path, params: PeerParams, adapters: Sequence[Path]) -> None:
        self._peer = self._adapters = AdapterPeer(path, params)
        try:
            self._known = [self._adapters.load(each) for each in adapters]
        except BaseException:
            self._peer.close()
            raise

    def use(self, index: int | None) -> None:
        """Apply one of the adapters from the next decode on, or none."""
        self._adapters.use(None if index is None else self._known[index])

    def switch(self, prompt: list[int], index: int | None) -> Switched:
        """Set an adapter that is loaded and compute a prompt."""
        began = time.perf_counter()
        self.use(index)
        return self._first(prompt, began)

    def load_and_switch(self, prompt: list[int], path: Path) -> Switched:
        """Load an adapter, set it, compute a prompt; then unload it."""
        began = time.perf_counter()
        adapter = self._adapters.load(path)
        self._adapters.use(adapter)
        found = self._first(prompt, began)
        self._adapters.use(None)
        self._adapters.unload(adapter)
        return found

    def _first(self, prompt: list[int], began: float) -> Switched:
        set_ = time.perf_counter()
        self._peer.clear()
        self._peer.prefill(prompt)
        return Switched(set_ - began, time.perf_counter() - began)


class AdapterPeer(Peer):
    """A peer that loads adapters; they are freed with its model at the latest."""

    def load(self, path: Path) -> Any:
        """Load an adapter.

        Raises:
            AdapterFileError: llama.cpp refuses it.
        """
        lib = self._lib
        adapter = lib.llama_adapter_lora_init(lib.llama_get_model(self._ctx), str(path).encode())
        if not adapter:
            raise AdapterFileError(f"llama.cpp cannot load the adapter {path}")
        return adapter

    def use(self, adapter: Any) -> None:
        """Apply an adapter in full from the next decode on; None for none."""
        lib = self._lib
        given = () if adapter is None else (adapter,)
        pointers = (lib.llama_adapter_lora_p_ctypes * 1)(*given)
        scales = np.ctypeslib.as_ctypes(np.ones(1, np.float32))
        lib.llama_set_adapters_lora(self._ctx, pointers, len(given), scales)

    def unload(self, adapter: Any) -> None:
        """Free an adapter that is not in use."""
        self._lib.llama_adapter_lora_free(adapter)


def read_file_s(path: Path) -> float:
    """Read a whole file in order, as any program would: seconds."""
    buffer = bytearray(READ_BYTES)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began
