"""Baselines that adapt the backbone itself, one task at a time: TSA, fine-tuning. They need pictures, not features."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heads


class Adapted(nn.Module):
    """A convolution with a residual 1x1 adapter beside it (TSA, Li et al. 2022), started at 1e-4 times the identity."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv, self.stride = conv, conv.stride
        eye = torch.eye(conv.out_channels, conv.in_channels, device=conv.weight.device)
        self.alpha = nn.Parameter(1e-4 * eye[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.conv2d(x, self.alpha, stride=self.stride)


def adapters(model: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """A frozen copy with an adapter beside each 3x3 convolution but the first layer's, and the adapters."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    convolutions = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and child.in_channels > 3
    ]
    if not convolutions:
        raise ValueError("the backbone has no 3x3 convolutions to adapt")
    for parent, name, child in convolutions:
        setattr(parent, name, Adapted(child))
    return model, [m.alpha for m in model.modules() if isinstance(m, Adapted)]


def _tasks(support: Tensor, labels: Tensor, query: Tensor, targets: Tensor) -> heads.Tasks:
    return heads.Tasks(support[None], labels[None], query[None], targets[None])


def tsa(
    model: nn.Module, x: Tensor, labels: Tensor, query: Tensor, targets: Tensor, seen: bool, steps: int = 40
) -> Tensor:
    """Adapters and head fitted together by the NCC loss. x [m, 3, s, s] -> logits of the queries [1, q, C].

    Learning rates: adapters 0.05, head 0.1 on domains seen in training, ten times that on others. Running statistics of
    the normalisation are kept.
    """
    model, alphas = adapters(model)
    theta = torch.eye(model.width, device=x.device).requires_grad_()
    factor = 1.0 if seen else 10.0
    groups = [{"params": alphas, "lr": 0.05 * factor}, {"params": [theta], "lr": 0.1 * factor}]
    optimizer = torch.optim.Adadelta(groups)

    def loss() -> Tensor:
        z = (model(x) @ theta.T)[None]
        return heads.url_loss(z, _tasks(z[0], labels, z[0], labels))

    heads.minimise([*alphas, theta], loss, optimizer, steps)
    with torch.no_grad():
        t = _tasks(model(x), labels, model(query), targets)
        return heads.ncc(t, theta[None])


def finetune(
    model: nn.Module, x: Tensor, labels: Tensor, query: Tensor, targets: Tensor, lr: float, steps: int
) -> Tensor:
    """All weights and a new cosine layer, by Adam on the cross-entropy of the support set. -> logits [1, q, C]."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    with torch.no_grad():
        start = _tasks(model(x), labels, model(query), targets)
        w = heads.centroids(start.support, start.onehot)
    w.requires_grad_()
    parameters = [*model.parameters(), w]
    optimizer = torch.optim.Adam(parameters, lr=lr)

    def loss() -> Tensor:
        return heads.cross_entropy(heads.cosine_logits(model(x)[None], w), labels[None])

    heads.minimise(parameters, loss, optimizer, steps)
    with torch.no_grad():
        return heads.only(heads.cosine_logits(model(query)[None], w), start)
