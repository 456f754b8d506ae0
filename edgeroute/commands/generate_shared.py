"""What `generate` and `chat` share: options, opening a model, one streamed answer."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from edgeroute.commands.adapters_part import adapters_part
from edgeroute.commands.answer_writer import StepWriter, writer
from edgeroute.commands.steps_part import steps_part
from edgeroute.lever_guard import switched_off
from edgeroute.runtime.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from edgeroute.engine import Options, Runtime, Settings
    from edgeroute.pool_answer import PoolStream
    from edgeroute.stats import Chunk, Generation
    from edgeroute.stream import Stream

Command = TypeVar("Command", bound=Callable[..., Any])

_RUNTIME_OPTIONS = (
    click.option("--memory", metavar="BYTES", help="Budget over everything, such as 2GiB; "
                 "without it what is free, less a reserve."),
    click.option("--threads", "-t", type=int, metavar="N", help="Compute threads; without it "
                 "measured while decoding."),
    click.option("--n-ctx", type=int, metavar="N", help="Most tokens of prompt and answer "
                 "together.  [default: 4096]"),
    click.option("--kv-type", metavar="TYPE", help="How keys and values are kept: f16 or "
                 "q8_0.  [default: f16]"),
    click.option("--device", metavar="NAMES", help="What computes: cpu; auto, the fastest that is "
                 "proved to answer like it; or ggml's devices by name, several with commas "
                 "between, such as cuda0,rpc:192.168.1.20:50052.  [default: cpu]"),
    click.option("--device-memory", metavar="BYTES", help="What may be used of each device's own "
                 "memory, such as 6GiB; without it what it has free, less a reserve."),
    click.option("--host-experts", metavar="WHEN", help="Compute experts that a device has no room "
                 "for by the processor: auto (where that is measured to be quicker), on, off.  "
                 "[default: auto]"),
    click.option("--policy", metavar="NAME", help="Which expert of a paged model leaves when "
                 "another needs its room: auto, lru, lfu, lfru, hobbit ...  [default: auto]"),
    click.option("--prefetch", metavar="WHEN", help="Read experts ahead: auto (while it pays), "
                 "off, or by gate, eam, frequency or learned:FILE, while it pays too (always with "
                 "--levers asked).  [default: auto]"),
    click.option("--drop-misses", type=float, metavar="SHARE", help="Do without experts that would "
                 "have to be read, up to this share of a token's weight in a layer, such as 0.1; "
                 "changes answers.  [default: 0]"),
    click.option("--prefer-resident", type=float, metavar="NATS", help="Of experts rated so near "
                 "each other, such as 0.2, take those in memory; changes answers.  [default: 0]"),
    click.option("--degrade-misses", type=float, metavar="SHARE", help="Read copies of fewer bits "
                 "(`edgeroute convert copies`) of experts that are missing and weigh little, up to "
                 "this share of a token's weight, such as 0.4; changes answers.  [default: 0]"),
    click.option("--plain-prompts", is_flag=True, default=None, help="Keep repacked weights in the "
                 "file's layout too, for prompts: on a Q4_K model a third of their time less; "
                 "takes the bytes of both."),
    click.option("--trace", metavar="FILE", help="Record which experts were chosen."),
    click.option("--speculate", metavar="WHO", help="Who drafts tokens that one pass verifies, "
                 "the answer staying the same: auto (where layers stream, while it pays), off, "
                 "lookup, self or small.  [default: auto]"),
    click.option("--small", metavar="NAME", help="A smaller model kept in memory beside the "
                 "model: it drafts for it (see --speculate) or writes steps of answers (--steps)."),
    click.option("--steps", metavar="WHO", help="Who writes the steps of an answer, --small or "
                 "the model: auto (as `edgeroute calibrate --steps` chose, where it pays), off, or "
                 "a policy such as glimpse:1.2, verify:-0.5:-4, random:0.3, small or large.  "
                 "[default: auto]"),
    click.option("--remote", metavar="URL", help="Have the large model's steps written by an "
                 "OpenAI-compatible server, such as http://workstation:8080/v1; where it fails, "
                 "the answer is completed here."),
    click.option("--adapters", metavar="DIR", help="LoRA adapters to choose from; without it, "
                 "where --adapter is given, the library of `edgeroute adapters`."),
    click.option("--small-adapters", metavar="DIR", help="LoRA adapters of --small, for the steps "
                 "that it writes."),
    click.option("--depth", metavar="PLAN", help="Leave out what a plan of `edgeroute calibrate` "
                 "names; auto takes the fastest that is nearly lossless.  [default: full]"),
    click.option("--levers", metavar="WHICH", help="proven: what `edgeroute bench levers` proved, "
                 "and what loses is switched off; asked: as the other options say; off: none.  "
                 "[default: proven]"),
)  # fmt: skip
_ANSWER_OPTIONS = (
    click.option("--model", "-m", metavar="NAME", help="Catalogue name, hf:owner/repo/file.gguf, "
                 "or a path to a .gguf file; without it the default model."),
    click.option("--show-steps", is_flag=True, help="Show which model wrote what: by colour on a "
                 "terminal (not with NO_COLOR), elsewhere by marks such as [small]."),
    click.option("--adapter", metavar="NAME", help="Adapter that answers: a name, several as "
                 "a=0.7,b=0.3, or auto to choose by the prompt."),
    click.option("--small-adapter", metavar="NAME", help="Adapter of --small-adapters that the "
                 "small model's steps are written with: a name, or several as a=0.7,b=0.3."),
    click.option("--session", metavar="NAME", help="Begin with the keys and values that were saved "
                 "under this name, as far as the prompt begins alike, and save them at the end."),
)  # fmt: skip
_SAMPLING_OPTIONS = (
    click.option("--temperature", type=float, default=0.0, show_default=True,
                 help="0 always takes the likeliest token."),
    click.option("--top-p", type=float, default=1.0, show_default=True,
                 help="Keep the likeliest tokens of this total probability."),
    click.option("--top-k", type=int, default=0, show_default=True,
                 help="Keep that many likeliest tokens; 0 keeps all."),
    click.option("--min-p", type=float, default=0.0, show_default=True,
                 help="Drop tokens below this share of the likeliest one's probability."),
    click.option("--repeat-penalty", type=float, default=1.0, show_default=True,
                 help="Divide the logits of recent tokens; 1 does nothing."),
    click.option("--seed", type=int, help="Same seed, same text; without it a random one."),
)  # fmt: skip
SETTINGS = (
    *("memory", "threads", "n_ctx", "kv_type", "device", "device_memory", "host_experts"),
    *("policy", "prefetch", "trace", "adapters", "depth", "speculate", "small", "steps"),
    *("small_adapters", "remote", "levers", "drop_misses", "prefer_resident", "degrade_misses"),
    "plain_prompts",
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed")


def model_options(command: Command) -> Command:
    """Add the options that say which model runs, and how."""
    for option in reversed(_ANSWER_OPTIONS[1:]):
        command = option(command)
    return _ANSWER_OPTIONS[0](runtime_options(command))


def runtime_options(command: Command) -> Command:
    """Add those that say how a model runs, but not which one, nor what answers are like."""
    for option in reversed(_RUNTIME_OPTIONS):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """Add the options that say how tokens are chosen."""
    for option in reversed(_SAMPLING_OPTIONS):
        command = option(command)
    return command


def pick(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Take the named options that were given; None means not given."""
    return {name: given[name] for name in names if given.get(name) is not None}


