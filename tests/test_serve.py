"""The server: the protocol as an independent client speaks it, limits, batches, faults, and an orderly end."""

import asyncio
import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from PIL import Image

from step3vl.generation.client import ChatClient, data_url
from step3vl.pacore import Counter, PaCoReGenerator, estimated, read_traces, replay
from step3vl.pacore.template import SynthesisTemplate
from step3vl.serving import Batcher, ChatServer, Closing, Coordinated, Limits, Plain
from step3vl.serving.batching import Full, Job
from step3vl.types import Completion, Message, Prompt, Sampling
from tests.pacore.answering import Notes, asked
from tests.pacore.upstream import Upstream

openai = pytest.importorskip("openai", reason="the openai package is not installed")

DEFAULT = Sampling(max_new_tokens=100, temperature=1.0)
WORDS = Counter(lambda prompt: sum(len(m.content.split()) for m in prompt.messages), is_exact=True)


class Streams(Notes):
    """Notes that can also be asked piece by piece."""

    def stream(self, prompt, sampling):
        text = self.say(prompt, sampling, 0)
        for word in text.split(" "):
            yield word + " "
            time.sleep(0.01)
        return Completion(text=text + " ", token_ids=[], truncated=True, num_tokens=len(text.split()))


def echo(prompt, sampling, k):
    return f"<think>t</think>{prompt.messages[-1].content} #{k}"


@contextmanager
def serving(generator, limits=None, default=DEFAULT, key="", split=False, **batching):
    pacore = PaCoReGenerator(generator, [4], counter=WORDS)
    backends = {"m": Plain(generator, WORDS), "m-pacore-4": Coordinated(pacore)}
    batcher = Batcher(backends, **batching)
    server = ChatServer(("127.0.0.1", 0), batcher, default, limits, key, split)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.stop(2)


def url(server):
    return f"http://127.0.0.1:{server.server_port}/v1"


def client(server, **more):
    return openai.OpenAI(base_url=url(server), api_key="k", max_retries=0, **more)


