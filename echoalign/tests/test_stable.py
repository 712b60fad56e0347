"""Stable Diffusion + ControlNet end to end with tiny random weights of the real classes, read from a local folder."""

import json

from lab import runs

import pytest
import torch
from conftest import HERE, records, start, told

import echomod
import train
from generator import stable
from readers import names

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """(base folder, ControlNet folder) in diffusers' layout."""
    from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for p in control.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )
    characters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(k) for k in range(10)] + [","]
    words = ["<|startoftext|>", "<|endoftext|>", *characters, *(c + "</w>" for c in characters)]
    (folder / "vocab.json").write_text(json.dumps({w: k for k, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {"vae": vae, "text_encoder": CLIPTextModel(config), "tokenizer": tokenizer, "unet": unet}
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, scheduler=scheduler, **more).save_pretrained(folder / "base")
    control.save_pretrained(folder / "control")
    return str(folder / "base"), str(folder / "control")


def load(weights, **knobs):
    told = {"resolution": 64, "steps": 4, "strength": 0.5, **knobs}
    return stable.load(*weights, names("cifar10"), stable.Knobs(**told), CPU)


def toy(n=3, channels=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 16, 16, channels), generator=g, dtype=torch.uint8)
    return x, torch.tensor([0, 3, 7][:n])


@pytest.mark.parametrize("mode", ["img2img", "start"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_edit(weights, mode, sampler):
    g, (x, y) = load(weights, mode=mode, sampler=sampler), toy()
    out = g.edit(x, y, [1, 2, 3])
    assert out.shape == (3, 64, 64, 3) and out.dtype == torch.uint8 and out.float().std() > 1
    assert torch.equal(g.edit(x, y, [1, 2, 3]), out)
    assert not torch.equal(g.edit(x, y, [1, 2, 4])[2], out[2])
    assert not torch.equal(g.edit(x, (y + 1) % 10, [1, 2, 3]), out)  # the prompt reaches the picture
    # an image of a batch is the image of its own, up to rounding: generators are the image's, not the batch's
    one = g.edit(x[2:], y[2:], [3])[0]
    assert (one.int() - out[2].int()).abs().max() <= 2


def test_control_and_strength(weights):
    x, y = toy()
    on, off, tile = (load(weights, control=c).edit(x, y, [1, 2, 3]) for c in ("canny", "none", "tile"))
    assert not torch.equal(on, off) and not torch.equal(tile, on)
    assert not torch.equal(load(weights, control_end=0.3).edit(x, y, [1, 2, 3]), on)
    assert torch.equal(load(weights, strength=0.0).edit(x, y, [1, 2, 3]), x)
    assert torch.equal(load(weights, strength=0.2).edit(x, y, [1, 2, 3]), x)  # int(4 x 0.2) = 0 steps are made
    grey = load(weights).edit(*toy(channels=1), [1, 2, 3])
    assert grey.shape == (3, 64, 64, 1)


def test_about_names_everything(weights, tmp_path):
    one, two = load(weights).about(), load(weights, guidance=5.0).about()
    assert one != two and one["weights"] == two["weights"] and one["resolution"] == 64
    json.dumps(one)


def test_canny_finds_an_edge():
    from PIL import Image

    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (20, 0, 64, 64))
    edges = stable.canny(picture, 100, 200)
    columns = {x for x in range(64) if edges.getpixel((x, 32))[0]}
    assert columns and columns <= {18, 19, 20, 21}


def test_edit_with_a_pipeline_of_ones_own(weights):
    """The README's snippet, with a ControlNet and without."""
    from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline, StableDiffusionImg2ImgPipeline

    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    net = ControlNetModel.from_pretrained(weights[1])
    held = StableDiffusionControlNetImg2ImgPipeline.from_pretrained(weights[0], controlnet=net, **none)
    free = StableDiffusionImg2ImgPipeline.from_pretrained(weights[0], **none)
    x, y = toy(3)
    x = echomod.resize(x, 64)
    knobs = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3.0, "names": names("cifar10")}
    for pipe, control in ((held, lambda p: stable.canny(p, 100, 200)), (free, None)):
        pipe.set_progress_bar_config(disable=True)
        out = echomod.edit(pipe, x, y, control=control, **knobs)
        assert out.shape == (3, 64, 64, 3) and out.dtype == torch.uint8 and not torch.equal(out, x)
        one = echomod.edit(pipe, x, y, control=control, batch=1, **knobs)
        assert (one.int() - out.int()).abs().max() <= 2
        assert not torch.equal(echomod.edit(pipe, x, (y + 1) % 10, control=control, **knobs), out)
        assert not torch.equal(echomod.edit(pipe, x, y, control=control, seed=1, **knobs), out)
    grey = echomod.edit(free, x[..., :1], y, **knobs)
    assert grey.shape == (3, 64, 64, 3)
    for bad, words in (({"control": lambda p: p}, "for no other"), ({"labels": y + 9}, "must lie in 0..9"),
                       ({"images": x.float()}, "uint8")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            echomod.edit(free, **{"images": x, "labels": y, **knobs, **bad})


def test_the_snippet_of_the_readme_runs_as_it_stands(weights, capsys):
    from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline

    text = (HERE / "README.md").read_text().split("## In your own code")[1]
    code = text.split("```python\n")[1].split("```")[0]
    assert code.count("\n") <= 15
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    net = ControlNetModel.from_pretrained(weights[1])
    pipe = StableDiffusionControlNetImg2ImgPipeline.from_pretrained(weights[0], controlnet=net, **none)
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    own = {
        "pipe": pipe,
        "images": torch.randint(0, 256, (6, 64, 64, 3), generator=g, dtype=torch.uint8),
        "labels": torch.arange(6),
        "names": names("cifar10"),
        "edges": lambda p: stable.canny(p, 100, 200),
        "features": lambda v: echomod.resize(v, 8).flatten(1).float(),
        "net": lambda x: x.flatten(1).float()[:, :10],
    }
    exec(code, own)
    assert "of 6 originals kept" in capsys.readouterr().out and torch.isfinite(own["loss"])
    assert len(own["x"]) == len(own["y"]) == len(own["c"]) == 6 + int(own["chosen"].keep.sum())


def test_missing_weights_are_told(tmp_path):
    with pytest.raises(runs.UserError, match="--sd.base and --sd.controlnet, or add --download"):
        stable.load(str(tmp_path), str(tmp_path), ["cat"], stable.Knobs(), CPU)


def test_a_whole_run(weights, tmp_path, monkeypatch, capsys):
    base = ["--dataset", "digits", "--device", "cpu", "--epochs", "2", "--finetune", "1", "--train-limit", "12"]
    args = [*base, "--generator", "sd", "--sd.base", weights[0], "--sd.controlnet", weights[1], "--sd.resolution", "64"]
    args += ["--edit.steps", "2", "--methods", "echoalign", "--edit.shard", "5", "--cache", tmp_path / "c"]
    start(monkeypatch, *args, "--out", tmp_path / "r")
    found = records(tmp_path / "r")
    assert found["seed0/record-echoalign.json"]["trained_on"] >= 12
    shards = list((tmp_path / "c" / "modified").rglob("shard*"))
    t, _ = runs.read_tensors(shards[0])
    assert len(shards) == 3 and t["full"].shape[1:] == (64, 64, 1) and t["small"].shape[1:] == (8, 8, 1)
    bad = [*args, "--sd.base", tmp_path / "no", "--out", tmp_path / "q", "--cache", tmp_path / "d"]
    line = told(capsys, monkeypatch, train.main, bad)
    assert "could not be read" in line and "of the data folder" in line
