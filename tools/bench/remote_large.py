"""A large model behind an endpoint of this machine, with a latency, for benchmarks.

Speaks as much of OpenAI's protocol as step routing asks for: streamed chat completions that go on
with an assistant's message. It is no server for users: `edgeroute serve` is.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from edgeroute.engine import Runtime, Settings
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.template import encode_chat
from edgeroute.stats import Chunk

MAX_BODY_BYTES: Final = 1 << 20


class RemoteLarge(Closing):
    """Serves one model until it is closed.

    Args:
        path: the model.
        settings: of its Runtime.
        latency_s: waited for before each answer begins.
    """

    def __init__(self, path: Path, settings: Settings, latency_s: float) -> None:
        self._runtime = Runtime(path, **settings)
        self._latency_s = latency_s
        handler = type("_BoundHandler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def address(self) -> str:
        """Return what `remote=` takes."""
        return f"http://127.0.0.1:{self._http.server_port}/v1#{self._runtime.path.stem}"

    def answer(self, body: Mapping[str, Any]) -> Iterator[Chunk]:
        """Go on with the conversation of a request."""
        time.sleep(self._latency_s)
        *messages, last = body["messages"]
        if last["role"] != "assistant":
            messages, last = [*messages, last], {"content": ""}
        loaded = self._runtime._loaded
        prompt = encode_chat(loaded.tokenizer, messages)
        prompt += loaded.tokenizer.encode_more(last["content"]) if last["content"] else []
        with self._runtime.stream(
            prompt_ids=prompt, max_tokens=body["max_tokens"], prefix="all",
            temperature=body.get("temperature") or 0.0,
        ) as stream:  # fmt: skip
            yield from stream

    def close(self) -> None:
        """Stop serving and free the model; safe to call twice."""
        self._http.shutdown()
        self._http.server_close()
        self._runtime.close()


class _Handler(BaseHTTPRequestHandler):
    owner: RemoteLarge

    def do_POST(self) -> None:
        """Stream one answer."""
        size = int(self.headers.get("Content-Length", "0"))
        if not self.path.endswith("/chat/completions") or size > MAX_BODY_BYTES:
            self.send_error(404)
            return
        body = json.loads(self.rfile.read(size))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for chunk in self.owner.answer(body):
                end = {None: None, "length": "length"}.get(chunk.finish_reason, "stop")
                choice = {"index": 0, "delta": {"content": chunk.text}, "finish_reason": end}
                self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):  # the reader has heard enough
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the bench reports."""
