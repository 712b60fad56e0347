"""DivideMix, and what it shares with ProMix (promix.py), in the loop of trainer.py."""

import math

from lab.runs import sent

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import Tensor

from trainer import Learner, Phase


def scaled(losses: Tensor) -> Tensor:
    """Min-max to [0, 1], float64; zeros when all are equal."""
    v = losses.double()
    return (v - v.min()) / (v.max() - v.min()).clamp(min=1e-12)


def clean_probability(v: Tensor) -> Tensor:
    """Posterior of the low-mean component of a two-component GMM on scaled losses [n] -> [n]; 1/2 everywhere when all
    losses are equal."""
    v = v.double().cpu()
    if not torch.isfinite(v).all() or float(v.max() - v.min()) < 1e-12:
        return torch.full_like(v, 0.5)
    gmm = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(v.numpy()[:, None])
    return torch.from_numpy(gmm.predict_proba(v.numpy()[:, None])[:, int(gmm.means_[:, 0].argmin())].copy())


def sharpen(p: Tensor, temperature: float = 0.5) -> Tensor:
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def mix(x: Tensor, y: Tensor, lam: float, order: Tensor) -> tuple[Tensor, Tensor]:
    """MixUp of a batch with itself in another order."""
    return lam * x + (1 - lam) * x[order], lam * y + (1 - lam) * y[order]


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * torch.log_softmax(logits, 1)).sum(1).mean()


def unlabelled_weight(s, rho: float, noise: str) -> float:
    """--divide.lambda-u; where that is -1: 0 for asymmetric noise and 20 % symmetric, 150 from 80 % on, else 25."""
    if s.divide.lambda_u >= 0:
        return s.divide.lambda_u
    if noise == "asymmetric" or noise == "symmetric" and rho <= 0.2:
        return 0.0
    return 150.0 if rho >= 0.8 else 25.0


class TwoViews(Learner):
    """Shared by both: losses over the training set and batches of several augmentations."""

    count = 2

    @property
    def own(self):
        """The options of this method."""
        return self.s.divide

    def learning_rate(self, phase: str, epoch: int) -> float:
        return self.own.lr * (0.1 if phase == "main" and epoch >= self.s.epochs // 2 else 1.0)

    def phases(self) -> list[Phase]:
        warm = min(self.own.warmup, max(1, self.s.epochs - 1))
        return [Phase("warmup", warm), Phase("main", self.s.epochs - warm)]

    def losses(self, k: int) -> Tensor:
        """CE [n] of network k on the training images, no augmentation."""
        return F.cross_entropy(self.predict(self.x, k=k), self.y, reduction="none")

    def draws(self, at: int, k: int) -> tuple[torch.Generator, np.random.RandomState]:
        """(generator of augmentation, generator of mixing) of an epoch and network."""
        base = self.generator("method", at).initial_seed() + 104_729 * k
        return torch.Generator(self.device).manual_seed(base), np.random.RandomState(base % 2**32)

    def shuffled(self, index: Tensor, at: int, k: int, salt: int, n: int) -> list[Tensor]:
        """n batches of `index` [at least 2], cycling through random orders of it; a last batch of one image, which has
        no batch statistics, is left out."""
        out, turn = [], 0
        size = max(2, self.own.batch)
        while len(out) < n:
            g = torch.Generator().manual_seed(
                self.generator("order", at).initial_seed() + 31 * k + 17 * salt + 977 * turn
            )
            order = index.cpu()[torch.randperm(len(index), generator=g)]
            out += [sent(b, self.device) for b in order.split(size) if len(b) > 1]
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
        return torch.optim.SGD(net.parameters(), self.own.lr, 0.9, weight_decay=5e-4, fused=True)

    def setup(self) -> None:
        if self.task.rho >= 0.9:  # losses differ little then: each division is made from those of five epochs
            self.buffers["history"] = torch.full((2, 5, len(self.y)), math.nan, device=self.device)

    def division(self, k: int) -> Tensor:
        """Probability [n] that a label is right, from network k."""
        v = scaled(self.losses(k))
        if "history" in self.buffers:
            past = self.buffers["history"]
            past[k] = torch.cat([past[k, 1:], v[None].to(past)])
            v = past[k].nanmean(0)
        return clean_probability(v).float().to(self.device)

    def epoch(self, phase: str, epoch: int, at: int) -> Tensor:
        if phase == "warmup":
            return self.warm(at)
        w = [self.division(k) for k in range(2)]
        self.train_mode()
        total = torch.zeros(2, device=self.device)
        for k in range(2):
            if k == 1:  # the second network is divided by the first one as it was before this epoch
                self.train_mode()
            chance = w[1 - k]
            labelled = torch.nonzero(chance > self.own.threshold)[:, 0]
            rest = torch.nonzero(chance <= self.own.threshold)[:, 0]
            if len(labelled) < 2:
                labelled = torch.argsort(chance, descending=True)[: max(2, len(chance) // 10)]
            size = max(2, self.own.batch)
            n = len(labelled) // size + (len(labelled) % size > 1)
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
        order = sent(torch.from_numpy(draw.permutation(len(everything))), self.device)
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
