"""The small-loss warm-up: how hard each image is for a fresh classifier on noisy labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import Learner, Phase


class WarmUp(Learner):
    """A fresh classifier on noisy originals at a constant rate; the mean of the epochs' losses of each sample."""

    every: Tensor  # all images, the held-out ones too
    labels: Tensor

    def setup(self) -> None:
        n = len(self.labels)
        self.buffers |= {"sum": torch.zeros(n, device=self.device), "last": torch.zeros(n, device=self.device)}

    def phases(self) -> list[Phase]:
        return [Phase("warmup", self.s.small_loss_epochs)]

    def learning_rate(self, phase: str, epoch: int) -> float:
        return self.s.lr

    def epoch(self, phase: str, epoch: int, at: int) -> Tensor:
        out = super().epoch(phase, epoch, at)
        loss = F.cross_entropy(self.predict(self.every), self.labels.to(self.device), reduction="none")
        self.buffers["sum"] += loss
        self.buffers["last"] = loss
        return out
