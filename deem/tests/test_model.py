"""The whole model: what trains where, where gradients go, a step of each stage, answers and drawings."""

from lab.runs import UserError

import pytest
import torch
from conftest import batch_of, documents, make
from PIL import Image
from waits import Host, Waits

import recipe
from documents.readers import Picture, Text
from model import Deem
from presets import PRESETS, Parts
from recipe import Rates
from settings import Settings

# The table of the official configurations: parts that train, by stage and variant.
COMMON = {"eyes", "synchroniser", "gate", "offsets", "soi", "new head"}
DECODER = {"net", "net offsets", "context", "null"}
TABLE = {
    (1, "deem"): COMMON | DECODER | {"trunk", "condition"},
    (1, "deem-star"): COMMON | DECODER | {"unet"},
    (1, "clean"): COMMON | DECODER | {"trunk"},
    (1, "both"): COMMON | DECODER | {"trunk", "condition", "unet"},
    (2, "deem"): COMMON | {"llm", "condition"},
    (2, "deem-star"): COMMON | {"llm"},
    (3, "deem"): COMMON | {"llm", "regions"},
}
RATES = {  # stage 1 and stages 2, 3
    1: {"trunk": 2e-5, "eyes": 1e-4, "condition": 1e-4, "synchroniser": 1e-4, "gate": 1e-4, "offsets": 1e-5,
        "soi": 1e-4, "new head": 1e-4, "unet": 1e-5, "net": 1e-4, "net offsets": 1e-5, "context": 1e-4, "null": 1e-4},
    2: {"eyes": 1e-5, "condition": 1e-5, "llm": 1e-6, "synchroniser": 5e-6, "gate": 5e-6, "offsets": 5e-6, "soi": 1e-5,
        "new head": 1e-5, "regions": 1e-5},
}  # fmt: skip


def regions_batch(model, n=2):
    b = batch_of(model, documents(n))
    b.masks = torch.zeros(len(b.row), 64, 64)
    b.masks[:, :20, 10:40] = 1
    return b