def post(server, body, path="/v1/chat/completions", headers=None, raw=None):
    """(status, body) of a request as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = raw if raw is not None else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


def get(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def counted(server, **wanted):
    """Whether the counts come to these: a request is counted once its answer has left."""
    deadline = time.monotonic() + 5
    while not wanted.items() <= server.counts.items() and time.monotonic() < deadline:
        time.sleep(0.01)
    return wanted.items() <= server.counts.items()


def ask(text="hi there", **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


# ------------------------------------------------------------------------------------------------ the openai library


def test_the_openai_library_asks_sees_and_counts():
    notes = Notes(echo)
    image = Image.new("RGB", (3, 2), (9, 8, 7))
    parts = [
        {"type": "text", "text": "See "},
        {"type": "image_url", "image_url": {"url": data_url(image), "detail": "high"}},
        {"type": "text", "text": " and an <image> tag"},
    ]
    with serving(notes) as server:
        sync = client(server)
        assert [model.id for model in sync.models.list()] == ["m", "m-pacore-4"]
        assert sync.models.retrieve("m-pacore-4").id == "m-pacore-4"
        answer = sync.chat.completions.create(
            model="m",
            messages=[{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}],
            n=2,
            temperature=0.5,
            top_p=0.9,
            max_completion_tokens=50,
            seed=4,
            stop=["END"],
            user="me",
            extra_body={"top_k": 20},
        )
    ((prompts, sampling, n),) = notes.calls
    wanted = Sampling(max_new_tokens=50, temperature=0.5, top_p=0.9, seed=4, stop=("END",), top_k=20)
    assert sampling == wanted and n == 2
    assert [(m.role, m.content) for m in prompts[0].messages] == [
        ("system", "Be short."),
        ("user", "See <image> and an [image] tag"),
    ]
    assert prompts[0].images[0].tobytes() == image.tobytes() and len(prompts[0].images) == 1
    assert [choice.message.content[-2:] for choice in answer.choices] == ["#0", "#1"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.usage.prompt_tokens == WORDS.count(prompts[0]) and answer.usage.completion_tokens == 2 * 7
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_streams_add_up_with_both_clients():
    text = "one two three <think> four"
    with serving(Streams(lambda *_: text)) as server:
        usage = {"include_usage": True}
        pieces = list(client(server).chat.completions.create(**ask(), stream=True, stream_options=usage))
        said = [piece.choices[0].delta.content for piece in pieces if piece.choices and piece.choices[0].delta.content]
        assert "".join(said) == text + " " and len(said) == 5, "piece by piece"
        assert pieces[0].choices[0].delta.role == "assistant"
        assert pieces[-2].choices[0].finish_reason == "length" and pieces[-1].usage.completion_tokens == 5
        whole = list(client(server).chat.completions.create(**ask(n=2), stream=True))
        by_choice = {0: "", 1: ""}
        for piece in whole:
            by_choice[piece.choices[0].index] += piece.choices[0].delta.content or ""
        assert by_choice == {0: text, 1: text}

        async def several():
            async with openai.AsyncOpenAI(base_url=url(server), api_key="k", max_retries=0) as made:

                async def one(k):
                    stream = await made.chat.completions.create(**ask(f"q {k}"), stream=True)
                    return "".join([piece.choices[0].delta.content or "" async for piece in stream])

                answers = [made.chat.completions.create(**ask(f"q {k}")) for k in range(5)]
                return await asyncio.gather(*[one(k) for k in range(5)]), await asyncio.gather(*answers)

        streamed, answered = asyncio.run(several())
        assert [found.strip() for found in streamed] == [text] * 5
        assert [found.choices[0].message.content for found in answered] == [text] * 5


def test_the_coordinated_model_says_what_it_cost():
    notes = Notes(echo)
    with serving(notes) as server:
        answer = client(server).chat.completions.create(**{**ask("what now"), "model": "m-pacore-4"})
        stream = client(server).chat.completions.create(**{**ask("what now"), "model": "m-pacore-4"}, stream=True)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in stream)
    text = answer.choices[0].message.content
    assert text.startswith("<think>t</think>You are given a problem") and "what now #3" in text and streamed == text
    assert [n for _, _, n in notes.calls] == [4, 1, 4, 1]
    (facts,) = answer.pacore
    assert facts["rounds"] == [4, 1] and facts["num_messages"] == 4 and facts["num_failed"] == 0
    rollouts = 4 * 3
    assert answer.usage.completion_tokens_details.reasoning_tokens == rollouts
    assert answer.usage.completion_tokens == rollouts + len(text.split()) and answer.usage.prompt_tokens == 2


def test_thoughts_can_be_split_off():
    with serving(Streams(lambda *_: "<think>\nhm, hm\n</think>\n\nfour"), split=True) as server:
        message = client(server).chat.completions.create(**ask()).choices[0].message
        assert message.content == "four" and message.reasoning_content == "hm, hm"
        deltas = [piece.choices[0].delta for piece in client(server).chat.completions.create(**ask(), stream=True)]
        assert "".join(delta.content or "" for delta in deltas) == "four"
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm, hm"


def test_our_own_client_gets_every_answer_in_its_place():
    with serving(Notes(echo)) as server:
        found = ChatClient(url(server), "m").generate([asked(f"question {k}") for k in range(40)], DEFAULT, n=2)
    assert [[one.text for one in group] for group in found] == [
        [f"<think>t</think>question {k} #0"] * 2 for k in range(40)
    ]


def test_tokens_are_told_to_who_asks():
    """Ids and log-probabilities of an answer, as vLLM tells them; nobody else gets them."""

    class Tells(Notes):
        def generate(self, prompts, sampling, n=1):
            one = Completion(text="hi", token_ids=[7, 2], truncated=False, num_tokens=2, logprobs=[-0.5, -0.25])
            return [[one] * n for _ in prompts]

    prompts = [Prompt(messages=[Message(role="user", content="q")])] * 3
    with serving(Tells(echo)) as server:
        _, plain = post(server, ask())
        _, told = post(server, ask(logprobs=True, return_token_ids=True))
        ((one,), *_) = ChatClient(url(server), "m", tell_tokens=True).generate(prompts, DEFAULT)
        ((other,), *_) = ChatClient(url(server), "m").generate(prompts, DEFAULT)
    assert plain["choices"][0]["logprobs"] is None and "token_ids" not in plain["choices"][0]
    assert told["choices"][0]["token_ids"] == [7, 2]
    assert [row["logprob"] for row in told["choices"][0]["logprobs"]["content"]] == [-0.5, -0.25]
    assert (one.token_ids, one.logprobs, one.text) == ([7, 2], [-0.5, -0.25], "hi")
    assert (other.token_ids, other.logprobs, other.text) == ([], [], "hi")
    with serving(Notes(echo)) as server:  # knows no ids: one is not taken for the other
        silent = ChatClient(url(server), "m", tell_tokens=True, num_retries=0)
        ((failed,),) = silent.generate(prompts[:1], DEFAULT)
    assert "tells no token ids and log-probabilities; set tell_tokens: false" in failed.error


def test_the_key_is_asked_for():
    with serving(Notes(echo), key="secret") as server:
        with pytest.raises(openai.AuthenticationError):
            client(server).chat.completions.create(**ask())
        right = openai.OpenAI(base_url=url(server), api_key="secret")
        assert right.chat.completions.create(**ask()).choices
        assert get(server, "/v1/models")[0] == 401 and get(server, "/health")[0] == 200


# ------------------------------------------------------------------------------------------------ what is refused


PNG = data_url(Image.new("RGB", (2, 2)))
CUT = PNG.partition(",")[0] + "," + base64.b64encode(base64.b64decode(PNG.partition(",")[2])[:-30]).decode()


def image(address):
    return ask([{"type": "image_url", "image_url": {"url": address}}])


def turn(**more):
    return {"model": "m", "messages": [{"role": "user", "content": "x"} | more]}


@pytest.mark.parametrize(
    "body, status, said",
    [
        ([], 400, "must be a JSON object"),
        ({**ask(), "model": "gpt"}, 404, "no model 'gpt'; there are m, m-pacore-4"),
        ({"model": "m"}, 400, "at least one message"),
        ({"model": "m", "messages": []}, 400, "at least one message"),
        (turn(role="tool"), 400, "the role system, user or assistant, found 'tool'"),
        (turn(role="assistant"), 400, "the last message must be the user's"),
        (turn(content=None), 400, "must be a text or a list of parts"),
        (turn(content=[{"type": "input_audio"}]), 400, "accepted are text and image_url"),
        (turn(tool_calls=[{}]), 400, "tool_calls"),
        (turn(content="\ud800"), 400, "half a character"),
        (ask(tools=[{"type": "function"}]), 400, "tools is not supported"),
        (ask(response_format={"type": "json_object"}), 400, "response_format is not supported"),
        (ask(logprobs=True, stream=True), 400, "logprobs is not supported in streams"),
        (ask(return_token_ids=True, stream=True), 400, "return_token_ids is not supported in streams"),
        (ask(return_token_ids=3), 400, "return_token_ids must be true or false"),
        (ask(top_logprobs=3), 400, "top_logprobs is not supported"),
        (ask(frequency_penalty=0.5), 400, "frequency_penalty is not supported"),
        (ask(temprature=1), 400, "unknown field 'temprature'"),
        (ask(temperature="hot"), 400, "temperature is 'hot'; accepted is float from 0 to 100"),
        (ask(temperature=float("nan")), 400, "temperature is nan"),
        (ask(max_tokens=101), 400, "max_tokens is 101; accepted is int from 1 to 100"),
        (ask(max_tokens=True), 400, "max_tokens is True"),
        (ask(n=0), 400, "n is 0"),
        (ask(n=1000), 400, "n is 1000"),
        (ask(seed=-1), 400, "seed is -1"),
        (ask(stop=[""]), 400, "stop must be"),
        (ask(stop=7), 400, "stop must be"),
        (ask(stream="yes"), 400, "stream must be true or false"),
        (ask(stream_options=7), 400, "stream_options must be"),
        ({**ask(temperature=0), "model": "m-pacore-4"}, 400, "temperature is 0"),
        (image("file:///etc/passwd"), 400, "files and addresses are not read"),
        (image("/etc/passwd"), 400, "files and addresses are not read"),
        (image("http://127.0.0.1:1/x.png"), 400, "files and addresses are not read"),
        (image("data:text/html;base64,AAAA"), 400, "must be data URLs"),
        (image("data:image/svg+xml;base64,AAAA"), 400, "must be data URLs"),
        (image("data:image/png;base64,!!!!"), 400, "holds no base64"),
        (image("data:image/png;base64,AAAA"), 400, "cannot be decoded"),
        (image(CUT), 400, "cannot be decoded"),
        (image(7), 400, "must be data URLs"),
        (ask([{"type": "image_url", "image_url": {"url": PNG}}] * 4), 400, "4 images; accepted are up to 3"),
        (image(data_url(Image.new("1", (200, 200)))), 400, "more than 30000 pixels together"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_sentence(body, status, said):
    notes = Notes(echo)
    with serving(notes, Limits(max_images=3, max_pixels=30_000)) as server:
        found, answer = post(server, body)
        assert (found, notes.calls) == (status, []) and set(answer) == {"error"}
        assert said in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
        assert post(server, ask())[0] == 200, "the next request is answered"


def test_bodies_have_limits():
    with serving(Notes(echo), Limits(max_body_bytes=2000)) as server:
        assert post(server, None, raw=b"x" * 5000)[0] == 413
        assert post(server, None, raw=b"{not json")[0] == 400
        assert post(server, None, raw=b"[" * 1999)[0] == 400
        assert post(server, ask(), headers={"Content-Type": "text/plain"})[0] == 415, "a web page cannot send JSON here"
        assert post(server, ask(), path="/v1/completions")[0] == 404
        assert get(server, "/v1/nothing")[0] == 404 and get(server, "/v1/models?x=1")[0] == 200
        with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert b" 411 " in raw.recv(4096)
        with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
            raw.sendall(b"GARBAGE\r\n\r\n")
            assert b'"error"' in raw.recv(4096)
        assert post(server, ask())[0] == 200 and counted(server, answered=1)


def test_failures_of_the_model_have_a_status():
    def say(prompt, sampling, k):
        match prompt.messages[-1].content:
            case "fails":
                return TimeoutError("upstream timed out")
            case "too long":
                raise ValueError("sample '0' has 9 tokens and the limit is 8")
            case "breaks":
                raise RuntimeError("out of memory")
            case "half" if k == 1:
                return TimeoutError("late")
        return "fine"

    with serving(Notes(say), wait_s=0.2) as server:
        found = {}
        threads = [
            threading.Thread(target=lambda text=text: found.__setitem__(text, post(server, ask(text))))
            for text in ("fails", "too long", "breaks", "good")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {text: status for text, (status, _) in found.items()} == {
            "fails": 502,
            "too long": 400,
            "breaks": 500,
            "good": 200,
        }, "one request's fault is not its neighbours'"
        assert "upstream timed out" in found["fails"][1]["error"]["message"]
        status, body = post(server, ask("half", n=3))
        assert status == 200 and len(body["choices"]) == 2 and body["num_failed"] == 1
        assert counted(server, answered=2, failed=2, refused=1, gone=0)
        with pytest.raises(openai.InternalServerError):
            list(client(server).chat.completions.create(**ask("fails"), stream=True))


# ------------------------------------------------------------------------------------------------ batches


def test_requests_that_agree_are_one_call():
    notes = Notes(echo)
    batcher = Batcher({"m": Plain(notes, WORDS)}, batch_size=8, wait_s=0.2)
    greedy = replace(DEFAULT, temperature=0.0)
    jobs = [
        batcher.submit(Job(model="m", prompt=asked(f"q{k}"), sampling=greedy if k % 5 == 4 else DEFAULT))
        for k in range(20)
    ]
    said = [job.events.get(timeout=10) for job in jobs]
    batcher.close()
    assert [one[0].completion.text for one in said] == [f"<think>t</think>q{k} #0" for k in range(20)]
    sizes = [len(prompts) for prompts, _, _ in notes.calls]
    assert sizes == [8, 4, 8] and notes.calls[0][1] == notes.calls[2][1] != notes.calls[1][1], (
        "16 that agree and 4 of another kind, the oldest first"
    )


def test_a_seed_alone_is_a_call_of_its_own():
    for alone, sizes in ((True, [1, 1, 1]), (False, [3])):
        notes = Notes(echo)
        batcher = Batcher({"m": Plain(notes, WORDS)}, batch_size=8, wait_s=0.1, seeds_alone=alone)
        jobs = [Job(model="m", prompt=asked("q"), sampling=replace(DEFAULT, seed=1)) for _ in range(3)]
        for job in jobs:
            batcher.submit(job)
        assert all(job.events.get(timeout=10) for job in jobs)
        assert [len(prompts) for prompts, _, _ in notes.calls] == sizes
        batcher.close()


def test_the_first_end_of_a_job_counts():
    job = Job(model="m", prompt=asked("q"), sampling=DEFAULT)
    job.settle(Closing())
    job.settle([])
    assert isinstance(job.events.get_nowait(), Closing) and job.events.empty()


def test_a_full_queue_refuses_and_what_was_given_up_is_not_asked():
    release = threading.Event()

    def slow(prompt, sampling, k):
        release.wait(10)
        return "done"

    notes = Notes(slow)
    batcher = Batcher({"m": Plain(notes, WORDS)}, batch_size=1, max_waiting=2)
    first = batcher.submit(Job(model="m", prompt=asked("1"), sampling=DEFAULT))
    while not batcher.num_running:
        time.sleep(0.01)
    second, third = (batcher.submit(Job(model="m", prompt=asked(k), sampling=DEFAULT)) for k in "23")
    with pytest.raises(Full):
        batcher.submit(Job(model="m", prompt=asked("4"), sampling=DEFAULT))
    second.abandoned = True
    release.set()
    assert first.events.get(timeout=5) and third.events.get(timeout=5)
    assert [prompts[0].messages[0].content for prompts, _, _ in notes.calls] == [
        "1",
        "3",
    ] and batcher.num_abandoned == 1
    batcher.close()
    with pytest.raises(Closing):
        batcher.submit(Job(model="m", prompt=asked("5"), sampling=DEFAULT))


def test_a_client_that_hangs_up_gives_its_place_free():
    release = threading.Event()

    def slow(prompt, sampling, k):
        release.wait(10)
        return "done"

    notes = Notes(slow)
    with serving(notes, batch_size=1) as server:
        threading.Thread(target=lambda: post(server, ask("first")), daemon=True).start()
        while not server.batcher.num_running:
            time.sleep(0.01)
        impatient = client(server, timeout=0.3)
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(**ask("gone"))
        deadline = time.monotonic() + 5
        while server.counts["gone"] == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        release.set()
        assert post(server, ask("last"))[0] == 200
        assert [prompts[0].messages[0].content for prompts, _, _ in notes.calls] == ["first", "last"]
        assert server.counts["gone"] == 1


def test_what_is_in_flight_at_the_end_is_answered_with_503():
    release = threading.Event()

    def slow(prompt, sampling, k):
        release.wait(30)
        return "late"

    with serving(Notes(slow), batch_size=1) as server:
        found = []
        threads = [threading.Thread(target=lambda k=k: found.append(post(server, ask(f"q{k}")))) for k in range(4)]
        for thread in threads:
            thread.start()
        while server.batcher.num_running + server.batcher.num_waiting < 4:
            time.sleep(0.01)
        server.shutdown()
        assert server.stop(1.0) is False, "the model is still busy"
        for thread in threads:
            thread.join(5)
        assert [status for status, _ in found] == [503] * 4
        assert all(body["error"]["code"] == "shutting_down" for _, body in found)
        release.set()


# ------------------------------------------------------------------------------------------------ a faulty upstream


def test_two_hundred_questions_over_a_faulty_upstream(tmp_path):
    """Every question ends, every failure is counted, none is lost, and traces say what synthesis was left with."""
    trace = tmp_path / "trace.jsonl"
    with Upstream(hang_s=7) as upstream:
        inner = ChatClient(upstream.url, "m", max_concurrent=64, num_retries=0, timeout_s=5)
        pacore = PaCoReGenerator(inner, [4], counter=estimated(), trace=trace)
        batcher = Batcher({"m-pacore-4": Coordinated(pacore)}, batch_size=32, num_workers=16)
        server = ChatServer(("127.0.0.1", 0), batcher, DEFAULT)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        outer = ChatClient(url(server), "m-pacore-4", max_concurrent=200, num_retries=0, timeout_s=60)
        prompts = [asked(f"what is word{k}") for k in range(200)]
        found = [group[0] for group in outer.generate(prompts, DEFAULT)]
        server.shutdown()
        assert server.stop(5)
    traces = [one for one in read_traces(trace) if one is not None]
    assert len(found) == 200 and len(traces) == 200, "none is lost"
    by_question = {one.original[0][1]: one for one in traces}
    num_failed = num_answered = 0
    for k, completion in enumerate(found):
        own = by_question[f"what is word{k}"]
        num_failed += own.num_failed
        left = len(own.rounds[1].messages)
        assert left == 4 - own.rounds[0].num_failed
        if own.final.error is not None:
            assert completion.error is not None and "502" in completion.error
            continue
        num_answered += 1
        wanted = f"<think>hm</think>{left} say word{k}" if left else f"<think>hm</think>word{k}"
        assert completion.text == wanted
        assert completion.num_tokens == 3 * (5 - own.num_failed), "what all rounds cost"
    assert 100 < num_answered < 200 and outer.num_failures == 200 - num_answered
    wrong = sum(num for fault, num in upstream.counts.items() if fault)
    assert len(upstream.bodies) == 1000 and set(upstream.counts) == {"", "error", "hang", "cut", "empty", "garbage"}
    assert num_failed == inner.num_failures >= wrong, "every failure is counted once"
    assert server.counts["answered"] == num_answered
    assert all(replay(one, SynthesisTemplate()) == [] for one in traces)


# ------------------------------------------------------------------------------------------------ the command


@contextmanager
def command(*words, cwd):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "step3vl", "serve", *words, "--port=0", "--quiet"],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    try:
        assert line.startswith("serving "), line + process.stderr.read()
        yield process, line.split(" at ")[1].strip(), line
    finally:
        process.kill()
        process.wait()


def test_the_command_serves_a_model_and_ends_cleanly(workplace, capsys):
    from step3vl.cli import main

    assert main(["make-tiny", "step3vl", "model"]) == 0
    with command("model", "--scale=tiny", "--pacore=[2]", "--name=tiny", cwd=workplace) as (process, address, line):
        assert "tiny, tiny-pacore-2" in line
        made = openai.OpenAI(base_url=address, api_key="x", max_retries=0)
        content = [{"type": "image_url", "image_url": {"url": PNG}}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}]
        one = made.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)
        pieces = made.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8, stream=True)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert streamed == one.choices[0].message.content and 0 < one.usage.completion_tokens <= 8
        two = made.chat.completions.create(model="tiny-pacore-2", messages=messages, max_tokens=8)
        assert two.pacore[0]["rounds"] == [2, 1] and two.usage.completion_tokens <= 24
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert process.returncode == 0 and "ended; requests: 3 answered" in out and "Traceback" not in error


def test_the_command_coordinates_another_server_and_ends_in_mid_answer(tmp_path):
    with (
        Upstream(faults=("",)) as upstream,
        command("--url", upstream.url, "--model=m", "--pacore=[3]", "--pacore=[2, 2]", cwd=tmp_path) as (
            process,
            address,
            line,
        ),
    ):
        assert "m, m-pacore-3, m-pacore-2-2" in line
        made = openai.OpenAI(base_url=address, api_key="x", max_retries=0)
        answer = made.chat.completions.create(model="m-pacore-3", messages=ask("what is it")["messages"])
        assert answer.choices[0].message.content == "<think>hm</think>3 say it" and answer.usage.prompt_tokens_estimated
        upstream.faults, upstream.hang_s = ("hang",), 20
        failed = []

        def late():
            try:
                made.chat.completions.create(model="m", messages=ask()["messages"])
            except openai.APIStatusError as error:
                failed.append(error.status_code)

        thread = threading.Thread(target=late)
        thread.start()
        while upstream.counts.get("hang", 0) < 1:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
        thread.join(10)
    assert process.returncode == 0 and failed == [503] and "Traceback" not in error, error


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "give a checkpoint's folder, or --url"),
        (["x", "--url=http://y/v1"], "give a checkpoint's folder, or --url"),
        (["--url=http://y/v1"], "a server needs --model"),
        (["nothing"], "no folder nothing"),
        (["--url=http://y/v1", "--model=m", "--pacore=many"], "--rounds is 'many'"),
        (["--url=http://y/v1", "--model=m", "--api-key-env=NOT_SET_HERE"], "that environment variable is not set"),
        (["--url=http://y/v1", "--model=m", "--preset=none"], "no preset 'none'"),
    ],
)
def test_wrong_words_get_one_sentence(words, said, capsys, monkeypatch, tmp_path):
    from step3vl.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error


def test_images_in_a_message_reach_the_model_in_order():
    notes = Notes(lambda *_: "seen")
    pictures = [Image.new("RGB", (k + 1, 2), (k, 0, 0)) for k in range(3)]
    buffer = io.BytesIO()
    pictures[2].save(buffer, "WEBP", lossless=True)
    webp = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    prompt = Prompt(
        messages=[
            Message(role="user", content="a<image>b"),
            Message(role="assistant", content="ok"),
            Message(role="user", content="<image>c"),
        ],
        images=pictures[:2],
    )
    with serving(notes) as server:
        assert ChatClient(url(server), "m").generate([prompt], DEFAULT)[0][0].text == "seen"
        assert post(server, image(webp))[0] == 200
    assert notes.calls[0][0][0].messages == prompt.messages
    assert [i.tobytes() for i in notes.calls[0][0][0].images] == [i.tobytes() for i in pictures[:2]]
    assert notes.calls[1][0][0].images[0].tobytes() == pictures[2].tobytes()
