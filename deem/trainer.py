"""What a step of any stage is: rows out of documents, accumulation, schedule, clipping; checkpoints and processes."""

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import checkpoints, runs
from lab.runs import UserError

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor

import recipe
from documents import sequences
from documents.sequences import Batch, Packer
from model import Deem
from streams import torch_seed
from vision.views import two_views


def schedule(step: int, total: int, warmup: int) -> float:
    """Share of the rate in step 0, 1, ...: linear over `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def accelerator_of(device: torch.device) -> Accelerator:
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=[DistributedDataParallelKwargs()])


class Feeder:
    """Micro-batches out of a reader of documents; its place is the reader's, kept in the checkpoint."""

    def __init__(self, s, model: Deem, reader, seed: int, rank: int):
        self.s, self.p, self.tok, self.reader, self.seed, self.rank = s, model.p, model.tok, reader, seed, rank
        limits = (model.tok, model.p.per_image, s.max_tokens, s.max_images, s.stage > 1)
        self.packer = Packer(*limits) if s.max_tokens else None
        self.pool = ThreadPoolExecutor(s.workers) if s.workers else None

    def batch(self, step: int, k: int) -> Batch:
        """Micro-batch k of a step; what is random in it besides the documents is a function of seed, step, k, rank."""
        if self.packer:
            rows = [self.packer.row(self.reader) for _ in range(self.s.batch)]
        else:
            rows = [sequences.encode(next(self.reader).parts, self.tok, self.p.per_image) for _ in range(self.s.batch)]
        b, pictures = sequences.collate(rows, self.tok)
        rng = random.Random(torch_seed(self.seed, "views", step, k, self.rank))
        tosses = [random.Random(rng.getrandbits(62)) for _ in pictures]
        made = list((self.pool.map if self.pool else map)(self.views, pictures, tosses))
        if made:
            b.images, b.targets = (torch.stack(x) for x in zip(*made, strict=True))
            b.masks = self.masks(pictures)
        return b

    def views(self, picture, rng: random.Random) -> tuple[Tensor, Tensor]:
        sizes = (self.p.resolution, self.p.decoder_resolution)
        return two_views(picture.load(), sizes, crop=self.s.stage == 1, flip=self.s.flip, rng=rng)

    def masks(self, pictures: list) -> Tensor | None:
        found = [getattr(p, "mask", None) for p in pictures]
        if self.s.stage < 3 or all(m is None for m in found):
            return None
        side = (self.p.resolution, self.p.resolution)
        out = []
        for m in found:
            full = torch.ones(1, 1, *side) if m is None else torch.as_tensor(m)[None, None].float()
            out.append(torch.nn.functional.interpolate(full, side, mode="nearest")[0, 0])
        return torch.stack(out)


