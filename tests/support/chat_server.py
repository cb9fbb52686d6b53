"""A chat endpoint on this machine that answers as told, and misbehaves on demand."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"prompt_tokens": 1000, "completion_tokens": 100}


class ChatServer(ThreadingHTTPServer):
    """reply: prompt -> the model's text. faults: what the next requests meet instead, in order, None being no fault.

    `slow` (0.6 s beyond the `pause` before each reply), `429` and `503` (with `retry_after` as their header), `500`,
    `garbage` (no JSON), `html`, `other` (JSON of another shape), `cut` (the body ends early), `hang up` (no response at
    all), `filtered`, `no quota`, `no usage`, `key` (echoes the key in an error), `echo` (repeats the question in one).
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[str], str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.faults: list[str | None] = []
        self.always: str | None = None
        self.pause, self.retry_after = 0.0, "0"
        self.lock = threading.Lock()
        self.prompts: list[str] = []
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that no longer wait are a part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = body["messages"]
        with server.lock:
            server.bodies.append(body)
            server.prompts.append(message["content"])
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.monotonic())
            fault = server.faults.pop(0) if server.faults else server.always
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.pause + 0.6 * (fault == "slow"))
            self.misbehave(fault, message["content"])
        finally:
            with server.lock:
                server.at_once -= 1

    def misbehave(self, fault: str | None, prompt: str) -> None:
        completion = {
            "id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": USAGE,
            "choices": [
                {
                    "index": 0, "finish_reason": "stop",
                    "message": {"role": "assistant", "content": self.server.reply(prompt)},
                }
            ],
        }  # fmt: skip
        key = self.headers["Authorization"]
        if fault in ("429", "503"):
            busy = {"error": {"message": "too many", "code": "busy"}}
            self.send(int(fault), busy, retry_after=self.server.retry_after)
        elif fault == "500":
            self.send(500, b"<html>oops</html>", kind="text/html")
        elif fault == "garbage":
            self.send(200, b'{"choices": [{]}')
        elif fault == "html":
            self.send(200, b"<html>log in first</html>", kind="text/html")
        elif fault == "other":
            self.send(200, {"choices": []})
        elif fault == "cut":
            self.send(200, completion, cut=40)
        elif fault == "hang up":
            self.close_connection = True
        elif fault == "filtered":
            self.send(400, {"error": {"message": "no", "code": "content_filter"}})
        elif fault == "no quota":
            self.send(429, {"error": {"message": "pay first", "code": "insufficient_quota"}})
        elif fault == "no usage":
            self.send(200, {name: value for name, value in completion.items() if name != "usage"})
        elif fault == "key":
            self.send(401, {"error": {"message": f"{key} is no key", "code": "invalid_api_key", "type": key}})
        elif fault == "echo":
            self.send(400, {"error": {"message": f"cannot read {prompt}", "code": "bad"}})
        else:
            self.send(200, completion)

    def send(self, status: int, body, kind="application/json", retry_after=None, cut=0) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        self.close_connection |= bool(cut)


@contextmanager
def serve(reply: Callable[[str], str]):
    """A running server, stopped at the end."""
    server = ChatServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
