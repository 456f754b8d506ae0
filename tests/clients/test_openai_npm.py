"""OpenAI's client for Node, unmodified: `npm install --no-save openai && pytest -m clients -k npm`.

node_modules is sought in the working folder; EDGEROUTE_NODE_FOLDER names another.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("EDGEROUTE_NODE_FOLDER", "."))
"""Read before the tests' clean environment takes it away."""
SCRIPT = Path(__file__).with_name("openai_npm.mjs")

pytestmark = pytest.mark.clients


def test_openai_npm(url: str, key: str) -> None:
    node = shutil.which("node")
    assert node is not None
    done = subprocess.run([node, str(SCRIPT), url, key], cwd=FOLDER, capture_output=True,
                          text=True, timeout=110)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") >= 10


@pytest.fixture(autouse=True)
def _installed() -> None:
    if shutil.which("node") is None or not (FOLDER / "node_modules/openai/package.json").exists():
        pytest.skip("no node, or no openai in node_modules: npm install --no-save openai")
