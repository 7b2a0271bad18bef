"""OpenAI's chat protocol: how answers and pieces of streamed ones look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step3vl.types import Completion

from .backends import Said
from .protocol import Request


def answer(id: str, created: int, request: Request, said: Sequence[Said], split: bool) -> dict[str, Any]:
    """The body of an answer. Those that failed are counted in `num_failed`, where others came."""
    came = [one for one in said if one.completion.error is None]
    choices = [
        {
            "index": k,
            "message": {"role": "assistant", **content(one.completion.text, split)},
            "finish_reason": finish(one.completion),
            "logprobs": logprobs(one.completion) if request.logprobs else None,
            **({"token_ids": list(one.completion.token_ids)} if request.token_ids else {}),
        }
        for k, one in enumerate(came)
    ]
    body = {"id": id, "object": "chat.completion", "created": created, "model": request.model, "choices": choices}
    body |= {"usage": usage(said)}
    if len(came) < len(said):
        body["num_failed"] = len(said) - len(came)
    if any(one.notes for one in said):
        body["pacore"] = [one.notes for one in came]
    return body


def piece(id: str, created: int, model: str, index: int, delta: Mapping[str, Any], end: str | None) -> dict[str, Any]:
    """A piece of a streamed answer."""
    choice = {"index": index, "delta": dict(delta), "finish_reason": end, "logprobs": None}
    return {"id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": [choice]}


def usage(said: Sequence[Said]) -> dict[str, Any]:
    """Tokens: of the question once, and all that were generated; those of rollouts are called reasoning."""
    hidden = sum(one.num_hidden_tokens for one in said)
    generated = sum(one.completion.num_tokens for one in said) + hidden
    prompt = said[0].num_prompt_tokens if said else 0
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
    found["completion_tokens_details"] = {"reasoning_tokens": hidden}
    if said and not said[0].counted_exactly:
        found["prompt_tokens_estimated"] = True
    return found


def content(text: str, split: bool) -> dict[str, str]:
    """Content, and where thoughts are split off, reasoning_content: what stands before the last closing think tag."""
    thoughts, tag, rest = text.rpartition("</think>")
    if not split or not tag:
        return {"content": text}
    return {"reasoning_content": thoughts.strip().removeprefix("<think>").strip(), "content": rest.lstrip()}


def logprobs(completion: Completion) -> dict[str, Any]:
    """One entry a token; the token is named by its id, as vLLM does it when asked for ids."""
    pairs = zip(completion.token_ids, completion.logprobs)
    rows: list[dict[str, Any]] = [
        {"token": f"token_id:{id}", "bytes": None, "logprob": value, "top_logprobs": []} for id, value in pairs
    ]
    return {"content": rows, "refusal": None}


def finish(completion: Completion) -> str:
    return "length" if completion.truncated else "stop"
