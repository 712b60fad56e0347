"""What a checkpoint holds, and whether it fits. The same in every folder.

A checkpoint is read back only whole: every tensor of the right name, shape and kind, finite, and of this run. What does
not fit is refused in one line; a run that went on from it would be another run without a word.
"""

import hashlib
import json
import math
from typing import Any

from lab.cli import UserError

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def fingerprint(settings: dict, data: list[str]) -> str:
    """Of the settings that decide a run and the checksums of its data: a checkpoint of anything else is refused."""
    return hashlib.sha256(json.dumps([settings, data], sort_keys=True).encode()).hexdigest()


def misfit(place: Any, why: str) -> UserError:
    return UserError(f"{place} does not fit this run ({why}); delete it to start the run again")


def check_tensor(name: str, found: Tensor, like: Tensor, place: Any, finite: bool = True) -> None:
    """UserError unless `found` has the shape and kind of `like` and, where asked, only finite numbers."""
    if found.shape != like.shape:
        raise misfit(place, f"{name} has shape {tuple(found.shape)}, not {tuple(like.shape)}")
    if found.dtype != like.dtype:
        raise misfit(place, f"{name} is {found.dtype}, not {like.dtype}")
    if finite and found.is_floating_point() and not bool(found.isfinite().all()):
        raise misfit(place, f"{name} holds values that are not finite")


def check_tensors(
    found: dict[str, Tensor], like: dict[str, Tensor], place: Any, unbounded: tuple[str, ...] = ()
) -> None:
    """UserError unless both hold the same names, each tensor as check_tensor asks; those named `unbounded` may be
    infinite or NaN."""
    if set(like) != set(found):
        odd = sorted(set(like) ^ set(found))[0]
        raise misfit(place, f"{odd} is {'missing' if odd in like else 'not part of it'}")
    for name, value in found.items():
        check_tensor(name, value, like[name], place, name not in unbounded)


def restore_module(module: nn.Module, tensors: dict[str, Tensor], place: Any) -> None:
    """load_state_dict after a look at every tensor."""
    check_tensors(tensors, module.state_dict(), place)
    module.load_state_dict(tensors)


def pack_optimizer(optimizer: Optimizer) -> dict[str, Tensor]:
    """{"<index of the parameter>.<key>": tensor}, the state alone; parameters are counted over all groups."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, own in state.items() for key, value in own.items()}


def state_keys(optimizer: Optimizer) -> set[str]:
    """What the state of each parameter has to hold."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer"} if group["momentum"] else set()
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
    raise TypeError(f"no checkpoint of {type(optimizer).__name__} is known")


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], place: Any, began: bool = True) -> None:
    """The state that pack_optimizer gave goes back through `optimizer.load_state_dict`, which puts each tensor where it
    is needed: a fused optimiser asks for its step counters on the parameters' device. `began`: steps were made, so each
    parameter that learns has to have a state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys, state = state_keys(optimizer), {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        if not index.isdigit() or int(index) >= len(parameters) or key not in keys:
            raise misfit(place, f"{name} is not part of the optimiser")
        state.setdefault(int(index), {})[key] = value
    for i, own in state.items():
        if set(own) != keys:
            raise misfit(place, f"the optimiser's {sorted(keys - set(own))[0]} of parameter {i} is missing")
        for key, value in own.items():
            like = torch.zeros(()) if key == "step" else parameters[i].detach()
            check_tensor(f"the optimiser's {key} of parameter {i}", value, like, place)
            if key != "step":  # in the parameter's memory format, else the next fused step is another sum
                own[key] = torch.empty_like(like).copy_(value)
            if key in ("step", "exp_avg_sq", "max_exp_avg_sq") and bool((value < 0).any()):
                raise misfit(place, f"the optimiser's {key} of parameter {i} is negative")
    bare = [i for i, p in enumerate(parameters) if p.requires_grad and i not in state]
    if began and keys and bare:
        raise misfit(place, f"the optimiser's state of parameter {bare[0]} is missing")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def position(meta: dict[str, str], key: str, last: int, place: Any) -> int:
    """A whole number of the checkpoint's metadata, from 0 to `last`: the epoch or step it stands at."""
    try:
        value = int(meta[key])
    except (KeyError, ValueError):
        raise misfit(place, f"{key} is missing or no whole number") from None
    if not 0 <= value <= last:
        raise misfit(place, f"{key} is {value}, outside 0 to {last}")
    return value


def seconds(meta: dict[str, str], place: Any, key: str = "seconds") -> float:
    """Time that earlier starts took, out of the metadata."""
    try:
        value = float(meta[key])
    except (KeyError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise misfit(place, f"{key} is missing or no time")
    return value
