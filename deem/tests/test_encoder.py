"""Trunks behind one interface, positions, masks, the resampler, ViT-Adapter, and views of a picture."""

import json
import random

from lab.runs import UserError

import numpy as np
import open_clip
import pytest
import torch
from conftest import make
from PIL import Image
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vision import encoder
from vision.encoder import Encoder, make_trunk
from vision.grids import binary_mask, resized, sincos_2d
from vision.resampler import Resampler
from vision.views import centre_crop, two_views


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Two small models that open_clip knows by name: a ConvNeXt and a ViT."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vision = {
        "tiny-convnext": {"timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_pool": "",
                          "timm_proj": "linear", "image_size": 64},
        "tiny-vit": {"image_size": 56, "layers": 4, "width": 32, "head_width": 16, "patch_size": 14},
    }  # fmt: skip
    for name, config in vision.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": config, "text_cfg": text}))
    open_clip.add_model_config(folder)
    return folder


@pytest.mark.parametrize(
    "name, strides",
    [
        ("conv:8,16,24", (2, 4, 8)), ("timm:test_convnext", (4, 8, 16, 32)), ("timm:test_resnet", (4, 8, 16, 32)),
        ("open_clip:tiny-convnext", (4, 8, 16, 32)), ("open_clip:tiny-vit", (4, 8, 16, 32)), ("plain:tiny-vit", (14,)),
    ],
)  # fmt: skip
def test_trunks(name, strides, tiny_clip):
    torch.manual_seed(0)
    side = 56 if strides == (14,) else 64
    trunk = make_trunk(name)
    assert trunk.strides == strides
    e = Encoder(trunk, 16, token_level=min(2, len(strides) - 1), grid=4)
    f = e(torch.rand(2, 3, side, side))
    assert [m.shape for m in f.maps] == [(2, 16, side // s, side // s) for s in strides]
    n = (side // strides[e.token_level]) ** 2
    assert f.tokens.shape == (2, 1 + n, 16)
    f.tokens.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trunk.parameters())


def test_drop_path_reaches_the_trunk(tiny_clip):
    for name in ("open_clip:tiny-convnext", "timm:test_convnext"):
        torch.manual_seed(0)
        trunk = make_trunk(name, drop_path=0.5).train()
        x = torch.rand(4, 3, 64, 64)
        assert not torch.equal(trunk(x)[1], trunk(x)[1])
        assert torch.equal(trunk.eval()(x)[1], trunk(x)[1])


@pytest.mark.parametrize(
    "name, weights, word",
    [
        ("conv:a,b", "random", "widths"), ("clip:x", "random", "unknown"), ("timm:nosuch", "random", "timm knows"),
        ("open_clip:nosuch", "random", "open_clip knows"), ("timm:test_vit", "random", "four scales"),
        ("open_clip:ViT-B-32", "openai", "--download"), ("plain:tiny-convnext", "random", "no ViT"),
    ],
)  # fmt: skip
def test_user_errors(name, weights, word, tiny_clip, tmp_path):
    with pytest.raises(UserError, match=word):
        make_trunk(name, weights, tmp_path)


def test_weights_from_a_file(tiny_clip, tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-convnext")
    folder = tmp_path / "tiny-convnext"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    got = make_trunk("open_clip:tiny-convnext", "some_tag", tmp_path)
    want = model.visual.trunk.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in got.network.state_dict().items())
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"broken")
    with pytest.raises(UserError, match="could not be loaded"):
        make_trunk("open_clip:tiny-convnext", "some_tag", tmp_path)


def test_positions():
    table = sincos_2d(8, 4)
    assert table.shape == (16, 8) and torch.equal(resized(table, 4, 4), table)
    # place (row 2, column 1): the first half of the width tells the column
    assert torch.allclose(table[2 * 4 + 1, 0], torch.tensor(1.0).sin()) and torch.allclose(
        table[9, 4], torch.tensor(2.0).sin()
    )
    assert resized(table, 7, 7).shape == (49, 8)


def test_global_token_has_no_position_and_no_mask():
    torch.manual_seed(0)
    e = Encoder(make_trunk("conv:8,8,8"), 16, token_level=1, grid=4)
    x, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 16, 16)
    none, whole = e(x, mask), e(x)
    assert torch.equal(none.tokens[:, 0], whole.tokens[:, 0])
    maps, pooled = e.trunk((x - e.mean) / e.std)
    first = e.post_norm(e.pos_norm(e.pos_proj(e.global_proj(pooled))))
    flat = e.adapters[1](maps[1].permute(0, 2, 3, 1)).flatten(1, 2)
    others = e.post_norm(e.pos_norm(e.pos_proj(flat)) + resized(e.positions, 4, 4))
    assert torch.allclose(whole.tokens, torch.cat([first[:, None], others], 1), atol=1e-5)
    assert torch.allclose(none.tokens[:, 1:], e.post_norm.bias.expand_as(none.tokens[:, 1:]))
    assert torch.equal(e(x, torch.ones(1, 16, 16)).tokens, whole.tokens)
    half = mask.clone()
    half[:, :8] = 1
    kept = e(x, half).tokens[0, 1:]
    assert torch.equal(kept[:8], whole.tokens[0, 1:9]) and torch.equal(kept[12:], none.tokens[0, 13:])


