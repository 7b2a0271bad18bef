"""OpenAI's chat protocol: what is read of a request, what is refused, and how errors look.

Images come as data URLs and in no other way: no file is opened and nothing is fetched for a client.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from step3vl.data.decode import image_size, open_image
from step3vl.types import IMAGE_MARK, Message, Prompt, Sampling

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
SAID_MARK = "[image]"
"""Stands for an image mark that is part of a client's text."""
DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
}
"""Fields that would change the answer in a way that is not supported, and the values that ask for nothing."""
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that do not concern the answer."""
READ = {"model", "messages", "stream", "stream_options", "n", "seed", "temperature", "top_p", "top_k", "stop"}
READ |= {"max_tokens", "max_completion_tokens", "logprobs", "return_token_ids"}


class Refused(Exception):
    """A request that is not answered, as the protocol says it."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if 400 <= self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may hold."""

    max_body_bytes: int = 64 * 2**20
    max_images: int = 64
    max_pixels: int = 128 * 2**20
    """Of all images together, by their headers, before one is decoded."""
    max_choices: int = 64


@dataclass(slots=True, kw_only=True)
class Request:
    """A request in our nouns."""

    model: str
    prompt: Prompt
    sampling: Sampling
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    """Log-probabilities of the answer's tokens are told, at the sampling temperature."""
    token_ids: bool = False
    """Token ids of the answer are told (vLLM's return_token_ids)."""


def read_request(body: bytes, models: Sequence[str], default: Sampling, limits: Limits) -> Request:
    """Check a request and read it. What is not given comes from `default`, whose max_new_tokens is also the most.

    Raises Refused with the status and the sentence for the client.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body must be a JSON object")
    for name, value in fields.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise Refused(400, f"{name} is not supported", "unsupported_parameter", name)
        if name not in READ and name not in IGNORED and name not in NEUTRAL:
            raise Refused(400, f"unknown field {name!r}", "unknown_parameter", name)
    model = fields.get("model")
    if not isinstance(model, str) or model not in models:
        raise Refused(404, f"there is no model {model!r}; there are {', '.join(models)}", "model_not_found", "model")
    options = fields.get("stream_options") or {}
    stream = _flag(fields.get("stream"), "stream")
    told = {name: _flag(fields.get(name), name) for name in ("logprobs", "return_token_ids")}
    for name in [name for name, wanted in told.items() if wanted and stream]:
        raise Refused(400, f"{name} is not supported in streams", "unsupported_parameter", name)
    return Request(
        model=model,
        prompt=_prompt(fields.get("messages"), limits),
        sampling=_sampling(fields, default),
        n=_number(fields, "n", 1, 1, limits.max_choices, int),
        stream=stream,
        include_usage=_flag(options.get("include_usage") if isinstance(options, dict) else "", "stream_options"),
        logprobs=told["logprobs"],
        token_ids=told["return_token_ids"],
    )


def _sampling(fields: Mapping[str, Any], default: Sampling) -> Sampling:
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    given = fields.get("stop")
    stop = () if given is None else tuple(given) if isinstance(given, list) else (given,)
    if len(stop) > 16 or not all(isinstance(text, str) and 0 < len(text) <= 1000 for text in stop):
        raise Refused(400, "stop must be a text or a list of up to 16 texts that are not empty", None, "stop")
    return replace(
        default,
        max_new_tokens=_number(fields, name, default.max_new_tokens, 1, default.max_new_tokens, int),
        temperature=_number(fields, "temperature", default.temperature, 0, 100, float),
        top_p=_number(fields, "top_p", default.top_p, 1e-6, 1, float),
        top_k=None if fields.get("top_k") in (None, -1, 0) else _number(fields, "top_k", None, 1, 10**6, int),
        seed=None if fields.get("seed") is None else _number(fields, "seed", None, 0, 2**63 - 1, int),
        stop=stop,
    )


def _number(fields: Mapping[str, Any], name: str, default: Any, low: float, high: float, kind: type) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    accepted = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not low <= value <= high:
        shown = repr(value)[:40]
        raise Refused(400, f"{name} is {shown}; accepted is {kind.__name__} from {low:g} to {high:g}", None, name)
    return kind(value)


def _flag(value: Any, name: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise Refused(400, f"{name} must be true or false, or hold such flags", None, name)


# ------------------------------------------------------------------------------------------------ messages


def _prompt(rows: Any, limits: Limits) -> Prompt:
    if not isinstance(rows, list) or not rows:
        raise Refused(400, "messages must be a list of at least one message", None, "messages")
    messages: list[Message] = []
    urls: list[tuple[str, str]] = []
    for k, row in enumerate(rows):
        where = f"messages[{k}]"
        role = row.get("role") if isinstance(row, dict) else None
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant"):
            raise Refused(400, f"{where} must have the role system, user or assistant, found {role!r}", None, where)
        if row.get("tool_calls"):
            raise Refused(400, f"{where} has tool_calls, which are not supported", "unsupported_parameter", where)
        text, found = _content(row.get("content"), where)
        if found and role != "user":
            raise Refused(400, f"{where} is the {role}'s and holds an image; images are the user's", None, where)
        messages.append(Message(role=role, content=text))  # type: ignore[arg-type]
        urls += found
    if messages[-1].role != "user":
        raise Refused(400, "the last message must be the user's", None, "messages")
    return Prompt(messages=messages, images=_images(urls, limits))


def _content(content: Any, where: str) -> tuple[str, list[tuple[str, str]]]:
    """The text with marks, and (url, where) of each image."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Refused(400, f"{where}.content must be a text or a list of parts", None, where)
    text = ""
    urls: list[tuple[str, str]] = []
    for k, part in enumerate(parts):
        place = f"{where}.content[{k}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"].replace(IMAGE_MARK, SAID_MARK)
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str) or not DATA_URL.match(url[:64]):
                raise Refused(
                    400,
                    f"{place}: images must be data URLs (data:image/png;base64,...) of PNG, JPEG, WebP or GIF; files "
                    "and addresses are not read",
                    "invalid_image_url",
                    place,
                )
            text += IMAGE_MARK
            urls.append((url, place))
        else:
            raise Refused(400, f"{place} is {kind!r}; accepted are text and image_url", None, place)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(400, f"{where} holds half a character (a lone surrogate)", None, where) from None
    return text, urls


def _images(urls: Sequence[tuple[str, str]], limits: Limits) -> list[Image.Image]:
    if len(urls) > limits.max_images:
        raise Refused(400, f"{len(urls)} images; accepted are up to {limits.max_images}", None, "messages")
    files: list[tuple[bytes, str]] = []
    num_pixels = 0
    for url, place in urls:
        try:
            data = base64.b64decode(url[url.index(",") + 1 :], validate=True)
            width, height = image_size(data, place, FORMATS)
        except (binascii.Error, ValueError) as error:
            raise Refused(400, f"{place}: {_sentence(error, place)}", "invalid_image", place) from None
        num_pixels += width * height
        if num_pixels > limits.max_pixels:
            raise Refused(400, f"the images have more than {limits.max_pixels} pixels together", None, "messages")
        files.append((data, place))
    try:
        return [open_image(data, place, FORMATS) for data, place in files]
    except ValueError as error:
        raise Refused(400, str(error), "invalid_image", "messages") from None


def _sentence(error: Exception, place: str) -> str:
    if isinstance(error, binascii.Error):
        return "the data URL holds no base64"
    return str(error).removeprefix(place).strip()
