"""Baselines of one or two networks on noisy labels: loss correction, co-teaching, early-learning regularisation."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import Learner, Phase

# ------------------------------------------------------------------------------------ losses with a transition matrix

REVISION_LR = 5e-7  # of Adam, published
ANCHORS = 20  # anchor points a class of PTD


def anchor_matrix(p: Tensor, percentile: float = 97.0) -> Tensor:
    """T [C, C] from predicted noisy posteriors p [n, C]: row i is p of the sample with the highest p_i (percentile 100)
    or the one at the percentile, which is more robust (Patrini et al. 2017)."""
    rows = []
    for i in range(p.shape[1]):
        order = torch.argsort(p[:, i])
        k = len(order) - 1 if percentile >= 100 else int((len(order) - 1) * percentile / 100)
        rows.append(p[order[k]])
    t = torch.stack(rows)
    return t / t.sum(1, keepdim=True)


def forward_loss(logits: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """-log (T^T softmax(logits))_y; t [C, C], or [b, C, C] a sample."""
    p = torch.softmax(logits, 1)
    mixed = torch.einsum("bi,bij->bj", p, t) if t.dim() == 3 else p @ t
    return F.nll_loss(mixed.clamp(min=1e-12).log(), y)


def reweight_loss(logits: Tensor, y: Tensor, t: Tensor, detach: bool = True) -> Tensor:
    """mean_b w_b CE_b with w = p_y / (T^T p)_y (Liu & Tao 2016). detach: no gradient through w into the network."""
    p = torch.softmax(logits, 1)
    q = torch.einsum("bi,bij->bj", p, t) if t.dim() == 3 else p @ t
    w = p.gather(1, y[:, None])[:, 0] / q.gather(1, y[:, None])[:, 0].clamp(min=1e-12)
    each = F.cross_entropy(logits, y, reduction="none")
    return ((w.detach() if detach else w) * each).mean()


class Forward(Learner):
    """Warm up, take T from anchor points, train a fresh network with the forward-corrected loss."""

    def setup(self) -> None:
        self.buffers["t"] = torch.eye(self.classes, device=self.device)

    def phases(self) -> list[Phase]:
        return [Phase("estimate", self.s.transition.estimate_epochs), Phase("main", self.s.epochs)]

    def learning_rate(self, phase: str, epoch: int) -> float:
        return self.s.lr if phase == "estimate" else super().learning_rate(phase, epoch)

    def estimate(self) -> None:
        p = torch.softmax(self.predict(self.task.x), 1)
        self.buffers["t"] = anchor_matrix(p, self.s.transition.percentile)

    def begin(self, phase: str) -> None:
        if phase == "main":
            self.estimate()
            self.fresh()

    def fresh(self) -> None:
        self.plain[0].load_state_dict(self.network(1).state_dict())
        self.optimizers = [self.optimizer(n) for n in self.plain]

    def loss(self, i, x, y, epoch):
        if self.phase == "estimate":
            return F.cross_entropy(self.forward(0, x), y)
        return forward_loss(self.forward(0, x), y, self.buffers["t"])


class Reweight(Forward):
    """As Forward, with importance weights in the loss."""

    def loss(self, i, x, y, epoch):
        if self.phase == "estimate":
            return F.cross_entropy(self.forward(0, x), y)
        return reweight_loss(self.forward(0, x), y, self.matrix(i))

    def matrix(self, i: Tensor) -> Tensor:
        return self.buffers["t"]


class Revision(Reweight):
    """T-Revision (Xia et al. 2019): Reweight, then Adam at REVISION_LR on the network and an additive Delta T."""

    def phases(self) -> list[Phase]:
        return [*super().phases(), Phase("revise", self.s.transition.revise_epochs)]

    def begin(self, phase: str) -> None:
        super().begin(phase)
        if phase == "revise":
            self.resume(phase)

    def resume(self, phase: str) -> None:
        """The optimiser of a phase, before its state is read."""
        if phase == "revise":
            self.delta = nn.Parameter(torch.zeros_like(self.buffers["t"]))
            self.buffers.setdefault("delta", self.delta.data)
            self.optimizers = [torch.optim.Adam([*self.plain[0].parameters(), self.delta], REVISION_LR)]

    def restore(self, tensors: dict, place: Path) -> None:
        super().restore(tensors, place)
        if self.phase == "revise":
            self.delta.data.copy_(self.buffers["delta"])
            self.buffers["delta"] = self.delta.data

    def learning_rate(self, phase: str, epoch: int) -> float:
        return REVISION_LR if phase == "revise" else super().learning_rate(phase, epoch)

    def matrix(self, i: Tensor) -> Tensor:
        if self.phase != "revise":
            return self.buffers["t"]
        t = (self.buffers["t"] + self.delta).clamp(min=1e-6)
        return t / t.sum(1, keepdim=True)

    def loss(self, i, x, y, epoch):
        if self.phase != "revise":
            return super().loss(i, x, y, epoch)
        # The gradient reaches Delta T through the weight.
        return reweight_loss(self.forward(0, x), y, self.matrix(i), detach=False)


class Parts(Revision):
    """PTD (Xia et al. 2020): matrices of parts, combined per instance; then Reweight, then revision.

    Non-negative factorisation of the penultimate features gives each instance r coefficients h_i that sum to 1; part
    matrices P_j minimise |sum_j h_j(x) P_j[k] - p(.|x)|^2 over the anchor points x of each class k, and
    T(x) = sum_j h_j P_j.
    """

    def setup(self) -> None:
        super().setup()
        n = len(self.task.y)
        self.buffers["parts"] = torch.zeros(self.s.transition.parts, self.classes, self.classes, device=self.device)
        self.buffers["h"] = torch.zeros(n, self.s.transition.parts, device=self.device)

    def estimate(self) -> None:
        from sklearn.decomposition import NMF

        super().estimate()
        f = self.predict(self.task.x, features=True).clamp(min=0).cpu().numpy().astype("float64")
        f /= f.max() or 1.0
        model = NMF(self.s.transition.parts, init="nndsvda", max_iter=300, tol=1e-3, random_state=self.seed)
        h = torch.from_numpy(model.fit_transform(f)).float() + 1e-6
        self.buffers["h"] = (h / h.sum(1, keepdim=True)).to(self.device)
        p = torch.softmax(self.predict(self.task.x), 1)
        self.buffers["parts"] = part_matrices(self.buffers["h"], p, ANCHORS, self.s.transition.parts_steps, self.seed)

    def matrix(self, i: Tensor) -> Tensor:
        t = torch.einsum("br,rij->bij", self.buffers["h"][i], self.buffers["parts"])
        if self.phase == "revise":
            t = (t + self.delta).clamp(min=1e-6)
        return t / t.sum(2, keepdim=True).clamp(min=1e-12)


def part_matrices(h: Tensor, p: Tensor, anchors: int, steps: int, seed: int) -> Tensor:
    """P [r, C, C] with rows on the simplex, fitted by Adam to the posteriors p [n, C] of the `anchors` samples of each
    class with the highest p_k; h [n, r]."""
    r, c = h.shape[1], p.shape[1]
    draw = torch.Generator().manual_seed(seed)
    start = 3 * torch.eye(c) + 0.1 * torch.randn(r, c, c, generator=draw)
    z = start.to(h.device).requires_grad_(True)
    top = p.topk(min(anchors, len(p)), 0).indices.T  # [C, anchors]
    optimizer = torch.optim.Adam([z], 0.02)
    for _ in range(steps):
        parts = torch.softmax(z, 2)
        rows = torch.einsum("kar,rkj->kaj", h[top], parts)
        loss = ((rows - p[top]) ** 2).sum(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.softmax(z.detach(), 2)


# --------------------------------------------------------------------------------------------- robust single networks


def elr_loss(logits: Tensor, y: Tensor, target: Tensor, lam: float) -> Tensor:
    """CE + lam mean log(1 - <p, t>), with the targets t [b, C] after their update (Liu et al. 2020)."""
    p = torch.softmax(logits, 1).clamp(1e-4, 1 - 1e-4)
    inner = (p / p.sum(1, keepdim=True) * target).sum(1)
    return F.cross_entropy(logits, y) + lam * torch.log((1 - inner).clamp(min=1e-4)).mean()


class Elr(Learner):
    def setup(self) -> None:
        self.buffers["targets"] = torch.zeros(len(self.y), self.classes, device=self.device)
        large = self.classes > 10
        self.beta, self.lam = (0.9, 7.0) if large else (0.7, 3.0)

    def loss(self, i, x, y, epoch):
        logits = self.forward(0, x)
        with torch.no_grad():
            p = torch.softmax(logits, 1).clamp(1e-4, 1 - 1e-4)
            p = p / p.sum(1, keepdim=True)
            new = self.beta * self.buffers["targets"][i] + (1 - self.beta) * p
            self.buffers["targets"][i] = new
        return elr_loss(logits, y, new, self.lam)


def cores_values(logits: Tensor, y: Tensor, prior: Tensor, beta: float) -> Tensor:
    """CE_i - beta E_{k ~ prior} CE(h(x_i), k) a sample [b]; prior [C]: frequencies of the noisy labels. The logarithm
    is that of p + 1e-8: the second term has no lower end otherwise."""
    log = (torch.softmax(logits, 1) + 1e-8).log()
    return -log.gather(1, y[:, None])[:, 0] + beta * log @ prior


class Cores(Learner):
    """CORES^2 (Cheng et al. 2021): confidence-regularised loss; after the warm-up the sieve keeps the samples whose
    loss lies below its mean over all labels, sum_k CE(h, k) / C."""

    def setup(self) -> None:
        self.prior = torch.bincount(self.y, minlength=self.classes).float() / len(self.y)

    def beta(self, epoch: int) -> float:
        """0 before the warm-up ends, then up to --cores.beta over three times as many epochs."""
        w = max(1, self.s.cores.warmup)
        return self.s.cores.beta * min(1.0, max(0.0, (epoch - w) / (3 * w)))

    def loss(self, i, x, y, epoch):
        logits = self.forward(0, x)
        beta = self.beta(epoch)
        each = cores_values(logits, y, self.prior, beta)
        if epoch <= self.s.cores.warmup:
            return each.mean()
        keep = (cores_score(logits.detach(), y) <= 0).float()
        return (keep * each).sum() / keep.sum().clamp(min=1)


def cores_score(logits: Tensor, y: Tensor) -> Tensor:
    """CE_i - (1/C) sum_k CE(h(x_i), k): at most 0 for samples the sieve keeps."""
    log = (torch.softmax(logits, 1) + 1e-8).log()
    return -log.gather(1, y[:, None])[:, 0] + log.mean(1)


# ------------------------------------------------------------------------------------------------------- two networks


def small_loss(losses: Tensor, keep: float) -> Tensor:
    """Indices of the share `keep` of smallest losses, at least one."""
    return torch.argsort(losses)[: max(1, int(keep * len(losses)))]


class Pair(Learner):
    """Two networks; R(t) = 1 - min(t / ramp, 1) rho of each batch is kept. rho is the rate the user states; a common
    choice for asymmetric noise is half of it."""

    count = 2

    def keep(self, epoch: int) -> float:
        rho = self.s.pair.forget_rate if self.s.pair.forget_rate >= 0 else self.task.rho
        rho = rho / 2 if self.s.pair.forget_rate < 0 and self.task.noise in ("asymmetric", "pair") else rho
        return 1 - min((epoch + 1) / max(1, self.s.pair.ramp), 1.0) * rho

    def optimizer(self, net):
        if self.s.pair.optimizer == "sgd":
            return super().optimizer(net)
        return torch.optim.Adam(net.parameters(), self.s.pair.lr)

    def learning_rate(self, phase: str, epoch: int) -> float:
        if self.s.pair.optimizer == "sgd":
            return super().learning_rate(phase, epoch)
        start, end = int(0.4 * self.s.epochs), self.s.epochs  # flat, then straight down to 0 (from epoch 80 of 200)
        return self.s.pair.lr * (1.0 if epoch < start else (end - epoch) / max(1, end - start))

    def epoch(self, phase: str, epoch: int, at: int) -> Tensor:
        if self.s.pair.optimizer == "adam":
            b1 = 0.9 if epoch < int(0.4 * self.s.epochs) else 0.1
            for opt in self.optimizers:
                for group in opt.param_groups:
                    group["betas"] = (b1, 0.999)
        self.train_mode()
        total = torch.zeros(2, device=self.device)
        for i, x in self.batches(at):
            total += torch.stack([self.pair_step(x, self.y[i], epoch), torch.ones((), device=self.device)])
        return total[0] / total[1].clamp(min=1)


def coteaching_losses(z1: Tensor, z2: Tensor, y: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Each network's loss on the samples that the OTHER one finds easiest (Han et al. 2018)."""
    a, b = (F.cross_entropy(z, y, reduction="none") for z in (z1, z2))
    i1, i2 = small_loss(a.detach(), keep), small_loss(b.detach(), keep)
    return a[i2].mean(), b[i1].mean()


class CoTeaching(Pair):
    def pair_step(self, x, y, epoch):
        one, two = coteaching_losses(self.forward(0, x), self.forward(1, x), y, self.keep(epoch))
        self.step(one, 0)
        self.step(two, 1)
        return (one + two).detach() / 2


def jocor_values(z1: Tensor, z2: Tensor, y: Tensor, lam: float) -> Tensor:
    """(1 - lam)(CE1 + CE2) + lam (KL(p1|p2) + KL(p2|p1)) a sample [b] (Wei et al. 2020)."""
    l1, l2 = torch.log_softmax(z1, 1), torch.log_softmax(z2, 1)
    ce = F.nll_loss(l1, y, reduction="none") + F.nll_loss(l2, y, reduction="none")
    kl = (l1.exp() * (l1 - l2)).sum(1) + (l2.exp() * (l2 - l1)).sum(1)
    return (1 - lam) * ce + lam * kl


class JoCoR(Pair):
    def pair_step(self, x, y, epoch):
        each = jocor_values(self.forward(0, x), self.forward(1, x), y, self.s.pair.jocor_lambda)
        loss = each[small_loss(each.detach(), self.keep(epoch))].mean()
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        for opt in self.optimizers:
            opt.step()
        return loss.detach()
