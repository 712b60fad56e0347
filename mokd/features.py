"""Features of a domain's pictures, kept on disk.

The file is named by everything that decides a feature: the network (its name, weights and normalisation), the pictures
(checksum, size, how many), precision, the versions of the libraries and this folder's code that prepares and encodes.
"""

import hashlib
import json
import os
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from domains import Domain, prepare

CODE = ("backbones.py", "domains.py", "features.py", "readers.py")  # what prepares and encodes a picture


def cache_dir() -> Path:
    """$MOKD_CACHE, else data/cache beside the code."""
    return Path(os.environ.get("MOKD_CACHE") or runs.HERE / "data" / "cache")


def described(model: nn.Module) -> str:
    """Checksum of all that makes the network: its modules with their options (two networks of one architecture may
    differ in padding or activation alone), parameters, and all buffers, such as the normalisation of the pictures."""
    digest = hashlib.sha256(repr(model).encode())
    for key, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def key(model: nn.Module, name: str, domain: Domain, size: int, device: torch.device, batch: int) -> str:
    """Name of the file, 32 characters."""
    import timm

    code = [hashlib.sha256((runs.HERE / file).read_bytes()).hexdigest() for file in CODE]
    parts = [
        name,
        described(model),
        domain.name,
        domain.sha256,
        domain.stamp,
        len(domain),
        size,
        "float32",
        device.type,
        batch,
    ]
    parts += [torch.__version__, timm.__version__, *code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Pictures(torch.utils.data.Dataset):
    """Prepared pictures of a domain, by their number."""

    def __init__(self, domain: Domain, size: int):
        self.domain, self.size = domain, size

    def __len__(self) -> int:
        return len(self.domain)

    def __getitem__(self, k: int) -> Tensor:
        return prepare(self.domain.image(int(k)), self.size)


@torch.no_grad()
def encode(
    model: nn.Module, domain: Domain, size: int, device, batch: int, workers: int, rank: int, world: int
) -> dict:
    """{number of the batch: its features} of the batches rank, rank + world, ... The model is in channels_last."""
    numbers = range(rank, -(-len(domain) // batch), world)
    loader = torch.utils.data.DataLoader(
        Pictures(domain, size),
        batch_sampler=[range(i * batch, min((i + 1) * batch, len(domain))) for i in numbers],
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    bar = progress(loader, f"features of {domain.title}", hide=bool(rank), unit="batch")
    out = {}
    for i, x in zip(numbers, bar, strict=True):
        x = x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        out[i] = model(x).float().cpu()
    return out


def features(
    model: nn.Module, name: str, domain: Domain, size: int, device, batch: int = 256, workers: int = 0
) -> Tensor:
    """Features [N, width] float32 on the CPU, in the order of the domain; computed once. `name`: the backbone's.

    Several processes of one launch take every so-many-th batch; each batch is the one a single process would make.
    """
    model = model.to(memory_format=torch.channels_last)
    path = cache_dir() / f"{key(model, name, domain, size, device, batch)}.safetensors"
    state = PartialState()
    if not broadcast_object_list([path.is_file()])[0]:  # one answer for all: the file may come to be between two looks
        was_training = model.training
        model.eval()  # running statistics: a task must not see those of its queries
        mine = encode(model, domain, size, device, batch, workers, state.process_index, state.num_processes)
        model.train(was_training)
        pieces = [path.with_suffix(f".part{i}") for i in range(state.num_processes)]
        runs.write_tensors(pieces[state.process_index], {str(i): x for i, x in mine.items()})
        state.wait_for_everyone()
        if state.is_main_process:
            found = {int(i): x for p in pieces for i, x in runs.read_tensors(p)[0].items()}
            whole = torch.cat([found[i] for i in sorted(found)])
            if not torch.isfinite(whole).all():
                raise UserError(f"features of {domain.title} are not finite; are the weights broken?")
            if len(whole) > 1 and (whole == whole[0]).all():
                raise UserError(f"features of {domain.title} are the same for all pictures; are the weights broken?")
            runs.write_tensors(path, {"features": whole}, {"domain": domain.name})
            for piece in pieces:
                piece.unlink(missing_ok=True)
        state.wait_for_everyone()
    return runs.read_tensors(path)[0]["features"]
