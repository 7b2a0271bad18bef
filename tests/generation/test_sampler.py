from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from step3vl.generation.cache import SharedCache
from step3vl.generation.flight import packed
from step3vl.generation.sampler import Sampler
from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.attention import StepCache
from step3vl.models.vision import DINOv3, PELang
from step3vl.types import Completion, Example, Message, Prompt, Sampling

IMAGE, PAD, STOPS, VOCABULARY = 5, 0, {2, 4, 10, 21}, 24


class TinyProcessor:
    """Letters are tokens from 6 on; `#` is an image of four visual tokens whose pixels follow from its place."""

    stop_ids = STOPS
    pad_id = PAD

    def encode_prompt(self, prompt: Prompt, id: str = "") -> Example:
        ids: list[int] = []
        views: list[Tensor] = []
        for letter in prompt.messages[0].content:
            if letter == "#":
                ids += [IMAGE] * 4
                seed = len(prompt.messages[0].content) + len(views)
                views.append(torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed)))
            else:
                ids.append(6 + (ord(letter) - ord("a")) % (VOCABULARY - 6))
        tokens = torch.tensor(ids, dtype=torch.long)
        return Example(
            id=id,
            input_ids=tokens,
            labels=torch.full_like(tokens, -100),
            position_ids=torch.arange(len(tokens)),
            views=views,
            num_visual_tokens=4 * len(views),
        )

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def asked(text: str, begun_ids: Sequence[int] = ()) -> Prompt:
    return Prompt(messages=[Message(role="user", content=text)], begun_ids=list(begun_ids))


PROMPTS = [asked(text) for text in ("abc#de", "a", "#b#cdefgh", "hgfe", "#", "bcd#a")]
GREEDY = Sampling(max_new_tokens=12)


def ids_of(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in completions]


def assert_same(found: list[list[Completion]], wanted: list[list[Completion]]) -> None:
    """The same words; log-probabilities but for rounding."""
    assert ids_of(found) == ids_of(wanted)
    for ones, others in zip(found, wanted):
        for one, other in zip(ones, others):
            assert (one.text, one.truncated, one.num_tokens) == (other.text, other.truncated, other.num_tokens)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def model(encoder: str = "pe_lang") -> VisionLanguageModel:
    torch.manual_seed(0)
    vision = (
        PELang(32, 1, 2, 64, patch_size=4, grid_size=8) if encoder == "pe_lang" else DINOv3(32, 1, 2, 64, patch_size=4)
    )
    vlm = VisionLanguageModel(vision, ConvProjector, Qwen3Decoder(48, 96, 2, 4, 2, 16, VOCABULARY, init_std=0.3))
    vlm.bind(IMAGE)
    return vlm


def uncached(vlm: VisionLanguageModel, prompt: Prompt, max_new_tokens: int) -> list[int]:
    """The slow truth: the whole sequence through the model for every token."""
    example = TinyProcessor().encode_prompt(prompt)
    said: list[int] = []
    vlm.eval()
    while len(said) < max_new_tokens and not STOPS & set(said):
        example.input_ids = torch.cat([example.input_ids, torch.tensor(said[-1:], dtype=torch.long)])
        example.position_ids = torch.arange(len(example.input_ids))
        with torch.no_grad():
            logits = vlm.decoder.lm_head(vlm(packed([example]))[0, -1])
        logits[IMAGE] = float("-inf")
        said.append(int(logits.argmax()))
    return said


def test_cached_equals_uncached() -> None:
    vlm = model()
    completions = Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY)
    expected = [uncached(vlm, prompt, 12) for prompt in PROMPTS]
    assert [found[0].token_ids for found in completions] == expected
    lengths = {len(ids) for ids in expected}
    assert len(lengths) > 1 and 12 in lengths, "the prompts must show both ways to end"


def test_batched_equals_one_by_one() -> None:
    vlm = model()
    together = Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY)
    for batch_size in (1, 2):
        assert_same(Sampler(vlm, TinyProcessor(), batch_size=batch_size).generate(PROMPTS, GREEDY), together)
    assert_same([Sampler(vlm, TinyProcessor()).generate([prompt], GREEDY)[0] for prompt in PROMPTS], together)


