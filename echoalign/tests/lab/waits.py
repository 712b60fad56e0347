"""What makes the host wait for a GPU, seen without one: the same in every folder of the workspace."""

import traceback

from lab.cli import HERE

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host has to read before it can go on: a number, the size of an output, an error code.
READ = ("_local_scalar_dense", "nonzero", "masked_select", "_linalg_check_errors", "bincount", "_unique2", "unique_dim")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Host(torch.Tensor):
    """x.as_subclass(Host): a tensor that lies on the host, whatever is made of it too; reading it is no wait."""


class Waits(TorchDispatchMode):
    """with Waits() as found: step() -> found.places lists each wait by file and line of the folder. A copy between host
    and device is not seen: there is no device."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = args[1] if name in INDEXED else ()
        if isinstance(args[0] if args else None, Host) or any(isinstance(m, Host) for m in masks):
            return function(*args, **(kwargs or {}))
        if name in READ or any(m is not None and m.dtype in (torch.bool, torch.uint8) for m in masks):
            here = [
                f for f in traceback.extract_stack() if f.filename.startswith(str(HERE)) and ".venv" not in f.filename
            ]
            here = [f for f in here if "/tests/" not in f.filename]
            self.places.append(
                f"{here[-1].filename.removeprefix(str(HERE) + '/')}:{here[-1].lineno} {name}" if here else name
            )
        return function(*args, **(kwargs or {}))
