"""The losses of the whole model: by hand, where their gradients go, what takes no part in them."""

import pytest
import torch
from conftest import batch_of, documents, make
from PIL import Image
from test_model import regions_batch

import recipe
from documents import sequences
from documents.readers import Picture, Text
from vision.grids import sincos_1d
from vision.views import to_tensor


def gradients(model, b):
    model.zero_grad()
    model.losses(b, 0)["total"].backward()
    return {k: float(p.grad.abs().sum()) if p.grad is not None else 0.0 for k, p in model.named_parameters()}


@pytest.mark.parametrize("preset", ["digits", "tiny"])
def test_without_the_caption_loss_the_encoder_learns_from_the_diffusion_loss_alone(preset):
    model, _ = make(preset, lambda_ntp=0.0, lambda_nip=0.0)
    model.freeze(1, "deem")
    b = batch_of(model, documents(4))
    g = gradients(model, b)
    for part in ("trunk", "eyes", "condition"):
        assert sum(v for k, v in g.items() if recipe.part_of(k) == part) > 0
    assert all(v == 0 for k, v in g.items() if recipe.part_of(k) in ("llm", "synchroniser", "unet", "vae", "context"))
    assert g["text_head.weight"] == 0
    model.loss.csr = 0.0
    model.loss.nip = 0.0
    assert "csr" not in model.losses(b, 0)
    with_out = model.losses(b, 0)
    assert set(with_out) == {"total"}


def test_frozen_unet_passes_gradients_and_keeps_none():
    model, _ = make("digits")
    model.freeze(1, "deem")
    gradients(model, batch_of(model, documents(4)))
    assert all(p.grad is None for p in model.denoiser.unet.parameters())
    assert model.encoder.trunk.stages[0][0].weight.grad.abs().sum() > 0


def test_nip_draws_are_the_same_with_and_without_csr():
    """Streams of CSR and NIP are apart: switching one off does not change the other."""
    model, _ = make("digits")
    model.eval()
    b = batch_of(model, documents(6))
    whole = model.losses(b, 5)
    model.loss.csr = 0.0
    assert torch.allclose(model.losses(b, 5)["nip"], whole["nip"], atol=1e-6)
    model.loss.csr, model.loss.nip = 5.0, 0.0
    assert torch.allclose(model.losses(b, 5)["csr"], whole["csr"], atol=1e-6)
    assert not torch.allclose(model.losses(b, 6)["csr"], whole["csr"], atol=1e-6)


def test_total_is_the_weighted_sum():
    model, _ = make("digits", lambda_csr=2.0, lambda_nip=3.0, lambda_ntp=0.5)
    out = model.losses(batch_of(model, documents(4)), 0)
    assert torch.allclose(out["total"], 0.5 * out["ntp"] + 3 * out["nip"] + 2 * out["csr"])


def test_ntp_by_hand():
    model, _ = make("digits")
    model.eval()
    b = batch_of(model, documents(3))
    logits = model.llm.lm_head(model.hidden(b, model.encode_images(b.images))).log_softmax(-1)
    terms = [
        -logits[i, k - 1, b.labels[i, k]]
        for i in range(len(b.ids))
        for k in range(1, b.ids.shape[1])
        if b.labels[i, k] >= 0
    ]
    assert torch.allclose(model.losses(b, 0)["ntp"], torch.stack(terms).mean(), atol=1e-5)


