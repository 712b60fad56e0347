"""Train the tiny SAM that works without published weights; the paper's method itself trains nothing (see eval.py).

    python train.py --steps 2000 --out runs/demo/tiny                # some minutes on a CPU
    python eval.py --segmenter tiny --weights runs/demo/tiny/seed0/model.safetensors --videos plain

Pictures are drawn: textured polygons over a textured background, one of them asked for by points, box or both. The
same classes as SAM at size 256. A run goes on from its last checkpoint when started again, to the same bits.
"""

import dataclasses
import hashlib
import math
from pathlib import Path

from lab import checkpoints, runs
from lab.progress import progress
from lab.runs import UserError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import prompts
from prompts import Prompt
from segmenters.sam import Sam, send
from settings import TrainSettings

NOT_PART_OF_A_RUN = ("out", "device", "dry_run", "seeds", "scale", "table", "checkpoint_every", "log_every")


def picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Prompt]:
    """A frame of a procedural video (96, 160, 3), the mask of one of its objects, and a prompt for it."""
    while True:
        video = data.draw(data.DRAWN[int(rng.integers(len(data.DRAWN)))], int(rng.integers(2**31)), length=2)
        t, o = int(rng.integers(2)), int(rng.choice(video.objects))
        mask = video.truth[t] == o
        box = prompts.box_of(mask)
        if mask.sum() >= 25 and box is not None:
            break
    points = prompts.select(mask, 2, "random", rng)
    wrong = prompts.select(~mask, 1, "random", rng)
    both = np.concatenate([points, wrong]).astype(np.float32), np.array([1, 1, 0])
    jitter = rng.uniform(-0.05, 0.05, 4) * np.tile(box[2:] - box[:2], 2)
    kind = int(rng.integers(3))
    if kind == 0:
        return video.frames[t], mask, Prompt(*both)
    box = (box + jitter).astype(np.float32)
    return video.frames[t], mask, Prompt(box=box) if kind == 1 else Prompt(*both, box)


def loss_of(logits: Tensor, quality: Tensor, truth: Tensor) -> Tensor:
    """20 focal + dice + squared error of the predicted IoU (SAM's mixture), for (h, w) logits of one prompt."""
    p = logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    focal = (cross * (1 - (p * truth + (1 - p) * (1 - truth))) ** 2 * (0.25 * truth + 0.75 * (1 - truth))).mean()
    dice = 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
    hard = logits.detach() > 0
    iou = (hard & (truth > 0.5)).sum() / (hard | (truth > 0.5)).sum().clamp_min(1)
    return 20 * focal + dice + (quality - iou) ** 2