def test_masks_are_binarised_above_zero():
    m = torch.zeros(1, 8, 8)
    m[0, 0, 0] = 0.01
    small = binary_mask(m, (8, 8))
    assert small.sum() == 1 and small.max() == 1


def test_region_tokens():
    torch.manual_seed(0)
    e = Encoder(make_trunk("timm:test_convnext"), 16, token_level=2, grid=4, regions=True)
    x, m = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64)
    m[:, :32, :32] = 1
    assert e(x, m).tokens.shape == (2, 5 + 1 + 16, 16)
    raw, _ = e.trunk((x - e.mean) / e.std)
    f = e.adapters[0](raw[0].permute(0, 2, 3, 1)) + resized(e.positions, 16, 16).view(16, 16, -1)
    assert torch.allclose(e(x, m).tokens[:, 0], e.region_proj(f[:, :8, :8].mean((1, 2))), atol=1e-5)
    assert torch.isfinite(e(x, torch.zeros(2, 64, 64)).tokens).all()
    shape = torch.nn.functional.interpolate(m[:, None], (112, 112), mode="bilinear", align_corners=False).flatten(1)
    a, b, c = (layer for layer in e.mask_mlp if isinstance(layer, torch.nn.Linear))
    token = c(b(a(shape).clamp(min=0)).clamp(min=0))  # three layers, ReLU between them
    assert torch.allclose(e(x, m).tokens[:, 4], token, atol=1e-5) and token.min() < 0


def test_resampler_is_blip2s_without_qk_norm():
    """The same weights in transformers' Q-Former give the same output."""
    torch.manual_seed(0)
    r = Resampler(5, 24, 4, 3, 16, dropout=0.0, qk_norm=False).eval()
    c = Blip2QFormerConfig(hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96,
                           encoder_hidden_size=16, cross_attention_frequency=2)  # fmt: skip
    q = Blip2QFormerModel(c).eval()
    q.layernorm.load_state_dict(r.norm.state_dict())
    for ours, theirs in zip(r.layers, q.encoder.layer, strict=True):
        for a, b in ((ours.attention, theirs.attention), (ours.cross, getattr(theirs, "crossattention", None))):
            if a is None:
                continue
            for name in ("query", "key", "value"):
                getattr(b.attention, name).load_state_dict(getattr(a, name).state_dict())
            b.output.dense.load_state_dict(a.out.state_dict())
            b.output.LayerNorm.load_state_dict(a.norm.state_dict())
        theirs.intermediate_query.dense.load_state_dict(ours.inner.state_dict())
        theirs.output_query.dense.load_state_dict(ours.out.state_dict())
        theirs.output_query.LayerNorm.load_state_dict(ours.norm.state_dict())
    memory = torch.randn(2, 7, 16)
    want = q(query_embeds=r.queries, encoder_hidden_states=memory).last_hidden_state
    assert torch.allclose(r(memory), want, atol=1e-5)


