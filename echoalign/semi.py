"""The two semi-supervised baselines, DivideMix and ProMix, in the loop of trainer.py."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from trainer import Learner, Phase


def clean_probability(losses: Tensor) -> Tensor:
    """Posterior of the low-mean component of a two-component GMM on min-max scaled losses [n] -> [n]; 1/2 everywhere
    when all losses are equal."""
    v = losses.double().cpu()
    if not torch.isfinite(v).all() or float(v.max() - v.min()) < 1e-12:
        return torch.full_like(v, 0.5)
    v = ((v - v.min()) / (v.max() - v.min())).numpy()[:, None]
    gmm = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(v)
    return torch.from_numpy(gmm.predict_proba(v)[:, int(gmm.means_[:, 0].argmin())].copy())


def sharpen(p: Tensor, temperature: float = 0.5) -> Tensor:
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def mix(x: Tensor, y: Tensor, lam: float, order: Tensor) -> tuple[Tensor, Tensor]:
    """MixUp of a batch with itself in another order."""
    return lam * x + (1 - lam) * x[order], lam * y + (1 - lam) * y[order]


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * torch.log_softmax(logits, 1)).sum(1).mean()


def unlabelled_weight(s, rho: float, noise: str) -> float:
    """lambda_u where --lambda-u is -1: 0 for asymmetric noise and for 20 % symmetric, 150 from 80 % on, else 25."""
    if s.lambda_u >= 0:
        return s.lambda_u
    if noise == "asymmetric" or noise == "symmetric" and rho <= 0.2:
        return 0.0
    return 150.0 if rho >= 0.8 else 25.0


class TwoViews(Learner):
    """Shared by both: losses over the training set and batches of several augmentations."""

    count = 2

    def learning_rate(self, phase: str, epoch: int) -> float:
        return self.s.semi_lr * (0.1 if phase == "main" and epoch >= self.s.epochs // 2 else 1.0)

    def phases(self) -> list[Phase]:
        warm = min(self.s.warmup, max(1, self.s.epochs - 1))
        return [Phase("warmup", warm), Phase("main", self.s.epochs - warm)]

    def losses(self, k: int) -> Tensor:
        """CE [n] of network k on the training images, no augmentation."""
        return F.cross_entropy(self.predict(self.x, k=k), self.y, reduction="none")

    def draws(self, at: int, k: int) -> tuple[torch.Generator, np.random.RandomState]:
        """(generator of augmentation, generator of mixing) of an epoch and network."""
        base = self.generator("method", at).initial_seed() + 104_729 * k
        return torch.Generator(self.device).manual_seed(base), np.random.RandomState(base % 2**32)

    def shuffled(self, index: Tensor, at: int, k: int, salt: int, n: int) -> list[Tensor]:
        """n batches of `index`, cycling through random orders of it."""
        out, turn = [], 0
        size = max(2, self.s.semi_batch)
        while len(out) < n:
            g = torch.Generator().manual_seed(
                self.generator("order", at).initial_seed() + 31 * k + 17 * salt + 977 * turn
            )
            order = index.cpu()[torch.randperm(len(index), generator=g)]
            out += [b.to(self.device) for b in order.split(size)]
            turn += 1
        return out[:n]

    def warm(self, at: int) -> Tensor:
        self.train_mode()
        total = torch.zeros(2, device=self.device)
        for k in range(2):
            for i, x in self.batches(at, salt=k):
                logits = self.forward(k, x)
                loss = F.cross_entropy(logits, self.y[i])
                if self.task.noise in ("asymmetric", "pair", "instance"):  # confident too early: penalised
                    p = torch.softmax(logits, 1)
                    loss = loss + (p * torch.log(p.clamp(min=1e-8))).sum(1).mean()
                self.step(loss, k)
                total += torch.stack([loss.detach(), torch.ones_like(loss)])
        return total[0] / total[1]


class DivideMix(TwoViews):
    """Li et al. (2020): each network trains on the division the other one makes."""

    def optimizer(self, net):
        s = self.s
        return torch.optim.SGD(net.parameters(), s.semi_lr, 0.9, weight_decay=5e-4, fused=True)

    def epoch(self, phase: str, epoch: int, at: int) -> Tensor:
        if phase == "warmup":
            return self.warm(at)
        w = [clean_probability(self.losses(k)).float().to(self.device) for k in range(2)]
        self.train_mode()
        total = torch.zeros(2, device=self.device)
        for k in range(2):
            if k == 1:  # the second network is divided by the first one as it was before this epoch
                self.train_mode()
            chance = w[1 - k]
            labelled = torch.nonzero(chance > self.s.divide_threshold)[:, 0]
            rest = torch.nonzero(chance <= self.s.divide_threshold)[:, 0]
            if len(labelled) < 2:
                labelled = torch.argsort(chance, descending=True)[: max(2, len(chance) // 10)]
            n = -(-len(labelled) // max(2, self.s.semi_batch))
            crops, draw = self.draws(at, k)
            b_l = self.shuffled(labelled, at, k, 0, n)
            b_u = self.shuffled(rest, at, k, 1, n) if len(rest) > 1 else [None] * n
            for j, (i, u) in enumerate(zip(b_l, b_u, strict=True)):
                ramp = min(1.0, max(0.0, (epoch + j / n) / 16))
                loss = self.mixmatch(k, i, u, chance[i], crops, draw, ramp)
                self.step(loss, k)
                total += torch.stack([loss.detach(), torch.ones_like(loss)])
        return total[0] / total[1].clamp(min=1)

    def mixmatch(self, k, i, u, chance, crops, draw, ramp) -> Tensor:
        x = [self.augment(self.x[i], crops) for _ in range(2)]
        with torch.no_grad():
            p = sum(torch.softmax(self.forward(k, v), 1) for v in x) / 2
            one = F.one_hot(self.y[i], self.classes).float()
            target = sharpen(chance[:, None] * one + (1 - chance[:, None]) * p)
            views, guesses = [], []
            if u is not None:
                views = [self.augment(self.x[u], crops) for _ in range(2)]
                q = sum(torch.softmax(self.forward(net, v), 1) for v in views for net in (k, 1 - k)) / 4
                guesses = [sharpen(q)] * 2
        everything, targets = torch.cat([*x, *views]), torch.cat([target, target, *guesses])
        lam = draw.beta(4, 4)
        lam = max(lam, 1 - lam)
        order = torch.from_numpy(draw.permutation(len(everything))).to(self.device)
        mixed, soft = mix(everything, targets, lam, order)
        logits = self.forward(k, mixed)
        n = 2 * len(i)
        loss = soft_cross_entropy(logits[:n], soft[:n])
        if u is not None:
            weight = unlabelled_weight(self.s, self.task.rho, self.task.noise) * ramp
            loss = loss + weight * ((torch.softmax(logits[n:], 1) - soft[n:]) ** 2).mean()
        mean = torch.softmax(logits, 1).mean(0)
        prior = torch.full_like(mean, 1 / self.classes)
        return loss + (prior * torch.log(prior / mean.clamp(min=1e-12))).sum()


class WithAuxiliary(nn.Module):
    """A classifier with a second head, trained on pseudo-labels, that inference does not use."""

    def __init__(self, net: nn.Module, classes: int):
        super().__init__()
        self.net, self.auxiliary = net, nn.Linear(net.head.in_features, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.net.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.net.features(x)
        return self.net.head(f), self.auxiliary(f)


def base_selection(losses: Tensor, y: Tensor, share: float) -> Tensor:
    """Class-wise small losses: of each noisy class at most share n / C samples, the smallest -> bool [n]."""
    keep = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    classes = torch.unique(y)
    quota = int(share * len(y) / max(1, len(classes)))
    for k in classes:
        mine = torch.nonzero(y == k)[:, 0]
        keep[mine[torch.argsort(losses[mine], stable=True)[:quota]]] = True
    return keep


class ProMix(TwoViews):
    """Xiao et al. (2023): class-wise small losses, grown by samples whose label is predicted with confidence above tau;
    supervised MixUp on those, debiased pseudo-labels for the auxiliary head on the rest."""

    def network(self, k: int) -> nn.Module:
        net = WithAuxiliary(super().network(k), self.kind.classes)
        return net.to(self.device, memory_format=torch.channels_last)

    def optimizer(self, net):  # not fused: the auxiliary head has no gradient in the warm-up
        return torch.optim.SGD(net.parameters(), self.s.semi_lr, 0.9, weight_decay=5e-4)

    def setup(self) -> None:
        self.buffers["bias"] = torch.full((2, self.classes), 1 / self.classes, device=self.device)
        self.tau = self.s.promix_tau if self.s.promix_tau >= 0 else 0.99 if self.classes <= 10 else 0.95

    def learning_rate(self, phase: str, epoch: int) -> float:
        warm = self.phases()[0].epochs
        done = epoch + (warm if phase == "main" else 0)
        return self.s.semi_lr * 0.5 * (1 + math.cos(math.pi * done / self.s.epochs))

    def select(self, k: int) -> Tensor:
        logits = self.predict(self.x, k=k)
        base = base_selection(F.cross_entropy(logits, self.y, reduction="none"), self.y, self.s.promix_rho)
        p = torch.softmax(logits, 1)
        confident = (p.amax(1) > self.tau) & (p.argmax(1) == self.y)
        return base | confident

    def epoch(self, phase: str, epoch: int, at: int) -> Tensor:
        if phase == "warmup":
            return self.warm(at)
        chosen = [self.select(k) for k in range(2)]
        self.train_mode()
        total = torch.zeros(2, device=self.device)
        for k in range(2):
            crops, draw = self.draws(at, k)
            index = torch.nonzero(chosen[1 - k])[:, 0]
            rest = torch.nonzero(~chosen[1 - k])[:, 0]
            n = -(-len(index) // max(2, self.s.semi_batch))
            b_u = self.shuffled(rest, at, k, 1, n) if len(rest) > 1 else [None] * n
            for i, u in zip(self.shuffled(index, at, k, 0, n), b_u, strict=True):
                loss = self.promix_step(k, i, u, crops, draw)
                self.step(loss, k)
                total += torch.stack([loss.detach(), torch.ones_like(loss)])
        return total[0] / total[1].clamp(min=1)

    def promix_step(self, k, i, u, crops, draw) -> Tensor:
        x = self.augment(self.x[i], crops)
        one = F.one_hot(self.y[i], self.classes).float()
        lam = draw.beta(4, 4)
        order = torch.from_numpy(draw.permutation(len(i))).to(self.device)
        mixed, soft = mix(x, one, max(lam, 1 - lam), order)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.s.precision == "bf16"):
            main, _ = self.plain[k].both(x)
            blended, _ = self.plain[k].both(mixed)
        loss = F.cross_entropy(main.float(), self.y[i]) + soft_cross_entropy(blended.float(), soft)
        if u is None:
            return loss
        weak, strong = self.augment(self.x[u], crops), self.augment(self.x[u], crops)
        with torch.no_grad():
            logits = self.forward(k, weak)
            bias = self.buffers["bias"][k]
            self.buffers["bias"][k] = 0.9999 * bias + 0.0001 * torch.softmax(logits, 1).mean(0)
            p = torch.softmax(logits - self.s.promix_debias * torch.log(bias), 1)
            sure, guess = p.max(1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.s.precision == "bf16"):
            _, aside = self.plain[k].both(strong)
        # debiased margin: frequent pseudo-labels must be won by a larger margin
        aside = aside.float() + self.s.promix_debias * torch.log(self.buffers["bias"][k])
        each = F.cross_entropy(aside, guess, reduction="none")
        return loss + (each * (sure > self.tau).float()).mean()
