"""Pulling from a hub on loopback: every way to succeed, break off, lie and refuse."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from edgeroute.models import hub, store
from edgeroute.models.pull import PullProgress, pull, remove, resolve
from edgeroute.models.sources import HashMismatchError, OfflineError, SourceError
from edgeroute.runtime.errors import CapacityError, CatalogueError
from tests.models.hub_server import BODY, HUB, SHA256, SPEC, Behaviour, add_entry, leftovers

pytestmark = pytest.mark.usefixtures("isolated_hub")


# Happy paths


def test_a_hub_file_arrives_verified_under_its_name(server, tmp_path: Path) -> None:
    steps: list[PullProgress] = []
    result = pull(SPEC, progress=steps.append)
    assert result.path == tmp_path / "models/hf/owner/repo/main/sub/tiny-q4.gguf"
    assert result.path.read_bytes() == BODY
    assert (result.n_bytes, result.sha256, result.cached) == (len(BODY), SHA256, False)
    assert resolve(SPEC) == result.path
    assert {step.phase for step in steps} == {"download", "verify"}
    done = [step.n_done for step in steps if step.phase == "download"]
    assert done == sorted(done) and done[-1] == steps[-1].n_total == len(BODY)
    assert set(leftovers(tmp_path)) == {
        "hf/owner/repo/main/sub/tiny-q4.gguf",
        "hf/owner/repo/main/sub/tiny-q4.json",
    }


def test_the_hub_is_asked_for_the_right_address_and_identity(server) -> None:
    pull(f"{SPEC}@v1.2")
    head, body = server.requests
    assert (head.method, head.path) == ("HEAD", "/owner/repo/resolve/v1.2/sub/tiny-q4.gguf")
    assert head.headers["accept-encoding"] == body.headers["accept-encoding"] == "identity"


def test_a_second_pull_asks_nobody(server) -> None:
    pull(SPEC)
    n_requests = len(server.requests)
    again = pull(SPEC)
    assert again.cached and again.sha256 == SHA256
    assert len(server.requests) == n_requests


def test_force_downloads_again(server) -> None:
    pull(SPEC)
    assert not pull(SPEC, force=True).cached
    assert server.n_sent == 2 * len(BODY)


def test_a_hub_without_redirect_is_read_directly(server) -> None:
    server.behaviour.redirect = "none"
    assert pull(SPEC).sha256 == SHA256


def test_a_path_is_only_hashed(tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(BODY)
    result = pull(str(path))
    assert (result.path, result.sha256, result.cached) == (path, SHA256, True)
    with pytest.raises(CatalogueError, match="file of yours"):
        remove(str(path))
    assert path.exists()


def test_installed_lists_and_remove_frees(server, tmp_path: Path, monkeypatch) -> None:
    add_entry(monkeypatch, HUB)
    pull("tiny")
    pull(SPEC + "@v1")
    assert [(m.name, m.n_bytes, m.sha256) for m in store.installed()] == [
        ("tiny", len(BODY), SHA256),
        (SPEC + "@v1", len(BODY), SHA256),
    ]
    assert remove(SPEC + "@v1") == len(BODY)
    assert remove("tiny") == len(BODY)
    assert leftovers(tmp_path) == {} and not (tmp_path / "models/hf/owner").exists()
    with pytest.raises(CatalogueError, match="not there"):
        remove("tiny")


def test_a_file_put_there_by_hand_is_checked_before_it_counts(tmp_path, monkeypatch) -> None:
    add_entry(monkeypatch, HUB)
    path = tmp_path / "models/tiny.gguf"
    path.parent.mkdir()
    path.write_bytes(BODY)
    assert pull("tiny").cached
    path.write_bytes(BODY[:-1] + b"!")
    with pytest.raises(OfflineError):
        pull("tiny")


# Broken transfers


def test_truncation_is_resumed_by_range_and_no_byte_is_sent_twice(server) -> None:
    server.behaviour.truncations = [60_000, 50_000]
    assert pull(SPEC).sha256 == SHA256
    ranges = [seen.headers.get("range") for seen in server.bodies()]
    assert ranges == [None, "bytes=60000-", "bytes=110000-"]
    assert server.n_sent == len(BODY)


def test_endless_truncation_ends_in_a_clear_error_and_keeps_the_bytes(server, tmp_path) -> None:
    server.behaviour.truncations = [70_000] + [0] * 50
    with pytest.raises(SourceError, match=r"gave up after 5 attempts .* kept .* resumes"):
        pull(SPEC)
    server.behaviour.truncations = []
    assert pull(SPEC).sha256 == SHA256
    assert server.n_sent == len(BODY)


def test_a_server_that_ignores_ranges_is_read_from_the_start(server) -> None:
    server.behaviour.truncations, server.behaviour.ignore_range = [60_000], True
    assert pull(SPEC).path.read_bytes() == BODY


def test_a_range_that_starts_elsewhere_is_refused(server) -> None:
    server.behaviour.truncations, server.behaviour.lie_range = [60_000], True
    with pytest.raises(SourceError, match="answered range 'bytes 0-"):
        pull(SPEC)


def test_another_version_on_the_hub_restarts_the_download(server) -> None:
    server.behaviour.truncations = [60_000] + [0] * 50
    with pytest.raises(SourceError):
        pull(SPEC)
    server.behaviour = Behaviour(body=b"GGUF" + BODY[::-1])
    assert pull(SPEC).path.read_bytes() == b"GGUF" + BODY[::-1]
    assert server.bodies()[-1].headers.get("range") is None


def test_ctrl_c_leaves_a_state_that_the_next_pull_resumes(server, tmp_path: Path) -> None:
    def stop(step: PullProgress) -> None:
        if step.n_done > 80_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(SPEC, progress=stop)
    assert not (tmp_path / "models/hf").exists()
    (n_kept,) = (n for name, n in leftovers(tmp_path).items() if name.endswith("hub.part"))
    assert n_kept > 80_000
    assert pull(SPEC).sha256 == SHA256
    assert server.bodies()[-1].headers["range"] == f"bytes={n_kept}-"


def test_server_errors_are_tried_again(server) -> None:
    server.behaviour.head_statuses, server.behaviour.body_statuses = [503], [500, 429]
    assert pull(SPEC).sha256 == SHA256


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL does not exist there")
def test_a_killed_process_is_resumed_by_the_next(server, tmp_path: Path) -> None:
    server.behaviour.pause_after = 120_000
    child = start_child()
    assert server.paused.wait(30)
    (part,) = wait_for_part(tmp_path, 100_000)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    n_kept = part.stat().st_size
    server.behaviour.pause_after = None
    server.resume.set()
    assert pull(SPEC).sha256 == SHA256
    assert server.bodies()[-1].headers["range"] == f"bytes={n_kept}-"


def wait_for_part(tmp_path: Path, n_bytes: int) -> list[Path]:
    """Wait until the unfinished file has at least so many bytes on the disk."""
    for _ in range(500):
        found = [
            path
            for path in (tmp_path / "models/.partial").rglob("hub.part")
            if path.stat().st_size >= n_bytes
        ]
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(leftovers(tmp_path))


def start_child() -> "subprocess.Popen[str]":
    """Another process that pulls SPEC, printing messages and at last whether it was cached."""
    code = (
        "import sys; from edgeroute.models.pull import pull\n"
        "say = lambda step: step.message and print(step.phase, flush=True)\n"
        f"print('cached' if pull({SPEC!r}, progress=say).cached else 'pulled')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_make_one_download(server) -> None:
    server.behaviour.pause_after = 50_000
    first = start_child()
    assert server.paused.wait(30)
    second = start_child()
    assert second.stdout is not None and second.stdout.readline() == "wait\n"
    with pytest.raises(CatalogueError, match="being pulled by another process"):
        remove(SPEC)
    server.resume.set()
    outputs = [child.communicate(timeout=60) for child in (first, second)]
    assert [out for out, _ in outputs] == ["pulled\n", "cached\n"], outputs
    assert server.n_sent == len(BODY)


# What must never get a name


def test_a_wrong_hash_deletes_the_file_and_names_both_hashes(server, tmp_path: Path) -> None:
    server.behaviour.etag = "a" * 64
    with pytest.raises(HashMismatchError, match=rf"{SHA256}, wanted {'a' * 64}; it was deleted"):
        pull(SPEC)
    assert leftovers(tmp_path) == {}


def test_a_small_file_is_checked_by_its_git_hash(server) -> None:
    blob = hashlib.sha1(b"blob %d\0" % len(BODY) + BODY)
    server.behaviour.etag = blob.hexdigest()
    assert pull(SPEC).sha256 == SHA256
    server.behaviour.etag = "b" * 40
    with pytest.raises(HashMismatchError, match=f"git sha1 {blob.hexdigest()}, wanted {'b' * 40}"):
        pull(SPEC, force=True)


def test_a_file_without_a_hash_is_refused(server) -> None:
    server.behaviour.etag = "W/../../../etc"
    with pytest.raises(SourceError, match="names no hash"):
        pull(SPEC)
    assert server.bodies() == []


def test_what_is_not_gguf_is_refused(server, tmp_path: Path) -> None:
    server.behaviour.body = b"version https://git-lfs.example/spec/v1\n" * 50
    with pytest.raises(SourceError, match="not a GGUF file"):
        pull(SPEC)
    assert leftovers(tmp_path) == {}


def test_more_bytes_than_announced_are_not_written(server, tmp_path: Path) -> None:
    server.behaviour.size = 10_000
    with pytest.raises(SourceError, match="more than the 10000 bytes"):
        pull(SPEC)
    assert max(leftovers(tmp_path).values()) < 1000


@pytest.mark.parametrize("size", [0, -5])
def test_impossible_sizes_are_refused(server, size: int) -> None:
    server.behaviour.size = size
    with pytest.raises(SourceError, match=f"announces {size} bytes"):
        pull(SPEC)


def test_a_huge_announced_size_is_refused_with_numbers(server) -> None:
    server.behaviour.size = 1 << 62
    with pytest.raises(CapacityError, match=rf"needs .*\({1 << 62} bytes\).* free"):
        pull(SPEC)
    assert server.bodies() == []


def test_gzip_is_not_decoded(server, tmp_path: Path) -> None:
    server.behaviour.compress = True
    with pytest.raises(SourceError, match="content-encoding 'gzip'"):
        pull(SPEC)
    assert max(leftovers(tmp_path).values()) < 1000


def test_endless_redirects_end(server) -> None:
    server.behaviour.redirect = "loop"
    with pytest.raises(SourceError, match="more than 5 redirects"):
        pull(SPEC)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirects_to_other_schemes_are_refused(server, address: str) -> None:
    server.behaviour.redirect = address
    with pytest.raises(SourceError):
        pull(SPEC)


def test_a_redirect_must_not_leave_https() -> None:
    with pytest.raises(SourceError, match="redirects from https"):
        hub._redirected("https://hub/x", "http://cdn/y")
    assert hub._redirected("https://hub/a/x", "/y") == "https://hub/y"


def test_the_token_stays_with_the_hub(server, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(SPEC)
    sent = {seen.server: seen.headers.get("authorization") for seen in server.requests}
    assert sent == {"hub": "Bearer hf_secret", "cdn": None}


def test_the_token_goes_with_a_body_that_the_hub_itself_serves(server, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.behaviour.redirect = "none"
    pull(SPEC)
    assert server.bodies()[0].headers["authorization"] == "Bearer hf_secret"


# Refusals of the hub


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "EntryNotFound", "has no file 'sub/tiny-q4.gguf'"),
        (404, "RevisionNotFound", "has no revision 'main'"),
        (401, "RepoNotFound", "does not exist or is private"),
        (401, "", "does not exist or is private"),
        (403, "GatedRepo", "is gated: accept its terms"),
        (429, "", "answered 429; it asks to wait 3 s"),
        (500, "", "answered 500"),
        (418, "", "answered 418"),
    ],
)
def test_a_refusal_says_what_to_do(server, status: int, code: str, words: str) -> None:
    server.behaviour.head_statuses, server.behaviour.error_code = [status] * 9, code
    if status == 429:
        server.behaviour.extra_headers = {"Retry-After": "3"}
    with pytest.raises(SourceError, match=words):
        pull(SPEC)


def test_offline_names_the_remedy() -> None:
    with pytest.raises(
        OfflineError, match=r"(?s)no source can be reached.*edgeroute pull hf:.*copy"
    ):
        pull(SPEC)


def test_a_name_lookup_that_hangs_does_not_hang_the_pull(monkeypatch) -> None:
    import threading

    import huggingface_hub

    release = threading.Event()
    monkeypatch.setattr(hub, "HEAD_DEADLINE_S", 0.05)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: release.wait(30))
    with pytest.raises(OfflineError, match=r"no answer within 0\.05 s"):
        pull(SPEC)
    release.set()


def test_a_full_disk_is_refused_before_the_first_byte(server, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(
        CapacityError, match=rf"{len(BODY)} bytes\).*\(1000 bytes\) free.*EDGEROUTE"
    ):
        pull(SPEC)
    assert server.bodies() == []


def test_a_disk_that_fills_up_says_so(server, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CapacityError, match="filled up"):
        pull(SPEC)


def test_an_unusable_models_folder_says_so(server, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EDGEROUTE_MODELS", str(tmp_path / "file" / "models"))
    with pytest.raises(CatalogueError, match="cannot be used"):
        pull(SPEC)
