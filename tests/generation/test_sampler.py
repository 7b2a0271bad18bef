from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step3vl.generation.sampler import Sampler, left_padded
from step3vl.generation.stopping import StopRule
from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import DINOv3, PELang
from step3vl.types import Example, Message, Prompt, Sampling

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


PROMPTS = [
    Prompt(messages=[Message(role="user", content=text)]) for text in ("abc#de", "a", "#b#cdefgh", "hgfe", "#", "bcd#a")
]
GREEDY = Sampling(max_new_tokens=12)


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
            batch, _ = left_padded([example], PAD)
            logits = vlm.decoder.lm_head(vlm(batch)[0, -1])
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
        assert Sampler(vlm, TinyProcessor(), batch_size=batch_size).generate(PROMPTS, GREEDY) == together
    assert [Sampler(vlm, TinyProcessor()).generate([prompt], GREEDY)[0] for prompt in PROMPTS] == together


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
    assert many == [found * 4 for found in greedy]  # greedy completions of one prompt are all the same


def test_temperature_samples_from_the_softmax() -> None:
    vlm = model()
    n, temperature = 3000, 1.5
    drawn = Sampler(vlm, TinyProcessor(), batch_size=n, seed=3).generate(
        PROMPTS[:1], Sampling(max_new_tokens=1, temperature=temperature), n=n
    )
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn[0]]), minlength=VOCABULARY) / n
    batch, _ = left_padded([TinyProcessor().encode_prompt(PROMPTS[0])], PAD)
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
    batch, _ = left_padded([TinyProcessor().encode_prompt(PROMPTS[0])], PAD)
    vlm(batch).square().sum().backward()
    assert vlm.vision_encoder.blocks()[0].parameters().__next__().grad is not None


def test_no_prompts_no_completions() -> None:
    assert Sampler(model(), TinyProcessor()).generate([], GREEDY) == []


def test_refuses_nonsense() -> None:
    sampler = Sampler(model(), TinyProcessor())
    with pytest.raises(ValueError, match="n is 0"):
        sampler.generate(PROMPTS, GREEDY, n=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        sampler.generate(PROMPTS, Sampling(max_new_tokens=2, temperature=-1))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        sampler.generate(PROMPTS, Sampling(max_new_tokens=0))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        sampler.generate([Prompt(messages=[Message(role="user", content="")])], GREEDY)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Sampler(model(), TinyProcessor(), batch_size=0)


def test_stop_rule() -> None:
    rule = StopRule.of([2, 9], 4)
    assert rule.stops(torch.tensor([1, 2, 9])).tolist() == [False, True, True]
    assert rule.cut([5, 9]) == ([5], False) and rule.cut([5, 6]) == ([5, 6], True) and rule.cut([]) == ([], True)
    with pytest.raises(ValueError, match="stop_ids is empty"):
        StopRule.of([], 4)
