"""The fine-tuned originals: data, model and reference of a seed, trained once and shared by the runs that need them."""

import copy
import datetime
import fcntl
import hashlib
import json
from pathlib import Path

from lab import runs

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

import corpora
import data
import losses
import metrics
import models
from models import LM, set_weights, weights
from trainer import Trainer, block, by_size, steps_of


def accelerator_of(device: torch.device) -> Accelerator:
    # The first process evaluates for long while the others wait.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=[patience])


class Bench:
    """Data, model and original weights of one seed; `s` are the Settings of train.py. `lm` is written again and again,
    `reference` keeps the original."""

    def __init__(self, s, seed: int, accelerator: Accelerator):
        self.s, self.seed, self.accelerator, self.device = s, seed, accelerator, accelerator.device
        self.lead = accelerator.is_main_process
        self.corpus = corpora.load(s, seed)
        scratch = not models.PRESETS[s.preset].source
        self.origin_seed = s.origin_seed if s.origin_seed >= 0 else seed if scratch else 42
        self.lm, self.chat = self.fresh()
        self.lm.mixed = s.precision == "mixed"
        self.lm.attention = s.attention
        self.lm.to(self.device).eval()
        if s.checkpointing:
            self.lm.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.reference: LM | None = None
        self.made: dict[str, metrics.Sets] = {}
        self.started: dict[str, dict] = {}

    def fresh(self) -> tuple[LM, models.Chat]:
        """The model before fine-tuning."""
        s = self.s
        return models.load(s.preset, self.corpus, s.weights, runs.data_dir(s.data_dir), s.download, self.origin_seed)

    def encoded(self, rows: list[data.QA]) -> list[data.Encoded]:
        return [data.encode(self.chat, q.question, q.answer, self.s.max_length) for q in rows]

    def sets(self, split: str) -> metrics.Sets:
        """The evaluation sets of a split, made once."""
        if split not in self.made:
            s, kinds = self.s, [k for k in self.s.questions if k == "exact" or self.corpus.paraphrased]
            choice = {"limit": s.eval_items, "seed": s.eval_seed, "max_length": s.max_length, "kinds": kinds}
            self.made[split] = metrics.Sets(self.corpus, split, self.chat, self.device, **choice)
        return self.made[split]

    def start(self, split: str) -> dict[tuple[str, str], metrics.Scores]:
        """Scores of the original model on the sets of a split, taken once."""
        if split not in self.started:
            self.started[split] = self.sets(split).all_scores(self.reference)
        return self.started[split]

    @property
    def original(self) -> dict[str, Tensor]:
        return weights(self.reference)

    def set_original(self) -> None:
        """Fine-tune the model on the full data, or read it where that has been done."""
        tensors = self.trained_on("full", self.corpus.full + self.corpus.extra) if self.s.epochs else weights(self.lm)
        set_weights(self.lm, tensors)
        self.reference = copy.deepcopy(self.lm).requires_grad_(False).eval()

    def place(self, what: str) -> Path:
        """Folder of a fine-tuned model, named by everything it depends on."""
        s = self.s
        keys = (
            "preset",
            "weights",
            "dataset",
            "items",
            "authors",
            "lr",
            "epochs",
            "train_batch",
            "train_accum",
            "weight_decay",
        )
        keys = (*keys, "clip", "optimizer", "precision", "attention", "max_length")
        about = {k: getattr(s, k) for k in keys} | {"seed": self.origin_seed, "data": self.corpus.sha256, "on": what}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]
        return Path(s.models) / f"{s.preset}-{s.dataset}-{what}-seed{self.origin_seed}-{digest}"

    def trained_on(self, what: str, rows: list[data.QA]) -> dict[str, Tensor]:
        """Weights after fine-tuning on `rows`. Runs that start at once share one fine-tuning: the others wait for
        it."""
        folder = self.place(what)
        path = folder / "model.safetensors"
        if self.lead:
            folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        with open(folder / f".lock{self.accelerator.process_index or ''}", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the process that fine-tunes {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                self.fine_tune(folder, rows, what)
            self.accelerator.wait_for_everyone()
            return runs.read_weights(path)[0]

    def fine_tune(self, folder: Path, rows: list[data.QA], what: str) -> None:
        s = self.s
        items, size = self.encoded(rows), s.train_batch * s.train_accum
        total, warmup = steps_of(s.epochs, len(items), s.train_batch, s.train_accum)
        set_weights(self.lm, weights(self.fresh()[0]))
        t = self.trainer(s.lr, total, warmup, s.train_accum)
        t.load(folder / "checkpoint.safetensors")
        seed = self.origin_seed

        def micro(step: int, k: int) -> tuple[Tensor, dict]:
            chosen = [i for _, i in block(step, size, len(items), seed, "fine-tune")]
            chosen = by_size(chosen, lambda i: len(items[i].ids), s.train_accum)[k]
            b = data.collate([items[i] for i in chosen], self.chat.pad, self.device)
            return losses.token_nll(t.call(b.ids, b.attend, b.places), b.target).mean(), {}

        path, told = folder / "checkpoint.safetensors", folder / "metrics.jsonl"
        old = told.read_text().splitlines() if told.is_file() else []
        lines = [line for line in old if json.loads(line)["step"] <= t.step]  # a start that was killed may have gone on

        def log(new: list[dict]) -> None:
            lines.extend(map(json.dumps, new))
            runs.write_text(told, "".join(f"{line}\n" for line in lines))

        title = f"fine-tuning on {what}, seed {seed}"
        seconds = t.fit(micro, path, every=s.checkpoint_steps, title=title, log=log)
        tensors = t.full_weights()
        if self.lead:
            meta = {"seconds": str(seconds), "steps": str(total)}
            runs.write_tensors(folder / "model.safetensors", tensors, meta)
            path.unlink(missing_ok=True)

    def trainer(self, lr: float, steps: int, warmup: int, accum: int, trained=None) -> Trainer:
        """A trainer of `lm`, or of a copy where the libraries cut the model in pieces."""
        s = self.s
        sharded = self.accelerator.distributed_type in ("FSDP", "DEEPSPEED")
        lm = copy.deepcopy(self.lm) if sharded else self.lm
        return Trainer(
            *(lm, self.accelerator),
            **{"lr": lr, "steps": steps, "warmup": warmup, "accum": accum, "weight_decay": s.weight_decay},
            **{"clip": s.clip, "optimizer": s.optimizer, "trained": trained},
            compiled=s.compile,
        )
