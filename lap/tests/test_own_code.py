"""The README's section "In your own code": its snippet as it stands, with a ResNet and with a vision transformer."""

from pathlib import Path

import pytest
import torch

import attacks
import lap

README = (Path(attacks.__file__).parent / "README.md").read_text()
RESNET = "models.resnet18(num_classes=10)"
VIT = "models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10)"


def snippet():
    return README.split("## In your own code", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]


def batches(n=3):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(8, 3, 32, 32, generator=g), torch.randint(10, (8,), generator=g)) for _ in range(n)]


def run(code, loader):
    torch.manual_seed(0)
    names = {"loader": loader}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("network", [RESNET, VIT])
def test_the_snippet_runs_as_it_stands(network):
    code = snippet()
    assert len(code.splitlines()) <= 15 and RESNET in code
    names = run(code.replace(RESNET, network), batches())
    net = names["net"]
    torch.manual_seed(0)
    before = run(code.replace(RESNET, network), [])["net"]
    moved = [k for (k, p), q in zip(net.named_parameters(), before.parameters(), strict=True) if not torch.equal(p, q)]
    assert len(moved) == len(list(net.parameters())) and all(p.isfinite().all() for p in net.parameters())
    # The loop is LAP: without the moves of the weights it ends elsewhere.
    plain = "\n".join(line for line in code.splitlines() if "perturb_" not in line)
    other = run(plain.replace(RESNET, network), batches())["net"]
    first = names["weights"][0]
    assert (first - next(iter(lap.layers(other).values()))).norm() > 0.01 * first.norm()


def test_normalised_images_are_refused():
    with pytest.raises(ValueError, match="make it the network's first layer"):
        run(snippet(), [(3 * torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))])