@pytest.mark.parametrize("stage, variant", list(TABLE))
def test_a_step_of_each_stage_with_the_real_classes(stage, variant):
    """ConvNeXt, LlamaForCausalLM, UNet2DConditionModel and AutoencoderKL, small and random: exactly the table's parts
    change, and all of what they need is there."""
    model, s = make("tiny", stage=stage, variant=variant)
    assert {type(model.llm).__name__, type(model.encoder.trunk.network).__name__} == {"LlamaForCausalLM", "ConvNeXt"}
    assert (model.denoiser is None) == (stage == 3)
    model.freeze(stage, variant)
    two = [d for d in documents(20) if sum(not hasattr(x, "text") for x in d) == 2][
        :1
    ]  # its second image reads the first
    b = regions_batch(model) if stage == 3 else batch_of(model, documents(2, stage) + (two if stage == 1 else []))
    groups = model.trainable_groups(stage, variant, rates=s.rates())
    optimizer = torch.optim.AdamW([{k: v for k, v in g.items() if k != "name"} for g in groups])
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    model.train()
    for g in model.gates():  # closed gates let no gradient through to what lies behind them
        g.data += 0.1
    if model.denoiser is not None:
        for block in (*model.denoiser.net.down, model.denoiser.net.mid):
            torch.nn.init.normal_(block.conv.weight, std=0.1)
    before |= {k: p.detach().clone() for k, p in model.named_parameters()}
    for _ in range(2):
        out = model.losses(b, 0)
        out["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(out) - {"total"} == {1: {"ntp", "nip", "csr"}, 2: {"ntp", "csr"}, 3: {"ntp"}}[stage] - (
        set() if recipe.CSR[variant] else {"csr"}
    )
    changed = {recipe.part_of(k) for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert changed == TABLE[stage, variant]
    for g in groups:
        part = g["name"].removesuffix(", no decay")
        assert g["lr"] == RATES[min(stage, 2)][part]
        assert g["weight_decay"] == (0.05 if "no decay" not in g["name"] else 0.0)
        assert part not in ("offsets", "net offsets", "gate") or g["weight_decay"] == 0
    kept = [k for k, p in model.named_parameters() if "lm_head.base" in k]
    assert kept and all(torch.equal(dict(model.named_parameters())[k], before[k]) for k in kept)


def test_weight_decay_spares_biases_and_norms_alone():
    """And sampling offsets and gates: queries, the vector of <SOI>, the null condition and tables decay."""
    for stage, variant in ((1, "both"), (2, "deem"), (3, "deem")):
        model, _ = make("tiny", stage=stage, variant=variant)
        model.freeze(stage, variant)
        names = {id(p): k for k, p in model.named_parameters()}
        groups = model.trainable_groups(stage, variant)
        found = [names[id(p)] for g in groups for p in g["params"]]
        assert sorted(found) == sorted(k for k, p in model.named_parameters() if p.requires_grad)
        spared = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
        for k in found:
            last = k.split(".")[-1]
            norm = any("norm" in w for w in k.split(".")[:-1]) or "downsample.0." in k or "stem.1." in k
            assert (k in spared) == (last == "bias" or norm or "offsets" in k or last == "gate"), k
        decays = set(found) - spared
        assert {"resampler.queries", "soi"} <= decays and ("denoiser.null" in decays) == (stage == 1)


def test_csr_use_mmfs_is_the_only_side_path():
    """Off: own maps reach the U-Net neither in value nor in gradient; on: they do (trap 2)."""
    for switch, moves in (("off", False), ("on", True)):
        model, _ = make("digits", csr_use_mmfs=switch, lambda_ntp=0.0, lambda_nip=0.0)
        for block in (*model.denoiser.net.down, model.denoiser.net.mid):
            torch.nn.init.normal_(block.conv.weight, std=0.3)
        b = batch_of(model, documents(4))
        seen = model.encode_images(b.images)
        seen.maps = [m.detach().requires_grad_() for m in seen.maps]
        model.denoising(b, seen, None, 0)["csr"].backward()
        assert all((m.grad is not None and m.grad.abs().sum() > 0) == moves for m in seen.maps)
        model.freeze(1, "deem")
        assert any(p.requires_grad for p in model.denoiser.net.parameters()) == moves


def test_embeddings_of_a_picture():
    """The learned vector is added to <SOI>'s own embedding; e^L stands in the place of the placeholders behind it."""
    model, _ = make("digits")
    torch.nn.init.normal_(model.soi)
    b = batch_of(model, [[Text("there is a 3 ."), Picture(Image.new("RGB", (16, 16))), Text("yes")], [Text("no")]])
    seen = model.encode_images(b.images)
    want = torch.nn.functional.embedding(b.ids, model.llm.model.embed_tokens.weight).clone()
    soi = int(b.soi[0])
    want[0, soi] += model.soi
    want[0, soi + 1 : soi + 1 + model.p.per_image] = seen.text[0]
    assert torch.allclose(model.embed(b, seen), want, atol=1e-6)
    model.set_context(b, seen)  # the coarsest maps; a row without pictures has zeros
    assert [m.shape[-1] for m in model.context.maps] == [4, 2] and [m.shape[-1] for m in seen.maps] == [8, 4, 2]
    for m, own in zip(model.context.maps, seen.maps[1:], strict=True):
        assert torch.equal(m[0, 0], own[0]) and not m[1].any()


def test_initial_values_of_the_paper():
    """Queries N(0, 0.02), W_t and W_i N(0, 1e-3) without bias, the vector of <SOI> 0, gates 0."""
    from dataclasses import replace

    torch.manual_seed(0)
    p = Parts()
    assert (p.init_std, p.head_std, p.dropout, p.drop_path) == (0.02, 1e-3, 0.1, 0.1)
    m = Deem(replace(PRESETS["tiny"], resampler_width=256, init_std=p.init_std, head_std=p.head_std, queries=77))
    wide = Deem(replace(PRESETS["tiny"], init_std=0.1, head_std=0.05))
    some = [
        (m.resampler.queries, 0.02), (m.text_head.weight, 1e-3), (m.condition_head.weight, 1e-3),
        (m.resampler.layers[0].cross.query.weight, 0.02), (m.llm.lm_head.new.weight, 0.02),
        (m.context_reader.queries, 0.02), (wide.resampler.queries, 0.1), (wide.text_head.weight, 0.05),
    ]  # fmt: skip
    for w, std in some:
        assert w.std().item() == pytest.approx(std, rel=0.15) and abs(w.mean().item()) < std / 3
    assert not any(w.any() for w in (m.soi, m.text_head.bias, m.condition_head.bias, *m.gates()))


def test_the_net_beside_the_unet_begins_with_nothing():
    """Zero convolutions: with maps or without, the first prediction is the U-Net's own."""
    for preset in ("digits", "tiny"):
        model, _ = make(preset)
        model.eval()
        b = batch_of(model, documents(2))
        seen = model.encode_images(b.images)
        z = torch.randn(len(b.images), *model.denoiser.latents.encode(b.targets).shape[1:])
        t, there = torch.full((len(z),), 300), torch.ones(len(z), dtype=torch.bool)
        plain = model.denoiser(z, t, seen.condition)
        assert torch.allclose(model.denoiser(z, t, seen.condition, seen.maps, there), plain, atol=1e-6)


def test_official_form_sets_every_switch():
    s = Settings(preset="deem", dataset="paper", form="official", stage=2)
    s.resolve()
    assert (s.csr_use_mmfs, s.squeeze, s.drop_paths, s.lm.lr) == ("on", 0.6, True, 1e-5)
    s = Settings(preset="deem", dataset="paper", form="official")
    s.resolve()
    assert (s.flip, s.loss().twice, s.encoder.lr, s.lr, s.batch, s.max_images, s.encoder.resolution) == (
        "independent", True, 2e-5, 1e-4, 4, 15, 256,
    )  # fmt: skip
    s = Settings(preset="deem", dataset="paper", form="official", variant="deem-star")
    s.resolve()  # no CSR pass in front: NIP's picture is mapped once
    assert not s.loss().twice and s.flip == "independent"
    s = Settings(preset="deem", dataset="paper", stage=3)
    s.resolve()
    assert (s.flip, s.squeeze, s.lm.lr, s.batch, s.encoder.resolution, s.warmup, s.steps) == (
        "none",
        1.0,
        1e-6,
        2,
        448,
        500,
        10000,
    )


@pytest.mark.parametrize("stage, variant", [(1, "deem"), (1, "deem-star"), (2, "deem"), (3, "deem")])
def test_a_step_never_waits_for_the_device(stage, variant, monkeypatch):
    """What a size depends on lies on the host; only the library looks at the mask of rows of one length."""
    model, s = make("tiny" if stage == 3 else "digits", stage=stage, variant=variant)
    model.freeze(stage, variant)
    b = regions_batch(model) if stage == 3 else batch_of(model, documents(6, stage))
    groups = [
        {k: v for k, v in g.items() if k != "name"} for g in model.trainable_groups(stage, variant, rates=s.rates())
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    for key in ("labels", "row", "soi", "bos", "previous"):
        setattr(b, key, getattr(b, key).as_subclass(Host))
    for module in ("model", "diffusion"):
        monkeypatch.setattr(f"{module}.sent", lambda x, device: x.as_subclass(torch.Tensor))
    with Waits() as found:
        model.losses(b, 0)["total"].backward()
        optimizer.step()
    assert len(found.places) <= (not b.padded), found.places


def test_llava_reads_patches_and_its_variant_has_csr():
    from dataclasses import replace

    p = replace(PRESETS["tiny"], reader="mlp", patch=16, llm_every=0)
    s = Settings(preset="llava", variant="llava-csr", dataset="files", files=("x",))
    s.check()
    s.resolve()
    model = Deem(p, loss=s.loss())
    assert p.per_image == 16 and model.context is None
    b = batch_of(model, documents(2))
    for stage, variant, want in (
        (1, "llava-csr", {"trunk", "eyes", "condition", "soi", "new head"}), (1, "llava", {"eyes", "soi", "new head"}),
        (2, "llava", {"eyes", "soi", "new head", "llm"}),
    ):  # fmt: skip
        model.loss = Settings(preset="llava", variant=variant, stage=stage).loss()
        model.freeze(stage, variant)
        assert {recipe.part_of(k) for k, q in model.named_parameters() if q.requires_grad} == want
        assert ("csr" in model.losses(b, 0)) == (variant == "llava-csr")
        read = [all(q.requires_grad for q in a.parameters()) for a in model.encoder.adapters]
        assert read == [False, False, True, False]  # only the map that becomes tokens is read


# --------------------------------------------------------------------------------------------------------------- parts


def test_llama_folder_gets_six_new_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<unk>", "<s>", "</s>", "is", "there", "a", "3", "yes", "no", "."]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48,
                                         num_hidden_layers=5,
                                         num_attention_heads=2))  # fmt: skip
    place = tmp_path / "vicuna-7b-v1.5"
    llama.save_pretrained(place)
    hf.save_pretrained(place)
    from dataclasses import replace

    p = replace(PRESETS["tiny"], llm="lmsys/vicuna-7b-v1.5", tokenizer=())
    model = Deem(p, folder=tmp_path).eval()
    assert model.llm.model.embed_tokens.num_embeddings == len(words) + 6
    ids = torch.tensor([[1, 4, 3, 5, 6]])
    model.context.set(None, None)
    ours = model.llm(ids).logits
    assert torch.allclose(ours[..., : len(words)], llama.eval()(ids).logits, atol=1e-5)
    assert torch.allclose(model.llm.lm_head.new.bias, torch.tensor(-5.0))
    b = batch_of(model, [[Text("there is a 3 ."), Picture(Image.new("RGB", (64, 64))), Text("yes")]])
    assert (
        torch.isfinite(model.losses(b, 0)["total"]) and len(model.generate([[Text("there is")]], max_new_tokens=3)) == 1
    )
    with pytest.raises(UserError, match="language model .* is missing"):
        Deem(replace(p, llm="lmsys/nosuch"), folder=tmp_path)
    (place / "config.json").write_text("{")
    with pytest.raises(UserError, match="could not be loaded"):
        Deem(p, folder=tmp_path)


