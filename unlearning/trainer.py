"""The training loop of fine-tuning and unlearning alike: accumulation, clipping, schedule, checkpoints, several
processes."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lab import checkpoints, runs
from lab.progress import progress
from lab.runs import UserError

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from data import generator
from models import LM, set_weights, weights

Precision = Literal["fp32", "mixed"]
Optimizer = Literal["adamw", "paged32", "paged8"]
LOG_EVERY = 10  # steps between lines of metrics.jsonl
FLUSH_SECONDS = 30.0  # at least so long between two waits for the device in which lines are written


def schedule(step: int, total: int, warmup: int) -> float:
    """Share of the learning rate in step 0, 1, ...: linear from 0 over `warmup` steps, then linear to 0 after
    `total`."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def steps_of(epochs: int, n: int, batch: int, accum: int) -> tuple[int, int]:
    """(steps in all, warm-up steps): floor(epochs * n / (batch * accum)), and one epoch of them, at least 1 each."""
    return max(epochs * n // (batch * accum), 1), max(n // (batch * accum), 1)


def check_steps(steps: int) -> None:
    if steps < 2:
        raise UserError(
            "training would be a single step, whose learning rate is 0; choose more epochs or items, or "
            "smaller --train-batch, --train-accum, --batch or --accum"
        )


def block(step: int, size: int, n: int, seed: int, stream: str) -> list[tuple[int, int]]:
    """The (epoch, item) pairs of a step: the items are shuffled anew each epoch and the epochs read one after the
    other, so that a step may lie across two of them. A function of its arguments alone: a resumed run sees the same."""
    out = []
    for place in range(step * size, (step + 1) * size):
        epoch, at = divmod(place, n)
        out.append((epoch, at))
    orders = {e: torch.randperm(n, generator=generator(seed, stream, e)).tolist() for e in {e for e, _ in out}}
    return [(e, orders[e][at]) for e, at in out]


def by_size(index: Sequence, length: Callable[..., int], parts: int) -> list[list]:
    """Split what a step sees into `parts` micro-batches of like length; which items it sees does not change."""
    order = sorted(index, key=length)
    size = len(order) // parts
    return [order[k * size : (k + 1) * size] for k in range(parts)]


class Trainer:
    """A model with its optimizer. `micro(step, k)` gives the loss of micro-batch k of a step and what to log of it.
    `alone`: this process trains by itself, whatever other processes there are."""

    def __init__(
        self, lm: LM, accelerator: Accelerator, *, lr: float, steps: int, warmup: int, accum: int,
        weight_decay: float = 0.0, clip: float = 1.0, optimizer: Optimizer = "adamw",
        trained: Callable[[str], bool] | None = None, compiled: bool = False, alone: bool = False,
    ):  # fmt: skip
        self.lm, self.accelerator = lm, accelerator
        self.lr, self.steps, self.warmup, self.accum, self.clip = lr, steps, warmup, accum, clip
        self.world, self.rank = (1, 0) if alone else (accelerator.num_processes, accelerator.process_index)
        if accum % self.world:
            raise UserError(f"--accum {accum} micro-batches cannot be shared by {self.world} processes")
        check_steps(steps)
        self.device = accelerator.device
        for key, p in lm.named_parameters():
            p.requires_grad_(trained is None or trained(key))
        chosen = [p for p in lm.parameters() if p.requires_grad]
        self.optimizer = self.make(optimizer, chosen, lr, weight_decay)
        self.sharded = not alone and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.spread = self.world > 1 or self.sharded
        if self.spread:
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                # No data loader goes through `prepare`, so DeepSpeed has to be told the size of a micro-batch.
                accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
            self.model, self.optimizer = accelerator.prepare(lm, self.optimizer)
        else:
            self.model = lm
        self.call = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.step, self.before = 0, 0.0

    @staticmethod
    def make(kind: Optimizer, parameters: list, lr: float, weight_decay: float):
        if kind == "adamw":
            return torch.optim.AdamW(
                parameters, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True
            )
        try:
            import bitsandbytes
        except ImportError:
            raise UserError(f"--optimizer {kind} needs the package bitsandbytes: pip install bitsandbytes") from None
        make = {"paged32": bitsandbytes.optim.PagedAdamW32bit, "paged8": bitsandbytes.optim.PagedAdamW8bit}[kind]
        return make(parameters, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)

    def update(self, micro: Callable[[int, int], tuple[Tensor, dict]]) -> dict[str, Tensor]:
        """One optimizer step; returns means of what the micro-batches log, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * schedule(self.step, self.steps, self.warmup)
        mine = range(self.rank, self.accum, self.world)
        logged: dict[str, Tensor] = {}
        for place, k in enumerate(mine):
            last = place == len(mine) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps inside the backward pass
            wait = self.accelerator.no_sync(self.model) if self.spread and not last else contextlib.nullcontext()
            with wait:
                with self.lm.autocast():
                    loss, parts = micro(self.step, k)
                for key, value in {"loss": loss, **parts}.items():
                    logged[key] = logged.get(key, 0) + value.detach() / len(mine)
                (self.accelerator.backward if self.spread else torch.Tensor.backward)(loss / len(mine))
        clip = self.accelerator.clip_grad_norm_ if self.spread else torch.nn.utils.clip_grad_norm_
        norm = clip(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return logged | ({} if norm is None else {"grad_norm": torch.as_tensor(norm)})

    def fit(
        self, micro: Callable[[int, int], tuple[Tensor, dict]], path: Path | None = None, *, every: int = 0,
        title: str = "", log: Callable[[list[dict]], None] | None = None, after: Callable[[int], bool] | None = None,
        look: Callable[[int], dict] | None = None,
    ) -> float:  # fmt: skip
        """Run to the last step; a checkpoint at `path` every `every` steps (0: never inside). `after(step)` may end the
        run by True; what `look(step)` returns goes into a line of the log. Returns the seconds spent, those of earlier
        starts included."""
        started, lines, total = time.perf_counter(), [], torch.zeros((), device=self.device)
        flushed = started
        lead = self.accelerator.is_main_process

        def flush() -> None:
            if not math.isfinite(float(total)):  # every step counts, not only those with a line
                raise UserError(
                    f"{title}: the loss or its gradient is not a finite number in a step up to {self.step}; the last "
                    "checkpoint before it is kept; lower the learning rate"
                )
            rows = [{k: v if isinstance(v, int | float) else float(v) for k, v in line.items()} for line in lines]
            if log and lead and rows:
                log(rows)
            lines.clear()

        self.lm.train()
        bar = progress(range(self.step, self.steps), title, self.steps, self.step, hide=not lead)
        for _ in bar:
            logged = self.update(micro)
            total += sum(0 * logged[k].float().to(self.device) for k in ("loss", "grad_norm") if k in logged)
            self.step += 1
            seen = look(self.step) if look else {}
            if seen or self.step % LOG_EVERY == 0 or self.step == self.steps:
                rate = self.lr * schedule(self.step - 1, self.steps, self.warmup)
                lines.append({"step": self.step, "lr": rate, **logged, **seen})
            saves = bool(every) and self.step % every == 0
            if saves or self.step == self.steps or (lines and time.perf_counter() - flushed > FLUSH_SECONDS):
                flush()
                flushed = time.perf_counter()
            if saves and path is not None and self.step < self.steps:
                self.save(path, self.before + time.perf_counter() - started)
            if after is not None and after(self.step):
                break
        flush()
        self.lm.eval()
        return self.before + time.perf_counter() - started

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def save(self, path: Path, seconds: float) -> None:
        """Weights, moments and the step. Data order and draws are functions of seed and step, so no generator is
        kept."""
        meta = {"step": str(self.step), "seconds": str(seconds)}
        if (
            self.sharded
        ):  # the states of a sharded model are written by its library, beside the place of the single file
            folder, new = path.with_suffix(""), path.with_suffix(".new")
            self.accelerator.save_state(str(new))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                runs.write_json(new / "step.json", meta)
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
            return self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return None
        tensors = {f"model.{k}": v for k, v in weights(self.lm).items()}
        tensors |= {f"adam.{k}": v for k, v in checkpoints.pack_optimizer(self.plain_optimizer).items()}
        return runs.write_tensors(path, tensors, meta)

    @property
    def plain_optimizer(self):
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def load(self, path: Path) -> bool:
        """Go on from a checkpoint if there is one."""
        if self.sharded:
            folder = path.with_suffix("")
            if not (folder / "step.json").is_file():
                return False
            self.accelerator.load_state(str(folder))
            meta = runs.read_json(folder / "step.json")
        elif path.is_file():
            tensors, meta = runs.read_weights(path)
            set_weights(self.lm, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, path)
            own = {k.removeprefix("adam."): v for k, v in tensors.items() if k.startswith("adam.")}
            began = checkpoints.position(meta, "step", self.steps, path) > 0
            checkpoints.restore_optimizer(self.plain_optimizer, own, path, began)
        else:
            return False
        self.step = checkpoints.position(meta, "step", self.steps, path)
        self.before = checkpoints.seconds(meta, path)
        return True

    def full_weights(self) -> dict[str, Tensor]:
        """The whole model's weights, gathered when it is sharded (on the first process only)."""
        if not self.sharded:
            return {k: v.clone() for k, v in weights(self.lm).items()}
        names = self.names
        return {k: v for k, v in self.accelerator.get_state_dict(self.model).items() if k in names}

    @property
    def names(self) -> set[str]:
        return {k for k, _ in self.accelerator.unwrap_model(self.model).named_parameters()}
