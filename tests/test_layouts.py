"""Our parts are the published parts: names both ways, whole key lists, numbers equal to transformers' own classes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from step3vl.checkpoints import import_model, make_tiny, open_model
from step3vl.checkpoints.export import export_model
from step3vl.checkpoints.importing import KINDS
from step3vl.checkpoints.model import build
from step3vl.config import compose
from step3vl.data.collate import collate
from step3vl.data.images import plan
from step3vl.models import VisionLanguageModel
from step3vl.types import Message, Prompt
from step3vl.weights import LAYOUTS, Entry, detect, layout_named, load_into, open_source

IGNORE = {
    "qwen3_vl": ["^model.visual"],
    "siglip2": ["^text_model", "^logit_", "^vision_model.head"],
    "siglip2_naflex": ["^text_model", "^logit_", "^vision_model.head"],
}
FOUND = {"siglip2": "siglip_full", "siglip2_naflex": "siglip2_full"}
ARCHITECTURES = ("step3vl", "pe", "dinov3", "siglip2", "siglip2_naflex", "qwen3", "qwen3_vl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """arch -> (published folder, the same imported)."""
    root, out = tmp_path_factory.mktemp("tiny"), {}
    for arch in ARCHITECTURES:
        make_tiny(arch, root / arch, seed=3)
        import_model(root / arch, root / f"ours_{arch}", IGNORE.get(arch, ()))
        out[arch] = (root / arch, root / f"ours_{arch}")
    return out


def paper_model():
    with torch.device("meta"):
        return build(compose(["vlm/step3vl_10b.yaml"]).config, VisionLanguageModel)


def part(folder, name):
    """A part built from an imported folder's card and filled from its tensors."""
    module = build(compose([folder / f"{name}.yaml"]).config, KINDS[name])
    load_into(nn.ModuleDict({name: module}), open_source(folder), part=name)
    return module.eval()


# ------------------------------------------------------------------------------------------------ names


def reference_keys():
    """Every name and shape of STEP3-VL-10B, from the structure as documented; nothing of ours is asked."""
    shapes = {"lm_head.weight": (151936, 4096), "model.embed_tokens.weight": (151936, 4096)}
    shapes |= {"model.norm.weight": (4096,)}
    for i in range(36):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (4096,),
            f"model.layers.{i}.post_attention_layernorm.weight": (4096,),
            f"model.layers.{i}.self_attn.q_proj.weight": (32 * 128, 4096),
            f"model.layers.{i}.self_attn.k_proj.weight": (8 * 128, 4096),
            f"model.layers.{i}.self_attn.v_proj.weight": (8 * 128, 4096),
            f"model.layers.{i}.self_attn.o_proj.weight": (4096, 32 * 128),
            f"model.layers.{i}.self_attn.q_norm.weight": (128,),
            f"model.layers.{i}.self_attn.k_norm.weight": (128,),
            f"model.layers.{i}.mlp.gate_proj.weight": (12288, 4096),
            f"model.layers.{i}.mlp.up_proj.weight": (12288, 4096),
            f"model.layers.{i}.mlp.down_proj.weight": (4096, 12288),
        }
    vision = {
        "conv1.weight": (1536, 3, 14, 14),
        "positional_embedding": (52 * 52, 1536),
        "ln_pre.weight": (1536,),
        "ln_pre.bias": (1536,),
        "vit_downsampler1.weight": (3072, 1536, 3, 3),
        "vit_downsampler1.bias": (3072,),
        "vit_downsampler2.weight": (6144, 3072, 3, 3),
        "vit_downsampler2.bias": (6144,),
    }
    for i in range(47):
        block = f"transformer.resblocks.{i}"
        vision |= {f"{block}.ls_1.gamma": (1536,), f"{block}.ls_2.gamma": (1536,)}
        vision |= {f"{block}.attn.in_proj_weight": (4608, 1536), f"{block}.attn.in_proj_bias": (4608,)}
        vision |= {f"{block}.attn.out_proj.weight": (1536, 1536), f"{block}.attn.out_proj.bias": (1536,)}
        vision |= {f"{block}.mlp.c_fc.weight": (8960, 1536), f"{block}.mlp.c_fc.bias": (8960,)}
        vision |= {f"{block}.mlp.c_proj.weight": (1536, 8960), f"{block}.mlp.c_proj.bias": (1536,)}
        for norm in ("ln_1", "ln_2"):
            vision |= {f"{block}.{norm}.weight": (1536,), f"{block}.{norm}.bias": (1536,)}
    shapes |= {f"vision_model.{name}": shape for name, shape in vision.items()}
    return shapes | {"vit_large_projector.weight": (4096, 6144)}


