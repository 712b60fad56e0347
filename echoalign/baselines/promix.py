"""ProMix (Xiao et al., IJCAI 2023): selection of clean samples that grows, in the form its authors released it.

Both networks see every batch in a weak and a strong view. Their base selection are the class-wise small losses (CSS);
in a batch it is grown by samples whose label is predicted with confidence above tau (MHCS) and, in late epochs, by
those on which both networks agree with that confidence (label guessing). The auxiliary head alone learns from the rest.
"""

import math

from lab.runs import sent

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from baselines.semi import TwoViews, mix, sharpen, soft_cross_entropy

LOWEST = 1e-3  # of the first rate, at the end of the cosine
BIAS_MOMENTUM = 0.9999
GUESS_BELOW = 0.9  # share of a batch up to which label guessing adds samples
AUXILIARY = 0.1  # weight of the rest's loss at the top of its ramp


class WithAuxiliary(nn.Module):
    """A classifier with a second head, trained on pseudo-labels too, that inference does not use."""

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


def base_selection(losses: Tensor, y: Tensor, share: float, classes: int) -> Tensor:
    """Class-wise small losses: of each noisy class the ceil(share n / classes) smallest, at least one -> bool [n]."""
    keep = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    quota = max(1, math.ceil(share * len(y) / classes))
    for k in torch.unique(y):
        mine = torch.nonzero(y == k)[:, 0]
        keep[mine[torch.argsort(losses[mine], stable=True)[:quota]]] = True
    return keep


def fmix_mask(height: int, width: int, lam: float, draw: np.random.RandomState, decay: float = 3.0) -> np.ndarray:
    """FMix (Harris et al. 2020): the brightest `lam` of a random picture whose amplitudes fall by frequency^-decay;
    [height, width] of 0 and 1, rounded up or down with equal odds."""
    f = np.sqrt(np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None] ** 2)
    amplitude = np.maximum(f, 1 / max(height, width)) ** -decay
    grey = np.fft.irfft2(amplitude * (draw.randn(*f.shape) + 1j * draw.randn(*f.shape)), (height, width)).ravel()
    n = lam * grey.size
    mask = np.zeros(grey.size, np.float32)
    mask[np.argsort(-grey, kind="stable")[: math.ceil(n) if draw.rand() > 0.5 else math.floor(n)]] = 1
    return mask.reshape(height, width)


