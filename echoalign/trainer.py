"""The training loop every classifier here goes through: phases of epochs, exact resume, evaluation.

A method is a `Learner`: networks, optimisers and named buffers, and `loss`. All that an epoch draws comes from
generators seeded with (seed, stream, epoch): order, augmentation and the method's own draws are separate streams, and
a run that was cut starts its epoch again and ends with the same weights.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab import checkpoints, runs
from lab.progress import progress
from lab.runs import UserError, sent

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from features import to_input
from readers import Kind, Part

DECAY, MOMENTUM = 0.1, 0.9  # of SGD, released code
TEST_BATCH = 500  # images a batch in evaluation
STREAMS = {"order": 1, "crop": 2, "method": 3, "official": 4}


def stream_seed(seed: int, stream: str, epoch: int) -> int:
    return (seed + 1) * 1_000_000_007 + STREAMS[stream] * 10_000_019 + epoch


def crop_and_flip(x: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """uint8 [n, H, W, C] -> the same: random crop of the zero-padded image, random mirror."""
    n, h, w, _ = x.shape
    draw = torch.rand(3, n, generator=generator, device=x.device)
    if pad:
        x = F.pad(x, (0, 0, pad, pad, pad, pad))
        top = (draw[0] * (2 * pad + 1)).long()[:, None] + torch.arange(h, device=x.device)
        left = (draw[1] * (2 * pad + 1)).long()[:, None] + torch.arange(w, device=x.device)
        if flip:
            left = torch.where((draw[2] < 0.5)[:, None], left.flip(1), left)
        return x[torch.arange(n, device=x.device)[:, None, None], top[:, :, None], left[:, None, :]]
    return torch.where((draw[2] < 0.5)[:, None, None, None], x.flip(2), x) if flip else x


@dataclass
class Task:
    """What a method learns from. x uint8 [n, H, W, C], or features [n, D] for a head; y noisy labels; c: class flag (1:
    modified image); `test` has true labels; `val`: images and noisy labels, looked at and never used."""

    x: Tensor
    y: Tensor
    test: Part
    kind: Kind
    c: Tensor | None = None
    tune: Part | None = None
    """Selected originals of the fine-tuning."""
    val: Part | None = None
    rho: float = 0.0
    noise: str = ""


@dataclass
class Phase:
    name: str
    epochs: int


@dataclass
class Learner:
    """Base: one network, cross-entropy. `s`: Settings of settings.py."""

    s: object
    task: Task
    seed: int
    device: torch.device
    nets: list[nn.Module] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    count = 1  # networks
    phase = ""

    def __post_init__(self):
        self.classes = self.task.kind.classes
        self.kind = self.task.kind
        self.x, self.y = self.task.x.to(self.device), self.task.y.to(self.device)
        for k in range(self.count):
            self.nets.append(self.network(k))
        self.plain = list(self.nets)
        if self.s.compile:
            self.nets = [torch.compile(n) for n in self.nets]
        self.optimizers = [self.optimizer(n) for n in self.plain]
        self.setup()

    # -------------------------------------------------------------------------------------------- what methods override

    def setup(self) -> None:
        """Make buffers, tensors [..] that a checkpoint must hold."""

    def phases(self) -> list[Phase]:
        return [Phase("main", self.s.epochs)]

    def begin(self, phase: str) -> None:
        """Called when a phase starts, before its first epoch."""

    def loss(self, i: Tensor, x: Tensor, y: Tensor, epoch: int) -> Tensor:
        """The loss of a batch: i index in the training set [b], x float [b, C, H, W], y [b]; called per batch."""
        return F.cross_entropy(self.forward(0, x), y)

    def learning_rate(self, phase: str, epoch: int) -> float:
        """For an epoch of a phase."""
        s = self.s
        return s.lr * DECAY ** sum(epoch >= m for m in s.milestones)

    def logits(self, x: Tensor) -> Tensor:
        """For evaluation; several networks add theirs."""
        return sum(self.forward(k, x) for k in range(len(self.nets)))

    # -------------------------------------------------------------------------------------------------------- machinery

    def network(self, k: int) -> nn.Module:
        torch.manual_seed(self.seed * 1009 + k)
        net = models.build(self.s.model, self.kind.classes, self.x.shape[-1], self.kind.mean, self.kind.std)
        return net.to(self.device, memory_format=torch.channels_last)

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        s = self.s
        return torch.optim.SGD(net.parameters(), s.lr, MOMENTUM, weight_decay=s.weight_decay, fused=True)

    def forward(self, k: int, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.s.precision == "bf16"):
            return self.nets[k](x).float()

    def generator(self, stream: str, epoch: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(stream_seed(self.seed, stream, epoch))

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if x.dim() == 2:  # features of whole images
            return to_input(x)
        return to_input(crop_and_flip(x, self.kind.pad, self.kind.flip, generator))

    def batches(self, epoch: int, index: Tensor | None = None, x: Tensor | None = None, salt: int = 0) -> Iterator:
        """(index, augmented images) of one epoch over `index` (None: all) in random order; the last batch is kept."""
        x = self.x if x is None else x
        index = torch.arange(len(x)) if index is None else index
        draw = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch) + 7_919 * salt)
        order = index[torch.randperm(len(index), generator=draw)]
        crops = torch.Generator(self.device).manual_seed(stream_seed(self.seed, "crop", epoch) + 7_919 * salt)
        for i in order.split(self.s.batch):
            # A last batch of one image has no batch statistics worth the name: it goes with none.
            if len(i) == 1 and len(order) > 1:
                continue
            at = sent(i, self.device)
            yield at, self.augment(x[at], crops)

    def step(self, loss: Tensor, k: int = 0) -> None:
        self.optimizers[k].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[k].step()

    def train_mode(self, on: bool = True) -> None:
        for net in self.plain:
            net.train(on)

    def epoch(self, phase: str, epoch: int, at: int) -> Tensor:
        """One epoch (`epoch` inside its phase, `at` over all); the mean loss as a tensor on the device."""
        self.train_mode()
        total = torch.zeros(2, device=self.device)
        for i, x in self.batches(at):
            loss = self.loss(i, x, self.y[i], epoch)
            self.step(loss)
            total += torch.stack([loss.detach(), torch.ones_like(loss)])
        return total[0] / total[1].clamp(min=1)

    @torch.no_grad()
    def predict(self, x: Tensor, features: bool = False, k: int | None = None) -> Tensor:
        """Logits (of network k, or of all together) or features of uint8 images, eval mode, no augmentation."""
        modes = [n.training for n in self.plain]
        self.train_mode(False)
        out = []
        for part in x.split(TEST_BATCH):
            v = to_input(part.to(self.device))
            if features:
                out.append(self.plain[k or 0].features(v).float())
            else:
                out.append(self.logits(v) if k is None else self.forward(k, v))
        for net, mode in zip(self.plain, modes, strict=True):
            net.train(mode)
        return torch.cat(out)

    def accuracy(self, part: Part, augmented_seed: int | None = None) -> float:
        """Per cent. augmented_seed: on images cropped and flipped as in training, the released code's protocol."""
        x = part.x
        if augmented_seed is not None and x.dim() == 4:
            draw = torch.Generator(x.device).manual_seed(augmented_seed)
            kind = self.kind
            x = torch.cat([crop_and_flip(v, kind.pad, kind.flip, draw) for v in x.split(TEST_BATCH)])
        logits = self.predict(x)
        if not torch.isfinite(logits).all():
            raise UserError("the network's outputs are not finite numbers; train it again with a lower --lr")
        return 100 * float((logits.argmax(1).cpu() == part.y).double().mean())

    def state(self) -> dict[str, Tensor]:
        out = {f"buffer.{k}": v for k, v in self.buffers.items()}
        for k, (net, opt) in enumerate(zip(self.plain, self.optimizers, strict=True)):
            out |= {f"net{k}.{n}": v for n, v in net.state_dict().items()}
            out |= {f"opt{k}.{name}": v for name, v in checkpoints.pack_optimizer(opt).items()}
        return out

    def restore(self, tensors: dict[str, Tensor], place: Path) -> None:
        for k, (net, opt) in enumerate(zip(self.plain, self.optimizers, strict=True)):
            head = f"net{k}."
            own = {n[len(head) :]: v for n, v in tensors.items() if n.startswith(head)}
            checkpoints.restore_module(net, own, place)
            moved = {n.partition(".")[2]: v for n, v in tensors.items() if n.startswith(f"opt{k}.")}
            checkpoints.restore_optimizer(opt, moved, place, began=False)  # a phase may begin with a new optimiser
        for name, v in tensors.items():
            if name.startswith("buffer."):
                self.buffers[name[7:]] = v.to(self.device)


