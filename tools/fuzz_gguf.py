"""Coverage-guided fuzzing of the GGUF header reader and the vocabulary check.

A finding is anything but success or an EdgerouteError: another exception, a hang, or more
memory than the limit. libFuzzer prints it and leaves the input as `crash-*`, `timeout-*`
or `oom-*` beside the corpus.
"""

import importlib
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, Protocol

import click

from edgeroute.runtime.errors import EdgerouteError, UsageError

if TYPE_CHECKING:
    # Imported when fuzzing starts, so that atheris can instrument it.
    from edgeroute.runtime.gguf_metadata import Metadata

MAX_INPUT_BYTES: Final = 1 << 16
MEMORY_LIMIT_MIB: Final = 256
"""What one input may make the process grow by."""
SECONDS_PER_INPUT: Final = 5
SECONDS_PER_SESSION: Final = 60
"""One process fuzzes this long: atheris leaks, so it starts anew with the corpus so far."""

_WORDS: Final = (
    b"GGUF",
    b"general.alignment",
    b"general.name",
    b"phi-3",
    b"split.count",
    b"tokenizer.ggml.model",
    b"tokenizer.ggml.pre",
    b"tokenizer.ggml.tokens",
    b"tokenizer.ggml.token_type",
    b"tokenizer.ggml.scores",
    b"tokenizer.ggml.merges",
    b"tokenizer.ggml.eos_token_id",
    b"tokenizer.ggml.bos_token_id",
    b"tokenizer.ggml.add_bos_token",
    b"gpt2",
    b"llama",
    b"<0x00>",
    b"<0x0A>",
    b"<0x-1>",
    b"[EMPTY_1]",
    b"a b",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x00\x00\x00\x00\x00\x00\x00\x80",
    b"\x09\x00\x00\x00\x08\x00\x00\x00",
    b"\x09\x00\x00\x00\x09\x00\x00\x00",
)


_STRING, _ARRAY, _BOOL, _UINT32, _INT32, _FLOAT32 = 8, 9, 7, 4, 5, 6
_ID_NAMES: Final = ("bos", "eos", "eot", "unknown", "padding")


class Provider(Protocol):
    """The part of atheris.FuzzedDataProvider that is used."""

    def ConsumeBytes(self, count: int) -> bytes: ...
    def ConsumeIntInRange(self, low: int, high: int) -> int: ...
    def ConsumeBool(self) -> bool: ...


def build_file(provider: Provider) -> bytes:
    """Build a well-formed file around a vocabulary that the fuzzer chooses.

    Blind changes to a file nearly always break its lengths, and would seldom reach the
    vocabulary check; here every length is right and every content wild.
    """
    values = [
        _pair("tokenizer.ggml.model", _STRING, _text(_pick(provider, _MODELS))),
        _pair("tokenizer.ggml.pre", _STRING, _text(_pick(provider, (b"default", b"gemma4")))),
        _pair("general.name", _STRING, _text(_pick(provider, (b"tune", b"my-phi-3")))),
        _pair("general.alignment", _UINT32, _mostly(provider, 32)),
        _pair("split.count", _UINT32, _mostly(provider, 1)),
        _strings("odd", _odd_strings(provider)),
        _pair("flags", _ARRAY, struct.pack("<IQ", _BOOL, 4) + _flags(provider)),
        _pair("tokenizer.ggml.suppress_tokens", _ARRAY, struct.pack("<IQ", _INT32, 0)),
    ]
    tokens = [_wild(provider, 12) for _ in range(provider.ConsumeIntInRange(0, 8))]
    if provider.ConsumeBool():
        tokens += [f"<0x{byte:02X}>".encode() for byte in range(256)]
    values.append(_strings("tokenizer.ggml.tokens", tokens))
    merges = [_wild(provider, 8) for _ in range(provider.ConsumeIntInRange(0, 4))]
    values.append(_strings("tokenizer.ggml.merges", merges))
    for key, low, high in (("token_type", -1, 7), ("scores", -(2**31), 2**31 - 1)):
        n = len(tokens) + provider.ConsumeIntInRange(-1, 1) * provider.ConsumeBool()
        numbers = [provider.ConsumeIntInRange(low, high) for _ in range(max(n, 0))]
        item = _INT32 if key == "token_type" or provider.ConsumeBool() else _FLOAT32
        payload = struct.pack("<IQ", item, len(numbers)) + struct.pack(
            f"<{len(numbers)}i", *numbers
        )
        values.append(_pair(f"tokenizer.ggml.{key}", _ARRAY, payload))
    for name in _ID_NAMES:
        token = struct.pack("<i", provider.ConsumeIntInRange(-1, 300))
        values.append(_pair(f"tokenizer.ggml.{name}_token_id", _UINT32, token))
    for name in ("bos", "eos"):
        flag = bytes([provider.ConsumeIntInRange(0, 1)])
        values.append(_pair(f"tokenizer.ggml.add_{name}_token", _BOOL, flag))
    kept = [value for value in values if provider.ConsumeIntInRange(0, 15)]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(kept)) + b"".join(kept)


