"""What training a backbone needs: pictures by the batch, augmentation, distillation, validation, checkpoint.

Everything random is a function of (seed, step): which pictures, how they are cropped and coloured. A resumed run and
one on several processes see the same.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import checkpoints, runs
from lab.runs import UserError, sent

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import backbones
import domains
import episodes
import evaluation
import features
import heads
import hsic
import weights

RESIDENT = 2**31  # bytes of prepared pictures that are held in memory; larger domains are read anew for each batch


# --------------------------------------------------------------------------------------------------------- augmentation

# Rows: luma and two colour differences (YIQ); a turn of the last two is a change of hue.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


@functools.cache
def colours(device: torch.device) -> tuple[Tensor, Tensor]:
    """YIQ and its inverse, [3, 3] each: made once, since a step that copies or inverts waits for the device."""
    return YIQ.to(device), torch.linalg.inv(YIQ).to(device)


def augment(x: Tensor, u: Tensor) -> Tensor:
    """[B, 3, s, s] in [-1, 1] -> the same, by u [B, 6] uniform in [0, 1).

    Each picture: a crop out of 8 reflected pixels, brightness +-0.125 (of 1), contrast and saturation times 0.8 to 1.2,
    hue turned by up to 0.03 of a circle.
    """
    n, _, _, s = x.shape
    u = sent(u, x.device)
    left, top = (u[:, :2] * 17).long().clamp(max=16).T
    x = F.pad(x, (8, 8, 8, 8), mode="reflect")
    along = torch.arange(s, device=x.device)
    row, column = (top[:, None] + along)[:, None, :, None], (left[:, None] + along)[:, None, None, :]
    picture, channel = torch.arange(n, device=x.device)[:, None, None, None], torch.arange(3, device=x.device)
    x = (x[picture, channel[:, None, None], row, column] + 1) / 2
    brightness, contrast, saturation, hue = (u[:, 2:] * 2 - 1).T[..., None, None, None]
    x = x + 0.125 * brightness
    x = (x - x.mean((2, 3), keepdim=True)) * (1 + 0.2 * contrast) + x.mean((2, 3), keepdim=True)
    matrix, inverse = colours(x.device)
    y = torch.einsum("ij,njhw->nihw", matrix, x)
    angle = 2 * torch.pi * 0.03 * hue[:, 0]
    i, q = y[:, 1] * (1 + 0.2 * saturation[:, 0]), y[:, 2] * (1 + 0.2 * saturation[:, 0])
    turned = torch.stack([y[:, 0], i * angle.cos() - q * angle.sin(), i * angle.sin() + q * angle.cos()], 1)
    return torch.einsum("ij,njhw->nihw", inverse, turned).clamp(0, 1) * 2 - 1


# ------------------------------------------------------------------------------------------------------------- pictures


class Source:
    """Training pictures of a domain: held in memory as uint8 where they fit, decoded by workers otherwise."""

    def __init__(self, name: str, s, device):
        self.domain = domains.load(name, "train", runs.data_dir(s.data_dir), s.size, s.limit)
        sizes = [len(x) for x in self.domain.items]
        self.labels = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
        self.size, self.device, self.workers, self.held = s.size, device, s.workers, None
        if len(self.domain) * 3 * s.size**2 <= RESIDENT:
            loader = torch.utils.data.DataLoader(features.Pictures(self.domain, s.size), 512, num_workers=s.workers)
            self.held = torch.cat([((x + 1) * 127.5).round().byte() for x in loader]).to(device)

    def batches(self, indices: "Indices") -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures [B, 3, s, s] in [-1, 1] and labels [B], on the device, for each step."""
        if self.held is not None:
            for index in indices:
                index = torch.from_numpy(index)
                x = self.held[sent(index, self.device)].float() / 127.5 - 1
                yield x, sent(self.labels[index], self.device)
            return
        pictures = features.Pictures(self.domain, self.size)
        pin = self.device.type == "cuda"
        loader = torch.utils.data.DataLoader(pictures, batch_sampler=indices, num_workers=self.workers, pin_memory=pin)
        for index, x in zip(indices, loader, strict=True):
            yield x.to(self.device, non_blocking=True), sent(self.labels[torch.from_numpy(index)], self.device)


