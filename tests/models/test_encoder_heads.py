"""Parts that encoders are pre-trained with and that are then thrown away: pooling, the text tower, prototypes."""

import pytest
import torch
import torch.nn.functional as F

from step3vl.models.pooling import AttentionPool, MeanPool, pooled_cells
from step3vl.models.prototypes import PrototypeHead
from step3vl.models.text_tower import TextTower
from step3vl.models.vision import DINOv3


def tower(**more):
    torch.manual_seed(0)
    return TextTower(16, 2, 2, 40, 12, 8, **more)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_changes_nothing(is_causal, pooling):
    model = tower(is_causal=is_causal, pooling=pooling)
    ids = torch.randint(40, (3, 7))
    alone = model(ids[:1, :4], torch.ones(1, 4, dtype=torch.bool))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 4:] = False
    found = model(ids, mask)
    assert found.shape == (3, 8)
    torch.testing.assert_close(found[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_causal_tower_does_not_look_ahead():
    ids, mask = torch.randint(40, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 40
    for is_causal in (True, False):
        model = tower(is_causal=is_causal)
        seen = []
        model.norm.register_forward_hook(lambda module, given, x, seen=seen: seen.append(x))
        model(ids, mask), model(other, mask)
        same = torch.allclose(seen[0][:, :-1], seen[1][:, :-1], atol=1e-6)
        assert same == is_causal


def test_long_captions_and_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"13 tokens is longer than text_tower.max_tokens, 12"):
        tower()(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match="accepted are last and mean"):
        tower(pooling="first")
    with pytest.raises(ValueError, match="not a multiple"):
        TextTower(10, 1, 3, 40, 12, 8)
    with pytest.raises(ValueError, match="not a multiple"):
        AttentionPool(10, 4, num_heads=3)
    with pytest.raises(ValueError, match="num_layers of at least 1"):
        PrototypeHead(4, 4, 4, 4, num_layers=0)


def test_attention_pool_is_torchs_attention():
    torch.manual_seed(0)
    pool = AttentionPool(16, 6, num_heads=4, num_queries=3)
    features = torch.randn(2, 3, 5, 16)
    wanted = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        wanted.in_proj_weight.copy_(torch.cat([pool.query.weight, pool.key_value.weight]))
        wanted.in_proj_bias.copy_(torch.cat([pool.query.bias, pool.key_value.bias]))
        wanted.out_proj.load_state_dict(pool.out.state_dict())
    x = pool.norm_in(features.flatten(1, 2))
    y, _ = wanted(pool.query_token.expand(2, -1, -1), x, x)
    y = y + pool.mlp(pool.norm(y))
    torch.testing.assert_close(pool(features), pool.proj(y.flatten(1)), rtol=1e-4, atol=1e-5)
    assert pool.flops(15) > 2 * 15 * 16 * 32


def test_mean_pool_and_cells():
    features = torch.arange(2 * 4 * 4 * 3, dtype=torch.float32).view(2, 4, 4, 3)
    cells = pooled_cells(features, 2)
    torch.testing.assert_close(cells[1, 0, 1], features[1, :2, 2:].mean((0, 1)))
    pool = MeanPool(3, 5)
    torch.testing.assert_close(pool(features), pool.proj(pool.norm(features.mean((1, 2)))))


def test_prototypes_are_compared_by_angle():
    torch.manual_seed(0)
    head = PrototypeHead(8, 16, 6, 10)
    x = torch.randn(4, 8)
    found = head(x)
    torch.testing.assert_close(found, F.normalize(head.mlp(x), dim=-1) @ F.normalize(head.prototype_embedding).T)
    with torch.no_grad():
        head.prototype_embedding.mul_(7)
    torch.testing.assert_close(head(x), found)


def test_dinov3_tokens_are_its_features_and_masks_hide():
    torch.manual_seed(0)
    encoder = DINOv3(16, 2, 2, 32, patch_size=4, num_registers=2)
    encoder.init_weights()
    with torch.no_grad():
        encoder.model.embeddings.mask_token.normal_()
    pixels = torch.randn(3, 3, 16, 16)
    classes, patches = encoder.tokens(pixels)
    assert classes.shape == (3, 16)
    torch.testing.assert_close(patches.unflatten(1, (4, 4)), encoder.encode(pixels, ())[0])
    masked = torch.zeros(3, 16, dtype=torch.bool)
    masked[:, 5] = True
    changed = pixels.clone()
    changed[:, :, 4:8, 4:8] = 9.0  # patch 5
    hidden = encoder.tokens(pixels, masked)
    torch.testing.assert_close(encoder.tokens(changed, masked), hidden)
    assert not torch.allclose(hidden[0], classes)
    assert not torch.allclose(encoder.tokens(changed)[0], classes)
