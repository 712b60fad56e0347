"""Out of settings: models (random, pretrained, with the weights of an earlier stage or of a finished run) and documents
(scenes, the paper's sets below the data folder, given files)."""

import hashlib
from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch

import recipe
from documents import readers
from model import Deem
from scenes.digits import digits
from scenes.photos import photos
from scenes.pretrain import base
from scenes.world import SceneReader, World
from settings import Settings
from streams import stream, torch_seed


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
    if s.preset == s.dataset and not s.init:  # the parts of --preset digits and photos
        base(model, world_of(s), s, seed)
    if s.init:
        read_weights(model, Path(s.init) / f"seed{seed}" / "model.safetensors", s)
    return model


def read_weights(model: Deem, path: Path, s: Settings, whole: bool = False) -> None:
    """Weights of a run on top of the model; parts that the stage does not load are left out. `whole`: the file must
    hold every weight that comes from nowhere else."""
    tensors, _ = runs.read_weights(path)
    own = dict(model.named_parameters())
    lost = {k for k in tensors if k not in own and not k.startswith(("denoiser.", "condition_head.", "context_"))}
    wrong = lost | {k for k, v in tensors.items() if k in own and own[k].shape != v.shape}
    if wrong:
        raise UserError(f"{path} is of another model ({min(wrong)}); use the --preset it was trained with")
    missing = {k for k in own if k not in tensors and made_here(model, k)}
    if whole and missing:
        raise UserError(f"{path} lacks {min(missing)}; train the run again")
    with torch.no_grad():
        for k, v in tensors.items():
            if k in own:
                own[k].copy_(v)


def made_here(model: Deem, name: str) -> bool:
    """Whether a parameter of a small model is kept with a run although the run does not train it: what comes out of a
    package or a folder is not."""
    return not (isinstance(model.p.llm, str) and recipe.part_of(name) in recipe.SPEECH)


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


# ------------------------------------------------------------------------------------------------------------ documents

PLACES = {
    1: ("deem/mmc4", "deem/blip-lcs"),
    2: ("deem/llava/llava_v1_5_mix665k.json", "deem/llava/images"),
    3: ("deem/regions", "deem/regions/images"),
}


def world_of(s: Settings) -> World:
    return digits() if s.dataset == "digits" else photos(runs.data_dir(s.data_dir))


def reader(s, seed: int, accelerator):
    """The endless reader of a run; every process reads its own part."""
    rank, world = accelerator.process_index, accelerator.num_processes
    if s.on_scenes:
        return SceneReader(world_of(s), seed, s.stage, n=s.scenes.count, rank=rank, world_size=world)
    more = {"seed": seed, "rank": rank, "world": world, "broken": s.broken}
    if s.dataset == "files":
        return of_files(s, [Path(f).expanduser() for f in s.files], more)
    folder = runs.data_dir(s.data_dir)
    first, second = (folder / p for p in PLACES[s.stage])
    if s.stage == 1:
        pages = shards(
            first, "*.jsonl*", "MMC4-core shards docs_no_face_shard_*_v3.jsonl and images/ (github.com/allenai/mmc4)"
        )
        pairs = shards(
            second, "*.tar", "tar shards of LAION, CC12M and SBU with BLIP captions (github.com/salesforce/BLIP)"
        )
        both = [readers.mmc4(pages, first / "images", **more), readers.captions_webdataset(pairs, **more)]
        return readers.Mixture(both, [2, 1], seed=seed + rank)
    if s.stage == 2:
        if not first.is_file():
            raise UserError(f"no file {first}; fetch it from huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K")
        return readers.llava665k(first, second, form=s.prompt_form, **more)
    found = shards(first, "*.json", "region instructions as Osprey prepares them (github.com/CircleRadon/Osprey)")
    parts = [readers.regions(f, second, form=s.prompt_form, **more) for f in found]
    return parts[0] if len(parts) == 1 else readers.Mixture(parts, [1] * len(parts), seed=seed + rank)


def of_files(s, files: list[Path], more: dict):
    for f in files:
        if not f.is_file():
            raise UserError(f"--files: no file {f}")
    root = Path(s.image_root).expanduser() if s.image_root else files[0].parent
    if s.files_kind == "webdataset":
        return readers.captions_webdataset(files, **more)
    if s.files_kind == "parquet":
        return readers.captions_parquet(files, image_root=root, **more)
    if s.files_kind == "mmc4":
        return readers.mmc4(files, root, **more)
    make = readers.llava665k if s.files_kind == "llava" else readers.regions
    parts = [make(f, root, form=s.prompt_form, **more) for f in files]
    return parts[0] if len(parts) == 1 else readers.Mixture(parts, [1] * len(parts), seed=more["seed"] + more["rank"])


def shards(folder: Path, pattern: str, origin: str) -> list[Path]:
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if not found:
        raise UserError(f"no {pattern} in {folder}; place {origin} there, or give another --data-dir")
    return found


def title(s) -> str:
    if s.on_scenes:
        return {"digits": "digit scenes", "photos": "photo scenes"}[s.dataset]
    return {"paper": {1: "MMC4 + BLIP-LCS", 2: "LLaVA-665K", 3: "regions"}[s.stage], "files": "files"}[s.dataset]


def data_of(s, seed: int) -> dict:
    """The record's `data`. Files are told by name and size: whole they would take hours to read."""
    if s.on_scenes:
        world = world_of(s)
        made = world.make(s.scenes.count, stream(seed, "scenes"), world.train)
        digest = hashlib.sha256(made.images.tobytes() + made.cells.tobytes()).hexdigest()
        return {"name": world.title, "variant": world.variant, "sha256": digest, "n": len(made)}
    places = [Path(f).expanduser() for f in s.files] or [runs.data_dir(s.data_dir) / p for p in PLACES[s.stage]]
    files = [f for p in places for f in (sorted(p.iterdir()) if p.is_dir() else [p]) if f.is_file()]
    digest = hashlib.sha256("\n".join(f"{f.name} {f.stat().st_size}" for f in files).encode()).hexdigest()
    return {"name": title(s), "variant": "paper" if s.dataset == "paper" else "own files", "sha256": digest, "n": 0}
