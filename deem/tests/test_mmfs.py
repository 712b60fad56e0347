"""MMFS against a reference written in loops; its invariants; the gate; the net beside the U-Net."""

import math

import pytest
import torch
from conftest import batch_of, documents, make
from hypothesis import given, settings
from hypothesis import strategies as st

from vision import mmfs
from vision.mmfs import MMFS, GatedMMFS, ImageContext, distances


def bilinear(m, x, y):
    """Value of a map (C, H, W) at (x, y) in [0, 1], pixel centres at (i + 0.5) / size, zero outside."""
    c, h, w = m.shape
    px, py = x * w - 0.5, y * h - 0.5
    x0, y0 = math.floor(px), math.floor(py)
    out = torch.zeros(c, dtype=m.dtype)
    for xi in (x0, x0 + 1):
        for yi in (y0, y0 + 1):
            if 0 <= xi < w and 0 <= yi < h:
                out += (1 - abs(px - xi)) * (1 - abs(py - yi)) * m[:, yi, xi]
    return out


def reference(m: MMFS, query, ref, maps, mask):
    """The definition of dossier and docstring, one query, image, head, level and point at a time."""
    b, nq, _ = query.shape
    n, levels, h, p = mask.shape[-1], m.levels, m.heads, m.points
    mask = mask[:, None].expand(b, nq, n) if mask.ndim == 2 else mask
    out = torch.zeros(b, nq, m.value.out_features, dtype=query.dtype)
    d = m.value.out_features // h
    for i in range(b):
        for q in range(nq):
            seen = [j for j in range(n) if mask[i, q, j]]
            offsets, logits = [], []
            for j in range(n):
                place = len(seen) - seen.index(j) if j in seen else 0
                x = m.mix(query[i, q]) + m.relpos.weight[place]
                offsets.append(m.offsets(x).view(h, p, 2))
                a = m.weights(x).view(h, levels, p + 1) + (0 if j in seen else -1e4)
                a[..., -1] = -math.log(n * levels)
                logits.append(a)
            for head in range(h):
                flat = torch.stack([a[head] for a in logits]).flatten().softmax(0).view(n, levels, p + 1)
                for j in range(n):
                    for level, mp in enumerate(maps):
                        value = torch.einsum("oc,chw->ohw", m.value.weight, mp[i, j]) + m.value.bias[:, None, None]
                        part = value[head * d : (head + 1) * d]
                        size = mp.shape[-1]
                        for k in range(p):
                            r = ref[q if len(ref) > 1 else 0]
                            # ratio size / base, then divided by the size of the level
                            at = r + offsets[j][head, k] * (size / m.base) / size
                            found = bilinear(part, at[0].item(), at[1].item())
                            out[i, q, head * d : (head + 1) * d] += flat[j, level, k] * found
    return m.out(out)