def test_step3vl_10b_has_every_released_name_and_shape():
    layout, state = layout_named("step3vl"), paper_model().state_dict()
    ours = {layout.to_theirs(name): tuple(tensor.shape) for name, tensor in state.items()}
    assert ours == reference_keys() and len(ours) == len(state) == 1066
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == 10_171_750_144
    assert [layout.to_ours(name) for name in ours] == list(state)


def test_the_releases_own_key_mapping_leads_to_the_same_places():
    mapping = {  # from the released README, for transformers 4.57
        "^vision_model": "model.vision_model",
        r"^model(?!\.(language_model|vision_model))": "model.language_model",
        "vit_large_projector": "model.vit_large_projector",
    }
    entries, ours = {}, {}
    for name, shape in reference_keys().items():
        renamed = name
        for pattern, target in mapping.items():
            renamed, times = re.subn(pattern, target, renamed)
            if times:
                break
        entries[renamed] = Entry(shape, torch.bfloat16)
        ours[renamed] = layout_named("step3vl").to_ours(name)
    layout = detect(entries)
    assert layout.name == "step3vl_transformers"
    assert {name: layout.to_ours(name) for name in entries} == ours


def test_layouts_are_one_to_one():
    names = list(paper_model().state_dict())
    text = [name for name in names if name.startswith("decoder.")]
    tower = [name for name in names if name.startswith("vision_encoder.")]
    inner = ("model.layer.3.norm1.weight", "embeddings.x", "encoder.y", "norm")
    model = {f"vision_encoder.model.{name}" for name in inner}
    for layout in LAYOUTS:
        some = names if len(layout.parts) == 3 else text if layout.parts == ("decoder",) else [*tower, *model]
        if layout.name.startswith(("dinov3", "siglip")):
            some = sorted(model)
        theirs = [layout.to_theirs(name) for name in some]
        assert None not in theirs and len(set(theirs)) == len(some), layout.name
        assert [layout.to_ours(name) for name in theirs] == some, layout.name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_round_trip_is_bitwise(arch, folders):
    published, imported = (open_source(folder) for folder in folders[arch])
    layout = detect(published.keys())
    assert layout.name == FOUND.get(arch, arch)
    assert detect(imported.keys()).name == "ours"
    kept = [name for name in list(published.keys()) if not any(re.search(p, name) for p in IGNORE.get(arch, ()))]
    assert {layout.to_theirs(name) for name in list(imported.keys())} == set(kept) and len(kept) > 20
    for name in kept:
        one, two = published.read(name), imported.read(layout.to_ours(name))
        assert one.dtype == two.dtype and torch.equal(one, two), name


def test_a_whole_model_comes_back_as_it_was(folders, tmp_path):
    published, imported = folders["step3vl"]
    export_model(imported, tmp_path / "again", max_shard_bytes=1_000_000)
    for file in published.iterdir():
        if file.name != "README.md":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("arch", ["qwen3", "qwen3_vl"])