@pytest.mark.parametrize("maps", ["off", "on"])
def test_denoising_losses_by_hand(maps):
    """L_CSR and L_NIP one image and document at a time, from the equations and the draws of their streams: documents
    with one picture in front, one behind, two, none; two documents in a row."""
    model, _ = make("digits", csr_use_mmfs=maps, squeeze=0.6, null_share=0.4)
    model.eval()
    den, per = model.denoiser, model.p.per_image
    for block in (*den.net.down, den.net.mid):
        torch.nn.init.normal_(block.conv.weight, std=0.3)
        torch.nn.init.normal_(block.mmfs.out.bias, std=0.3)
    torch.nn.init.normal_(model.soi, std=0.3)
    for g in model.gates():
        g.data.fill_(0.5)
    shade = [Picture(Image.new("RGB", (16, 16), (30 * k, 200 - 20 * k, 90))) for k in range(7)]
    told = [Text(f"there is a {k} .") for k in range(6)]
    docs = [[shade[0], told[0]], [told[1], shade[1]], [told[2], shade[2], told[3], shade[3]], [told[4]],
            [shade[4], shade[5], told[5], shade[6]]]  # fmt: skip
    rows = [sequences.encode(d, model.tok, per) for d in docs]
    b, found = sequences.collate([rows[0], sequences.join(rows[1:3]), rows[3], rows[4]], model.tok)
    b.images = torch.stack([to_tensor(p.load(), 16) for p in found])
    b.targets = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    got = model.losses(b, 11)

    streams = [torch.Generator().manual_seed(11 * 4 + k) for k in (1, 2)]
    z0 = torch.nn.functional.pixel_unshuffle(2 * b.targets.mean(1, keepdim=True) - 1, 2)
    seen = model.encode_images(b.images)
    hidden = model.hidden(b, seen)
    alone = torch.tensor([True])

    def error(z, eps, t, condition, own):
        a = den.scheduler.alphas_cumprod[t]
        noisy, target = a.sqrt() * z + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z  # v prediction
        more = {} if own is None else own
        return ((den(noisy[None], torch.tensor([t]), condition[None], **more)[0] - target) ** 2).mean()

    t = torch.randint(1000, (7,), generator=streams[0])
    eps = torch.randn(z0.shape, generator=streams[0])
    csr = 0
    for i in range(7):
        own = {"maps": [m[i : i + 1] for m in seen.maps], "seen": alone} if maps == "on" else None
        csr = csr + error(z0[i], eps[i], int(torch.round(0.6 * (t[i] - 500.0) + 500)), seen.condition[i], own) / 7
    assert torch.allclose(got["csr"], csr, rtol=1e-4)

    t = torch.randint(1000, (7,), generator=streams[1])
    eps = torch.randn(z0.shape, generator=streams[1])
    null = torch.rand(7, 1, 1, generator=streams[1])[:, 0, 0] < 0.4
    assert null.any() and not null.all()
    # picture -> (row, begin of its document, the picture before it); pictures 0 and 4 open documents
    place = {1: (1, 0, None), 2: (1, len(rows[1]), None), 3: (1, len(rows[1]), 2), 5: (3, 0, 4), 6: (3, 0, 5)}
    nip = 0
    for i, (row, begin, before) in place.items():
        states = hidden[row, begin : int(b.soi[i]) + 1].flip(0)
        memory = model.context_proj(states) + sincos_1d(64, torch.arange(len(states)))
        condition = den.null[0] if null[i] else model.context_reader(memory[None])[0]
        own = {"maps": [m[:1] * 0 if before is None else m[before : before + 1] for m in seen.maps],
               "seen": alone if before is not None else ~alone}  # fmt: skip
        nip = nip + error(z0[i], eps[i], int(t[i]), condition, own) / 7
    assert torch.allclose(got["nip"], nip, rtol=1e-4)


def test_context_of_an_image_is_its_document_backwards():
    """Two documents of unlike length, and after them a longer one: positions count from <SOI> back."""
    model, _ = make("digits")
    picture = Picture(Image.new("RGB", (16, 16)))
    two, longer = (
        [[Text("there is a 3 ."), picture], [Text("there"), picture]],
        [[Text("there is a 3 . " * 3), picture]],
    )
    for docs in (two, longer):
        b = batch_of(model, docs)
        h = model.hidden(b, model.encode_images(b.images))
        states, keep = model.image_context(h, b)
        longest = int(b.soi.max()) + 1
        assert states.shape == (len(docs), longest, 64)
        for i, soi in enumerate(b.soi.tolist()):
            assert keep[i].tolist() == [k <= soi for k in range(longest)]
            for back in range(soi + 1):
                want = model.context_proj(h[i, soi - back]) + sincos_1d(64, torch.tensor([back]))[0]
                assert torch.allclose(states[i, back], want, atol=1e-5)


