"""DeepStack: unchanged at step 0, injected as transformers injects, exact under packing and caching."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from step3vl.generation.sampler import Sampler
from step3vl.models import ConvProjector, DeepStack, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.types import Grids, MultiCrop, Sampling

from ..generation.test_sampler import PROMPTS, TinyProcessor
from .test_vlm import IMAGE, batch, mixed

MERGERS = ["pool_mlp", "unshuffle", "conv"]


def model(deepstack=DeepStack, num_layers: int = 4, **options) -> VisionLanguageModel:
    torch.manual_seed(0)
    vision = PELang(32, 3, 2, 64, patch_size=4, grid_size=8, layout=MultiCrop(global_size=32, crop_size=16))
    decoder = Qwen3Decoder(48, 96, num_layers, 4, 2, 16, 64, **options)
    made = VisionLanguageModel(vision, ConvProjector, decoder, deepstack and partial(deepstack, **LEVELS))
    made.bind(IMAGE)
    return made


LEVELS = {"taps": [0, 2], "inject_after": [0, 2]}


def awake(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """The same with last maps that are not zero."""
    torch.manual_seed(2)
    for merger in vlm.deepstack.mergers:
        nn.init.normal_(merger.last.weight, std=0.5)
        nn.init.normal_(merger.last.bias, std=0.5)
    return vlm


def logits(vlm: VisionLanguageModel, packed) -> Tensor:
    return vlm.decoder.lm_head(vlm(packed))


@pytest.mark.parametrize("merger", MERGERS)
def test_step_0_is_unchanged(merger: str) -> None:
    off, on = model(None), model(partial(DeepStack, merger=merger))
    given = {name: weight for name, weight in on.state_dict().items() if not name.startswith("deepstack.")}
    assert given.keys() == off.state_dict().keys() and len(given) < len(on.state_dict())
    off.load_state_dict(given)
    assert torch.equal(logits(on, mixed()), logits(off, mixed()))
    before = logits(on, mixed())
    assert (logits(awake(on), mixed()) - before).abs().max() > 1e-3


def test_without_deepstack_the_model_is_as_it_was() -> None:
    off = model(None)
    assert off.deepstack is None and not any("deepstack" in name for name in off.state_dict())
    assert [name for name, _ in off.named_children()] == ["vision_encoder", "projector", "decoder"]


def test_injection_equals_transformers() -> None:
    """Qwen3VLTextModel called directly, with the levels as its own arguments; layer 1 gets zeros."""
    vlm, one = awake(model()), batch([([7, *[IMAGE] * 4, 8, IMAGE, 9, 10], 5)], [32, 16])
    visual, (first, third) = vlm.encode_images(one.images)
    theirs = vlm.decoder.model(
        inputs_embeds=vlm.place(vlm.decoder.embed(one.input_ids), visual, one),
        position_ids=one.position_ids,
        visual_pos_masks=one.input_ids == IMAGE,
        deepstack_visual_embeds=[first, torch.zeros_like(first), third],
        use_cache=False,
    ).last_hidden_state
    mask = torch.ones_like(one.input_ids, dtype=torch.bool)
    torch.testing.assert_close(vlm(one, attention_mask=mask), theirs, rtol=0, atol=0)
    torch.testing.assert_close(vlm(one), theirs, rtol=0, atol=1e-5)


def test_injection_comes_after_the_layers_it_names() -> None:
    """Layer 1 sees level 0 at image positions and nowhere else; layer 2 sees nothing new."""
    vlm, one = awake(model()), batch([([7, *[IMAGE] * 4, 8], 4)], [32])
    _, (first, third) = vlm.encode_images(one.images)
    seen: dict[str, Tensor] = {}
    layers = [*vlm.decoder.model.layers, vlm.decoder.model.norm]
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _, inputs, k=number: seen.update({f"in {k}": inputs[0][0]}))
        layer.register_forward_hook(lambda *call, k=number: seen.update({f"out {k}": call[-1][0]}))
    vlm(one)
    for number, level in ((0, first), (1, 0.0), (2, third), (3, 0.0)):
        expected = seen[f"out {number}"].clone()
        expected[1:5] += level
        torch.testing.assert_close(seen[f"in {number + 1}"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["per_document", "sdpa"])
def test_packed_equals_separate(attention: str) -> None:
    vlm, packed = awake(model(attention=attention)), mixed()
    hidden, views = vlm(packed)[0], packed.images.unstack()
    for start, end, seen in [(0, 8, views[:2]), (8, 11, []), (11, 18, views[2:])]:
        ids = packed.input_ids[0, start:end].tolist()
        alone = batch([(ids, ids.count(IMAGE))], [])
        alone.images = Grids.stack(seen) if seen else None
        torch.testing.assert_close(hidden[start:end], vlm(alone)[0], rtol=0, atol=2e-5)


def test_rows_equal_one_long_row() -> None:
    vlm, one = awake(model()), batch([([7, *[IMAGE] * 4, 8], 4), ([9, *[IMAGE] * 4, 8], 4)], [32, 32])
    two = replace(one, input_ids=one.input_ids.view(2, 6), position_ids=one.position_ids.view(2, 6))
    torch.testing.assert_close(vlm(two).flatten(0, 1), vlm(one)[0], rtol=0, atol=1e-5)


def test_cached_equals_uncached() -> None:
    """Prefill of an image and a word, then word by word, against the whole sequence at once."""
    from transformers import DynamicCache

    vlm, ids = awake(model()).eval(), [7, *[IMAGE] * 4, 8, 9, 10, 11]
    whole = batch([(ids, 4)], [32])
    expected = vlm(whole)
    cache = DynamicCache(config=vlm.decoder.model.config)
    prefill = replace(whole, input_ids=whole.input_ids[:, :6], position_ids=whole.position_ids[:, :6])
    parts = [vlm(prefill, cache)]
    for k in range(6, 9):
        step = batch([(ids[k : k + 1], 0)], [])
        step.position_ids = torch.tensor([[k]])
        parts.append(vlm(step, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


def test_generation_in_a_batch_equals_generation_alone() -> None:
    from ..generation.test_sampler import model as sampled

    plain = sampled()
    vlm = VisionLanguageModel(
        plain.vision_encoder, lambda *_: plain.projector, plain.decoder, partial(DeepStack, taps=[0], inject_after=[0])
    )
    vlm.bind(plain.image_token_id)
    awake(vlm)
    greedy = Sampling(max_new_tokens=6)

    def said(made: VisionLanguageModel, size: int) -> list[list[int]]:
        found = Sampler(made, TinyProcessor(), batch_size=size).generate(PROMPTS, greedy)
        return [completion.token_ids for (completion,) in found]

    assert said(vlm, 64) == said(vlm, 1)  # prompts of several lengths in one row; one at a time
    assert said(vlm, 64) != said(plain, 64)


@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize(("side", "tokens"), [(52, 169), (36, 81), (37, 100), (7, 4), (1, 1)])
def test_as_many_tokens_as_the_projector(merger: str, side: int, tokens: int) -> None:
    features = Grids((torch.randn(1, side, side, 8),), torch.tensor([0]))
    (level,) = DeepStack(8, 12, taps=[0], inject_after=[0], merger=merger)([features])
    main = features.map(ConvProjector(8, 12)).tensors[0]
    assert level.shape == (tokens, 12) and main.shape[1] * main.shape[2] == tokens
    assert DeepStack.grid(side) == ConvProjector.grid(side) == main.shape[1]


@pytest.mark.parametrize("merger", MERGERS)
def test_a_token_sees_its_own_cells(merger: str) -> None:
    """A change in one cell of a 6x9 grid reaches the token in whose 4x4 window it lies; only "conv" sees further."""
    torch.manual_seed(0)
    stack = DeepStack(8, 12, taps=[0], inject_after=[0], merger=merger)
    nn.init.normal_(stack.mergers[0].last.weight)
    features = torch.randn(1, 6, 9, 8)  # 2 x 3 tokens
    changed = features.clone()
    changed[0, 5, 8] += torch.randn(8)
    before, after = (stack([Grids((x,), torch.tensor([0]))])[0] for x in (features, changed))
    moved = (before - after).abs().amax(1) > 1e-6
    assert moved[5] and (merger == "conv" or moved.sum() == 1)


def test_a_partial_window_is_the_mean_of_its_own_cells() -> None:
    stack = DeepStack(8, 12, taps=[0], inject_after=[0])
    merger = stack.mergers[0]
    nn.init.normal_(merger.last.weight)
    features = torch.randn(1, 6, 5, 8)
    levels = stack([Grids((features,), torch.tensor([0]))])[0].view(2, 2, 12)
    mean = features[0, 4:6, 4:5].mean((0, 1))
    expected = merger.last(nn.functional.gelu(merger.linear_1(merger.norm(mean))))
    torch.testing.assert_close(levels[1, 1], expected, rtol=0, atol=1e-5)


def test_reading_order_is_that_of_the_main_tokens() -> None:
    vlm, packed = awake(model()), mixed()
    visual, levels = vlm.encode_images(packed.images)
    for level, number in zip(levels, range(2)):
        alone = [vlm.encode_images(Grids.stack([view]))[1][number] for view in packed.images.unstack()]
        assert level.shape == visual.shape
        torch.testing.assert_close(level, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("merger", MERGERS)
def test_gradient_reaches_mergers_and_tapped_layers(merger: str) -> None:
    vlm = model(partial(DeepStack, merger=merger))
    vlm(mixed()).square().sum().backward()
    for name, weight in vlm.deepstack.named_parameters():  # at step 0 the last maps alone can learn
        assert (weight.grad.abs().sum() > 0) == (".last." in name), name
    awake(vlm).zero_grad()
    _, levels = vlm.encode_images(mixed().images)
    levels[0].square().sum().backward()
    blocks = [sum(w.grad is not None for w in block.parameters()) for block in vlm.vision_encoder.blocks()]
    assert blocks[0] > 0 and blocks[1:] == [0, 0]  # tap 0 teaches block 0 and what lies before it
    vlm.zero_grad()
    vlm(mixed()).square().sum().backward()
    for name, weight in vlm.named_parameters():
        if "lm_head" not in name:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_text_alone_skips_deepstack(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, text = awake(model()), batch([([7, 8, 9], 0)], [])
    expected = model(None)
    expected.load_state_dict({k: v for k, v in vlm.state_dict().items() if not k.startswith("deepstack.")})
    monkeypatch.setattr(vlm.deepstack, "forward", None)
    assert torch.equal(vlm(text), expected(text))


def test_meta_construction_then_init() -> None:
    with torch.device("meta"):
        vlm = model()
    vlm.to_empty(device="cpu")
    for tensor in [*vlm.parameters(), *vlm.buffers()]:
        nn.init.constant_(tensor, float("nan"))
    vlm.init_weights()
    assert torch.isfinite(vlm(mixed())).all()
    for merger in vlm.deepstack.mergers:
        assert not merger.last.weight.any() and not merger.last.bias.any() and merger.linear_1.weight.any()


def test_bfloat16_autocast_trains() -> None:
    vlm = awake(model())
    with torch.autocast("cpu", torch.bfloat16):
        hidden = vlm(mixed())
    hidden.float().square().sum().backward()
    assert all(torch.isfinite(w.grad).all() for w in vlm.deepstack.parameters())


@pytest.mark.parametrize(("merger", "millions"), [("pool_mlp", 23.1), ("unshuffle", 100.7), ("conv", 237.5)])
def test_parameters_at_full_size(merger: str, millions: float, card) -> None:
    with torch.device("meta"):
        made = DeepStack(1536, 4096, merger=merger)
    counts = [sum(weight.numel() for weight in level.parameters()) for level in made.mergers]
    assert counts == counts[:1] * 3 and abs(counts[0] / 1e6 - millions) < 0.06


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": [0, 1], "inject_after": [0]}, r"taps \[0, 1\] and inject_after \[0\] must be of one length"),
        ({"taps": [], "inject_after": []}, "at least 1"),
        ({"taps": [-1, 1], "inject_after": [0, 1]}, r"taps is \[-1, 1\]; accepted are numbers from 0"),
        ({"taps": [0], "inject_after": [-1]}, r"inject_after is \[-1\]"),
        ({"taps": [3], "inject_after": [0]}, r"taps is \[3\], but PELang has the layers 0 to 2"),
        ({"taps": [0], "inject_after": [4]}, r"inject_after is \[4\], but Qwen3Decoder has the layers 0 to 3"),
        ({"merger": "mlp"}, "merger is 'mlp'; accepted are 'pool_mlp', 'unshuffle', 'conv'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(lambda *widths, **levels: DeepStack(*widths, **(levels | options)))


def test_another_grid_than_the_projectors_is_refused() -> None:
    class Halving(ConvProjector):
        @staticmethod
        def grid(side: int) -> int:
            return side // 2

    vision = PELang(32, 1, 2, 64, patch_size=4, grid_size=8, layout=MultiCrop(global_size=32, crop_size=16))
    with pytest.raises(
        ValueError, match="deepstack makes 1 tokens a side of 1 grid cells, the projector Halving makes 0"
    ):
        VisionLanguageModel(
            vision, Halving, Qwen3Decoder(48, 96, 1, 4, 2, 16, 64), partial(DeepStack, taps=[0], inject_after=[0])
        )
