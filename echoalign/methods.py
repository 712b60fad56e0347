"""EchoAlign's classifier: trained on the aligned set, then tuned on the selected originals; and the small-loss warm-up:
how hard each image is for a fresh classifier on noisy labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

import echoselect
from trainer import Learner, Phase


class Echo(Learner):
    """Weighted loss on D_mix, then fine-tuning on the selected originals with the optimiser as it is."""

    def setup(self) -> None:
        self.c = self.task.c.to(self.device)
        weights = echoselect.loss_weights(self.task.c)
        weights = {"cross": weights, "swapped": weights.flip(0), "equal": torch.ones(2)}[self.s.weighting]
        self.weights = weights.to(self.device)
        self.tune = self.task.tune.x.to(self.device), self.task.tune.y.to(self.device)

    def phases(self) -> list[Phase]:
        return [Phase("main", self.s.epochs), Phase("finetune", self.s.finetune if len(self.tune[0]) > 1 else 0)]

    def learning_rate(self, phase: str, epoch: int) -> float:
        return super().learning_rate("main", epoch if phase == "main" else self.s.epochs)  # as the schedule left it

    def loss(self, i, x, y, epoch):
        return echoselect.weighted_loss(self.forward(0, x), y, self.c[i], self.weights, self.s.normalise)

    def epoch(self, phase: str, epoch: int, at: int) -> Tensor:
        if phase == "main":
            return super().epoch(phase, epoch, at)
        self.train_mode()
        x_all, y_all = self.tune
        total = torch.zeros(2, device=self.device)
        for i, x in self.batches(at, x=x_all):
            loss = F.cross_entropy(self.forward(0, x), y_all[i])
            self.step(loss)
            total += torch.stack([loss.detach(), torch.ones_like(loss)])
        return total[0] / total[1].clamp(min=1)


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
