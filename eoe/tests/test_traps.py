"""What changes every number without an error: prompts, temperatures, resizing, activation, order, caches, rows."""

import json

from lab import runs
from lab.cells import read_printed
from lab.runs import UserError

import pytest
import torch
from PIL import Image
from test_cli import tiny
from test_papertables import D, FakeBackbone, made_up, vector  # noqa: F401 (a fixture)

import backbones
import data
import evaluation
import metrics
import papertables
import scores
from evaluation import drop_similar, rows, text_features
from names import prompts, reading
from scores import normalise, reduce
from settings import EvalSettings

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------- prompts


class Spy:
    """Remembers the prompts; a prompt's vector is as long as the prompt."""

    def __init__(self):
        self.seen: list[str] = []

    def encode_texts(self, texts):
        self.seen += texts
        return torch.stack([vector(t) * len(t) for t in texts])


def test_prompts_are_the_papers():
    spy = Spy()
    text_features(spy, ["Abyssinian", "aquarium_fish"])
    assert spy.seen == ["a photo of a Abyssinian", "a photo of a aquarium_fish"]  # no stop, no "an", case kept
    spy.seen.clear()
    found = text_features(spy, ["cat"], evaluation.ENSEMBLE)
    want = ["a photo of a cat.", "a blurry photo of a cat.", "a photo of many cat."]
    want += ["a photo of the large cat.", "a photo of the small cat."]
    assert spy.seen == want
    mean = sum(vector(t).double() / vector(t).double().norm() for t in want)  # unit vectors, whatever their length was
    assert torch.allclose(found[0].double(), mean / mean.norm(), atol=1e-6)


def test_the_main_score_is_eoe_and_not_s_max():
    g = torch.Generator().manual_seed(0)
    images, other, ids, out = (normalise(torch.randn(n, D, generator=g)) for n in (40, 30, 4, 3))
    found = {m: v for _, m, _, v in rows(images, {"o": other}, ids, [evaluation.Labels("EOE", [*"abc"], out)], 0.25)}
    want = [scores.s_eoe(reduce(x, ids, out), 0.25) for x in (images, other)]
    assert found["EOE"]["FPR95"] == metrics.measure(*want)["FPR95"]
    assert found["EOE"]["AUROC"] == metrics.measure(*want)["AUROC"] != found["MCM"]["AUROC"]


def test_default_temperatures():
    g = torch.Generator().manual_seed(1)
    v, ids, out = (normalise(torch.randn(n, D, generator=g)) for n in (5, 4, 3))
    a, b = (v.double() @ w.double().T / 0.01 for w in (ids, out))
    s = reduce(v, ids, out)
    assert torch.allclose(scores.s_energy(s), 0.01 * (a.logsumexp(1) - b.logsumexp(1)), atol=1e-6)
    assert torch.allclose(scores.energy(s), 0.01 * a.logsumexp(1), atol=1e-6)
    share = torch.cat([a, b], 1).softmax(1)[:, : len(ids)].sum(1)
    assert torch.allclose(scores.neglabel(v, ids, out), share, atol=1e-4)
    assert torch.allclose(scores.mcm(s), (a * 0.01).softmax(1).max(1).values, atol=1e-7)


def test_a_name_is_too_similar_only_above_the_bar():
    ids, out = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.75**0.5], [0.6, 0.8]])
    assert drop_similar(["at", "above"], out, ids, 0.5)[0] == ["at"]


# ------------------------------------------------------------------------------------------------------------ backbones