@pytest.mark.parametrize("shape", ["shared", "a row a query"])
def test_against_loops(shape):
    torch.manual_seed(1)
    m = MMFS(6, 5, levels=2, base=4, width=8, heads=2, points=3).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    query, ref = torch.randn(2, 3, 6, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    maps = [torch.randn(2, 3, 5, s, s, dtype=torch.float64) for s in (4, 2)]
    mask = torch.tensor([[True, False, True], [True, True, True]])
    if shape != "shared":
        mask = torch.rand(2, 3, 3) < 0.6
    got = m(query, ref, m.values(maps), mask)
    assert torch.allclose(got, reference(m, query, ref, maps, mask), atol=1e-5)


def test_gradients_match_differences():
    torch.manual_seed(0)
    m = MMFS(4, 4, levels=1, base=3, width=4, heads=2, points=2)
    torch.nn.init.normal_(m.offsets.weight, std=0.3)
    q, maps = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, 4, 3, 3, requires_grad=True)
    mask, ref = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), 0.5)
    f = lambda a, b: m(a, ref, m.values([b]), mask).sum()  # noqa: E731
    f(q, maps).backward()
    for x, other in ((q, lambda v: f(v, maps)), (maps, lambda v: f(q, v))):
        flat, g = x.detach().flatten(), x.grad.flatten()
        for i in range(0, len(flat), max(1, len(flat) // 6)):
            e = torch.zeros_like(flat)
            e[i] = 1e-2
            with torch.no_grad():
                slope = (other((flat + e).view_as(x)) - other((flat - e).view_as(x))) / 2e-2
            assert abs(slope.item() - g[i].item()) < 2e-2 * max(1.0, abs(g[i].item()))


def test_masked_images_change_nothing():
    """An image that may not be read is worth as much as any other that may not; only their number is in -log(N L)."""
    torch.manual_seed(0)
    m = MMFS(6, 5, levels=1, base=4, width=8, heads=2, points=3)
    q, ref = torch.randn(1, 2, 6), torch.full((1, 2), 0.5)
    maps = torch.randn(1, 3, 5, 4, 4)
    mask = torch.tensor([[True, False, True]])
    before = m(q, ref, m.values([maps]), mask)
    maps[:, 1] += 100
    assert torch.equal(before, m(q, ref, m.values([maps]), mask))
    maps[:, 2] += 1
    assert not torch.equal(before, m(q, ref, m.values([maps]), mask))


def test_nothing_to_read_gives_zero_before_the_output():
    m = MMFS(6, 5, levels=2, base=4, width=8, heads=2, points=3)
    maps = [torch.randn(1, 2, 5, s, s) for s in (4, 2)]
    found = m(torch.randn(1, 2, 6), torch.full((1, 2), 0.5), m.values(maps), torch.zeros(1, 2, dtype=torch.bool))
    assert torch.allclose(found, m.out.bias.expand_as(found), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_distances_count_back(mask):
    d = distances(torch.tensor(mask)).tolist()
    there = [v for v, m in zip(d, mask, strict=True) if m]
    assert there == list(range(len(there), 0, -1)) and all(v == 0 for v, m in zip(d, mask, strict=True) if not m)


def test_pieces_equal_the_whole(monkeypatch):
    torch.manual_seed(0)
    m = MMFS(6, 5, levels=2, base=4, width=8, heads=2, points=3)
    q, ref = torch.randn(2, 7, 6, requires_grad=True), torch.rand(7, 2)
    maps = [torch.randn(2, 2, 5, s, s) for s in (4, 2)]
    mask = torch.ones(2, 2, dtype=torch.bool)
    whole = m(q, ref, m.values(maps), mask)
    (g,) = torch.autograd.grad(whole.square().sum(), q)
    monkeypatch.setattr(mmfs, "LARGEST", 40)
    parts = m(q, ref, m.values(maps), mask)
    (h,) = torch.autograd.grad(parts.square().sum(), q)
    assert torch.allclose(whole, parts, atol=1e-6) and torch.allclose(g, h, atol=1e-5)


def test_more_images_than_positions_do_not_break():
    m = MMFS(4, 4, levels=1, base=2, width=4, heads=2, points=2, max_images=3)
    values = m.values([torch.randn(1, 5, 4, 2, 2)])
    out = m(torch.randn(1, 1, 4), torch.full((1, 2), 0.5), values, torch.ones(1, 5, dtype=torch.bool))
    assert torch.isfinite(out).all()


def test_initial_values():
    m = MMFS(16, 16, levels=2, base=16, width=16, heads=4, points=8, spread=3.0)
    assert m.offsets.weight.abs().max() == 0 and 2 < m.offsets.bias.abs().max() <= 3
    assert GatedMMFS(8, 8, levels=1, base=2, eps=1e-6, width=8, heads=2, points=2).gate.item() == 0


def test_closed_gate_changes_nothing():
    g = GatedMMFS(8, 8, levels=1, base=2, eps=1e-6, width=8, heads=2, points=2)
    c, h = ImageContext(), torch.randn(1, 3, 8)
    c.set([torch.randn(1, 2, 8, 4, 4)], torch.ones(1, 3, 2, dtype=torch.bool))
    assert torch.equal(g(h, c), h)
    g.gate.data += 1
    assert not torch.allclose(g(h, c), h)


def test_layers_every_fourth():
    model, _ = make("tiny")
    with_ = [i for i, layer in enumerate(model.llm.model.layers) if hasattr(layer, "synchroniser")]
    assert with_ == [0, 4]


def test_later_images_are_not_read():
    """A change of the second image must not move hidden states in front of it."""
    model, _ = make("digits")
    for g in model.gates():
        g.data += 1
    model.eval()
    two = next(d for d in documents(40) if sum(not hasattr(p, "text") for p in d) == 2)
    b = batch_of(model, [two])
    h = model.hidden(b, model.encode_images(b.images))
    b.images[1] = 1 - b.images[1]
    g = model.hidden(b, model.encode_images(b.images))
    second = int(b.soi[1])
    assert torch.equal(h[:, : second + 1], g[:, : second + 1]) and not torch.allclose(
        h[:, second + 1 :], g[:, second + 1 :]
    )


def test_the_gate_is_a_hyperbolic_tangent():
    torch.manual_seed(0)
    gated = mmfs.GatedMMFS(8, 6, levels=2, base=4, eps=1e-6, width=8, heads=2, points=2)
    maps = [torch.randn(1, 2, 6, s, s) for s in (4, 2)]
    h, context = torch.randn(1, 3, 8), mmfs.ImageContext()
    assert torch.equal(gated(h, context), h)  # nothing to read
    context.set(maps, torch.ones(1, 3, 2, dtype=torch.bool))
    assert torch.equal(gated(h, context), h)  # closed
    found = []
    for gate in (0.5, 3.0):
        gated.gate.data.fill_(gate)
        found.append((gated(h, context) - h) / math.tanh(gate))
    assert found[0].abs().max() > 1e-3 and torch.allclose(*found, atol=1e-5)


def test_gated_layer_by_hand():
    """h + tanh(g) MMFS(RMSNorm(h), RMSNorm(F)) at the image's centre."""
    torch.manual_seed(2)
    gated = GatedMMFS(6, 5, levels=2, base=4, eps=1e-6, width=8, heads=2, points=3).double()
    for p in gated.parameters():
        torch.nn.init.normal_(p, std=0.5)
    maps = [3 * torch.randn(2, 3, 5, s, s, dtype=torch.float64) for s in (4, 2)]
    h, visible = torch.randn(2, 4, 6, dtype=torch.float64), torch.rand(2, 4, 3) < 0.6
    context = ImageContext()
    context.set(maps, visible)

    def rms(x, norm, dim):
        shape = [-1 if k == dim else 1 for k in range(x.ndim)]
        return x / (x.pow(2).mean(dim, keepdim=True) + 1e-6).sqrt() * norm.weight.view(shape)

    centre = torch.full((1, 2), 0.5, dtype=torch.float64)
    normed = [rms(m, gated.value_norm, 2) for m in maps]
    found = reference(gated.mmfs, rms(h, gated.query_norm, 2), centre, normed, visible)
    assert torch.allclose(gated(h, context), h + gated.gate.tanh() * found, atol=1e-5)
    with torch.no_grad():
        whole = gated(h, context)
        last = gated(h[:, -1:], context)  # a step of generation, with the values kept
        copies = gated(h[:, -1:].repeat_interleave(2, 0), context)
    assert torch.allclose(last, whole[:, -1:]) and torch.allclose(copies, last.repeat_interleave(2, 0))
    assert list(context.values) == [gated]
    context.set([m + 1 for m in maps], visible)
    with torch.no_grad():
        assert not torch.allclose(gated(h, context), whole)


@pytest.mark.parametrize("side", [4, 2])
def test_block_beside_the_unet_by_hand(side):
    """Conv1x1(MMFS(LN(feature) + pos, LN(F))) at each pixel's centre."""
    torch.manual_seed(3)
    block = mmfs.MMFSBlock(8, 5, levels=2, size=side, table=4, width=8, heads=2, points=3, max_images=10)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    block = block.double()
    block.positions = block.positions.double()
    feature = torch.randn(2, 8, side, side, dtype=torch.float64)
    maps = [3 * torch.randn(2, 1, 5, s, s, dtype=torch.float64) for s in (4, 2)]
    mask = torch.tensor([[True], [False]])
    table = torch.zeros(8, 4, 4, dtype=torch.float64)  # column in the first half, row in the second
    for y in range(4):
        for x in range(4):
            for k, v in enumerate((x, y)):
                angles = torch.tensor([v / 10000 ** (i / 2) for i in range(2)])
                table[4 * k : 4 * k + 4, y, x] = torch.cat([angles.sin(), angles.cos()])
    if side != 4:
        table = torch.nn.functional.interpolate(table[None], (side, side), mode="bicubic")[0]

    def norm(x, layer, dim):
        shape = [-1 if k == dim else 1 for k in range(x.ndim)]
        x = (x - x.mean(dim, keepdim=True)) / (x.var(dim, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * layer.weight.view(shape) + layer.bias.view(shape)

    q = (norm(feature, block.query_norm, 1) + table).flatten(2).transpose(1, 2)
    places = [[(x + 0.5) / side, (y + 0.5) / side] for y in range(side) for x in range(side)]
    normed = [norm(m, block.value_norm, 2) for m in maps]
    found = reference(block.mmfs, q, torch.tensor(places, dtype=torch.float64), normed, mask)
    want = block.conv(found.transpose(1, 2).reshape(2, 8, side, side))
    assert torch.allclose(block(feature, maps, mask), want, atol=1e-4)


def test_net_has_a_block_for_each_skip_feature_and_the_middle():
    """Stable Diffusion's form: 12 skip features and the middle; an offset counts cells of the feature's own grid."""
    model, _ = make("tiny")
    net = model.denoiser.net
    assert [b.mmfs.base for b in net.down] == [8, 8, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1] and net.mid.mmfs.base == 1
    assert [b.conv.in_channels for b in net.down] == [8] * 7 + [16] * 5 and net.mid.conv.in_channels == 16
    assert all(b.mmfs.levels == 4 and b.mmfs.offsets.bias.abs().max() <= 1 for b in (*net.down, net.mid))
    small = make("digits")[0].denoiser.net
    assert [b.mmfs.base for b in (*small.down, small.mid)] == [8, 8, 4, 4, 4]
    inside = [layer.synchroniser.mmfs for layer in model.llm.model.layers if hasattr(layer, "synchroniser")]
    assert all(m.levels == 3 and m.base == 4 and 1 < m.offsets.bias.abs().max() <= 3 for m in inside)
