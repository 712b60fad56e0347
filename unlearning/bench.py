"""Speed of this folder's three levers against plain implementations in one process, as ratios; same results first.

    python bench.py                    # mini Llama on the CPU
    python bench.py --device cuda --preset scratch-medium

Extraction strength: one teacher-forced pass beside batched generation from every prefix. A training step (GA + KL):
padding to the longest sequence and logits where they are needed, beside padding to 500 and logits everywhere. Mixing:
in place, beside reading both models from disk, adding them up and loading the sum, for each alpha.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from lab import runs
from lab.runs import UserError

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import control
import data
import losses
import metrics
import models


@dataclass
class BenchSettings:
    preset: Literal["mini", "scratch-medium"] = "mini"
    """Network; the generated authors in both cases."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    items: int = 32
    """Items whose extraction strength is taken."""
    answer: int = 40
    """Tokens of their answers (TOFU: 25 words, at most 66)."""
    batch: int = 4
    """Forget items of a training step, with as many retain items (paper: 4)."""
    length: int = 500
    """Length that the plain step pads to (released code: 500)."""
    repeats: int = 5
    """Timed repeats of each, in turn; the fastest counts."""
    smoke: bool = False
    """Tiny sizes, to see that everything runs."""


def clock(device: torch.device, function) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def best(device: torch.device, repeats: int, **functions) -> dict[str, float]:
    """Fastest of `repeats` runs of each, in turn, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {k: [] for k in functions}
    for k in range(repeats + 1):
        for name, function in functions.items():
            seconds = clock(device, function)
            if k:
                times[name].append(seconds)
    return {k: min(v) for k, v in times.items()}


def learned(lm: models.LM, n: int, length: int, end: int, steps: int, device) -> list[data.Encoded]:
    """Random texts of which the model has learned a part: extraction strengths between 0 and 1."""
    g = torch.Generator().manual_seed(0)
    size = lm.hf.config.vocab_size
    text = torch.randint(3, size, (n, 12 + length), generator=g)
    items = [data.Encoded((*row, end), 12, length) for row in text.tolist()]
    b = data.collate(items, end, device)
    optimizer = torch.optim.AdamW(lm.parameters(), 2e-3)
    for _ in range(steps):
        loss = losses.token_nll(lm(b.ids, b.attend, b.places), b.target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return items


def strength(b: BenchSettings, lm: models.LM, chat: models.Chat, device) -> str:
    lm = copy.deepcopy(lm)
    items = learned(lm, b.items, b.answer, chat.end, 3 if b.smoke else 20, device)
    found: dict = {}

    def one_pass() -> None:
        found["quick"] = metrics.score_items(lm, items, chat.pad, device).es

    def search() -> None:
        found["slow"] = metrics.extraction_strength_literal(lm, items, chat.end, device)

    slow = min(clock(device, search) for _ in range(1 if b.smoke else 2))
    quick = best(device, b.repeats, one_pass=one_pass)["one_pass"]
    differ = int((abs(found["quick"] - found["slow"]) > 1e-12).sum())
    mean = found["quick"].mean()
    return (
        f"extraction strength of {len(items)} answers of {b.answer} tokens (mean {mean:.3f}, {differ} items differ): "
        f"generate and search {slow:.2f} s, one pass {1e3 * quick:.1f} ms, {slow / quick:.0f} x"
    )


def step(b: BenchSettings, lm: models.LM, chat: models.Chat, corpus: data.Corpus, device) -> str:
    """GA on the forget items, KL on the retain items, forward and backward."""
    reference = copy.deepcopy(lm).requires_grad_(False)
    with torch.no_grad():
        for p in lm.parameters():  # away from the reference, else the KL term is 0
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(device) * 1e-2)
    chosen = [corpus.forget["forget-large"][: b.batch], corpus.retain_train("forget-large")[: b.batch]]
    forget, retain = ([data.encode(chat, q.question, q.answer) for q in rows] for rows in chosen)
    found: dict = {}

    def ours() -> None:
        f, r = (data.collate(x, chat.pad, device) for x in (forget, retain))
        with torch.no_grad():
            before = reference(r.ids, r.attend, r.text)
        ascent = losses.ga(losses.token_nll(lm(f.ids, f.attend, f.places), f.target))
        loss = ascent + losses.kl(lm(r.ids, r.attend, r.text), before, r.mask)
        found["ours"] = loss.item(), torch.autograd.grad(loss, list(lm.parameters()))

    def plain() -> None:
        f, r = (data.collate(x, chat.pad, device, b.length) for x in (forget, retain))
        labels = torch.full_like(f.ids, -100)
        labels[:, 1:][f.keep[:, :-1]] = f.target
        logits = lm.hf(input_ids=f.ids, attention_mask=f.mask).logits.float()
        ascent = -F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        with torch.no_grad():
            before = F.log_softmax(reference.hf(input_ids=r.ids, attention_mask=r.mask).logits.float(), -1)
        now = F.log_softmax(lm.hf(input_ids=r.ids, attention_mask=r.mask).logits.float(), -1)
        each = F.kl_div(now, before, reduction="none", log_target=True).sum(-1)
        loss = ascent + (each * r.mask).sum() / r.mask.sum()
        found["plain"] = loss.item(), torch.autograd.grad(loss, list(lm.parameters()))

    times = best(device, b.repeats, ours=ours, plain=plain)
    (x, gx), (y, gy) = found["ours"], found["plain"]
    gap = max(float((p - q).norm() / q.norm().clamp(min=1e-9)) for p, q in zip(gx, gy, strict=True))
    real = sum(len(e.ids) for e in forget + retain)
    return (
        f"GA + KL step of {b.batch} + {b.batch} items (loss differs by {abs(x - y):.1e}, gradients by {gap:.1e}): "
        f"padded to {b.length} {1e3 * times['plain']:.1f} ms, dynamic {1e3 * times['ours']:.1f} ms, "
        f"{times['plain'] / times['ours']:.1f} x; {real / times['ours']:.0f} tokens/s without padding tokens "
        f"(plain: {real / times['plain']:.0f}, with them {2 * b.batch * b.length / times['plain']:.0f})"
    )


def mixing(b: BenchSettings, lm: models.LM, device) -> str:
    first = {k: v.clone() for k, v in models.weights(lm).items()}
    second = {k: v + 0.01 for k, v in first.items()}
    mixer = control.Mixer(lm, first, second)
    names = list(models.weights(lm))
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.safetensors" for k in "ab"]
        for path, tensors in zip(paths, (first, second), strict=True):
            runs.write_tensors(path, tensors)
        found: dict = {}

        def reload() -> None:
            one, two = (load_file(p) for p in paths)
            mixed = {k: (1 - 0.3) * one[k] + 0.3 * two[k] for k in names}
            lm.load_state_dict(mixed, strict=False)

        def ours() -> None:
            mixer.set(0.3)

        times = best(device, b.repeats, ours=ours, reload=reload)
        for name, function in (("ours", ours), ("reload", reload)):
            function()
            found[name] = {k: v.clone() for k, v in models.weights(lm).items()}
    gap = max(float((found["ours"][k] - found["reload"][k]).abs().max()) for k in names)
    return (
        f"one alpha (weights differ by at most {gap:.1e}): reload {1e3 * times['reload']:.2f} ms, in place "
        f"{1e3 * times['ours']:.2f} ms, {times['reload'] / times['ours']:.1f} x"
    )


def main() -> None:
    b = runs.parse(BenchSettings, __doc__)
    if min(b.items, b.answer, b.batch, b.length, b.repeats) < 1 or b.length < 64:
        raise UserError("--items, --answer, --batch and --repeats must be at least 1, --length at least 64")
    if b.batch > 30:
        raise UserError("--batch is at most 30, the generated forget set")
    device = runs.device(b.device)
    torch.set_float32_matmul_precision("high")
    if b.smoke:
        b.items, b.answer, b.repeats, b.length = 3, 4, 1, 64
    corpus = data.miniature(0)
    lm, chat = models.load(b.preset, corpus, "", Path("."))
    lm.to(device).eval()
    size = sum(p.numel() for p in lm.parameters())
    print(f"{models.PRESETS[b.preset].title}, {size:,} parameters, {device}, {torch.get_num_threads()} threads")
    print(strength(b, lm, chat, device))
    print(step(b, lm, chat, corpus, device))
    print(mixing(b, lm, device))


if __name__ == "__main__":
    runs.command(main)