def test_images_are_resized_bilinearly_and_cropped_in_the_centre(tmp_path):
    from torchvision.transforms.v2 import functional as f

    tiny("clip", tmp_path / "w")
    b = backbones.load("clip-vit-b16", CPU, str(tmp_path / "w"))
    g = torch.Generator().manual_seed(0)
    picture = f.to_pil_image(torch.randint(0, 256, (3, 300, 500), dtype=torch.uint8, generator=g))
    small = f.resize(f.pil_to_tensor(picture), [224], f.InterpolationMode.BILINEAR, antialias=True)
    left = round((small.shape[2] - 224) / 2)
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    want = (small[:, :, left : left + 224] / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(b.transform()(picture), want, atol=1e-5)


def test_sizes_statistics_and_quickgelu():
    import open_clip

    imagenet, half = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)
    sizes = {"clip-rn50": 224, "clip-rn101": 224, "clip-rn50x4": 288, "clip-rn50x16": 384, "align": 289}
    sizes |= {"conse-lite0": 160, "conse-lite2": 160}
    means = {
        "groupvit": imagenet,
        "align": half,
        "conse-lite0": backbones.LITE_STATS,
        "conse-lite2": backbones.LITE_STATS,
    }
    for name, known in backbones.KNOWN.items():
        assert known.size == sizes.get(name, 224)
        assert known.stats == means.get(name, backbones.CLIP_STATS)
        if known.library == "open_clip":  # OpenAI's weights load into a plain GELU model too, and lose quality
            config = open_clip.get_model_config(known.id)
            assert config["quick_gelu"] and config["vision_cfg"]["image_size"] == known.size


class Blank(list):
    name, sha256 = "blank", "0"

    def __init__(self):
        super().__init__(Image.new("RGB", (40, 30), (i * 50, 99, 20)) for i in range(3))


