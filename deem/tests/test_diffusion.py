"""Noise, targets, NIP's error, residuals beside the U-Net, drawing, loading of a Stable Diffusion folder."""

import json

from lab.runs import UserError

import pytest
import torch
from conftest import batch_of, documents, make
from diffusers import DDPMScheduler

from diffusion import Denoiser, Latents, Pixels, Residuals, load_diffusion, nip_error


def test_noise_and_targets_are_diffusers():
    model, _ = make("digits")
    z, n, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=kind)
        d = Denoiser(
            model.denoiser.unet, Pixels(), scheduler, value_width=64, levels=3, tokens=8, width=32, heads=2, points=4
        )
        noisy, target = d.noised(z, n, t)
        assert torch.allclose(noisy, scheduler.add_noise(z, n, t), atol=1e-6)
        assert torch.allclose(target, n if kind == "epsilon" else scheduler.get_velocity(z, n, t), atol=1e-6)
    with pytest.raises(UserError, match="epsilon or v_prediction"):
        Denoiser(
            model.denoiser.unet, Pixels(), DDPMScheduler(prediction_type="sample"), value_width=64, levels=3, tokens=8
        )


def test_nip_error_counts_openers_as_zero():
    found, target = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2)
    error = (found - target) ** 2
    keep = torch.tensor([True, False, True, True, False])
    want = (error * keep.view(-1, 1, 1, 1)).mean()
    assert torch.allclose(nip_error(found[keep], target[keep], 5), want)
    assert nip_error(found[:0], target[:0], 5) == 0


def test_pixels_invert():
    x = torch.rand(2, 1, 16, 16).expand(-1, 3, -1, -1)
    assert torch.allclose(Pixels().decode(Pixels().encode(x)), x, atol=1e-6) and Pixels().encode(x).shape == (
        2,
        4,
        8,
        8,
    )


def test_the_input_is_not_changed():
    """Trap 4: neither latents nor losses map the pictures in place."""
    for preset in ("digits", "tiny"):
        model, _ = make(preset)
        b = batch_of(model, documents(3))
        before = [b.images.clone(), b.targets.clone()]
        model.losses(b, 0)
        model.losses(b, 0)
        assert torch.equal(b.images, before[0]) and torch.equal(b.targets, before[1])


def test_latents_are_scaled_draws_of_the_posterior():
    model, _ = make("tiny")
    latents, x = model.denoiser.latents, torch.rand(3, 3, 64, 64)
    assert isinstance(latents, Latents)
    g = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    want = latents.vae.encode(2 * x - 1).latent_dist.sample(generator=g()) * 0.18215
    assert torch.allclose(latents.encode(x, g()), want, atol=1e-6) and not latents.encode(x).requires_grad
    assert latents.decode(want).shape == x.shape


def with_net(model, std=0.3):
    """Blocks whose last convolution is no longer zero."""
    for block in (*model.denoiser.net.down, model.denoiser.net.mid):
        torch.nn.init.normal_(block.conv.weight, std=std)
        torch.nn.init.normal_(block.conv.bias, std=std)
        torch.nn.init.normal_(block.mmfs.out.bias, std=std)
    return model.denoiser


@pytest.mark.parametrize("preset", ["digits", "tiny"])
def test_residuals_equal_two_passes(preset):
    """Residuals made while the U-Net runs are those of a first pass given to a second one as plain tensors."""
    model, _ = make(preset)
    den = with_net(model).eval()
    den.unet.eval()
    b, width, side = 3, model.p.width, den.unet.config.sample_size
    z, t = torch.randn(b, 4, side, side), torch.tensor([1, 500, 900])
    c = torch.randn(b, model.p.queries, den.unet.config.cross_attention_dim)
    maps = [torch.randn(b, width, s, s) for s in (8, 4, 2, 1)[: len(model.encoder.strides)]]
    seen = torch.tensor([True, False, True])
    got = den(z, t, c, maps, seen)
    found = []
    hooks = [den.unet.conv_in.register_forward_hook(lambda _, __, o: found.append(o))]
    hooks += [d.register_forward_hook(lambda _, __, o: found.extend(o[1])) for d in den.unet.down_blocks]
    hooks += [den.unet.mid_block.register_forward_hook(lambda _, __, o: found.append(o))]
    den.unet(z, t, encoder_hidden_states=c)
    for h in hooks:
        h.remove()
    inner = [m[:, None] for m in maps]
    blocks = [*den.net.down, den.net.mid]
    residuals = [block(f, inner, seen[:, None]) for block, f in zip(blocks, found, strict=True)]
    want = den.unet(z, t, encoder_hidden_states=c, down_block_additional_residuals=tuple(residuals[:-1]),
                    mid_block_additional_residual=residuals[-1]).sample  # fmt: skip
    assert torch.allclose(got, want, atol=1e-4)
    assert not den.unet.conv_in._forward_hooks and len(found) == len(blocks)