def forward(sam: Sam, given: list) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(logits, predicted IoU, truth) of pictures of one size, on the low-resolution cells that hold the picture."""
    h, w = given[0][0].shape[:2]
    features = sam.image_encoder(sam.pixels(np.stack([frame for frame, _, _ in given])))
    low = 4 * sam.cells / max(h, w)
    rows, columns = round(h * low), round(w * low)
    truth = send(np.stack([mask for _, mask, _ in given]), features.device)[:, None].float()
    truth = F.interpolate(truth, (rows, columns), mode="area")[:, 0]
    out = []
    for i, (_, _, prompt) in enumerate(given):
        masks, quality = sam.predict(features[i : i + 1], None, [prompt], sam.size / max(h, w))
        out.append((masks[0, 0, :rows, :columns].float(), quality[0, 0].float(), truth[i]))
    return out


def rate(step: int, s: TrainSettings) -> float:
    warm = max(1, s.steps // 20)
    if step < warm:
        return s.lr * (step + 1) / warm
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, s.steps - warm)))


class Training:
    """Network, optimiser and place of one seed, and its checkpoint."""

    def __init__(self, s: TrainSettings, seed: int, device):
        torch.manual_seed(seed)
        self.s, self.seed, self.step = s, seed, 0
        self.sam = Sam("tiny").to(device).train()
        self.optimizer = torch.optim.AdamW(self.sam.parameters(), lr=s.lr, weight_decay=s.weight_decay)

    def pictures(self, step: int) -> list:
        """Those of a step: a stream a step, so that a resumed run sees the same pictures."""
        rng = np.random.default_rng([self.seed, step])
        return [picture(rng) for _ in range(self.s.batch)]

    def fingerprint(self) -> str:
        """Of what decides the run: its settings, and the pictures that this code draws."""
        own = {k: v for k, v in dataclasses.asdict(self.s).items() if k not in NOT_PART_OF_A_RUN}
        digest = hashlib.sha256()
        for frame, mask, _ in self.pictures(0):
            digest.update(frame.tobytes() + mask.tobytes())
        return checkpoints.fingerprint({**own, "seed": self.seed}, [digest.hexdigest()])

    def save(self, path: Path, seconds: float) -> None:
        tensors = {f"model.{k}": v for k, v in self.sam.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in checkpoints.pack_optimizer(self.optimizer).items()}
        meta = {"step": str(self.step), "seconds": repr(seconds), "run": self.fingerprint()}
        runs.write_tensors(path, tensors, meta)

    def load(self, path: Path) -> float:
        """Take up a checkpoint; the seconds that went before it. UserError where it is not of this run, or damaged."""
        tensors, meta = runs.read_tensors(path)
        if meta.get("run") != self.fingerprint():
            raise checkpoints.misfit(path, "it belongs to a run of other settings or other pictures")
        step = checkpoints.position(meta, "step", self.s.steps - 1, path)
        parts: dict[str, dict] = {"model": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            parts.setdefault(part, {})[key] = value
        checkpoints.restore_module(self.sam, parts["model"], path)
        # Weights of prompts that no picture has had so far have no gradient yet, and so no state.
        checkpoints.restore_optimizer(self.optimizer, parts["optimizer"], path, began=False)
        self.step = step
        return checkpoints.seconds(meta, path)


def fit(s: TrainSettings, run: runs.Run, seed: int, device) -> None:
    folder, path = run.folder(seed), run.out / "checkpoint" / f"seed{seed}.safetensors"
    if (folder / "record.json").is_file():
        path.unlink(missing_ok=True)  # left by a start that was killed just after its record
        return
    t = Training(s, seed, device)
    if path.is_file():
        run.before = max(run.before, t.load(path))
    run.log(seed, [], keep_to=t.step)
    for step in progress(range(t.step, s.steps), f"tiny SAM, seed {seed}", s.steps - t.step):
        for group in t.optimizer.param_groups:
            group["lr"] = rate(step, s)
        loss = torch.stack([loss_of(*x) for x in forward(t.sam, t.pictures(step))]).mean()
        t.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(t.sam.parameters(), s.clip)
        t.optimizer.step()
        t.step = step + 1
        if t.step % s.log_every == 0 or t.step == s.steps:
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise UserError(f"the loss is not finite at step {t.step}; the last checkpoint stays, lower --lr")
            run.log(seed, [{"step": t.step, "loss": round(loss.item(), 6), "lr": rate(step, s)}])
        if t.step % s.checkpoint_every == 0 and t.step < s.steps:
            t.save(path, run.seconds())
    runs.write_tensors(folder / "model.safetensors", t.sam.state_dict(), {"segmenter": "tiny"})
    metrics, digest = measure(t.sam.eval(), s, seed)
    where = {"table": s.table, "dataset": "drawn pictures", "setting": "one prompt", "method": "tiny", "scale": s.scale}
    info = {"name": "drawn", "variant": "generated", "n": s.test, "sha256": digest}
    run.record(seed, seconds=run.seconds(), data=info, metrics=metrics, where=where, device=device)
    path.unlink(missing_ok=True)


@torch.inference_mode()
def measure(sam: Sam, s: TrainSettings, seed: int) -> tuple[dict, str]:
    """Mean IoU on held-out pictures, by kind of prompt, and the sha256 of these pictures and masks."""
    rng, digest = np.random.default_rng([seed, 2**31]), hashlib.sha256()
    found: dict[str, list[float]] = {}
    for _ in range(s.test):
        given = picture(rng)
        digest.update(given[0].tobytes() + given[1].tobytes())
        logits, quality, truth = forward(sam, [given])[0]
        if not torch.isfinite(logits).all():
            raise UserError("the network's masks are not finite; no record written")
        a, b = logits > 0, truth > 0.5
        iou = float((a & b).sum() / (a | b).sum().clamp_min(1))
        p = given[2]
        kind = "box" if not len(p.points) else "points" if p.box is None else "both"
        found.setdefault(kind, []).append(iou)
    every = [x for v in found.values() for x in v]
    metrics = {"iou": float(np.mean(every)), **{f"iou_{k}": float(np.mean(v)) for k, v in sorted(found.items())}}
    return metrics, digest.hexdigest()


def main() -> None:
    s = runs.parse(TrainSettings, __doc__)
    s.check()
    s.out = s.out or runs.default_out(s.scale, f"{s.table}-tiny")
    if s.dry_run:
        count = sum(p.numel() for p in Sam("tiny").parameters())
        print(f"{s.steps} steps of {s.batch} drawn pictures, {count:,} parameters, seeds {s.seeds}: {s.out}")
        return
    device = runs.device(s.device)
    run = runs.Run(Path(s.out), s, ("out", "device", "dry_run"))
    if run.complete:
        print(f"{run.out} is complete; delete it to run again")
    else:
        for seed in s.seeds:
            fit(s, run, seed, device)
        run.finish()
    for path in sorted(run.out.glob("seed*/record.json")):
        r = runs.read_record(path)
        print(f"seed {r['seed']}: " + ", ".join(f"{k} {v:.3f}" for k, v in r["metrics"].items()))
    print(f"weights in {run.out}/seed*/model.safetensors")


if __name__ == "__main__":
    runs.command(main)
