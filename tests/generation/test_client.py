"""A server that fails in every way: each failure is counted, no question is lost, and answers keep their places."""

import asyncio
import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from step3vl.generation.client import ChatClient
from step3vl.types import Message, Prompt, Sampling

pytest.importorskip("openai", reason="the openai package is not installed")


class Server(BaseHTTPRequestHandler):
    """Answers with the last word of the question; what else happens is written in the question."""

    seen: list[dict] = []
    tries: dict[str, int] = {}
    busy = most = 0
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        question = content if isinstance(content, str) else "".join(p.get("text", "") for p in content)
        with self.lock:
            type(self).seen.append(body)
            number = self.tries[question] = self.tries.get(question, 0) + 1
            type(self).busy += 1
            type(self).most = max(self.most, self.busy)
        time.sleep(0.02)
        try:
            self.answer(question, number)
        finally:
            with self.lock:
                type(self).busy -= 1

    def answer(self, question, number):
        if "always fails" in question or ("fails once" in question and number == 1):
            return self.reply(500, {"error": {"message": "broken"}})
        if "breaks off" in question:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return self.close_connection
        message = {"role": "assistant", "content": "" if "silent" in question else question.split()[-1]}
        if "thinks" in question:
            message["reasoning_content"] = "hm"
        choice = {"index": 0, "message": message, "finish_reason": "length" if "long" in question else "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        base = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
        return self.reply(200, {**base, "choices": [] if "no choice" in question else [choice]})

    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Server.seen, Server.tries, Server.busy, Server.most = [], {}, 0, 0
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/v1"
    made.shutdown()
    made.server_close()


def asked(text, *images):
    return Prompt(messages=[Message(role="user", content=text)], images=list(images))


SAMPLING = Sampling(max_new_tokens=9, temperature=0.5, seed=3)


def test_answers_keep_their_places_and_failures_are_counted(server):
    kinds = ["", "fails once ", "always fails ", "silent ", "no choice ", "breaks off "]
    prompts = [asked(f"{kinds[k % 6]}word{k}") for k in range(60)]
    client = ChatClient(server, "m", max_concurrent=8, num_retries=1, timeout_s=20)
    found = [group[0] for group in client.generate(prompts, SAMPLING)]
    assert [c.text for c in found] == [f"word{k}" if k % 6 < 2 else "" for k in range(60)]
    assert [c.error is None for c in found] == [k % 6 < 2 for k in range(60)]
    assert client.num_failures == 40 and 1 < Server.most <= 8
    assert "500" in found[2].error and found[3].error == "the server's answer is empty"
    assert found[0].num_tokens == 7 and not found[0].truncated


def test_what_is_sent_and_what_comes_back(server):
    red = Image.new("RGB", (3, 2), (250, 3, 7))
    client = ChatClient(server, "m", extra={"top_k": 20})
    prompt = Prompt(
        messages=[
            Message(role="system", content="Be short."),
            Message(role="user", content="See <image> here: thinks long"),
        ],
        images=[red],
    )
    ((one, two),) = client.generate([prompt], SAMPLING, n=2)
    assert one.text == "<think>hm</think>long" and one.truncated and two.error is None
    bodies = sorted(Server.seen, key=lambda body: body["seed"])
    assert [body["seed"] for body in bodies] == [3, 4] and bodies[0]["top_k"] == 20
    assert (bodies[0]["max_tokens"], bodies[0]["temperature"], bodies[0]["model"]) == (9, 0.5, "m")
    system, user = bodies[0]["messages"]
    assert system == {"role": "system", "content": "Be short."}
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    data = user["content"][1]["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == red.tobytes()


def test_the_whole_sampling_is_sent(server):
    sampling = Sampling(max_new_tokens=9, temperature=1.0, top_p=0.8, top_k=5, stop=("END",))
    ChatClient(server, "m").generate([asked("one word")], sampling)
    ChatClient(server, "m").generate([asked("one word")], SAMPLING)
    one, two = Server.seen
    assert (one["top_p"], one["top_k"], one["stop"]) == (0.8, 5, ["END"]) and "seed" not in one
    assert not {"top_p", "top_k", "stop"} & two.keys()


def test_an_image_is_encoded_once_for_all_answers(server, monkeypatch):
    from step3vl.generation import client

    encoded, encode = [], client.data_url
    monkeypatch.setattr(client, "data_url", lambda image: encoded.append(image) or encode(image))
    pictures = [Image.new("RGB", (3, 2), (k, 0, 0)) for k in range(3)]
    prompts = [asked(f"<image>word{k}", picture) for k, picture in enumerate(pictures)]
    found = ChatClient(server, "m", max_concurrent=4).generate(prompts, SAMPLING, n=5)
    assert encoded == pictures and [[c.text for c in group] for group in found] == [[f"word{k}"] * 5 for k in range(3)]


def test_nobody_there_is_a_failure_too():
    client = ChatClient("http://127.0.0.1:9/v1", "m", num_retries=0)
    ((answer,),) = client.generate([asked("hello")], SAMPLING)
    assert answer.text == "" and answer.error and client.num_failures == 1


def test_inside_of_an_event_loop(server):
    async def notebook():
        return ChatClient(server, "m").generate([asked("one word")], SAMPLING)

    assert asyncio.run(notebook())[0][0].text == "word"


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="max_concurrent >= 1"):
        ChatClient("http://x/v1", "m", max_concurrent=0)
    with pytest.raises(ValueError, match="n is 0; accepted is 1 or more"):
        ChatClient("http://x/v1", "m").generate([asked("x")], SAMPLING, n=0)