def fit(
    learner: Learner,
    checkpoint: Path,
    log: Callable[[list[dict], int | None], None] | None = None,
    show: bool = True,
    label: str = "",
    after: Callable[[Learner, int], None] | None = None,
) -> tuple[list[dict], float]:
    """Train to the end; (a line an epoch, seconds). Goes on from `checkpoint` when it is there.

    log(lines, keep_to): writes lines; keep_to drops later ones of an interrupted start. after(learner, epoch): called
    after every epoch, before the checkpoint (its results must lie in learner.buffers).
    """
    s, phases = learner.s, learner.phases()
    steps = [(p.name, e) for p in phases for e in range(p.epochs)]
    curve: list[dict] = []
    first, before, waiting = 0, 0.0, []
    if checkpoint.is_file():
        tensors, meta = runs.read_tensors(checkpoint)
        try:
            first = checkpoints.position(meta, "epoch", len(steps), checkpoint)
            before, curve = checkpoints.seconds(meta, checkpoint), runs.json.loads(meta["curve"])
            if not isinstance(curve, list) or not all(isinstance(line, dict) for line in curve):
                raise ValueError("its curve is no list of epochs")
            learner.phase = meta["phase"]
            learner.resume(meta["phase"]) if hasattr(learner, "resume") else None
            learner.restore(tensors, checkpoint)
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            text = str(error)[:160]
            raise UserError(f"{checkpoint} belongs to another run ({text}); delete it to start again") from None
        print(f"resuming {label} at epoch {first}")
    if log:
        log([], first)
    started, seen = time.perf_counter(), "-"
    bar = progress(range(first, len(steps)), label, len(steps), first, hide=not show)
    for at in bar:
        phase, epoch = steps[at]
        if phase != learner.phase:
            learner.phase = phase
            learner.begin(phase)
        rate = learner.learning_rate(phase, epoch)
        for opt in learner.optimizers:
            for group in opt.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
        loss = float(learner.epoch(phase, epoch, at))
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of {label} is not a finite number in epoch {at + 1}; the checkpoint before it is kept; "
                "lower --lr"
            )
        row = {"step": at + 1, "epoch": at + 1, "loss": loss, "lr": rate, "main": int(phase != "finetune")}
        last = at + 1 == len(steps)
        ends = last or steps[at + 1][0] != phase
        if ends or (at + 1) % s.eval_every == 0 or len(steps) - at <= s.eval_last:
            row["accuracy"] = learner.accuracy(learner.task.test)
            if s.official_eval:
                row["accuracy_official"] = learner.accuracy(
                    learner.task.test, stream_seed(learner.seed, "official", at)
                )
            if learner.task.val is not None:
                row["val_accuracy"] = learner.accuracy(learner.task.val)
        if after:
            after(learner, at)
        curve.append(row)
        waiting.append(row)
        seen = f"{row['accuracy']:.1f}%" if "accuracy" in row else seen
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=seen)
        if last or ends or (at + 1) % s.checkpoint_every == 0:
            if log:
                log(waiting, None)
            waiting = []
            seconds = before + time.perf_counter() - started
            told = {"epoch": str(at + 1), "seconds": str(seconds), "curve": runs.json.dumps(curve), "phase": phase}
            runs.write_tensors(checkpoint, learner.state(), told)
    return curve, before + time.perf_counter() - started
