"""A model behind a server that speaks OpenAI's chat protocol (vLLM, SGLang, ours, a judge), as a Generator.

Every request is retried; one that still fails becomes a completion with an `error`, so that no question is lost and no
failure passes for an answer.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import threading
from collections.abc import Sequence
from typing import Any

from PIL import Image

from step3vl.types import IMAGE_MARK, Completion, Prompt, Sampling


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
    ):
        if max_concurrent < 1 or num_retries < 0 or timeout_s <= 0:
            raise ValueError(
                f"ChatClient needs max_concurrent >= 1, num_retries >= 0 and timeout_s > 0, got {max_concurrent}, "
                f"{num_retries} and {timeout_s}"
            )
        self.url, self.model, self.api_key_env = url, model, api_key_env
        self.max_concurrent, self.timeout_s, self.num_retries = max_concurrent, timeout_s, num_retries
        self.extra = extra or {}
        self.num_failures = 0
        """Requests that got no answer after all retries."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt, in order; each is a request of its own. Safe in any thread."""
        if n < 1:
            raise ValueError(f"n is {n}; accepted is 1 or more")
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
        extra = self.extra if sampling.top_k is None else {"top_k": sampling.top_k, **self.extra}
        try:
            answer = await client.chat.completions.create(**request, extra_body=extra or None)
            choice = answer.choices[0]
        except Exception as error:  # of the network, the server or its answer's form: all mean that there is no answer
            return _failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        text = choice.message.content or ""
        thoughts = getattr(choice.message, "reasoning_content", None)
        if thoughts:
            text = f"<think>{thoughts}</think>{text}"
        if not text:
            return _failed("the server's answer is empty")
        num_tokens = answer.usage.completion_tokens if answer.usage else 0
        is_cut = choice.finish_reason == "length"
        return Completion(text=text, token_ids=[], truncated=is_cut, num_tokens=num_tokens)


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
