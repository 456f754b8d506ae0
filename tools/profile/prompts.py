"""What a profile asks a model: the bundled prompts by domain, or the user's own files.

Bundled: `prompts.json`, written for this project (Apache-2.0). A user's file is JSON (a list of
texts, or an object of domain to texts), JSON lines (`{"text": ..., "domain": ...}`), or plain
text whose prompts stand between lines of `---`; a folder is all such files, each a domain.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import MIB, format_bytes

MAX_FILE_BYTES: Final = 16 * MIB
MAX_PROMPTS: Final = 10_000
MAX_DOMAIN: Final = 64
"""Characters of a domain's name."""
MAX_DOMAINS: Final = 64
SUFFIXES: Final = (".txt", ".md", ".json", ".jsonl")
_BETWEEN: Final = "---"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text to continue or answer, and what it is about.

    Raises:
        UsageError: the text is empty, or the domain no short printable name.
    """

    domain: str
    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise UsageError(f"a prompt must be a text that is not empty, got {self.text!r:.80}")
        named = isinstance(self.domain, str) and 0 < len(self.domain) <= MAX_DOMAIN
        if not named or not self.domain.isprintable():
            raise UsageError(
                f"a prompt's domain must be 1 to {MAX_DOMAIN} printable characters, "
                f"got {self.domain!r:.80}"
            )


def bundled_prompts() -> list[Prompt]:
    """Return the project's own prompts: nine domains, two to four prompts each."""
    text = files("edgeroute.tools.profile").joinpath("prompts.json").read_text(encoding="utf-8")
    domains = json.loads(text)["domains"]
    return [Prompt(domain=name, text=each) for name, texts in domains.items() for each in texts]


def read_prompts(path: Path) -> list[Prompt]:
    """Read a user's prompts: a file, or all of a folder by name.

    Raises:
        UsageError: nothing is there, it is too large, or malformed; the message names the file.
    """
    found: list[Prompt] = []
    for file in _files(path):
        try:
            found += _read(file)
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 text: {error.reason}") from error
        except OSError as error:
            raise UsageError(f"cannot read prompts from {file}: {error.strerror}") from error
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
        if len(found) > MAX_PROMPTS:
            raise UsageError(f"{path} has more than {MAX_PROMPTS} prompts; give fewer")
    n_domain = len({each.domain for each in found})
    if n_domain > MAX_DOMAINS:
        raise UsageError(f"{path} has {n_domain} domains; at most {MAX_DOMAINS} can be compared")
    if not found:
        raise UsageError(f"{path} has no prompts")
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"there are no prompts at {path}: no such file or folder")
    found = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES and each.is_file())
    if not found:
        raise UsageError(f"{path} has no file of prompts; they end in {', '.join(SUFFIXES)}")
    return found


def _read(file: Path) -> Iterator[Prompt]:
    n_bytes = file.stat().st_size
    if n_bytes > MAX_FILE_BYTES:
        raise UsageError(
            f"{format_bytes(n_bytes)} of prompts; the limit is {format_bytes(MAX_FILE_BYTES)}"
        )
    text, domain = file.read_text(encoding="utf-8-sig"), file.stem[:MAX_DOMAIN]
    if file.suffix == ".json":
        yield from _of_json(_parse(text), domain)
    elif file.suffix == ".jsonl":
        for line in filter(str.strip, text.splitlines()):
            yield _of_line(_parse(line), domain)
    else:
        for part in _parts(text):
            yield Prompt(domain=domain, text=part)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it is not JSON: {error}") from error


def _of_json(content: Any, domain: str) -> Iterator[Prompt]:
    by_domain = {domain: content} if isinstance(content, list) else content
    if not isinstance(by_domain, dict):
        raise UsageError("it must be a list of texts, or an object of domain to such lists")
    for name, texts in by_domain.items():
        if not isinstance(texts, list):
            raise UsageError(f"the prompts of {name!r:.80} must be a list of texts")
        for text in texts:
            yield Prompt(domain=name, text=text)


def _of_line(content: Any, domain: str) -> Prompt:
    if isinstance(content, str):
        return Prompt(domain=domain, text=content)
    if not isinstance(content, dict) or "text" not in content:
        raise UsageError('a line must be a text, or {"text": ..., "domain": ...}')
    return Prompt(domain=content.get("domain", domain), text=content["text"])


def _parts(text: str) -> Iterator[str]:
    """Cut at lines of three dashes; parts without text are none."""
    part: list[str] = []
    for line in [*text.splitlines(), _BETWEEN]:
        if line.strip() == _BETWEEN:
            if joined := "\n".join(part).strip():
                yield joined
            part = []
        else:
            part.append(line)