_MODELS: Final = (b"gpt2", b"llama", b"llama", b"gpt2", b"bert")


def _odd_strings(provider: Provider) -> list[bytes]:
    """Return strings that look like lengths: zero bytes, and sizes around 256."""
    pieces = (b"", b"\0", b"\0" * 8, b"\1" + b"\0" * 7, b"a", b"b" * 255, b"c" * 256, b"d" * 300)
    texts = [
        _pick(provider, pieces) + _pick(provider, pieces)
        for _ in range(provider.ConsumeIntInRange(0, 6))
    ]
    # Enough of them and the reader gives up guessing and walks.
    return texts * (400 if provider.ConsumeIntInRange(0, 9) == 0 else 1)


def _mostly(provider: Provider, usual: int) -> bytes:
    """Return a UINT32 that is refused one time in sixteen, so that the rest is reached."""
    if provider.ConsumeIntInRange(0, 15):
        return struct.pack("<I", usual)
    return provider.ConsumeBytes(4).ljust(4, b"\0")


def _flags(provider: Provider) -> bytes:
    return bytes(provider.ConsumeIntInRange(0, 2) for _ in range(4))


def _pick(provider: Provider, choices: tuple[bytes, ...]) -> bytes:
    return choices[provider.ConsumeIntInRange(0, len(choices) - 1)]


def _wild(provider: Provider, limit: int) -> bytes:
    """Return a short text, one time in four a word that the checks know."""
    if provider.ConsumeIntInRange(0, 3) == 0:
        return _WORDS[provider.ConsumeIntInRange(0, len(_WORDS) - 1)]
    return provider.ConsumeBytes(provider.ConsumeIntInRange(0, limit))


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _pair(key: str, value_type: int, payload: bytes) -> bytes:
    return _text(key.encode()) + struct.pack("<I", value_type) + payload


def _strings(key: str, texts: list[bytes]) -> bytes:
    head = struct.pack("<IQ", _STRING, len(texts))
    return _pair(key, _ARRAY, head + b"".join(_text(text) for text in texts))


def _read_everything(metadata: "Metadata", key: str) -> None:
    """Decode one value with every getter; all but a few refuse its type."""
    getters: tuple[Callable[[], object], ...] = (
        lambda: metadata.get_str(key),
        lambda: metadata.get_u32(key),
        lambda: metadata.get_int(key, low=-5, high=5),
        lambda: metadata.get_float(key),
        lambda: metadata.get_bool(key),
        lambda: metadata.get_array(key, str),
        lambda: metadata.get_array(key, bytes),
        lambda: metadata.get_array(key, bool),
        lambda: metadata.get_array(key, int),
        lambda: metadata.get_array(key, float),
        lambda: metadata.get_int_or_array(key, 3),
    )
    for getter in getters:
        try:
            getter()
        except EdgerouteError as error:
            _check_sentence(error)
    if metadata.type_name(key) == "ARRAY of STRING":
        raw, pos, walked = metadata.array_bytes(key), 0, []
        while pos < len(raw):
            end = pos + 8 + int.from_bytes(raw[pos : pos + 8], "little")
            walked.append(raw[pos + 8 : end])
            pos = end
        if metadata.get_array(key, bytes) != walked:
            raise AssertionError(f"{key} is split wrongly")


def _check_sentence(error: EdgerouteError) -> None:
    if not str(error).startswith("fuzzed: ") or len(str(error)) > 1000:
        raise AssertionError(f"not a sentence: {str(error)[:200]!r}")


def make_target(
    provide: Callable[[bytes], Provider] | None = None,
) -> Callable[[bytes], None]:
    """Return the function under test: bytes of a file in, None or a finding out.

    With `provide`, bytes that do not start with GGUF's magic choose a vocabulary instead.
    """
    from edgeroute.runtime.gguf_header import parse_header
    from edgeroute.runtime.vocab_check import check_vocab_metadata

    def target(data: bytes) -> None:
        if provide is not None and not data.startswith(b"GGUF"):
            data = build_file(provide(data))
        try:
            header = parse_header(memoryview(data), "fuzzed")
        except EdgerouteError as error:
            _check_sentence(error)
            return
        for info in header.tensors.values():
            if not header.data_offset <= info.offset <= len(data) - info.nbytes:
                raise AssertionError(f"outside the file: {info}")
        for key in header.metadata:
            _read_everything(header.metadata, key)
        try:
            check_vocab_metadata(header.metadata)
        except EdgerouteError as error:
            _check_sentence(error)

    return target


