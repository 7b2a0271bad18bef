"""A chat server that fails in every way, by turns: what it does to a request depends on how many came before."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (*[""] * 8, "error", *[""] * 9, "cut", *[""] * 8, "empty", *[""] * 8, "garbage", *[""] * 20, "hang")


class Upstream(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, faults=FAULTS, hang_s=3.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.hang_s = faults, hang_s
        self.counts, self.bodies, self.lock = {}, [], threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Clients that hang up are what is wanted here."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            fault = self.server.faults[len(self.server.bodies) % len(self.server.faults)]
            self.server.counts[fault] = self.server.counts.get(fault, 0) + 1
        content = body["messages"][-1]["content"]
        question = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        said = f"<think>hm</think>{self.answer(question)}"
        if fault == "error":
            return self.reply(500, b'{"error": {"message": "broken"}}')
        if fault == "hang":
            time.sleep(self.server.hang_s)
        if fault == "garbage":
            return self.reply(200, b"<html>not JSON</html>")
        message = {"role": "assistant", "content": "" if fault == "empty" else said}
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "usage": usage,
            "choices": [choice],
        }
        return self.reply(200, json.dumps(whole).encode(), cut=fault == "cut")

    def answer(self, question):
        """The question's last word; of a synthesis, how many references there are and the problem's last word."""
        if "Original Problem:\n" not in question:
            return question.split()[-1]
        problem = question.split("Original Problem:\n")[1].split("\n\nReference Responses:")[0]
        return f"{question.count(chr(10) + 'Reference ') - 1} say {problem.split()[-1]}"

    def reply(self, status, data, cut=False):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut or self.close_connection

    def log_message(self, *arguments):
        pass
