"""A stand-in for a server with OpenAI's chat interface, and a fixture that makes them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint:
    """A stand-in for a server with OpenAI's interface.

    Attributes:
        replies: what it says, one after another; a number is an HTTP status. The last one is repeated.
        requests: what it was asked.
    """

    def __init__(self, *replies: str | int) -> None:
        self.replies, self.requests = list(replies), []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                endpoint.requests.append(json.loads(self.rfile.read(length)) | {"path": self.path})
                reply = endpoint.replies.pop(0) if len(endpoint.replies) > 1 else endpoint.replies[0]
                status = reply if isinstance(reply, int) else 200
                message = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
                body = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "judge-0613",
                    "choices": [message],
                }
                content = json.dumps(body if status == 200 else {"error": {"message": "busy"}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("retry-after-ms", "1")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def make_endpoints() -> Iterator[Any]:
    """Yields a function that starts one with given replies; they end with it."""
    made: list[Endpoint] = []

    def make(*replies: str | int) -> Endpoint:
        made.append(Endpoint(*replies))
        return made[-1]

    yield make
    for endpoint in made:
        endpoint.server.shutdown()
        endpoint.server.server_close()
