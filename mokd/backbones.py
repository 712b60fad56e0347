"""Feature extractors and their features on disk.

A backbone maps [B, 3, size, size] in [-1, 1] to [B, width]; features come after the last ReLU, so none is negative.
"""

import hashlib
import json
import os
import pickle
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from domains import Domain, prepare

NAMES = ("resnet18", "conv4", "conv4-group", "random5x5")


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; torchvision's names, which published checkpoints share."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """The ResNet-18 of SUR and URL: 5x5 first convolution of stride 2, no max-pool, for 84x84 pictures."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        self.width, first = widths[-1], widths[0]
        self.conv1 = nn.Conv2d(3, first, 5, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            layer = nn.Sequential(Block(before, width, 1 if i == 0 else 2), Block(width, width, 1))
            setattr(self, f"layer{i + 1}", layer)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return x.mean((2, 3))


class Conv4(nn.Module):
    """Four 3x3 convolutions of 64 channels, three max-pools, global average. group: GroupNorm in place of BatchNorm,
    whose statistics are those of a single picture, so that a batch can be split without changing anything."""

    def __init__(self, width: int = 64, group: bool = False):
        super().__init__()
        self.width, layers = width, []
        for i in range(4):
            norm = nn.GroupNorm(8, width) if group else nn.BatchNorm2d(width)
            layers += [nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False), norm, nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i < 3 else []
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


class Random5x5(nn.Module):
    """No training, no weights: 32 random 5x5 filters of unit norm, ReLU, average pool 8x8. For 28x28: 288 features."""

    def __init__(self):
        super().__init__()
        self.width = 288
        w = torch.randn(32, 1, 5, 5, generator=torch.Generator().manual_seed(0))
        self.register_buffer("filters", w / w.flatten(1).norm(dim=1)[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d((x[:, :1] + 1) / 2, self.filters))
        return F.avg_pool2d(x, 8).flatten(1)


class Timm(nn.Module):
    """Any timm model by name, without classifier; its own normalisation of the pictures."""

    def __init__(self, name: str, size: int):
        import timm

        super().__init__()
        known = timm.list_models(name)
        if not known:
            raise UserError(f"no backbone {name}; use one of {', '.join(NAMES)}, or the name of a timm model")
        try:  # transformers have to know the size of the pictures, convolutional networks do not take it
            self.body = timm.create_model(name, num_classes=0, img_size=size)
        except TypeError:
            self.body = timm.create_model(name, num_classes=0)
        self.width = self.body.num_features
        stats = timm.data.resolve_model_data_config(self.body)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(stats[key])[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(((x + 1) / 2 - self.mean) / self.std)


def build(name: str, size: int) -> nn.Module:
    """A backbone with new weights."""
    if name == "random5x5" and size != 28:
        raise UserError("--backbone random5x5 is made for --size 28")
    makers = {"resnet18": ResNet18, "conv4": Conv4, "random5x5": Random5x5}
    makers["conv4-group"] = lambda: Conv4(group=True)
    return makers[name]() if name in makers else Timm(name, size)


def load_weights(model: nn.Module, path: Path) -> None:
    """Weights out of .safetensors, or out of a checkpoint of URL (entry `state_dict`, classifiers named cls*)."""
    if not path.is_file():
        raise UserError(f"no weights in {path}; train.py makes some, README.md names the published ones")
    if path.suffix == ".safetensors":
        state = runs.read_tensors(path)[0]
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(f"{path} cannot be read as plain tensors ({str(error)[:200]})") from None
        state = state.get("state_dict", state)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith("cls")}
    try:
        missing, extra = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path} holds weights of another network ({str(error)[:200]})") from None
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or extra:
        word = f"has no {missing[0]}" if missing else f"has {extra[0]}, which the network does not"
        raise UserError(f"{path} holds weights of another network: it {word}")


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256(type(model).__name__.encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- features on disk


def cache_dir() -> Path:
    """$MOKD_CACHE, else data/cache beside the code."""
    return Path(os.environ.get("MOKD_CACHE") or runs.HERE / "data" / "cache")


class Pictures(torch.utils.data.Dataset):
    """Prepared pictures of a domain, by their number."""

    def __init__(self, domain: Domain, size: int):
        self.domain, self.size = domain, size

    def __len__(self) -> int:
        return len(self.domain)

    def __getitem__(self, k: int) -> Tensor:
        return prepare(self.domain.image(int(k)), self.size)


@torch.no_grad()
def _encode(model, domain: Domain, size: int, device, batch: int, workers: int, rank: int, world: int) -> dict:
    """{number of the batch: its features} of the batches rank, rank + world, ..."""
    numbers = range(rank, -(-len(domain) // batch), world)
    loader = torch.utils.data.DataLoader(
        Pictures(domain, size),
        batch_sampler=[range(i * batch, min((i + 1) * batch, len(domain))) for i in numbers],
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    bar = progress(loader, f"features of {domain.title}", hide=bool(rank), unit="batch")
    return {i: model(x.to(device, non_blocking=True)).float().cpu() for i, x in zip(numbers, bar, strict=True)}


def features(model, domain: Domain, size: int, device, batch: int = 256, workers: int = 0) -> Tensor:
    """Features [N, width] float32 on the CPU, in the order of the domain; computed once for weights and pictures.

    Several processes of one launch take every so-many-th batch; each batch is the one a single process would make.
    """
    key = json.dumps([fingerprint(model), domain.sha256, size, len(domain)])
    path = cache_dir() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    state = PartialState()
    if not broadcast_object_list([path.is_file()])[0]:  # one answer for all: the file may come to be between two looks
        was_training = model.training
        model.eval()  # running statistics: a task must not see those of its queries
        mine = _encode(model, domain, size, device, batch, workers, state.process_index, state.num_processes)
        model.train(was_training)
        pieces = [path.with_suffix(f".part{i}") for i in range(state.num_processes)]
        runs.write_tensors(pieces[state.process_index], {str(i): x for i, x in mine.items()})
        state.wait_for_everyone()
        if state.is_main_process:
            found = {int(i): x for p in pieces for i, x in runs.read_tensors(p)[0].items()}
            whole = torch.cat([found[i] for i in sorted(found)])
            if not torch.isfinite(whole).all():
                raise UserError(f"features of {domain.title} are not finite; are the weights broken?")
            runs.write_tensors(path, {"features": whole}, {"domain": domain.name})
            for piece in pieces:
                piece.unlink(missing_ok=True)
        state.wait_for_everyone()
    return runs.read_tensors(path)[0]["features"]