def test_text_leaves_the_stop_token_out() -> None:
    for (completion,) in Sampler(model(), TinyProcessor()).generate(PROMPTS, GREEDY):
        stopped = completion.token_ids[-1] in STOPS
        said = completion.token_ids[:-1] if stopped else completion.token_ids
        assert completion.text == " ".join(map(str, said))
        assert completion.truncated == (not stopped)
        assert not STOPS & set(said) and IMAGE not in said


def test_a_length_limit_only_shortens() -> None:
    vlm = model()
    long = Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY)
    short = Sampler(vlm, TinyProcessor()).generate(PROMPTS, Sampling(max_new_tokens=3))
    assert [c[0].token_ids for c in short] == [c[0].token_ids[:3] for c in long]


def test_n_samples_encode_images_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model()
    seen = []
    inner = vlm.encode_images
    monkeypatch.setattr(vlm, "encode_images", lambda images: seen.append(len(images)) or inner(images))
    greedy = Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY)
    assert sum(seen) == 5
    seen.clear()
    many = Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY, n=4)
    assert sum(seen) == 5
    assert_same(many, [found * 4 for found in greedy])  # greedy completions of one prompt are all the same


def test_temperature_samples_from_the_softmax() -> None:
    vlm = model()
    n, temperature = 3000, 1.5
    drawn = Sampler(vlm, TinyProcessor(), batch_size=n, seed=3).generate(
        PROMPTS[:1], Sampling(max_new_tokens=1, temperature=temperature), n=n
    )
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn[0]]), minlength=VOCABULARY) / n
    batch = packed([TinyProcessor().encode_prompt(PROMPTS[0])])
    logits = vlm.eval().decoder.lm_head(vlm(batch)[0, -1]).detach()
    logits[IMAGE] = float("-inf")
    assert (counts - (logits / temperature).softmax(-1)).abs().max() < 0.04
    assert counts[IMAGE] == 0


def test_same_seed_same_samples() -> None:
    vlm, hot = model(), Sampling(max_new_tokens=6, temperature=1.0)

    def draw(seed: int) -> list:
        sampler = Sampler(vlm, TinyProcessor(), seed=seed)
        return [sampler.generate(PROMPTS, hot, n=2) for _ in range(2)]

    first = draw(0)
    assert draw(0) == first and draw(1) != first
    assert first[0] != first[1]  # the random numbers go on


@pytest.mark.parametrize("encoder", ["pe_lang", "dinov3"])
def test_training_goes_on_where_it_was(encoder: str) -> None:
    vlm = model(encoder).train()
    vlm.vision_encoder.eval()
    modes = [part.training for part in vlm.modules()]
    Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY)
    assert [part.training for part in vlm.modules()] == modes
    batch = packed([TinyProcessor().encode_prompt(PROMPTS[0])])
    vlm(batch).square().sum().backward()
    assert vlm.vision_encoder.blocks()[0].parameters().__next__().grad is not None


def test_no_prompts_no_completions() -> None:
    assert Sampler(model(), TinyProcessor()).generate([], GREEDY) == []


def test_refuses_nonsense() -> None:
    sampler = Sampler(model(), TinyProcessor(), max_cached_tokens=20)
    hot = {"max_new_tokens": 2, "temperature": 1.0}
    with pytest.raises(ValueError, match="n is 0"):
        sampler.generate(PROMPTS, GREEDY, n=0)
    for sampling, message in (
        (Sampling(max_new_tokens=2, temperature=-1), "temperature is -1"),
        (Sampling(max_new_tokens=0), "max_new_tokens is 0"),
        (Sampling(**hot, top_p=0), "top_p is 0; accepted is above 0"),
        (Sampling(**hot, top_p=1.1), "top_p is 1.1; accepted is above 0"),
        (Sampling(**hot, top_k=0), "top_k is 0; accepted is 1 or more"),
        (Sampling(**hot, stop=("",)), "none of them empty"),
        (Sampling(max_new_tokens=15), "prompt 0 has 9 tokens and may get 15 more, but max_cached_tokens is 20"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.generate(PROMPTS, sampling)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        sampler.generate([asked("")], GREEDY)
    for wrong in (IMAGE, VOCABULARY, -1):
        with pytest.raises(ValueError, match=f"prompt 0: begun_ids has {wrong}; accepted are ids from 0 to 23"):
            sampler.generate([asked("a", [7, wrong])], GREEDY)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Sampler(model(), TinyProcessor(), batch_size=0)


# ------------------------------------------------------------------------------------------------ log-probabilities


def whole_logprobs(vlm: VisionLanguageModel, prompt: Prompt, ids: list[int], temperature: float) -> list[float]:
    """By one forward of prompt and answer, without any cache."""
    example = TinyProcessor().encode_prompt(prompt)
    num_given = len(example.input_ids)
    example.input_ids = torch.cat([example.input_ids, torch.tensor(ids)])
    with torch.no_grad():
        logits = vlm.eval().decoder.lm_head(vlm(packed([example]))[0, num_given - 1 : -1])
    logits = logits.float()
    logits[:, IMAGE] = float("-inf")
    return (logits / (temperature or 1)).log_softmax(-1)[torch.arange(len(ids)), ids].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(max_new_tokens=40, temperature=0.7),
        Sampling(max_new_tokens=9, temperature=2, top_k=4, top_p=0.9),
    ],
)
@pytest.mark.parametrize("batch_size", [64, 5])
def test_logprobs_are_those_of_one_forward(sampling: Sampling, batch_size: int) -> None:
    vlm = model()
    completions = Sampler(vlm, TinyProcessor(), batch_size).generate(PROMPTS, sampling, n=3)
    for prompt, group in zip(PROMPTS, completions):
        for found in group:
            assert len(found.logprobs) == len(found.token_ids) == found.num_tokens
            wanted = whole_logprobs(vlm, prompt, found.token_ids, sampling.temperature)
            assert found.logprobs == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "per_document"])