class Trainer:
    """A model with its optimizer and its feeder; `step` counts optimizer steps."""

    def __init__(self, s, model: Deem, feeder: Feeder, accelerator: Accelerator, seed: int):
        self.s, self.model, self.feeder, self.accelerator, self.seed = s, model, feeder, accelerator, seed
        model.freeze(s.stage, s.variant)
        self.groups = model.trainable_groups(s.stage, s.variant, rates=s.rates())
        self.rates = [g["lr"] for g in self.groups]
        self.names = [g.pop("name") for g in self.groups]
        betas, eps = ((0.9, 0.995), 1e-6) if s.stage == 1 else ((0.9, 0.999), 1e-8)
        self.optimizer = torch.optim.AdamW(self.groups, betas=betas, eps=eps, fused=True)
        if s.checkpointing:
            model.checkpointing()
        if s.compile and model.denoiser is not None:
            model.denoiser.unet.compile()
        kind = accelerator.distributed_type
        self.sharded = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.spread = accelerator.num_processes > 1 or self.sharded
        self.call = model
        if self.spread:
            if kind == DistributedType.DEEPSPEED:
                # No data loader goes through `prepare`, so DeepSpeed has to be told the size of a micro-batch.
                accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = s.batch
            self.call, self.optimizer = accelerator.prepare(model, self.optimizer)
        dev = accelerator.device.type
        self.autocast = torch.autocast(dev, torch.bfloat16) if s.precision == "bf16" else contextlib.nullcontext()
        self.step, self.before = 0, 0.0

    def modes(self) -> None:
        """Training mode; a frozen trunk's drop-path is off but in the code's form."""
        self.model.train()
        if not self.s.drop_paths and "trunk" not in recipe.trained(self.s.stage, self.s.variant):
            self.model.encoder.trunk.eval()
        if self.model.denoiser is not None:
            self.model.denoiser.latents.eval()

    def update(self) -> dict[str, Tensor]:
        """One optimizer step; means of the losses over its micro-batches, on the device."""
        share = schedule(self.step, self.s.steps, self.s.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        rank, logged = self.accelerator.process_index, {}
        for k in range(self.s.accum):
            b = self.feeder.batch(self.step, k).to(self.accelerator.device)
            # Dropout and drop-path draw from torch's own stream: it starts anew for each micro-batch, so that a resumed
            # run draws the same.
            torch.manual_seed(torch_seed(self.seed, "dropout", self.step, k, rank))
            last = k == self.s.accum - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps inside the backward pass
            wait = self.accelerator.no_sync(self.call) if self.spread and not last else contextlib.nullcontext()
            with wait:
                with self.autocast:
                    out = self.call(b, torch_seed(self.seed, "noise", self.step, k, rank))
                if not getattr(out.get("total"), "requires_grad", False):
                    raise UserError(
                        "nothing to learn: every loss of this stage has weight 0, or the rows hold no image"
                    )
                for key, value in out.items():
                    logged[key] = logged.get(key, 0) + value.detach() / self.s.accum
                (self.accelerator.backward if self.spread else Tensor.backward)(out["total"] / self.s.accum)
        chosen = [p for g in self.optimizer.param_groups for p in g["params"]]
        clip = self.accelerator.clip_grad_norm_ if self.spread else torch.nn.utils.clip_grad_norm_
        norm = clip(self.call.parameters() if self.sharded else chosen, self.s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return logged | ({} if norm is None else {"grad_norm": torch.as_tensor(norm)})

    # ------------------------------------------------------------------------------------------------------ checkpoint

    @property
    def plain_optimizer(self):
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def trained_names(self) -> dict[str, Tensor]:
        return {k: p for k, p in self.model.named_parameters() if p.requires_grad}

    def save(self, path: Path, seconds: float) -> None:
        """Trained weights, moments, the step and each process's place in its data."""
        place = path.with_suffix(f".rank{self.accelerator.process_index}.json")
        meta = {"step": str(self.step), "seconds": str(seconds)}
        if self.sharded:
            folder, new = path.with_suffix(""), path.with_suffix(".new")
            self.accelerator.save_state(str(new))
            runs.write_json(new / place.name, self.feeder.reader.state())
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                runs.write_json(new / "step.json", meta)
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
            return self.accelerator.wait_for_everyone()
        states = self.gathered(self.feeder.reader.state())
        if not self.accelerator.is_main_process:
            return None
        tensors = {f"model.{k}": v for k, v in self.trained_names().items()}
        tensors |= {f"adam.{k}": v for k, v in checkpoints.pack_optimizer(self.plain_optimizer).items()}
        return runs.write_tensors(path, tensors, meta | {"readers": json.dumps(states)})

    def gathered(self, value) -> list:
        if self.accelerator.num_processes == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def load(self, path: Path) -> bool:
        """Go on from a checkpoint if there is one; UserError for one that is damaged, of another run, or of another
        number of processes: these share the documents, so each place in them holds for that number alone."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        folder = path.with_suffix("")
        place = path if not self.sharded else folder
        if not (path if not self.sharded else folder / "step.json").is_file():
            return False
        try:
            if self.sharded:
                before = len(list(folder.glob("*.rank*.json")))
                meta, tensors = runs.read_json(folder / "step.json"), {}
            else:
                tensors, meta = runs.read_tensors(path)
                before = len(states := json.loads(meta["readers"]))
            if before != world:
                raise UserError(
                    f"{place} was written by {before} processes, this start has {world}; start as many again"
                )
            if self.sharded:
                self.accelerator.load_state(str(folder))
                state = runs.read_json(folder / path.with_suffix(f".rank{rank}.json").name)
            else:
                self.take(tensors, place)
                state = states[rank]
            self.feeder.reader.restore(state)
            self.step = checkpoints.position(meta, "step", self.s.steps - 1, place)
            if not self.step:
                raise checkpoints.misfit(place, "no step was made")
            self.before = checkpoints.seconds(meta, place)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{place} belongs to another run ({error}); delete it to start the run again") from None
        return True

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor], place: Path) -> None:
        """Weights and moments of a checkpoint; UserError for one that does not fit."""
        own = self.trained_names()
        given = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        checkpoints.check_tensors(given, own, place)
        for k, p in own.items():
            p.copy_(given[k])
        moments = {k.removeprefix("adam."): v for k, v in tensors.items() if not k.startswith("model.")}
        checkpoints.restore_optimizer(self.plain_optimizer, moments, place)

    def weights(self, kept: Callable[[str], bool]) -> dict[str, Tensor]:
        """What a run keeps: what it trains, and what `kept` says by its name."""
        if self.sharded:
            full = self.accelerator.get_state_dict(self.call)
            keep = {k for k, p in self.accelerator.unwrap_model(self.call).named_parameters() if p.requires_grad}
            return {k: v for k, v in full.items() if k in keep or kept(k)}
        return {k: p for k, p in self.model.named_parameters() if p.requires_grad or kept(k)}