@torch.no_grad()
def test_decoder_gives_transformers_logits(arch, folders):
    from transformers import Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

    published, imported = folders[arch]
    cls = {"qwen3": Qwen3ForCausalLM, "qwen3_vl": Qwen3VLForConditionalGeneration}[arch]
    reference = cls.from_pretrained(published, dtype=torch.float32).eval()
    decoder = part(imported, "decoder")
    ids = torch.randint(1024, (2, 19), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(19).expand(2, -1)
    given = decoder.lm_head(decoder(decoder.embed(ids), positions))
    expected = reference(input_ids=ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_dinov3_gives_transformers_features(folders):
    from transformers import DINOv3ViTModel

    published, imported = folders["dinov3"]
    pixels = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    expected = DINOv3ViTModel.from_pretrained(published).eval()(pixels).last_hidden_state[:, 5:]
    given, _ = part(imported, "vision_encoder").encode(pixels, ())
    torch.testing.assert_close(given.flatten(1, 2), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_siglip2_gives_transformers_features(folders):
    from transformers import Siglip2Model, SiglipModel

    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    published, imported = folders["siglip2"]
    expected = SiglipModel.from_pretrained(published).eval().vision_model(pixels).last_hidden_state
    given, _ = part(imported, "vision_encoder").encode(pixels, ())
    torch.testing.assert_close(given.flatten(1, 2), expected, atol=1e-4, rtol=0)

    published, imported = folders["siglip2_naflex"]
    pixels = pixels[..., :48]  # 4 x 3 patches of 16 pixels
    patches = pixels.unfold(2, 16, 16).unfold(3, 16, 16)  # [2,3,4,3,16,16]
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(2, 12, 768)
    shapes = torch.tensor([[4, 3], [4, 3]])
    tower = Siglip2Model.from_pretrained(published).eval().vision_model
    expected = tower(patches, torch.ones(2, 12, dtype=torch.long), shapes).last_hidden_state
    given, _ = part(imported, "vision_encoder").encode(pixels, ())
    torch.testing.assert_close(given.flatten(1, 2), expected, atol=1e-4, rtol=0)


def tower_of_transformers(folder, tmp_path, hidden_act, patch_size, grid, heads):
    """transformers' port of STEP's tower, filled from published names by the mapping that its authors document."""
    from transformers import Step3p7VisionConfig, Step3p7VisionModel

    vision = {k.removeprefix("vision_model."): v for k, v in folder.items() if k.startswith("vision_model.")}
    width, mlp = vision["conv1.weight"].shape[0], vision["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    layers = 1 + max(int(name.split(".")[2]) for name in vision if name.startswith("transformer."))
    sizes = dict(width=width, layers=layers, heads=heads, mlp_ratio=mlp / width, image_size=grid * patch_size)
    config = Step3p7VisionConfig(
        **sizes, patch_size=patch_size, hidden_act=hidden_act, max_position_embeddings=grid * grid
    )
    state = {}
    names = {"conv1.weight": "embeddings.patch_embedding.weight", "ln_pre.": "pre_layernorm.", ".attn.": ".self_attn."}
    names |= {"positional_embedding": "embeddings.position_embedding.weight", "transformer.resblocks.": "layers."}
    names |= {"vit_downsampler": "downsampler", ".ls_1.gamma": ".lambda_1", ".ls_2.gamma": ".lambda_2"}
    names |= {".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2."}
    names |= {".ln_1.": ".layernorm_before.", ".ln_2.": ".layernorm_after."}
    for name, tensor in vision.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "in_proj_" not in name:
            state[name] = tensor.float()
            continue
        for letter, third in zip("qkv", tensor.float().chunk(3)):
            if letter != "v":  # adjacent channel pairs become two halves
                third = third.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            state[name.replace("in_proj_", f"{letter}_proj.")] = third
    tower = Step3p7VisionModel(config)
    tower.load_state_dict(state)
    return tower.eval()


@torch.no_grad()
def test_whole_forward_equals_a_reference_of_transformers_parts(folders, tmp_path):
    """Crops, newline tokens, projector and decoder, against Step3p7VisionModel + Linear + Qwen3ForCausalLM."""
    from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

    published, _ = folders["step3vl"]
    tensors = {k: v for file in sorted(published.glob("*.safetensors")) for k, v in load_file(file).items()}
    config = AutoConfig.from_pretrained(published, trust_remote_code=True)
    tower = tower_of_transformers(tensors, tmp_path, config.vision_config.hidden_act, patch_size=4, grid=16, heads=2)
    text = Qwen3ForCausalLM(config.text_config).eval()
    names = ("model.", "lm_head.")
    text.load_state_dict({k: v.float() for k, v in tensors.items() if k.startswith(names)})

    vlm, processor = open_model(published)
    pixels = np.random.default_rng(0).integers(0, 256, (110, 150, 3), dtype=np.uint8)
    image, question = Image.fromarray(pixels), "How many squares are there?"
    prompt = Prompt(messages=[Message(role="user", content=f"<image>{question}")], images=[image])
    example = processor.encode_prompt(prompt)
    columns, rows = plan(*image.size, processor.spec.layout).grid
    assert columns > 1 and rows > 1

    crop = "<patch_start>" + "<im_patch>" * 9 + "<patch_end>"
    view = "<patch_newline>".join([crop * columns] * rows) + "<im_start>" + "<im_patch>" * 16 + "<im_end>"
    tokenizer = AutoTokenizer.from_pretrained(published, trust_remote_code=True)
    chat = f"<|im_start|>user\n{view}{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat, return_tensors="pt").input_ids
    assert torch.equal(ids[0], example.input_ids)
    assert tokenizer.convert_tokens_to_ids("<im_patch>") == config.image_token_id

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in processor.spec[1:3])
    unit = [(view / 255 - mean) / std for view in example.views]  # what the released preprocessing hands over
    visual = torch.cat([tower(view[None]).last_hidden_state[0] for view in unit])
    embeds = text.get_input_embeddings()(ids)
    embeds[ids == config.image_token_id] = visual @ tensors["vit_large_projector.weight"].float().T
    expected = text(inputs_embeds=embeds).logits

    vlm.eval()
    batch = collate([example], seq_len=len(example.input_ids), pad_id=processor.pad_id)
    given = vlm.decoder.lm_head(vlm(batch))[:, : ids.shape[1]]
    assert expected.std() > 0.1
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_metas_tower_computes_with_exact_gelu(folders, tmp_path):
    published, imported = folders["pe"]
    state = torch.load(published / "PE-Lang-tiny.pt", weights_only=True)
    width = state["conv1.weight"].shape[0]
    extra = {f"vit_downsampler{i}.weight": torch.zeros(2 * i * width, i * width, 3, 3) for i in (1, 2)}
    extra |= {f"vit_downsampler{i}.bias": torch.zeros(2 * i * width) for i in (1, 2)}
    folder = {f"vision_model.{name}": tensor for name, tensor in (state | extra).items()}
    tower = tower_of_transformers(folder, tmp_path, "gelu", patch_size=14, grid=4, heads=16)
    pixels = torch.randn(1, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    expected = tower(pixels, output_hidden_states=True).hidden_states[-1]
    given, _ = part(imported, "vision_encoder").encode(pixels, ())
    torch.testing.assert_close(given.flatten(1, 2), expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ refusals


def test_a_config_that_does_not_fit_its_tensors_is_refused(folders, tmp_path):
    import json
    import shutil

    def changed(arch, **changes):
        folder = tmp_path / f"{arch}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folders[arch][0], folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def sentence(folder, *words, ignore=()):
        with pytest.raises(ValueError) as error:
            import_model(folder, tmp_path / "out", ignore)
        assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value
        assert not list(tmp_path.glob("out*"))

    sentence(changed("qwen3", hidden_size=96), "decoder.model.embed_tokens.weight: [1024, 64] there, [1024, 96] here")
    sentence(changed("qwen3", tie_word_embeddings=False), "decoder.lm_head.weight", "tie_embeddings: true")
    sentence(changed("qwen3", rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'yarn' is not supported")
    sentence(changed("dinov3", rope_theta=50.0), "rope_theta is 50.0")
    sentence(changed("step3vl", understand_projector_stride=1), "understand_projector_stride is 1")
    sentence(folders["qwen3_vl"][0], "39 keys are unexpected", "model.visual")
    (changed("dinov3") / "config.json").unlink()
    bare = max(tmp_path.glob("dinov3-*"), key=lambda folder: folder.name)
    sentence(bare, "needs its config.json")
    save_file({"gpt.wte": torch.ones(2)}, tmp_path / "gpt.safetensors")
    sentence(tmp_path / "gpt.safetensors", "no known layout", "gpt.wte")