def guessed(chosen: Tensor, p: list[Tensor], tau: float) -> Tensor:
    """Label guessing by agreement: samples outside `chosen` [b] of which both predictions p [b, C] say the same with
    more than tau, the surest first, until 0.9 of the batch is taken -> bool [b]."""
    room = int(len(chosen) * GUESS_BELOW) - chosen.sum()
    sure = [q.max(1) for q in p]
    agree = (sure[0].values > tau) & (sure[1].values > tau) & (sure[0].indices == sure[1].indices) & ~chosen
    score = torch.where(agree, sure[0].values + sure[1].values, -1.0)
    order = torch.argsort(score, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return agree & (rank < room)


class ProMix(TwoViews):
    """Settings: --promix.*."""

    @property
    def own(self):
        return self.s.promix

    def network(self, k: int) -> nn.Module:
        net = WithAuxiliary(super().network(k), self.kind.classes)
        return net.to(self.device, memory_format=torch.channels_last)

    def optimizer(self, net):  # not fused: the auxiliary head has no gradient in the warm-up
        return torch.optim.SGD(net.parameters(), self.own.lr, 0.9, weight_decay=5e-4)

    def setup(self) -> None:
        # What each network predicts on average, for the chosen samples and for the rest.
        self.buffers["bias"] = torch.full((2, 2, self.classes), 1 / self.classes, device=self.device)
        few = self.classes <= 10
        self.tau = self.own.tau if self.own.tau >= 0 else 0.99 if few else 0.95
        self.debias = self.own.debias if self.own.debias >= 0 else 0.8 if few else 0.5
        # The released code's three operations at half of the greatest strength, each left out in half of the cases.
        one = v2.RandomApply([v2.RandAugment(num_ops=1, magnitude=15, num_magnitude_bins=31)], p=0.5)
        self.random_operations = v2.Compose([one] * 3)

    def learning_rate(self, phase: str, epoch: int) -> float:
        warm = self.phases()[0].epochs
        done = epoch + (warm if phase == "main" else 0)
        cosine = 0.5 * (1 + math.cos(math.pi * done / self.s.epochs))
        return self.own.lr * (LOWEST + (1 - LOWEST) * cosine)

    def select(self, k: int) -> Tensor:
        losses = F.cross_entropy(self.predict(self.x, k=k), self.y, reduction="none")
        return base_selection(losses, self.y, self.own.rho, self.classes)

    def stronger(self, x: Tensor, seed: int) -> Tensor:
        """uint8 [n, H, W, C] -> the same after random operations, of each image its own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([self.random_operations(v.permute(2, 0, 1)).permute(1, 2, 0) for v in x])

    def epoch(self, phase: str, epoch: int, at: int) -> Tensor:
        if phase == "warmup":
            return self.warm(at)
        base = [self.select(k) for k in range(2)]
        self.train_mode()
        crops, draw = self.draws(at, 0)
        order = torch.randperm(
            len(self.y), generator=torch.Generator().manual_seed(self.generator("order", at).initial_seed())
        )
        rows = order.split(max(2, self.own.batch))
        if len(rows) > 1 and len(rows[-1]) < len(rows[0]):
            rows = rows[:-1]  # as released: a batch that is not full is left out
        total = torch.zeros(2, device=self.device)
        for i in rows:
            i = sent(i, self.device)
            loss = self.promix_step(i, [b[i] for b in base], at, crops, draw)
            for opt in self.optimizers:
                opt.zero_grad(set_to_none=True)
            loss.backward()
            for opt in self.optimizers:
                opt.step()
            total += torch.stack([loss.detach(), torch.ones_like(loss)])
        return total[0] / total[1].clamp(min=1)

    def both(self, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.s.precision == "bf16"):
            main, auxiliary = self.plain[k].both(x)
        return main.float(), auxiliary.float()

    def promix_step(self, i: Tensor, base: list[Tensor], at: int, crops, draw) -> Tensor:
        """Sum of both networks' losses on the batch i [b]; base: their base selections [b]; at: epochs so far."""
        s, bias = self.s, self.buffers["bias"]
        ramp = min(1.0, at / self.own.ramp) if self.own.ramp else 1.0
        x = self.x[i]
        weak = self.augment(x, crops)
        strong = self.augment(self.stronger(x, int(draw.randint(2**31))), crops)
        views = [(self.both(k, weak), self.both(k, strong)) for k in range(2)]
        p = [torch.softmax(v[0][0].detach(), 1) for v in views]
        one = F.one_hot(self.y[i], self.classes).float()
        chosen = [base[k] | ((p[k] * one).sum(1) > self.tau) for k in range(2)]
        labels = []
        for k in range(2):
            said = torch.softmax(views[k][0][0].detach() - self.debias * torch.log(bias[k, 0]), 1).argmax(1)
            labels.append(torch.where(chosen[k][:, None], one, F.one_hot(said, self.classes).float()))
        if at > s.epochs - self.own.expand:
            chosen = [c | guessed(c, p, self.tau) for c in chosen]
        loss = sum(self.one_network(k, weak, views[k], chosen[k], labels[k], ramp, at, draw) for k in range(2))
        for k in range(2):
            for j, mine in enumerate((chosen[k].float(), (~chosen[k]).float())):
                new = BIAS_MOMENTUM * bias[k, j] + (1 - BIAS_MOMENTUM) * (mine @ p[k]) / mine.sum().clamp(min=1)
                bias[k, j] = torch.where(mine.any(), new, bias[k, j])
        return loss

    def one_network(self, k, weak, views, chosen, labels, ramp, at, draw) -> Tensor:
        """views: ((main, auxiliary logits of the weak view), (of the strong view))."""
        # Debiased margin: a class that is predicted often must be won by more.
        margin = self.debias * torch.log(self.buffers["bias"][k])
        index = torch.nonzero(chosen)[:, 0]  # the only wait of the host: mixing needs the number of them
        loss = weak.sum() * 0
        if len(index) > 1:
            for head in range(2):
                plain, aside = (soft_cross_entropy(v[head][index] + margin[0], labels[index]) for v in views)
                more = self.mixed(k, head, weak[index], labels[index], margin[0], draw)
                loss = loss + plain + ramp * (aside + more)
        if len(index) < len(chosen):
            p = torch.softmax(views[0][0].detach() - self.debias * torch.log(self.buffers["bias"][k, 1]), 1)
            target = sharpen(p) * (~chosen)[:, None]  # the chosen ones count as nothing
            share = len(chosen) / (len(chosen) - len(index))
            plain, aside = (share * soft_cross_entropy(v[1] + margin[1], target) for v in views)
            loss = loss + self.rest_weight(at) * (plain + ramp * aside)
        return loss

    def rest_weight(self, at: int) -> float:
        """0.1 after twice the ramp, and from then on 0, as released; 1 throughout without debiasing."""
        if not self.debias:
            return 1.0
        twice = 2 * self.own.ramp
        return AUXILIARY * at / twice if at < twice else 0.0

    def mixed(self, k: int, head: int, x: Tensor, labels: Tensor, margin: Tensor, draw) -> Tensor:
        """Losses of MixUp and FMix of the chosen samples."""
        lam = draw.beta(4, 4)
        order = sent(torch.from_numpy(draw.permutation(len(x))), x.device)
        blended, soft = mix(x, labels, max(lam, 1 - lam), order)
        up = soft_cross_entropy(self.both(k, blended)[head] + margin, soft)
        lam = draw.beta(1, 1)
        mask = sent(torch.from_numpy(fmix_mask(*x.shape[2:], lam, draw)), x.device)
        order = sent(torch.from_numpy(draw.permutation(len(x))), x.device)
        logits = self.both(k, mask * x + (1 - mask) * x[order])[head] + margin
        return up + lam * soft_cross_entropy(logits, labels) + (1 - lam) * soft_cross_entropy(logits, labels[order])