def test_any_attention_of_training_gives_the_same(attention: str) -> None:
    vlm = model()
    wanted = Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY, n=2)
    vlm.decoder.attention = attention
    vlm.decoder.model.set_attn_implementation(attention)
    assert_same(Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY, n=2), wanted)
    assert vlm.decoder.model.config._attn_implementation == attention


def test_bfloat16_stays_close() -> None:
    vlm = model()
    with torch.autocast("cpu", torch.bfloat16):
        for prompt, group in zip(PROMPTS, Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY, n=2)):
            wanted = whole_logprobs(vlm, prompt, group[0].token_ids, 0)
            errors = torch.tensor(group[0].logprobs) - torch.tensor(wanted)
            assert errors.abs().mean() < 0.05
            assert group[0] == group[1]


def test_logits_that_are_no_numbers_are_not_drawn_from() -> None:
    vlm = model()
    torch.nn.init.constant_(vlm.decoder.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="prompt 0: a drawn token has the log-probability nan"):
        Sampler(vlm, TinyProcessor()).generate(PROMPTS, Sampling(max_new_tokens=3, temperature=1.0))


# ------------------------------------------------------------------------------------------------ what is drawn

HOT = Sampling(max_new_tokens=30, temperature=1.2, seed=5)


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 7}, {"max_cached_tokens": 90}, {"batch_size": 200}]
)
def test_completions_depend_on_no_batch(options: dict[str, int]) -> None:
    vlm = model()
    wanted = Sampler(vlm, TinyProcessor()).generate(PROMPTS, HOT, n=4)
    assert len({tuple(ids) for group in ids_of(wanted) for ids in group}) > 15
    assert_same(Sampler(vlm, TinyProcessor(), **options).generate(PROMPTS, HOT, n=4), wanted)
    fewer = Sampler(vlm, TinyProcessor(), **options).generate(PROMPTS[:3], HOT, n=2)
    assert_same(fewer, [group[:2] for group in wanted[:3]])


def test_calls_go_on_with_new_numbers_also_after_a_restart() -> None:
    vlm, hot = model(), Sampling(max_new_tokens=6, temperature=1.0)
    sampler = Sampler(vlm, TinyProcessor(), seed=4)
    first, _ = (sampler.generate(PROMPTS, hot, n=2) for _ in range(2))
    saved = sampler.state_dict()
    seeded = sampler.generate(PROMPTS, HOT)
    third = sampler.generate(PROMPTS, hot, n=2)
    assert ids_of(third) != ids_of(first)
    later = Sampler(vlm, TinyProcessor(), seed=9)
    later.load_state_dict(saved)
    assert later.generate(PROMPTS, hot, n=2) == third
    assert sampler.generate(PROMPTS, HOT) == seeded