def check_options(given: dict[str, Any]) -> None:
    """Refuse values out of range now, not after the model was loaded.

    Raises:
        UsageError: the message names the option's value and its range.
    """
    from edgeroute.config import merge_settings
    from edgeroute.runtime.records import SamplingParams

    if given.get("session") is not None:
        from edgeroute.session_folder import check_session_name

        check_session_name(given["session"])
    SamplingParams(**pick(given, SAMPLING))
    merge_settings(pick(given, SETTINGS))


def find_model(name: str | None) -> "Path":
    """Find a model's file; the default model is pulled, with its progress shown.

    Raises:
        CatalogueError: it is not here; the message names the `edgeroute pull` to run.
    """
    from edgeroute.models.catalogue import DEFAULT_MODEL
    from edgeroute.models.pull import pull, resolve
    from edgeroute.runtime.errors import CatalogueError

    spec = name or DEFAULT_MODEL
    try:
        return resolve(spec)
    except CatalogueError:
        if spec != DEFAULT_MODEL:
            raise
    from edgeroute.commands.pull import progress_on_stderr

    click.echo(f"pulling the default model, {spec}", err=True)
    with progress_on_stderr() as report:
        return pull(spec, progress=report).path


def has_chat_template(path: "Path") -> bool:
    """Tell from the header whether a model was trained to chat.

    Raises:
        ModelFileError: the header is malformed.
    """
    from edgeroute.runtime.gguf import GGUFFile

    with GGUFFile.open(path) as file:
        return bool(file.metadata.get_str("tokenizer.chat_template", None))


