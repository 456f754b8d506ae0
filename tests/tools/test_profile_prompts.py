"""The prompts of a profile: those that come with edgeroute, and files of anybody's."""

import json
from collections import Counter
from pathlib import Path

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.tools.profile import prompts
from edgeroute.tools.profile.prompts import Prompt, bundled_prompts, read_prompts


def test_the_bundled_set_covers_nine_domains_evenly() -> None:
    found = bundled_prompts()
    counts = Counter(each.domain for each in found)
    assert len(counts) == 9 and all(2 <= n <= 4 for n in counts.values())
    assert len({each.text for each in found}) == len(found)
    # Short enough for a small context, long enough that experts settle.
    assert all(100 < len(each.text) < 900 for each in found)
    assert any(not each.text.isascii() for each in found if each.domain == "languages")


def test_plain_text_is_cut_at_lines_of_dashes(tmp_path: Path) -> None:
    path = tmp_path / "tales.txt"
    path.write_text("---\nOne.\n\nStill one.\n---\n\n---\n Two -- \n", encoding="utf-8")
    assert read_prompts(path) == [
        Prompt(domain="tales", text="One.\n\nStill one."),
        Prompt(domain="tales", text="Two --"),
    ]


def test_a_folder_is_its_files_by_name_each_a_domain(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"x": ["1", "2"], "y": ["3"]}')
    (tmp_path / "a.jsonl").write_text('{"text": "4", "domain": "z"}\n\n"5"\n')
    (tmp_path / "c.json").write_text('["6"]')
    (tmp_path / "notes.doc").write_text("no prompt")
    found = [(each.domain, each.text) for each in read_prompts(tmp_path)]
    assert found == [("z", "4"), ("a", "5"), ("x", "1"), ("x", "2"), ("y", "3"), ("c", "6")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b"3", "list of texts"),
        ("a.json", b'{"x": "text"}', "must be a list"),
        ("a.json", b"[1]", "must be a text"),
        ("a.json", b'{"": ["text"]}', "domain must be"),
        ("a.json", b'{"a\\nb": ["text"]}', "printable"),
        ("a.jsonl", b'{"domain": "x"}', '"text"'),
        ("a.jsonl", b'{"text": "x", "domain": 7}', "domain must be"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"  \n---\n", "no prompts"),
    ],
)
def test_a_malformed_file_is_refused_by_name(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert name in str(caught.value)


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({str(i): ["x"] for i in range(prompts.MAX_DOMAINS + 1)}))
    with pytest.raises(UsageError, match="65 domains"):
        read_prompts(path)
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 3)
    with pytest.raises(UsageError, match="more than 3 prompts"):
        read_prompts(path)
    monkeypatch.setattr(prompts, "MAX_FILE_BYTES", 10)
    with pytest.raises(UsageError, match="the limit is 10 B"):
        read_prompts(path)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        read_prompts(tmp_path / "none")
    with pytest.raises(UsageError, match="no file of prompts"):
        read_prompts(tmp_path)