def test_top_k_and_top_p_narrow_what_is_drawn() -> None:
    vlm = model()
    greedy = ids_of(Sampler(vlm, TinyProcessor()).generate(PROMPTS, GREEDY))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        hot = Sampling(max_new_tokens=12, temperature=3.0, seed=1, **narrow)
        assert ids_of(Sampler(vlm, TinyProcessor()).generate(PROMPTS, hot)) == greedy
        still = Sampling(max_new_tokens=12, **narrow)
        assert ids_of(Sampler(vlm, TinyProcessor()).generate(PROMPTS, still)) == greedy
    one_token = Sampling(max_new_tokens=1, temperature=3.0, seed=1, top_k=3)
    drawn = ids_of(Sampler(vlm, TinyProcessor(), 512).generate(PROMPTS[:1], one_token, n=300))[0]
    assert len({id for (id,) in drawn}) == 3


# ------------------------------------------------------------------------------------------------ begun answers


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_a_begun_answer_goes_on_as_if_it_had_not_stopped(sampling: Sampling) -> None:
    vlm = model()
    whole = Sampler(vlm, TinyProcessor()).generate(PROMPTS, sampling)
    begun = [2, 0, 1, 3, 0, 4]
    begun = [min(count, found[0].num_tokens - 1) for count, found in zip(begun, whole)]
    prompts = [
        asked(prompt.messages[0].content, found[0].token_ids[:count])
        for prompt, found, count in zip(PROMPTS, whole, begun)
    ]
    rest = Sampler(vlm, TinyProcessor()).generate(prompts, sampling)
    for (one,), (other,), count in zip(rest, whole, begun):
        assert one.token_ids[: other.num_tokens - count] == other.token_ids[count:]
        assert one.logprobs[: other.num_tokens - count] == pytest.approx(other.logprobs[count:], abs=1e-4)
        assert one.num_tokens == len(one.token_ids) <= sampling.max_new_tokens
    assert sum(begun) > 4


# ------------------------------------------------------------------------------------------------ what it costs


class Counts:
    """Forwards of the model by kind, rows of every step, and views encoded."""

    def __init__(self, vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
        self.prefills: list[int] = []
        self.steps: list[int] = []
        self.views: list[int] = []
        forward, encode = vlm.forward, vlm.encode_images

        def watched(batch, cache=None, attention_mask=None):
            (self.steps if isinstance(cache, StepCache) else self.prefills).append(batch.input_ids.numel())
            return forward(batch, cache=cache, attention_mask=attention_mask)

        monkeypatch.setattr(vlm, "forward", watched)
        monkeypatch.setattr(vlm, "encode_images", lambda images: self.views.append(len(images)) or encode(images))


def test_sixteen_answers_to_an_image_cost_one_look_and_one_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model()
    counts = Counts(vlm, monkeypatch)
    for batch_size in (64, 5):
        found = Sampler(vlm, TinyProcessor(), batch_size).generate(PROMPTS[:1], HOT, n=16)
        assert counts.views == [1] and counts.prefills == [9]
        assert max(counts.steps) <= batch_size
        assert sum(counts.steps) == sum(c.num_tokens - 1 for c in found[0])
        for seen in (counts.views, counts.prefills, counts.steps):
            seen.clear()


def test_the_next_begin_where_others_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve answers in flight of 6 x 4, of very different lengths: no step waits for the longest of a batch."""
    vlm = model()
    counts = Counts(vlm, monkeypatch)
    sampling = Sampling(max_new_tokens=60, temperature=1.2, seed=5)
    found = Sampler(vlm, TinyProcessor(), 12).generate(PROMPTS, sampling, n=4)
    lengths = sorted(c.num_tokens for group in found for c in group)
    assert lengths[-1] > 3 * lengths[len(lengths) // 2]
    assert max(counts.steps) == 12 and sum(counts.steps) == sum(lengths) - len(lengths)
    halves = [max(c.num_tokens for group in found[k : k + 3] for c in group) - 1 for k in (0, 3)]
    assert len(counts.steps) < sum(halves)


def test_no_more_is_kept_than_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model()
    most = []
    begin = SharedCache.begin_step

    def watched(cache):
        rows = begin(cache)
        most.append(
            sum(s.length for shelf in (*cache.prompts.values(), *cache.answers.values()) for s in shelf.stretches)
        )
        return rows

    monkeypatch.setattr(SharedCache, "begin_step", watched)
    Sampler(vlm, TinyProcessor(), max_cached_tokens=90).generate(PROMPTS, HOT, n=4)
    assert 45 < max(most) <= 90
    most.clear()
    Sampler(vlm, TinyProcessor()).generate(PROMPTS, HOT, n=4)
    assert max(most) > 90