def test_attention_with_norms_on_queries_and_keys_by_hand():
    """One head and query at a time: softmax(LN(W_q x) . LN(W_k m) / sqrt(d)) W_v m; masked memory has no share."""
    torch.manual_seed(0)
    a = Resampler(3, 8, 1, 2, 6, dropout=0.0).layers[0].cross.double()
    for p in a.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    keep = torch.tensor([[True] * 5, [True, False, True, False, False]])

    def norm(v, layer):
        return (v - v.mean()) / (v.var(unbiased=False) + 1e-12).sqrt() * layer.weight + layer.bias

    want = torch.zeros_like(x)
    for i in range(2):
        q, k, v = a.query(x[i]), a.key(memory[i]), a.value(memory[i])
        for h in (slice(0, 4), slice(4, 8)):
            for j in range(3):
                some = [m for m in range(5) if keep[i, m]]
                scores = torch.stack([norm(q[j, h], a.q_norm) @ norm(k[m, h], a.k_norm) / 2 for m in some]).softmax(0)
                want[i, j, h] = sum(s * v[m, h] for s, m in zip(scores, some, strict=True))
    assert torch.allclose(a(x, memory, keep[:, None, None]), a.norm(x + a.out(want)), atol=1e-8)
    model, _ = make("digits")
    assert all(isinstance(m.q_norm, torch.nn.LayerNorm) for m in (model.resampler.layers[0].attention,
               model.resampler.layers[0].cross, model.context_reader.layers[0].cross))  # fmt: skip


def test_resampler_masks_memory_and_shows_attention():
    torch.manual_seed(0)
    r = Resampler(3, 16, 2, 2, 8).eval()
    memory, keep = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    keep[:, 4:] = False
    a = r(memory, keep)
    memory[:, 4:] = 9
    assert torch.equal(a, r(memory, keep))
    w = r.attention(memory)
    assert w.shape == (2, 3, 6) and torch.allclose(w.sum(2), torch.ones(2, 3))
    r.checkpointing = True
    r.train()
    for layer in r.layers:
        layer.dropout = layer.attention.dropout = 0.0
        if layer.cross:
            layer.cross.dropout = 0.0
    r.dropout = 0.0
    assert torch.allclose(r(memory, keep), a, atol=1e-6)


def test_dropout_of_the_queries_is_drawn_for_each_sample():
    torch.manual_seed(0)
    r = Resampler(3, 16, 0, 2, 8, dropout=0.5).train()
    a, b = r(torch.randn(2, 6, 8))
    assert not torch.equal(a == 0, b == 0)


def test_one_toss_for_both_views():
    """Trap 1: with `shared` the decoder's view is mirrored exactly when the encoder's is; `independent` is not."""
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB").resize((40, 40))
    left = {"shared": set(), "independent": set(), "none": set()}
    for flip, found in left.items():
        for i in range(40):
            a, b = two_views(ramp, (16, 32), crop=True, flip=flip, rng=random.Random(i))
            found.add((bool(a[0, 0, 0] < a[0, 0, -1]), bool(b[0, 0, 0] < b[0, 0, -1])))
    assert left["shared"] == {(True, True), (False, False)}
    assert left["independent"] == {(a, b) for a in (True, False) for b in (True, False)} and len(left["none"]) == 1