@contextmanager
def open_runtime(path: "Path", given: dict[str, Any]) -> "Iterator[Runtime]":
    """Load a model for the time of a command."""
    from edgeroute.engine import Runtime

    settings = cast("Settings", pick(given, SETTINGS))
    if given["session"] is not None and not os.environ.get("EDGEROUTE_SESSIONS"):
        from edgeroute.session_folder import default_folder

        settings["sessions"] = default_folder()
    with Runtime(path, **settings) as runtime:
        for each in cast("list[str]", runtime.stats()["warnings"]):
            click.echo(f"warning: {each}", err=True)
        yield runtime


@dataclass(slots=True, kw_only=True)
class Answer:
    """An answer as far as it came, with the engine's statistics of it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "cancelled"
    seed: int | None = None
    stats: dict[str, Any] = field(default_factory=dict)


def listen(
    runtime: "Runtime", prompt: str | None, options: "Options", write: Callable[[str], None]
) -> Answer:
    """Ask for an answer and pass its text on as it comes.

    Ctrl-C ends the answer and returns what there is of it, with `finish_reason`
    `cancelled`.

    Raises:
        EdgerouteError: the request was refused; nothing was written.
    """
    # Refusals come here, before the loop: nothing has been written then.
    with runtime.stream(prompt, **options) as stream:
        answer, _ = hear(stream, write)
    if lost := switched_off(cast("dict[str, Any]", runtime.stats()["levers"])):
        answer.stats["switched_off"] = lost
    return answer


def hear(
    stream: "Stream | PoolStream", write: Callable[[str], None]
) -> "tuple[Answer, Generation | None]":
    """Pass on the text of an answer as it comes; Ctrl-C ends it.

    Returns:
        What there is of it, and the engine's record of it.
    """
    answer, generation = Answer(), None
    while True:
        try:
            for chunk in stream:
                _take(answer, chunk, write)
                generation = chunk.generation
            return answer, generation
        except KeyboardInterrupt:
            stream.cancel()  # what was produced still comes, with its statistics


def _take(answer: Answer, chunk: "Chunk", write: Callable[[str], None]) -> None:
    if chunk.text:
        answer.text += chunk.text
        if isinstance(write, StepWriter):
            write.turn(chunk.model)
        write(chunk.text)
    generation = chunk.generation
    if generation is not None:
        if isinstance(write, StepWriter):
            write.turn(None)
        answer.token_ids = list(generation.token_ids)
        answer.finish_reason, answer.seed = generation.finish_reason, generation.seed
        answer.stats = generation.stats.to_dict()


def stats_line(answer: Answer, budget_bytes: int) -> str:
    """Say on one line what an answer took."""
    stats = answer.stats
    n = stats["n_generated"]
    head = [f"{n} token{'' if n == 1 else 's'}"]
    if stats["decode_tok_s"]:
        head.append(f"{stats['decode_tok_s']:.1f} tok/s{_forecast_part(stats)}")
    parts = [", ".join(head)]
    if n:
        parts.append(f"first token after {stats['ttft_s']:.2f} s")
    parts.append(_prompt_part(stats))
    memory = f"memory {format_bytes(stats['memory_bytes'])} of {format_bytes(budget_bytes)}"
    parts += [memory, f"{stats['threads']} thread{'' if stats['threads'] == 1 else 's'}"]
    if (energy := stats.get("energy")) and energy["joules_per_token"] is not None:
        parts.append(_energy_part(energy))
    if experts := stats.get("experts"):
        parts.append(_experts_part(experts))
    if layers := stats.get("layers"):
        parts.append(f"layers streamed: {layers['streamed']} of "
                     f"{layers['resident'] + layers['streamed']}, {format_bytes(layers['bytes'])} "
                     f"read, {layers['stall_s']:.1f} s waited")  # fmt: skip
    if drafts := stats.get("speculation"):
        parts.append(_drafts_part(drafts))
    if adapters := stats.get("adapters"):
        parts.append(adapters_part(adapters))
    if depth := stats.get("depth"):
        parts.append(_depth_part(depth))
    if steps := stats.get("steps"):
        parts.append(steps_part(steps))
    if session := stats.get("session"):
        parts.append(_session_part(session))
    parts += stats.get("switched_off", ())
    ends = {"length": "ended at --max-tokens or --n-ctx", "cancelled": "stopped",
            "timeout": "ended by --timeout"}  # fmt: skip
    if answer.finish_reason in ends:
        parts.append(ends[answer.finish_reason])
    return f"[{'; '.join(parts)}]"


def _forecast_part(stats: dict[str, Any]) -> str:
    found = stats.get("forecast_tok_s")
    return "" if found is None else f" (forecast {found['low']:.1f} to {found['high']:.1f})"


def _energy_part(energy: dict[str, Any]) -> str:
    how = "estimated" if energy["estimated"] else f"by {energy['source']}"
    return f"{energy['joules_per_token']:.2g} J/token, {how}"


def _experts_part(experts: dict[str, Any]) -> str:
    read = format_bytes(experts["demand_bytes"] + experts["prefetch_bytes"])
    return (f"experts paged: {experts['hit_ratio']:.0%} hits, {read} read, "
            f"{experts['stall_s']:.1f} s waited")  # fmt: skip


def _drafts_part(drafts: dict[str, Any]) -> str:
    if not drafts["drafted"]:
        return "nothing drafted"
    return (f"drafted by {drafts['source']}: {drafts['accepted']} of {drafts['drafted']} "
            f"accepted, {drafts['tokens_per_pass']:.2f} tokens a pass")  # fmt: skip


def _depth_part(depth: dict[str, Any]) -> str:
    part = f"depth {depth['plan']}: {depth['layers_run']} of {depth['layers_total']} layers run"
    if "compute" in depth:
        part += f" whole, {1 - depth['compute']:.0%} of the weights left out"
    return part


def _session_part(session: dict[str, Any]) -> str:
    n, name = session["restored_tokens"], session["name"]
    came = (f"{n} tokens read back in {1e3 * session['restore_s']:.0f} ms" if n
            else f"nothing read back: {session['not_restored']}")  # fmt: skip
    saved = "" if session["saved"] is True else f", not saved: {session['saved']}"
    return f"session {name}: {came}{saved}"


def _prompt_part(stats: dict[str, Any]) -> str:
    part = f"prompt {stats['n_prompt']} tokens"
    if stats["n_cached"]:
        part += f", {stats['n_cached']} of them kept"
    if stats["prefill_tok_s"]:
        part += f" at {stats['prefill_tok_s']:.0f} tok/s"
    return part


def budget_of(runtime: "Runtime") -> int:
    """The byte budget a runtime keeps to."""
    return cast(int, runtime.stats()["budget_bytes"])


def answer_writer(given: dict[str, Any], *, err: bool = False) -> Callable[[str], None]:
    """Return what writes answers: with the models' colours where --show-steps asks for them."""
    return StepWriter(err=err) if given["show_steps"] else writer(err=err)


@contextlib.contextmanager
def file_errors(option: str, name: str) -> Iterator[None]:
    """Turn a file that cannot be read or written into a usage error that names the option."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{option} {name} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise click.UsageError(f"{option} {name}: {error.strerror or error}") from error