def write_seeds(folder: Path) -> int:
    """Write a small valid file of every architecture, and vocabularies; return how many."""
    from edgeroute.tools import synth

    for index in range(4):
        (folder / f"vocabulary-{index}").write_bytes(bytes([index]) * 2000)
    for name, spec in synth.ARCHITECTURES.items():
        tiny = replace(spec, n_layer=1, n_embd=8, n_ff=8, n_head=1, n_head_kv=1, n_embd_head=8,
                       n_ff_exp=8, n_ff_shexp=min(8, spec.n_ff_shexp))  # fmt: skip
        if spec.latent is not None:
            narrow = replace(spec.latent, n_lora_kv=8, n_nope=8, n_rot=8, n_head_v=8)
            n_lora_q = None if spec.latent.n_lora_q is None else 8
            tiny = replace(tiny, latent=replace(narrow, n_lora_q=n_lora_q))
        synth.write(replace(tiny, n_vocab=340, n_ctx=64), folder / f"{name}.gguf")
    return len(synth.ARCHITECTURES) + 4


def _atheris() -> ModuleType:
    try:
        return importlib.import_module("atheris")
    except ModuleNotFoundError as error:
        raise UsageError("fuzzing needs atheris; install it with: pip install atheris") from error


def _bounded(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Make an allocation beyond the limit a MemoryError, where the system can.

    The limit is set anew from time to time, because instrumented code grows on its own:
    atheris keeps some kilobytes of every run.
    """
    try:
        import resource
    except ModuleNotFoundError:
        return target  # Windows; libFuzzer's own limit on resident memory remains.
    status = Path("/proc/self/statm")
    if not status.exists():
        return target
    runs = 0

    def bounded(data: bytes) -> None:
        nonlocal runs
        if runs % 100 == 0:
            used_bytes = int(status.read_text().split()[0]) * resource.getpagesize()
            limit = used_bytes + (MEMORY_LIMIT_MIB << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        runs += 1
        target(data)

    return bounded


def run_session(seconds: int, folder: Path) -> None:
    """Fuzz in this process, which libFuzzer ends."""
    atheris = _atheris()
    words = folder.parent / f"{folder.name}.dict"
    words.write_text("".join(f'"{_escape(word)}"\n' for word in _WORDS))
    with atheris.instrument_imports(include=["edgeroute.runtime"]):
        target = make_target(atheris.FuzzedDataProvider)
    flags = [
        f"-max_total_time={seconds}",
        "-len_control=0",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={SECONDS_PER_INPUT}",
        "-rss_limit_mb=4096",
        f"-dict={words}",
        f"-artifact_prefix={folder.parent}/{folder.name}-",
        "-print_final_stats=1",
        str(folder),
    ]
    atheris.Setup([sys.argv[0], *flags], _bounded(target))
    atheris.Fuzz()


@click.command()
@click.option("--seconds", default=600, show_default=True, type=click.IntRange(1))
@click.option("--corpus", type=click.Path(file_okay=False, path_type=Path), default=None)
@click.option("--session", is_flag=True, hidden=True)
def main(seconds: int, corpus: Path | None, session: bool) -> None:
    """Fuzz the GGUF reader; the exit code is not 0 if anything was found."""
    if session and corpus is not None:
        run_session(seconds, corpus)
    _atheris()
    folder = corpus or Path(tempfile.mkdtemp(prefix="edgeroute-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    click.echo(f"{write_seeds(folder)} seeds and the corpus are in {folder}")
    n_runs, left = 0, seconds
    while left > 0:
        length = min(left, SECONDS_PER_SESSION)
        left -= length
        command = [sys.executable, "-m", "edgeroute.tools.fuzz_gguf", "--session"]
        command += ["--seconds", str(length), "--corpus", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        stats = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
        n_runs += int(stats[-1]) if stats else 0
        click.echo(f"{seconds - left} s: {n_runs} executions, {len(list(folder.iterdir()))} inputs")
        if done.returncode:
            click.echo(done.stderr[-4000:])
            sys.exit(done.returncode)
    click.echo(f"nothing found in {n_runs} executions")


def _escape(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main()
