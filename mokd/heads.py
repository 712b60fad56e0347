"""Few-shot classifiers on frozen features: the nearest-centroid rule and every head it can be given.

A batch of tasks is solved at once; padding has label -1. All return logits of the queries, [B, Q, C], with -inf at
classes that a task does not have.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import hsic

TEMPERATURE = 10.0  # of the cosine; without effect on the predicted class, but part of URL's loss


@dataclass
class Tasks:
    """A batch of tasks: support [B, M, d] with labels [B, M], query [B, Q, d] with targets [B, Q]."""

    support: Tensor
    labels: Tensor
    query: Tensor
    targets: Tensor
    onehot: Tensor = field(init=False)  # [B, M, C] float, rows of padding are 0
    there: Tensor = field(init=False)  # [B, C] bool: the task has this class

    def __post_init__(self):
        classes = int(self.labels.max()) + 1
        self.onehot = F.one_hot(self.labels.clamp(min=0), classes).float() * (self.labels >= 0).unsqueeze(-1)
        self.there = self.onehot.sum(1) > 0

    @property
    def mask(self) -> Tensor:
        return self.labels >= 0


def centroids(z: Tensor, onehot: Tensor) -> Tensor:
    """Means of the rows of each class, [B, C, d]; the rows are not made unit rows first."""
    return onehot.transpose(-1, -2) @ z / onehot.sum(1).clamp(min=1).unsqueeze(-1)


def cosine_logits(z: Tensor, c: Tensor) -> Tensor:
    """10 cos(z, c): [B, Q, d], [B, C, d] -> [B, Q, C]."""
    return TEMPERATURE * F.normalize(z, dim=-1, eps=1e-30) @ F.normalize(c, dim=-1, eps=1e-30).transpose(-1, -2)


def only(logits: Tensor, t: Tasks) -> Tensor:
    return logits.masked_fill(~t.there.unsqueeze(1), float("-inf"))


def ncc(t: Tasks, theta: Tensor | None = None) -> Tensor:
    """Nearest centroid by cosine, after the head if there is one."""
    s, q = (t.support, t.query) if theta is None else (x @ theta.transpose(-1, -2) for x in (t.support, t.query))
    return only(cosine_logits(q, centroids(s, t.onehot)), t)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the samples of a task, [B]; padding has label -1."""
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1, reduction="none").sum(-1)
    return loss / (labels >= 0).sum(-1)


def identity(t: Tasks) -> Tensor:
    d = t.support.shape[-1]
    return torch.eye(d, device=t.support.device).repeat(len(t.support), 1, 1).requires_grad_()


def minimise(parameters: list[Tensor], loss, optimizer, steps: int) -> None:
    """Full-batch steps; `loss()` gives [B], whose sum keeps the tasks apart."""
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss().sum().backward()
        optimizer.step()


def url_loss(z: Tensor, t: Tasks) -> Tensor:
    """NCC loss with centroids of the same support set, not detached, [B]."""
    return cross_entropy(only(cosine_logits(z, centroids(z, t.onehot)), t), t.labels)


def url(t: Tasks, lr: float, weight_decay: float = 0.0, steps: int = 40) -> Tensor:
    """The pre-classifier head of URL (Li et al. 2021): the same head as MOKD's, fitted by the NCC loss. -> Theta.
    Published without weight decay."""
    theta = identity(t)
    optimizer = torch.optim.Adadelta([theta], lr=lr, weight_decay=weight_decay)
    minimise([theta], lambda: url_loss(t.support @ theta.transpose(-1, -2), t), optimizer, steps)
    return theta.detach()


def ssl_hsic(t: Tasks, lr: float, weight_decay: float, gamma: float = 3.0, scale: float = 1.0, steps: int = 40):
    """Objective of SSL-HSIC (Li et al. 2021) on the support set, with class labels: -HSIC(Z,Y) + gamma sqrt(HSIC(Z,Z)).

    How MOKD's authors put it to few-shot tasks is not known. Ours: MOKD's head and optimiser, the IMQ kernel, and the
    biased estimator under the root, where the unbiased one may be below 0. -> Theta.
    """
    theta, delta, mask = identity(t), hsic.same_class(t.labels), t.mask
    width = torch.full((len(theta),), scale, device=theta.device)
    m = hsic.count(mask, t.support)

    def loss() -> Tensor:
        K = hsic.kernel("imq", hsic.gram(t.support @ theta.transpose(-1, -2)), width, mask)
        zy = hsic.unbiased(K, delta, mask) * hsic.label_gain("imq", width, m)
        return m * (gamma * hsic.biased(K, K, mask).clamp(min=1e-12).sqrt() - zy)

    minimise([theta], loss, torch.optim.Adadelta([theta], lr=lr, weight_decay=weight_decay), steps)
    return theta.detach()


def protonet(t: Tasks) -> Tensor:
    """Nearest centroid by squared Euclidean distance, the rule of ProtoNet, on the same frozen features."""
    return only(-torch.cdist(t.query, centroids(t.support, t.onehot)).square(), t)


def linear(t: Tasks, start: str, steps: int, lr: float) -> Tensor:
    """A linear layer by gradient descent on the cross-entropy.

    start "proto": W = 2c, b = -|c|^2 and plain gradient steps, the head of first-order Proto-MAML; "zero": Adam from 0.
    """
    c = centroids(t.support, t.onehot)
    if start == "proto":
        w, b = (2 * c).requires_grad_(), (-c.square().sum(-1)).requires_grad_()
        optimizer = torch.optim.SGD([w, b], lr=lr)
    else:
        w, b = torch.zeros_like(c).requires_grad_(), c.new_zeros(c.shape[:2]).requires_grad_()
        optimizer = torch.optim.Adam([w, b], lr=lr)

    def scores(x: Tensor) -> Tensor:
        return only(x @ w.transpose(-1, -2) + b.unsqueeze(1), t)

    minimise([w, b], lambda: cross_entropy(scores(t.support), t.labels), optimizer, steps)
    return scores(t.query).detach()


def cosine(t: Tasks, steps: int, lr: float) -> Tensor:
    """A cosine classifier, its weights started at the centroids, by Adam on the cross-entropy."""
    w = centroids(t.support, t.onehot).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=lr)
    minimise([w], lambda: cross_entropy(only(cosine_logits(t.support, w), t), t.labels), optimizer, steps)
    return only(cosine_logits(t.query, w), t).detach()


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of queries with the right class, per cent, [B]; padding has target -1."""
    right = (logits.argmax(-1) == targets) & (targets >= 0)
    return 100 * right.sum(-1) / (targets >= 0).sum(-1)


def cross_cosine(t: Tasks, theta: Tensor | None = None) -> Tensor:
    """Mean cosine of support images of different classes, [B]: what the paper's heat maps show."""
    z = t.support if theta is None else t.support @ theta.transpose(-1, -2)
    other = hsic.pairs(t.mask) & (hsic.same_class(t.labels) == 0)
    return (hsic.gram(z) * other).sum((-2, -1)) / other.sum((-2, -1)).clamp(min=1)