def test_features_on_disk_belong_to_their_weights_precision_and_order(tmp_path, monkeypatch):
    monkeypatch.setenv("EOE_CACHE", str(tmp_path / "cache"))
    tiny("clip", tmp_path / "w")
    one = backbones.load("clip-vit-b16", CPU, str(tmp_path / "w"))
    two = backbones.load("clip-vit-b16", CPU, str(tmp_path / "w"))
    assert one.fingerprint == two.fingerprint
    half = backbones.load("clip-vit-b16", CPU, str(tmp_path / "w"), bf16=True)
    with torch.no_grad():
        two.model.visual_projection.weight.mul_(-1)
    two = backbones.Backbone("clip-vit-b16", two.known, two.model, two.tokenizer, CPU)
    assert len({one.fingerprint, two.fingerprint, half.fingerprint}) == 3
    a, b, c = (backbones.image_features(x, Blank(), 2, 0) for x in (one, two, half))
    assert torch.allclose(a, -b, atol=1e-6) and a.dtype == b.dtype == c.dtype == torch.float32
    assert torch.allclose(a.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.allclose(a, c, atol=0.05) and not torch.equal(a, c)
    assert half.encode_images(torch.zeros(1, 3, 224, 224)).dtype == torch.float32
    texts = backbones.CachedTexts(one)
    forth, back = texts.encode_texts(["cat", "dog"]), texts.encode_texts(["dog", "cat"])
    assert torch.equal(forth, back.flip(0)) and torch.equal(forth, texts.encode_texts(["cat", "dog"]))


# --------------------------------------------------------------------------------------------------------------- tables


def made(table: str, out, **more) -> list[dict]:
    s = EvalSettings(table=table, out=str(out), scale="paper", **more)
    run = runs.Run(out, s)
    papertables.run_table(s, run, 0, CPU)
    return run.finish()


def test_table_19_takes_five_prompts_and_table_20_one(made_up, tmp_path, monkeypatch):  # noqa: F811
    seen: set[str] = set()
    plain = FakeBackbone.encode_texts
    monkeypatch.setattr(FakeBackbone, "encode_texts", lambda self, texts: seen.update(texts) or plain(self, texts))
    made("table20", tmp_path / "20")
    assert "a photo of a goldfish" in seen and not [t for t in seen if t.endswith(".")]
    seen.clear()
    made("table19", tmp_path / "19")
    assert {t for t in seen if "goldfish" in t} >= {t.format("goldfish") for t in evaluation.ENSEMBLE}


@pytest.fixture
def published(tmp_path):
    """Lists of every language model in the published layout."""
    place = tmp_path / "data" / "eoe" / "envisioned_classes"
    for llm in [*papertables.LLMS, "llama-2"]:
        for folder, name in (("far_500", "ImageNet"), ("near_3", "ImageNet"), ("fine_grained_500", "food50_ID"),
                             ("near_3", "ImageNet10"), ("near_3", "ImageNet20")):  # fmt: skip
            (place / folder).mkdir(parents=True, exist_ok=True)
            names = {"some": [f"{llm} {i}" for i in range(4)]}
            (place / folder / f"{name}_{llm}_0.json").write_text(json.dumps(names))
    return {"labels": "released", "data_dir": str(tmp_path / "data")}


def test_table_24_over_all_its_models(made_up, published, tmp_path):  # noqa: F811
    found = [r for m in papertables.LLMS for r in made("table24", tmp_path / m, llm=m, **published)]
    assert {r["table"] for r in found} == {"table24"}
    rows = [(r["dataset"], r["setting"], r["method"]) for r in found]
    assert len(rows) == len({*rows})  # MCM, which takes no name, stands there once
    printed = read_printed(runs.HERE / "paper.csv")
    printed = printed[printed["table"] == "table24"]
    assert {tuple(r) for r in printed[["dataset", "setting", "method"]].to_numpy()} <= {*rows}


def test_another_language_model_is_no_printed_row(made_up, published, tmp_path):  # noqa: F811
    assert {r["table"] for r in made("table3", tmp_path / "a", **published)} == {"table3"}
    assert {r["table"] for r in made("table3", tmp_path / "b", llm="llama-2", **published)} == {"own-table3"}


def test_names_of_the_far_prompt_are_cleaned_as_far_names(tmp_path):
    path = tmp_path / "n.json"
    path.write_text(json.dumps({"names": ["crane fly", "owl", "bat"]}))
    s = EvalSettings(labels=str(path))
    case = [c for c in papertables.TABLES["table25"] if c.id == "imagenet10"][0]
    assert papertables.envisioned(s, case, ["crane bird", "Owl"], "resemble", 500, 0) == ["crane fly", "bat"]
    near = papertables.TABLES["table3"][0]
    assert papertables.envisioned(s, near, ["crane bird", "Owl"], "resemble", 3, 0) == ["bat"]


def test_the_threshold_of_a_dump_comes_from_the_id_images(made_up, tmp_path, monkeypatch):  # noqa: F811
    cuts = []
    monkeypatch.setattr(evaluation, "write_scores", lambda path, images, stats, *a: cuts.append((a[-1], stats)))
    common = dict(table="own", id="imagenet10", task="near", dump=True, data_dir=str(tmp_path))
    made(out=tmp_path / "a", ood=("imagenet20",), **common)
    made(out=tmp_path / "b", ood=("imagenet10",), **common)
    inside = evaluation.score(cuts[1][1], "EOE")
    assert cuts[0][0] == cuts[1][0] == metrics.threshold95(inside)
    assert cuts[0][0] != metrics.threshold95(evaluation.score(cuts[0][1], "EOE"))


def test_scores_that_are_no_numbers_are_told():
    broken = reduce(torch.full((2, 2), float("nan")), torch.eye(2), torch.eye(2))
    for name in scores.SCORES:
        with pytest.raises(UserError, match="not a finite number"):
            evaluation.score(broken, name)


def test_kinds_of_the_fine_grained_prompt():
    assert {*prompts.KINDS} == {*data.HALVES, "cifar10-animals"}
    assert [prompts.KINDS[k].split()[0] for k in ("cub100", "cars98", "food50", "pet18")] == "bird car food pet".split()


def test_table_25_takes_all_far_names_and_three_near_ones(made_up, tmp_path):  # noqa: F811
    records = [r for r in made("table25", tmp_path) if r["dataset"].startswith("ImageNet-10")]
    found = {r["method"]: r["metrics"]["labels"] for r in records}
    for method, task, n in (("EOE(far prompt)", "far", 500), ("EOE", "near", 3)):
        names = reading.read_names(runs.HERE / "envisioned" / f"imagenet10-{task}.json").take(task, n)
        assert found[method] == len(reading.clean(names, data.id_names("imagenet10"), task).names)
    assert found["EOE(far prompt)"] > 100 > found["EOE"]