def test_samples_before_first_get_no_residual():
    model, _ = make("digits")
    den = with_net(model).eval()
    z, t, c = torch.randn(4, 4, 8, 8), torch.tensor([5, 6, 7, 8]), torch.randn(4, 8, 64)
    maps = [torch.randn(2, 64, s, s) for s in (8, 4, 2)]
    both = den(z, t, c, maps, torch.tensor([True, True]), first=2)
    assert torch.allclose(both[:2], den(z[:2], t[:2], c[:2]), atol=1e-5)
    assert torch.allclose(both[2:], den(z[2:], t[2:], c[2:], maps, torch.tensor([True, True])), atol=1e-5)
    assert not torch.allclose(both[2:], den(z[2:], t[2:], c[2:]), atol=1e-3)


def test_every_weight_of_the_net_gets_a_gradient_without_images_to_read():
    model, _ = make("digits")
    den = with_net(model)
    maps = [torch.randn(2, 64, s, s) for s in (8, 4, 2)]
    den(
        torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), torch.randn(2, 8, 64), maps, torch.zeros(2, dtype=torch.bool)
    ).sum().backward()
    assert all(p.grad is not None for p in den.net.parameters())
    assert isinstance(Residuals(den, maps, torch.zeros(2, dtype=torch.bool), 0).rows, torch.Tensor)


def test_drawing():
    model, _ = make("digits")
    c = torch.randn(2, 8, 64)
    a = model.denoiser.draw(c, steps=3, seed=1)
    assert a.shape == (2, 3, 16, 16) and 0 <= a.min() and a.max() <= 1
    assert torch.equal(a, model.denoiser.draw(c, steps=3, seed=1)) and not torch.equal(
        a, model.denoiser.draw(c, steps=3, seed=2)
    )
    start = torch.zeros(2, 4, 8, 8)
    near = model.denoiser.draw(c, steps=100, seed=1, start=start, strength=0.02, guidance=1.0)
    assert (near - 0.5).abs().mean() < 0.2
    # Guidance goes on from the null condition: 1 is the condition alone, 0 the null condition alone.
    one, almost, none = (model.denoiser.draw(c, steps=3, seed=1, guidance=g) for g in (1.0, 1.0 + 1e-6, 0.0))
    null = model.denoiser.draw(model.denoiser.null.expand(2, -1, -1), steps=3, seed=1, guidance=1.0)
    assert torch.allclose(one, almost, atol=1e-4) and torch.allclose(none, null, atol=1e-4)


def test_stable_diffusion_folder(tmp_path):
    """A folder as diffusers saves it is read whole, with the empty prompt as the null condition; the 768 px model
    predicts v."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from presets import PRESETS

    model, _ = make("tiny")
    place = tmp_path / "stable-diffusion-2-1-base"
    model.denoiser.unet.save_pretrained(place / "unet")
    model.denoiser.latents.vae.save_pretrained(place / "vae")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(place / "scheduler")
    vocab = {c: i for i, c in enumerate(["a", "a</w>", "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=8).save_pretrained(
        place / "tokenizer"
    )
    config = CLIPTextConfig(vocab_size=4, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
                            num_attention_heads=2,
                            max_position_embeddings=8, bos_token_id=2, eos_token_id=3)  # fmt: skip
    CLIPTextModel(config).save_pretrained(place / "text_encoder")
    unet, vae, scheduler, empty = load_diffusion(
        "stabilityai/stable-diffusion-2-1-base", tmp_path, False, torch.float32
    )
    assert empty.shape == (1, 8, 32) and scheduler.config.prediction_type == "v_prediction"
    from dataclasses import replace

    from model import Deem

    p = replace(PRESETS["tiny"], diffusion="stabilityai/stable-diffusion-2-1-base")
    deem = Deem(p, folder=tmp_path)
    assert torch.equal(deem.denoiser.null, empty) and deem.denoiser.kind == "v_prediction"
    out = deem.losses(batch_of(deem, documents(2)), 0)
    assert torch.isfinite(out["total"])
    with pytest.raises(UserError, match="mirrors"):
        load_diffusion("stabilityai/nosuch", tmp_path, False, torch.float32)
    (place / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match="could not be loaded"):
        load_diffusion("stable-diffusion-2-1-base", tmp_path, False, torch.float32)