def test_parameters_of_the_paper_size():
    """At the paper's size, on no device: the trained parameters of stage I lie near the printed 494.9 M (README)."""
    from vision.resampler import Resampler

    with torch.device("meta"):
        r = Resampler(77, 768, 12, 12, 1024)
    n = sum(p.numel() for p in r.parameters())
    assert 100e6 < n < 110e6  # BLIP-2's Q-Former without its text half


def test_every_parameter_has_a_part():
    for preset, stage in (("digits", 1), ("tiny", 1), ("tiny", 3)):
        model, _ = make(preset, stage=stage)
        assert {recipe.part_of(k) for k, _ in model.named_parameters()} <= {*recipe.PARTS}
    with pytest.raises(KeyError):
        recipe.part_of("nothing.weight")
    # Of a ViT with a ViT-Adapter the trunk is the ViT alone.
    names = {"adapter.prior.stem.0.weight": "eyes", "scales": "eyes", "vit.conv1.weight": "trunk"}
    assert all(recipe.part_of(f"encoder.trunk.{k}") == v for k, v in names.items())


@pytest.mark.parametrize("stage, variant, word", [(4, "deem", "--stage 4"), (1, "nosuch", "--variant nosuch")])
def test_unknown_stage_and_variant(stage, variant, word):
    with pytest.raises(UserError, match=word):
        recipe.trained(stage, variant)


def test_rates_of_a_part():
    r = Rates(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert [r.of(k) for k in ("eyes", "trunk", "unet", "llm", "gate", "net offsets", "net")] == [1, 2, 3, 4, 5, 6, 1]