def test_images_that_open_a_document_have_no_next_image_loss():
    model, _ = make("digits")
    picture = Picture(Image.new("RGB", (16, 16), (200, 200, 200)))
    opener = batch_of(model, [[picture, Text("there is a 3 .")]])
    out = model.losses(opener, 0)
    assert out["nip"] == 0
    out["total"].backward()  # a step without such an image has gradients for all that NIP trains, of zero
    for part in (model.context_reader, model.context_proj, model.denoiser.net):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())
    assert model.denoiser.null.grad is not None
    later = batch_of(model, [[Text("there is a 3 ."), picture], [picture, Text("there is a 3 .")]])
    alone = batch_of(model, [[Text("there is a 3 ."), picture]])
    model.loss.null_share = 0.0
    model.eval()
    assert model.losses(later, 0)["nip"] > 0 and model.losses(alone, 0)["nip"] > 0
    one = batch_of(model, [[Text("there"), picture]])  # BOS, a word, <SOI>: three are enough
    assert one.soi.item() - one.bos.item() + 1 == 3 and model.losses(one, 0)["nip"] > 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_null_condition_stands_for_the_dropped_context(share):
    model, _ = make("digits")
    model.loss.null_share, model.loss.ntp, model.loss.csr = share, 0.0, 0.0
    picture = Picture(Image.new("RGB", (16, 16), (200, 200, 200)))
    model.losses(batch_of(model, [[Text("there is a 3 ."), picture]]), 0)["total"].backward()
    null, context = model.denoiser.null.grad, model.context_proj.weight.grad
    used = [g is not None and bool(g.abs().max() > 0) for g in (null, context)]
    assert used == ([True, False] if share else [False, True])


def test_traps_four_and_seven():
    model, _ = make("digits", form="official", lambda_csr=0.0)
    b = batch_of(model, documents(8))
    model.eval()
    a = model.losses(b, 0)["nip"]
    model.loss.twice = False
    assert not torch.allclose(a, model.losses(b, 0)["nip"])
    model, s = make("digits", stage=2, form="official")
    assert s.loss().waste and s.loss().nip == 0
    b = batch_of(model, documents(4))
    out = model.losses(b, 0)
    assert "nip" in out and torch.allclose(out["total"], out["ntp"] + 5 * out["csr"])
    model, s = make("digits", stage=2)
    assert not s.loss().waste and "nip" not in model.losses(b, 0)


def test_masks_weigh_csr_and_tokens():
    model, _ = make("tiny", lambda_ntp=0.0, lambda_nip=0.0)
    model.eval()
    b = regions_batch(model)
    masked = model.losses(b, 0)["csr"]
    b.masks = torch.ones_like(b.masks)
    whole = model.losses(b, 0)["csr"]
    b.masks = None
    assert torch.allclose(whole, model.losses(b, 0)["csr"], atol=1e-6) and not torch.allclose(masked, whole)


def test_checkpointing_changes_nothing():
    model, _ = make("tiny")
    b = batch_of(model, documents(2))
    model.freeze(1, "deem")
    for part in (model.resampler, *model.resampler.layers, *(l.attention for l in model.resampler.layers),
                 *(l.cross for l in model.resampler.layers if l.cross)):  # fmt: skip
        part.dropout = 0.0
    model.train()
    model.encoder.trunk.eval()
    a, g = model.losses(b, 0)["total"].item(), gradients(model, b)
    model.checkpointing()
    assert model.losses(b, 0)["total"].item() == pytest.approx(a, rel=1e-5)
    again = gradients(model, b)
    assert all(again[k] == pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in g.items())


def test_share_of_images():
    model, _ = make("digits", images_share=0.5)
    b = batch_of(model, documents(6))
    cut, seen = model.part(b, model.encode_images(b.images))
    assert len(cut.row) == len(seen) == -(-len(b.row) // 2) and torch.isfinite(model.losses(b, 0)["total"])


def test_rows_without_pictures():
    model, _ = make("digits")
    out = model.losses(batch_of(model, [[Text("there is a 3 .")]]), 0)
    assert set(out) == {"ntp", "total"} and torch.isfinite(out["total"])
