"""A model behind a server that speaks OpenAI's chat protocol (vLLM, SGLang, ours, a judge), as a Generator.

Every request is retried; one that still fails becomes a completion with an `error`, so that no question is lost and no
failure passes for an answer.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from step3vl.types import IMAGE_MARK, Completion, Prompt, Sampling

LONGEST_PAUSE_S = 8.0
"""Between two tries."""


class ChatClient:
    """Asks a server; a `step3vl.types.Generator`.

    Args:
        url: of the API, e.g. http://localhost:8000/v1.
        model: the name that the server knows it by.
        api_key_env: environment variable that holds the key; servers of one's own need none.
        max_concurrent: requests in flight at once.
        timeout_s: of one request; long chains of thought take hours.
        num_retries: after connection errors, time-outs and the server's 408, 409, 429 and 5xx, with growing pauses.
        extra: further fields of every request, e.g. {"top_k": 20}.
        tell_tokens: ask for the ids and log-probabilities of an answer's tokens (ours, vLLM), so that reinforcement
            learning measures and corrects how far the server is from the policy. Only for servers that know it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrent: int = 64,
        timeout_s: float = 7200.0,
        num_retries: int = 5,
        extra: dict[str, Any] | None = None,
        tell_tokens: bool = False,
    ):
        if max_concurrent < 1 or num_retries < 0 or timeout_s <= 0:
            raise ValueError(
                f"ChatClient needs max_concurrent >= 1, num_retries >= 0 and timeout_s > 0, got {max_concurrent}, "
                f"{num_retries} and {timeout_s}"
            )
        self.url, self.model, self.api_key_env = url, model, api_key_env
        self.max_concurrent, self.timeout_s, self.num_retries = max_concurrent, timeout_s, num_retries
        self.extra, self.tell_tokens = extra or {}, tell_tokens
        self.num_failures = 0
        """Requests that got no answer after all retries."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt, in order; each is a request of its own. Safe in any thread."""
        if n < 1:
            raise ValueError(f"n is {n}; accepted is 1 or more")
        if any(prompt.begun_ids for prompt in prompts):
            raise ValueError("a server cannot go on with an answer that was begun; model.partial_tokens must be null")
        found = _run(self._ask_all(prompts, sampling, n))
        self.num_failures += sum(completion.error is not None for completion in found)
        return [found[k : k + n] for k in range(0, len(found), n)]

    async def _ask_all(self, prompts: Sequence[Prompt], sampling: Sampling, n: int) -> list[Completion]:
        try:
            from openai import AsyncOpenAI
        except ModuleNotFoundError:
            raise ValueError("a server is asked through the openai package: pip install 'step3vl[rl]'") from None
        gate = asyncio.Semaphore(self.max_concurrent)
        key = os.environ.get(self.api_key_env) or "none"
        async with AsyncOpenAI(
            base_url=self.url, api_key=key, timeout=self.timeout_s, max_retries=self.num_retries
        ) as client:
            written: dict[int, list[dict[str, Any]]] = {}  # messages of prompts in flight; images are encoded once
            left = [n] * len(prompts)

            async def ask(place: int, number: int) -> Completion:
                async with gate:
                    if place not in written:
                        written[place] = chat_messages(prompts[place])
                    try:
                        return await self._ask(client, written[place], sampling, number)
                    finally:
                        left[place] -= 1
                        if not left[place]:
                            del written[place]

            jobs = [(place, number) for place in range(len(prompts)) for number in range(n)]
            return list(await asyncio.gather(*(ask(place, number) for place, number in jobs)))

    async def _ask(self, client: Any, messages: list[dict[str, Any]], sampling: Sampling, number: int) -> Completion:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.seed is not None:
            request["seed"] = sampling.seed + number
        if sampling.top_p != 1:
            request["top_p"] = sampling.top_p
        if sampling.stop:
            request["stop"] = list(sampling.stop)
        if self.tell_tokens:
            request["logprobs"] = True
        extra = {"top_k": sampling.top_k} if sampling.top_k is not None else {}
        extra |= {"return_token_ids": True} if self.tell_tokens else {}
        extra |= self.extra
        try:
            answer = await client.chat.completions.create(**request, extra_body=extra or None)
            choice = answer.choices[0]
        except Exception as error:  # of the network, the server or its answer's form: all mean that there is no answer
            return _failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        text = choice.message.content or ""
        thoughts = getattr(choice.message, "reasoning_content", None)
        if thoughts:
            text = f"<think>{thoughts}</think>{text}"
        told = _told(choice) if self.tell_tokens else ([], [])
        if told is None or (text and self.tell_tokens and not told[0]):
            return _failed("the server tells no token ids and log-probabilities; set tell_tokens: false")
        if not text and not told[0]:
            return _failed("the server's answer is empty")
        num_tokens = answer.usage.completion_tokens if answer.usage else 0
        is_cut = choice.finish_reason == "length"
        return Completion(text=text, token_ids=told[0], truncated=is_cut, num_tokens=num_tokens, logprobs=told[1])

    # ------------------------------------------------------------------------------------------------ weights

    def served(self) -> str | None:
        """The folder of the weights that the server answers with; "" where it cannot be reached, None: it does not say.

        The request is SGLang's (GET /get_model_info beside /v1).
        """
        try:
            return self._post("/get_model_info", None).get("model_path")
        except urllib.error.HTTPError as error:
            return None if error.code < 500 else ""
        except (OSError, ValueError):
            return ""

    def load_weights(self, folder: str | Path) -> None:
        """Have the server take the weights of a folder, which it must see under the same name.

        The request is SGLang's (POST /update_weights_from_disk beside /v1), which our server knows too.
        Raises ValueError with one sentence: the server has no such endpoint, refuses, or cannot be reached after
        the retries.
        """
        for attempt in range(self.num_retries + 1):
            try:
                answer = self._post("/update_weights_from_disk", {"model_path": str(folder)})
                break
            except urllib.error.HTTPError as error:
                said = _said(error.read(20_000))
                if error.code in (404, 405):
                    raise ValueError(
                        f"the server at {self.url} has no /update_weights_from_disk, so that its weights cannot be "
                        "refreshed; serve the policy with step3vl serve --weights-from or with SGLang, or set "
                        "model.refresh to null"
                    ) from None
                if error.code < 500 or attempt == self.num_retries:
                    raise ValueError(
                        f"the server at {self.url} did not take the weights of {folder} ({error.code}): {said}"
                    ) from None
            except (OSError, ValueError) as error:
                if attempt == self.num_retries:
                    raise ValueError(
                        f"the server at {self.url} cannot be reached for the weights of {folder}: "
                        f"{' '.join(str(error).split())[:300]}"
                    ) from None
            time.sleep(min(0.5 * 2**attempt, LONGEST_PAUSE_S))
        if answer.get("success") is False:
            raise ValueError(f"the server at {self.url} did not take the weights of {folder}: {answer.get('message')}")

    def _post(self, place: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON at a place beside the API; a body makes it a POST."""
        request = urllib.request.Request(
            self.url.rstrip("/").removesuffix("/v1") + place,
            None if body is None else json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {os.environ.get(self.api_key_env) or 'none'}",
            },
        )
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            found = json.loads(answer.read())
        if not isinstance(found, dict):
            raise ValueError(f"{place} is {type(found).__name__}, not an object")
        return found


def chat_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Messages as the protocol has them: text, and images as data URLs, in reading order."""
    images = iter(prompt.images)
    messages: list[dict[str, Any]] = []
    for message in prompt.messages:
        pieces = message.content.split(IMAGE_MARK)
        if len(pieces) == 1:
            messages.append({"role": message.role, "content": message.content})
            continue
        parts: list[dict[str, Any]] = []
        for k, piece in enumerate(pieces):
            if k:
                parts.append({"type": "image_url", "image_url": {"url": data_url(next(images))}})
            if piece:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": message.role, "content": parts})
    return messages


def data_url(image: Image.Image) -> str:
    """An image inside of a URL, as PNG: no pixel changes on the way."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _told(choice: Any) -> tuple[list[int], list[float]] | None:
    """Ids and log-probabilities of an answer's tokens; None where they are not told, or not equally many."""
    ids = getattr(choice, "token_ids", None)
    rows = choice.logprobs.content if choice.logprobs is not None else None
    if not isinstance(ids, list) or rows is None or len(ids) != len(rows):
        return None
    return [int(id) for id in ids], [float(row.logprob) for row in rows]


def _said(body: bytes) -> str:
    """The sentence in an error's body."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        text = str(found["error"]["message"] if "error" in found else found["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300]


def _failed(why: str) -> Completion:
    return Completion(text="", token_ids=[], truncated=False, error=why)


def _run(job: Any) -> Any:
    """Run a coroutine to its end, also where an event loop runs already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    found: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(asyncio.run(job))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
