"""The whole of STEP3-VL against a model put together here from transformers' own classes.

The tower is transformers' Step3p7VisionModel, the projector a plain linear map, the decoder Qwen3ForCausalLM; the token
layout is written out by hand for an image with two rows of crops.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from step3vl.data.images import views
from step3vl.data.processor import Processor
from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.types import IGNORE_INDEX, Batch, Grids, ImageSpec, Message, MultiCrop, Prompt
from tests.data.test_reference_images import photo

VISION, HEADS, PATCH, GRID = 64, 4, 4, 16
TEXT, VOCABULARY = 48, 1024
LAYOUT = MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)
QUESTION = "What stands in row 2? é 471"


def ours(bias: bool, tied: bool) -> VisionLanguageModel:
    torch.manual_seed(0)
    vision = PELang(VISION, 3, HEADS, 2 * VISION, patch_size=PATCH, grid_size=GRID, layout=LAYOUT)
    decoder = Qwen3Decoder(TEXT, 96, 3, 4, 2, 16, VOCABULARY, tie_embeddings=tied, init_std=0.1)
    vlm = VisionLanguageModel(vision, lambda one, other: ConvProjector(one, other, bias=bias), decoder)
    with torch.no_grad():  # every weight must matter, also those that start at zero or one
        for weight in vlm.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return vlm.eval()


def half_split(weight: Tensor) -> Tensor:
    """Rows of a query or key map: each head's pairs (0,1), (2,3), ... become first halves, then second halves."""
    heads = weight.reshape(HEADS, VISION // HEADS // 2, 2, -1)
    return torch.stack([heads[:, :, 0], heads[:, :, 1]], dim=1).reshape(weight.shape)


def their_tower(vlm: VisionLanguageModel) -> nn.Module:
    from transformers import Step3p7VisionConfig, Step3p7VisionModel

    config = Step3p7VisionConfig(
        hidden_size=VISION,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        image_size=PATCH * GRID,
        patch_size=PATCH,
        mlp_ratio=2.0,
        max_position_embeddings=GRID * GRID,
        hidden_act="quick_gelu",
    )
    tower, given = Step3p7VisionModel(config), vlm.state_dict()
    renamed = {
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layernorm.weight": "ln_pre.weight",
        "pre_layernorm.bias": "ln_pre.bias",
    }
    for n in range(3):
        block = f"transformer.resblocks.{n}"
        renamed |= {f"layers.{n}.lambda_{k}": f"{block}.ls_{k}.gamma" for k in (1, 2)}
        for kind in ("weight", "bias"):
            for theirs, name in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layernorm_before", "ln_1"),
                ("layernorm_after", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                renamed[f"layers.{n}.{theirs}.{kind}"] = f"{block}.{name}.{kind}"
    state = {theirs: given[f"vision_encoder.{name}"] for theirs, name in renamed.items()}
    for n in range(3):
        for kind in ("weight", "bias"):
            fused = given[f"vision_encoder.transformer.resblocks.{n}.attn.in_proj_{kind}"]
            for k, name in enumerate(("q_proj", "k_proj", "v_proj")):
                part = fused[k * VISION : (k + 1) * VISION]
                state[f"layers.{n}.self_attn.{name}.{kind}"] = part if name == "v_proj" else half_split(part)
    for k in (1, 2):
        for kind in ("weight", "bias"):
            state[f"downsampler{k}.{kind}"] = given[f"projector.vit_downsampler{k}.{kind}"]
    missing, unexpected = tower.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return tower.eval()


def their_projector(vlm: VisionLanguageModel, bias: bool) -> nn.Linear:
    linear, given = nn.Linear(4 * VISION, TEXT, bias=bias), vlm.state_dict()
    linear.load_state_dict({name: given[f"projector.vit_large_projector.{name}"] for name in linear.state_dict()})
    return linear


def their_decoder(vlm: VisionLanguageModel, tied: bool) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=TEXT,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
    )
    decoder = Qwen3ForCausalLM(config)
    given = {name.removeprefix("decoder."): x for name, x in vlm.state_dict().items() if name.startswith("decoder.")}
    missing, unexpected = decoder.load_state_dict(given, strict=False)
    assert not missing and not unexpected
    return decoder.eval()


def written_out(tokenizer) -> list[int]:
    """96x96 pixels are two rows of two 48 px crops of 9 tokens each, and a global view of 16."""
    patch, newline = tokenizer.token_id("<im_patch>"), tokenizer.token_id("<patch_newline>")
    crop = [tokenizer.token_id("<patch_start>"), *[patch] * 9, tokenizer.token_id("<patch_end>")]
    image = [*crop, *crop, newline, *crop, *crop]
    image += [tokenizer.token_id("<im_start>"), *[patch] * 16, tokenizer.token_id("<im_end>")]
    turn, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    line = tokenizer.text("\n")
    start = [turn, *tokenizer.text("user"), *line]
    return [*start, *image, *tokenizer.text(QUESTION), end, *line, turn, *tokenizer.text("assistant"), *line]


@pytest.mark.parametrize(("bias", "tied"), [(False, False), (True, True)])
def test_logits_equal_transformers_parts(bias: bool, tied: bool) -> None:
    vlm = ours(bias, tied)
    processor = Processor(template="chat")
    processor.bind(vlm.image_spec, vlm.projector.grid)
    vlm.bind(processor.image_token_id)
    image = photo(96, 96)
    example = processor.encode_prompt(
        Prompt(messages=[Message(role="user", content=f"<image>{QUESTION}")], images=[image])
    )
    ids = torch.tensor([written_out(processor.tokenizer)])  # [1,T]
    assert torch.equal(example.input_ids[None], ids)
    batch = Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE_INDEX),
        loss_weights=torch.zeros(ids.shape),
        position_ids=torch.arange(ids.shape[1])[None],
        images=Grids.stack(example.views),
        sample_ids=["s"],
        num_visual_tokens=[4 * 9 + 16],
    )
    tower, projector, decoder = their_tower(vlm), their_projector(vlm, bias), their_decoder(vlm, tied)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in vlm.image_spec[1:3])
    seen = views(image, ImageSpec(PATCH, *vlm.image_spec[1:3], LAYOUT))
    *crops, whole = ((view / 255 - mean) / std for view in seen)
    with torch.no_grad():
        found = vlm.decoder.lm_head(vlm(batch))  # [1,T,V]
        crop_tokens = projector(tower(torch.stack(crops)).last_hidden_state)  # [4,9,E]
        whole_tokens = projector(tower(whole[None]).last_hidden_state)  # [1,16,E]
        embeds = decoder.get_input_embeddings()(ids)
        embeds[ids == processor.image_token_id] = torch.cat([crop_tokens.flatten(0, 1), whole_tokens.flatten(0, 1)])
        expected = decoder(inputs_embeds=embeds).logits
        embeds[ids == processor.image_token_id] = 0.0
        blind = decoder(inputs_embeds=embeds).logits
    assert expected.std() > 0.1
    assert (expected - blind)[0, -1].abs().max() > 0.01, "the image must matter at the last position"
    assert (found - expected).abs().max() < 1e-4