def test_views_crop_or_squeeze():
    wide = Image.new("RGB", (60, 20))
    wide.paste((255, 255, 255), (0, 0, 10, 20))
    a, b = two_views(wide, (8, 20), crop=True, flip="none", rng=random.Random(0))
    assert a.shape == (3, 8, 8) and b.shape == (3, 20, 20) and a.max() < 0.05
    a, _ = two_views(wide, (8, 20), crop=False, flip="none", rng=random.Random(0))
    assert a.max() > 0.9


def test_a_large_picture_is_halved_before_the_bicubic_step():
    """Means of 2 x 2 pixels, rows first, while the shorter side is twice the view or more; then one step."""
    rng = np.random.default_rng(0)
    for width, height, halvings in ((64, 64, 2), (96, 68, 2), (40, 30, 0), (50, 34, 1)):
        whole = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        small = whole.astype(np.float64)
        for _ in range(halvings):
            assert min(small.shape[:2]) >= 32
            small = np.floor((small[:, 0::2] + small[:, 1::2]) / 2 + 0.5)
            small = np.floor((small[0::2] + small[1::2]) / 2 + 0.5)
        assert min(small.shape[:2]) < 32
        step = Image.fromarray(small.astype(np.uint8))
        scale = 16 / min(step.size)
        if scale != 1:
            step = step.resize((round(step.width * scale), round(step.height * scale)), Image.Resampling.BICUBIC)
        left, top = (step.width - 16) // 2, (step.height - 16) // 2
        want = np.asarray(step)[top : top + 16, left : left + 16].astype(int)
        found = np.asarray(centre_crop(Image.fromarray(whole), 16)).astype(int)
        assert found.shape == (16, 16, 3) and np.abs(found - want).max() <= 1
        plain = Image.fromarray(whole).resize(
            (round(width * 16 / min(width, height)), round(height * 16 / min(width, height))), Image.Resampling.BICUBIC
        )
        off = np.abs(np.asarray(plain)[: want.shape[0], : want.shape[1]].astype(int) - want).max()
        assert not halvings or off > 3  # another picture than one bicubic step makes


def test_parameter_count_of_the_papers_trunk():
    """ConvNeXt-B of widths 128 to 1024 has 87.6 M parameters; no weights are made."""
    import timm

    with torch.device("meta"):
        trunk = encoder.TimmTrunk(timm.create_model("convnext_base.clip_laiona_320", num_classes=0))
    assert trunk.widths == (128, 256, 512, 1024) and trunk.strides == (4, 8, 16, 32)
    assert 87e6 < sum(p.numel() for p in trunk.parameters()) < 88e6


def test_deformable_attention_of_the_adapter_by_hand():
    """One query, head, level and point at a time; offsets count cells of their level; one softmax over all."""
    from test_mmfs import bilinear

    from vision.vit_adapter import Deformable, Injector

    torch.manual_seed(0)
    m = Deformable(8, 2, heads=2, points=3)
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    query, ref, maps = torch.randn(2, 3, 8), torch.rand(3, 2), [torch.randn(2, 8, s, s) for s in (4, 2)]
    want = torch.zeros(2, 3, 4)
    for i in range(2):
        for q in range(3):
            moved = m.offsets(query[i, q]).view(2, 2, 3, 2)
            shares = m.weights(query[i, q]).view(2, 6).softmax(1).view(2, 2, 3)
            for level, f in enumerate(maps):
                value = torch.einsum("oc,chw->ohw", m.value.weight, f[i]) + m.value.bias[:, None, None]
                for h in range(2):
                    for k in range(3):
                        x, y = (ref[q] + moved[h, level, k] / f.shape[-1]).tolist()
                        want[i, q, 2 * h : 2 * h + 2] += shares[h, level, k] * bilinear(value[2 * h : 2 * h + 2], x, y)
    assert torch.allclose(m(query, ref, maps), m.out(want), atol=1e-4)
    injector, grid = Injector(8, 2), torch.rand(3, 2)
    assert torch.equal(injector(query, grid, [*maps, maps[1]]), query)  # begins with nothing