@dataclass(frozen=True)
class Indices:
    """Which pictures of domain `d` a process takes in the steps start .. stop - 1: a function of (seed, step, d)."""

    size: int
    count: int
    seed: int
    d: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self.start, self.stop):
            rng = np.random.default_rng([self.seed, step, self.d])
            yield rng.integers(self.size, size=self.count)[self.rank :: self.world]


def load_training(s) -> tuple[list[Source], dict[str, domains.Domain]]:
    """Training pictures and validation domains of --train; the same for all seeds."""
    device = runs.device(s.device)
    valid = {n: domains.load(n, "valid", runs.data_dir(s.data_dir), s.size, s.limit) for n in s.train if s.validate}
    return [Source(n, s, device) for n in s.train], valid


# ------------------------------------------------------------------------------------------------------- network


class Network(nn.Module):
    """Backbone, a classifier for each domain and, for distillation, an adaptor of the features for each domain."""

    def __init__(self, backbone: nn.Module, classes: list[int], distil: bool):
        super().__init__()
        self.backbone, width = backbone, backbone.width
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes)
        self.adaptors = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in classes if distil)
        for a in self.adaptors:
            nn.init.xavier_normal_(a.weight)

    def forward(self, x: Tensor, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Pictures of all domains one after another -> for each domain: features (adapted) and logits."""
        parts = self.backbone(x).float().split(sizes)
        logits = [head(f) for head, f in zip(self.heads, parts, strict=True)]
        if len(self.adaptors):
            parts = [a(f) for a, f in zip(self.adaptors, parts, strict=True)]
        return list(parts), logits


def cka_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - kernel CKA of features [n, d] and [n, d']: biased HSIC, Gaussian kernels, sigma^2 the median distance."""
    one, everyone = torch.ones((), device=a.device), torch.ones(len(a), dtype=torch.bool, device=a.device)
    K, L = (hsic.kernel("rbf", hsic.gram(x), one, everyone) for x in (a, b))
    return 1 - hsic.biased(K, L) / (hsic.biased(K, K) * hsic.biased(L, L)).clamp(min=1e-12).sqrt()


def fading(step: int, domain: str) -> float:
    """Weight of distillation: from 4 (ImageNet) or 1 linearly to 0 over 5, 2 or 1 times 48,000 steps."""
    turns = {"ilsvrc_2012": 5, "omniglot": 2, "quickdraw": 2, "fungi": 2}.get(domain, 1)
    return (4.0 if domain == "ilsvrc_2012" else 1.0) * max(0.0, 1 - step / (turns * 48_000))


class Trainer:
    """Network, optimiser, pictures and teachers of one seed. `s`: Settings of train.py."""

    def __init__(self, s, seed: int, device: torch.device, given: tuple):
        self.s, self.seed, self.device = s, seed, device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.sources, self.valid = given
        self.counts = [s.first if d == 0 else s.pictures for d in range(len(s.train))]
        uneven = [c for c in self.counts if c % self.world]
        if uneven:
            raise UserError(f"{uneven[0]} pictures a step cannot be shared evenly by {self.world} processes")
        if sum(self.counts) < 2 * self.world:
            raise UserError(
                f"{sum(self.counts)} pictures a step leave one for each of {self.world} processes; 2 at least"
            )
        torch.manual_seed(seed)
        self.model = backbones.build(s.backbone, s.size)
        if s.weights:
            weights.load(self.model, Path(s.weights))
        net = Network(self.model, [len(x.domain.classes) for x in self.sources], bool(s.teachers))
        self.net = net.to(device, memory_format=torch.channels_last)
        self.call = torch.compile(self.net) if s.compile else self.net
        self.call = DistributedDataParallel(self.call) if self.world > 1 else self.call
        main = [p for k, p in self.net.named_parameters() if not k.startswith("adaptors")]
        # The adaptors have an Adam of their own (0.1, decay 5e-4) that follows the same cosine.
        self.optimizer = Both(main, list(self.net.adaptors.parameters()), s)
        self.teachers = [self._teacher(Path(r), name) for r, name in zip(s.teachers, s.train, strict=False)]
        self.best, self.best_step, self.best_state = -1.0, 0, {}
        self.bf16 = torch.autocast(device.type, torch.bfloat16) if s.precision == "bf16" else contextlib.nullcontext()

    def _teacher(self, folder: Path, domain: str) -> Network:
        """Backbone and classifier of a finished run on this domain alone, frozen."""
        told = runs.read_json(folder / "settings.json")
        if not isinstance(told, dict) or told.get("train") != [domain]:
            raise UserError(f"--teachers: {folder} is no run of train.py on {domain} alone")
        if told["size"] != self.s.size:
            raise UserError(f"--teachers: {folder} saw pictures of size {told['size']}, not {self.s.size}")
        tensors, _ = runs.read_tensors(folder / f"seed{told['seeds'][0]}" / "model.safetensors")
        head = {k: v for k, v in tensors.items() if k.startswith("cls.")}
        if not head:
            raise UserError(f"{folder} keeps no classifier; train the teacher with this version of train.py")
        net = Network(backbones.build(told["backbone"], told["size"]), [len(head["cls.0.weight"])], False)
        state = {f"heads.{k.removeprefix('cls.')}" if k in head else f"backbone.{k}": v for k, v in tensors.items()}
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"teacher {folder}: {str(error)[:200]}") from None
        classes = self.sources[self.s.train.index(domain)].domain.classes
        if len(net.heads[0].weight) != len(classes):
            raise UserError(
                f"teacher {folder} tells {len(net.heads[0].weight)} classes apart, {domain} has {len(classes)}"
            )
        return net.to(self.device).eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """Weights of the backbone, and of the classifiers under cls. (left out when a backbone is loaded)."""
        return {**self.model.state_dict(), **{f"cls.{k}": v for k, v in self.net.heads.state_dict().items()}}

    def batches(self, start: int) -> Iterator[tuple[tuple[Tensor, Tensor], ...]]:
        """For each step from `start` on: pictures and labels of each domain, this process's share."""
        place = {"start": start, "stop": self.s.steps, "rank": self.rank, "world": self.world}
        parts = [
            x.batches(Indices(len(x.domain), n, self.seed, d, **place))
            for d, (x, n) in enumerate(zip(self.sources, self.counts, strict=True))
        ]
        return zip(*parts, strict=True)

    def loss(self, batch: list[tuple[Tensor, Tensor]], step: int) -> tuple[Tensor, Tensor]:
        """Sum over the domains of the cross-entropy (and the distillation terms), and the training accuracy in %."""
        self.net.train()
        sizes = [len(y) for _, y in batch]
        x = torch.cat([x for x, _ in batch])
        if self.s.augment:  # drawn for the pictures of all processes
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
            u = torch.rand(sum(self.counts), 6, generator=generator).split(self.counts)
            x = augment(x, torch.cat([part[self.rank :: self.world] for part in u]))
        x = x.contiguous(memory_format=torch.channels_last)
        with self.bf16:
            adapted, logits = self.call(x, sizes)
        loss, right = x.new_zeros(()), x.new_zeros(())
        for d, (_, y) in enumerate(batch):
            z = logits[d].float()
            loss = loss + F.cross_entropy(z, y)
            right = right + (z.detach().argmax(1) == y).sum()
            if self.teachers:
                weight = fading(step, self.s.train[d])
                with torch.no_grad(), self.bf16:
                    (known,), (said,) = self.teachers[d](x.split(sizes)[d], [len(y)])
                soft = F.kl_div(
                    *((z / 4).log_softmax(1), (said.float() / 4).log_softmax(1)), log_target=True, reduction="batchmean"
                )
                loss = loss + weight * (cka_loss(adapted[d].float(), known.float()) + 16 * soft)
        return loss, 100 * right / sum(sizes)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """NCC accuracy without adaptation on tasks of each domain's validation classes, %; same on all processes."""
        self.net.eval()
        out = {}
        for name, domain in self.valid.items():
            loader = torch.utils.data.DataLoader(features.Pictures(domain, self.s.size), self.s.batch)
            found = torch.cat([self.model(x.to(self.device)).float().cpu() for x in loader])
            right = []
            for k in range(self.s.validate):
                task = episodes.sample(domain.pool, self.s.sampling, 0, k)
                t = evaluation.batch(domain, found, [task], torch.device("cpu"))
                right.append(heads.accuracy(heads.ncc(t), t.targets).item())
            out[name] = float(np.mean(right))
        return out

    def keep(self, step: int, accuracy: float) -> None:
        """Remember the weights if they are the best so far; ties keep the earlier."""
        if accuracy > self.best:
            self.best, self.best_step = accuracy, step
            self.best_state = {k: v.detach().clone() for k, v in self.state().items()}

    def use_best(self) -> None:
        if self.best_state:
            self._load_state(self.best_state)

    def _load_state(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict({k: v for k, v in state.items() if not k.startswith("cls.")})
        self.net.heads.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("cls.")})

    def load_final(self, path: Path) -> None:
        tensors, meta = runs.read_weights(path)
        try:
            self._load_state(tensors)
            self.best, self.best_step = float(meta["valid"]), int(meta["step"])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path} belongs to another run ({str(error)[:200]}); delete the run") from None

    # ------------------------------------------------------------------ checkpoint: every tensor the next step reads

    def save(self, path: Path, step: int, seconds: float) -> None:
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_state.items()} | self.optimizer.state()
        meta = {"step": step, "seconds": seconds, "best": self.best, "best_step": self.best_step, "seed": self.seed}
        runs.write_tensors(path, tensors, {k: str(v) for k, v in meta.items()})

    def load(self, path: Path) -> tuple[int, float]:
        """-> (steps done, seconds spent)."""
        tensors, meta = runs.read_tensors(path)
        step, seconds = checkpoints.position(meta, "step", self.s.steps, path), checkpoints.seconds(meta, path)
        checkpoints.restore_module(self.net, {k[4:]: v for k, v in tensors.items() if k.startswith("net.")}, path)
        self.optimizer.load({k: v for k, v in tensors.items() if k.startswith("optimizer.")}, path)
        try:
            self.best, self.best_step = float(meta["best"]), int(meta["best_step"])
            if not (0 <= self.best_step <= step and -1 <= self.best <= 100):
                raise ValueError(f"best {meta['best']} at step {meta['best_step']}")
            self.best_state = {k[5:]: v.to(self.device) for k, v in tensors.items() if k.startswith("best.")}
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} belongs to another run ({str(error)[:200]}); delete it to start again") from None
        return step, seconds


class Both:
    """SGD for the network and, where there are adaptors, Adam for them; the rate of each is a multiple of one rate."""

    def __init__(self, main: list, adaptors: list, s):
        self.parts = [torch.optim.SGD(main, s.rate, s.momentum, weight_decay=s.decay)]
        if adaptors:
            self.parts.append(torch.optim.Adam(adaptors, 0.1, weight_decay=5e-4))
        for part in self.parts:
            for group in part.param_groups:
                group["scale"] = group["lr"] / s.rate

    @property
    def param_groups(self) -> list[dict]:
        return [g for part in self.parts for g in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state(self) -> dict[str, Tensor]:
        packed = {n: checkpoints.pack_optimizer(part) for n, part in enumerate(self.parts)}
        return {f"optimizer.{n}.{k}": v for n, own in packed.items() for k, v in own.items()}

    def load(self, tensors: dict[str, Tensor], place: Path) -> None:
        for n, part in enumerate(self.parts):
            head = f"optimizer.{n}."
            own = {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
            # A head whose domain was not drawn yet has no momentum.
            checkpoints.restore_optimizer(part, own, place, began=False)
