"""Models out of settings and out of finished runs: random, pretrained, or with the weights of an earlier stage."""

from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch

import recipe
from digits.pretrain import base
from model import Deem
from settings import Settings
from streams import torch_seed


def build(s: Settings, seed: int, device: torch.device) -> Deem:
    """The model of a stage before training: random parts from the seed, pretrained ones from their sources, what --init
    trained on top."""
    torch.manual_seed(torch_seed(seed, "weights"))
    dtype = torch.bfloat16 if s.precision == "bf16" and not s.small else torch.float32
    folder = runs.data_dir(s.data_dir) / "weights"
    model = Deem(s.parts(), folder=folder, download=s.download, dtype=dtype, diffusion=s.stage < 3, loss=s.loss())
    chosen = recipe.trained(s.stage, s.variant)
    for name, p in model.named_parameters():  # what trains keeps float32 weights
        if recipe.part_of(name) in chosen:
            p.data = p.data.float()
    model.to(device)
    if s.preset == "digits" and not s.init:
        base(model, s, seed)
    if s.init:
        read_weights(model, Path(s.init) / f"seed{seed}" / "model.safetensors", s)
    return model


def read_weights(model: Deem, path: Path, s: Settings, whole: bool = False) -> None:
    """Weights of a run on top of the model; parts that the stage does not load are left out. `whole`: the file must
    hold every weight."""
    tensors, _ = runs.read_weights(path)
    own = dict(model.named_parameters())
    lost = {k for k in tensors if k not in own and not k.startswith(("denoiser.", "condition_head.", "context_"))}
    wrong = lost | {k for k, v in tensors.items() if k in own and own[k].shape != v.shape}
    if wrong:
        raise UserError(f"{path} is of another model ({min(wrong)}); use the --preset it was trained with")
    if whole and {*own} - {*tensors}:
        raise UserError(f"{path} lacks {min({*own} - {*tensors})}; train the run again")
    with torch.no_grad():
        for k, v in tensors.items():
            if k in own:
                own[k].copy_(v)


def load_run(folder, device, seed: int | None = None) -> tuple[Deem, Settings]:
    """(model in eval mode, settings) of a run written by train.py; UserError when it is not there."""
    folder = Path(folder)
    s = settings_of(folder)
    seed = s.seeds[0] if seed is None else seed
    path = folder / f"seed{seed}" / "model.safetensors"
    if not path.is_file():
        raise UserError(f"no file {path}; train the run first")
    s.init = s.init if not s.small else ""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if s.precision == "bf16" and not s.small else torch.float32
    place = runs.data_dir(s.data_dir) / "weights"
    model = Deem(s.parts(), folder=place, dtype=dtype, diffusion=s.stage < 3, loss=s.loss()).to(device)
    read_weights(model, path, s, whole=s.small)
    return model.eval(), s


def settings_of(folder: Path) -> Settings:
    """Settings of a run; UserError for a file that train.py of this version did not write."""
    return runs.settings_from(folder / "settings.json", Settings)


def inherited(s: Settings, seed: int) -> dict:
    """Weights that an earlier stage trained and this one did not touch: a run's file holds both."""
    if not s.init:
        return {}
    return runs.read_weights(Path(s.init) / f"seed{seed}" / "model.safetensors")[0]
