"""Answers to one prompt: sixteen together against sixteen calls, and against transformers' generate; and refill.

Our sampler sees the image once, prefills once and keeps the prompt's keys and values once. The peer is transformers'
own Qwen3 with equal weights and a key-value cache: an expanded batch, which is what `num_return_sequences` makes, and a
cache that is prefilled once and then expanded. Process CPU time, one thread, fp32, variants by turns. A variant counts
only if its greedy tokens are those of the others. Run: make bench
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from gate import abstain, interleaved, ratio
from PIL import Image
from tiny_vlm import stage

from step3vl.data import Processor
from step3vl.data.malloc import keep_freed_memory
from step3vl.generation.sampler import Sampler, evaluating, without_gradients
from step3vl.generation.stopping import StopRule
from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.attention import StepCache
from step3vl.models.vision import PELang
from step3vl.types import Completion, Example, Message, Prompt, Sampling

N = 16
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
}
IMAGE_TOKEN, STOP = 1, 2
OURS = "prompt kept once (ours)"
EXPANDED, PREFILLED = "transformers, expanded batch", "transformers, prefilled once, expanded"
TOGETHER, APART = "16 answers in one call", "16 calls"
REFILLED, FIXED = "the next begin where others end", "fixed batches"


def ids_of(completions: Sequence[Sequence[Completion]]) -> list[list[int]]:
    return [completion.token_ids for group in completions for completion in group]


class Ids:
    """A prompt is its token ids, written out."""

    pad_id, stop_ids = 0, frozenset({STOP})

    def __init__(self, num_stops: int = 0):
        self.stop_ids = frozenset(range(STOP, STOP + 1 + num_stops))

    def encode_prompt(self, prompt: Prompt, id: str = "") -> Example:
        ids = torch.tensor([int(word) for word in prompt.messages[0].content.split()])
        return Example(id=id, input_ids=ids, labels=ids, position_ids=torch.arange(len(ids)))

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def prompt_of(ids: Sequence[int]) -> Prompt:
    return Prompt(messages=[Message(role="user", content=" ".join(map(str, ids)))])


class Peers:
    """One decoder in our sampler and in transformers, and a text of so many tokens to go on from."""

    def __init__(self, num_given: int, num_new: int):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.set_num_threads(1)
        keep_freed_memory()  # for all variants
        torch.manual_seed(0)
        decoder = Qwen3Decoder(**SIZES, init_std=0.1)
        vlm = VisionLanguageModel(PELang(32, 1, 2, 64, patch_size=4, grid_size=8), ConvProjector, decoder)
        vlm.bind(IMAGE_TOKEN)
        config = Qwen3Config(
            vocab_size=SIZES["vocab_size"],
            hidden_size=SIZES["hidden_size"],
            intermediate_size=SIZES["intermediate_size"],
            num_hidden_layers=SIZES["num_layers"],
            num_attention_heads=SIZES["num_heads"],
            num_key_value_heads=SIZES["num_kv_heads"],
            head_dim=SIZES["head_dim"],
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            attn_implementation="sdpa",
            eos_token_id=STOP,
            pad_token_id=0,
        )
        self.theirs = Qwen3ForCausalLM(config).eval()
        missing, unexpected = self.theirs.load_state_dict(decoder.state_dict(), strict=False)
        assert not missing and not unexpected
        self.sampler, self.num_new = Sampler(vlm, Ids()), num_new
        self.given = torch.randint(STOP + 1, SIZES["vocab_size"], (num_given,))

    def __call__(self, variant: str) -> list[list[int]]:
        """Greedy tokens of all answers."""
        if variant == OURS:
            sampling = Sampling(max_new_tokens=self.num_new)
            return ids_of(self.sampler.generate([prompt_of(self.given.tolist())], sampling, N))
        ids = self.given.expand(N, -1)
        options = {"max_new_tokens": self.num_new, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
        with torch.inference_mode():
            if variant == PREFILLED:
                cache = self.theirs.model(self.given[None, :-1], use_cache=True).past_key_values
                cache.batch_repeat_interleave(N)
                options["past_key_values"] = cache
            found = self.theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return found[:, len(self.given) :].tolist()


@pytest.mark.parametrize(("num_given", "num_new", "goal"), [(512, 64, 3.0), (2048, 32, 8.0)])
def test_sixteen_continuations_of_one_prompt(num_given, num_new, goal):
    peers = Peers(num_given, num_new)
    wanted = peers(OURS)
    assert wanted == [wanted[0]] * N and len(wanted[0]) == num_new
    for variant in (EXPANDED, PREFILLED):
        assert peers(variant) == wanted, f"{variant}: other tokens"
    seconds = interleaved({variant: lambda v=variant: peers(v) for variant in (EXPANDED, PREFILLED, OURS)}, rounds=3)
    title = f"{N} x ({num_given} + {num_new}) tokens: "
    found = {v: ratio(seconds, v, OURS, f"{title}{v} / ours") for v in (EXPANDED, PREFILLED)}
    abstain(seconds)
    assert found[EXPANDED] >= goal


def image_question(processor: Processor) -> Prompt:
    """An image of several crops, in noise that no two views share."""
    torch.manual_seed(0)
    side = processor.spec.layout.global_size if processor.spec else 64
    pixels = torch.randint(0, 256, (2 * side, 3 * side, 3), dtype=torch.uint8)
    question = Message(role="user", content="<image>What does the sign in the third row say?")
    return Prompt(messages=[question], images=[Image.fromarray(pixels.numpy())])


def test_sixteen_answers_to_an_image_question():
    """The goal is a sixth to a seventh of the CPU time of as many calls."""
    tiny = stage()
    prompt, sampling = image_question(tiny.processor), Sampling(max_new_tokens=16)
    sampler = Sampler(tiny.vlm, tiny.processor)
    variants: dict[str, Callable[[], list[list[int]]]] = {
        APART: lambda: [ids_of(sampler.generate([prompt], sampling))[0] for _ in range(N)],
        TOGETHER: lambda: ids_of(sampler.generate([prompt], sampling, N)),
    }
    assert variants[TOGETHER]() == variants[APART]()
    example = tiny.processor.encode_prompt(prompt)
    print(f"\nprompt: {len(example.input_ids)} tokens, {len(example.views)} views")
    seconds = interleaved(variants)
    found = ratio(seconds, TOGETHER, APART, "16 answers to an image question: one call / 16 calls")
    abstain(seconds)
    assert found <= 0.15


def test_long_tailed_answers():
    """Steps are what a GPU waits for: there a row more costs little. On a CPU rows cost, and the gain is small."""
    peers = Peers(96, 1)
    vlm = peers.sampler.vlm
    sampler = Sampler(vlm, Ids(num_stops=160), batch_size=32)
    prompts = [prompt_of(peers.given[k:].tolist()) for k in range(64)]
    sampling = Sampling(max_new_tokens=400, temperature=2.0, seed=0)
    rule = StopRule.of(sampler.processor.stop_ids, sampling.max_new_tokens)
    num_steps = 0

    def fixed() -> list[list[int]]:
        answers = sampler._prepare(prompts, sampling, rule, 4)
        for k in range(0, len(prompts), sampler.batch_size // 4):
            flight = sampler._flight(answers[k : k + sampler.batch_size // 4], sampling, rule)
            with evaluating(vlm), without_gradients(flight.ranks):
                for _ in flight.turns():
                    pass
        return [answer.ids for group in answers for answer in group]

    def count(_, given, named) -> None:
        nonlocal num_steps
        num_steps += isinstance(named.get("cache"), StepCache)

    variants = {FIXED: fixed, REFILLED: lambda: ids_of(sampler.generate(prompts, sampling, 4))}
    hook, steps = vlm.register_forward_pre_hook(count, with_kwargs=True), {}
    wanted = None
    for name, run in variants.items():
        num_steps = 0
        found = run()
        steps[name] = num_steps
        assert wanted in (None, found), f"{name}: other tokens"
        wanted = found
    hook.remove()
    lengths = sorted(map(len, wanted))
    print(f"\n{len(lengths)} answers of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")
    print(f"steps: {steps[FIXED]} / {steps[REFILLED]} = {steps[FIXED] / steps[REFILLED]:.2f}x")
    seconds = interleaved(variants, rounds=3)
    found = ratio(seconds, FIXED, REFILLED)
    assert steps[FIXED] >= 1.5 * steps[REFILLED]
    abstain(seconds)
    assert found >= 1.0
