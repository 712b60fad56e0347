"""The metric study: attack a model without teaching it anything, and see whether a metric keeps its ordering of models.

Attacks: jail-breaking (a prompt around the question), embedding probing (answers read from earlier layers),
relearning (one epoch on the full data), token noising (random prompt tokens), relearning + probing, and GCG (an
adversarial suffix).
"""

import dataclasses
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from scipy import stats

import losses
import metrics
from data import Encoded, collate, encode, generator
from models import LM, Chat
from trainer import Trainer, block, by_size, steps_of

Attack = Literal["jail-breaking", "embedding probing", "relearning", "token noising", "relearning+probing", "GCG"]
FOUR: tuple[Attack, ...] = ("jail-breaking", "embedding probing", "relearning", "token noising")
STUDIED = ("ES", "EM", "PPL", "logPPL", "ROUGE-L", "truth_ratio")


def measure(lm: LM, chat: Chat, sets: metrics.Sets, items: dict[str, list[Encoded]]) -> dict[str, float]:
    """The six metrics of both parts: {"ES_retain": ...}. `items` are the sets' own or attacked ones, in the same
    order."""
    out = {}
    rows, every = [q for p in metrics.PARTS for q in sets.rows[p]], [e for p in metrics.PARTS for e in items[p]]
    rouge, _ = metrics.rouge_items(lm, chat, rows, every, sets.device)
    s, t = score_with_truth(lm, chat, rows, every, sets)
    values = {"ES": s.es, "EM": s.em, "PPL": s.ppl, "logPPL": s.nll, "ROUGE-L": rouge, "truth_ratio": t.balanced}
    first = len(sets.rows[metrics.PARTS[0]])
    for part, here in zip(metrics.PARTS, (slice(None, first), slice(first, None)), strict=True):
        out |= {f"{k}_{part}": float(v[here].mean()) for k, v in values.items()}
    return out


def score_with_truth(lm: LM, chat: Chat, rows, items: list[Encoded], sets: metrics.Sets):
    """(Scores of `items`, Truth losses behind their (attacked) prompts), in one pass. Most attacks ask every model the
    same: what that takes is tokenised and batched once."""
    k, asked = min(len(q.perturbed_answer) for q in rows), tuple(items)
    if asked not in sets.truths:
        answers = []
        for q, e in zip(rows, items, strict=True):
            for answer in (q.base_answer, *q.perturbed_answer[:k]):
                text = chat.answer_ids(answer)
                answers.append(Encoded((*e.ids[: e.start], *text, chat.end), e.start, len(text)))
        sets.truths[asked] = metrics.prepare([*items, *answers], chat.pad, sets.device)
    found = metrics.score(lm, sets.truths[asked])
    nll = found.nll[len(items) :].reshape(len(rows), k + 1)
    return found.part(slice(len(items))), metrics.Truth(nll[:, 0], nll[:, 1:])


# ------------------------------------------------------------------------------------------------------------- attacks


def jailbroken(chat: Chat, rows, max_length: int) -> list[Encoded]:
    wrapped = dataclasses.replace(chat, jailbreak=True)
    return [encode(wrapped, q.question, q.answer, max_length) for q in rows]


def noised(items: list[Encoded], rate: float, vocabulary: int, seed: int) -> list[Encoded]:
    """Each prompt token but the first is replaced with chance `rate` by a random token; at least one of each prompt
    is."""
    out = []
    g = generator(seed, "noise")
    for e in items:
        ids, inner = list(e.ids), max(e.start - 1, 1)
        hit = torch.rand(inner, generator=g) < rate
        hit[torch.randint(inner, (1,), generator=g)] = True
        new = torch.randint(vocabulary, (inner,), generator=g)
        for place, (yes, token) in enumerate(zip(hit.tolist(), new.tolist(), strict=True)):
            place = min(place + 1, e.start - 1)
            ids[place] = token if yes else ids[place]
        out.append(Encoded(tuple(ids), e.start, e.n))
    return out


def gcg(lm: LM, chat: Chat, items: list[Encoded], device, *, length: int = 8, steps: int = 20, tries: int = 32,
        top: int = 64, seed: int = 0) -> list[Encoded]:  # fmt: skip
    """Greedy coordinate gradient: one suffix for all prompts that makes the answers likelier. Each step takes the
    gradient of the mean loss with respect to the one-hot suffix, draws `tries` single replacements out of the `top`
    best tokens of a place, and keeps the best of them if it is better."""
    g = generator(seed, "gcg")
    table = lm.hf.get_input_embeddings().weight
    suffix = torch.randint(len(table), (length,), generator=g).to(device)

    def joined(tail: list[int]) -> list[Encoded]:
        return [Encoded((*e.ids[: e.start], *tail, *e.ids[e.start :]), e.start + length, e.n) for e in items]

    def loss_of(tail: list[int]) -> float:
        return float(metrics.score_items(lm, joined(tail), chat.pad, device).nll.mean())

    best = loss_of(suffix.tolist())
    lm.eval()
    for _ in range(steps):
        b = collate(joined(suffix.tolist()), chat.pad, device)
        starts = torch.tensor([e.start for e in items], device=device)
        one_hot = torch.zeros(length, len(table), device=device).scatter_(1, suffix[:, None], 1).requires_grad_()
        with torch.enable_grad():
            x = table.detach()[b.ids].clone()
            places = starts[:, None] + torch.arange(length, device=device)
            rows = torch.arange(len(items), device=device)[:, None].expand_as(places)
            x = x.index_put((rows, places), (one_hot @ table.detach()).expand(len(items), -1, -1))
            h = lm.hf.base_model(inputs_embeds=x, attention_mask=b.mask, use_cache=False).last_hidden_state
            loss = losses.token_nll(
                lm.hf.get_output_embeddings()(h.flatten(0, 1).index_select(0, b.places)), b.target
            ).mean()
            slope = torch.autograd.grad(loss, one_hot)[0]
        good = (-slope).topk(min(top, len(table)), dim=1).indices.cpu()
        for _ in range(tries):
            place = int(torch.randint(length, (1,), generator=g))
            new = suffix.clone()
            new[place] = int(good[place][torch.randint(good.shape[1], (1,), generator=g)])
            value = loss_of(new.tolist())
            if value < best:
                best, suffix = value, new
    return joined(suffix.tolist())


def relearn(
    lm: LM, items: list[Encoded], chat: Chat, *, lr: float, batch: int, accum: int, seed: int, show: bool
) -> None:
    """One epoch of fine-tuning on the full data, in place; the optimizer and rate of the original fine-tuning."""
    total, _ = steps_of(1, len(items), batch, accum)
    device = next(lm.parameters()).device
    # A process of its own, whatever the run's: the attack is made by the process that evaluates.
    t = Trainer(lm, Accelerator(cpu=device.type == "cpu"), lr=lr, steps=total, warmup=1, accum=accum, alone=True)

    def micro(step: int, k: int):
        chosen = [i for _, i in block(step, batch * accum, len(items), seed, "relearn")]
        b = collate([items[i] for i in by_size(chosen, lambda i: len(items[i].ids), accum)[k]], chat.pad, device)
        return losses.token_nll(t.call(b.ids, b.attend, b.places), b.target).mean(), {}

    t.fit(micro, title="relearning" if show else "")


def layers_of(depth: int, shares: tuple[float, ...]) -> list[int]:
    return sorted({min(depth, max(1, round(share * depth))) for share in shares})


def probed(
    lm: LM, chat: Chat, sets: metrics.Sets, items: dict, shares: tuple[float, ...], plain: dict[str, float] | None
) -> dict[str, float]:
    """Mean over the probed layers of each metric, answers read from the layer through the final norm and the head.
    `plain`: what `measure` gives without the attack, which is also what the last layer gives."""
    found = []
    for layer in layers_of(lm.depth, shares):
        if layer == lm.depth and plain is not None:
            found.append(plain)
            continue
        with lm.cut(layer):
            found.append(measure(lm, chat, sets, items))
    return {k: float(np.mean([f[k] for f in found])) for k in found[0]}


def attack(
    kind: Attack, lm: LM, chat: Chat, sets: metrics.Sets, s, seed: int, full: list[Encoded],
    plain: dict[str, float] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Metrics under one attack; `plain`: those of the same weights without it, where they are known. Relearning changes
    the weights: the caller puts them back."""
    items = {part: sets.items["exact", part] for part in metrics.PARTS}
    if kind in ("relearning", "relearning+probing"):
        relearn(lm, full, chat, lr=s.relearn_lr, batch=s.train_batch, accum=s.train_accum, seed=seed, show=False)
        plain = None  # of other weights
    if kind in ("embedding probing", "relearning+probing"):
        return probed(lm, chat, sets, items, s.probe_layers, plain)
    if kind == "jail-breaking":
        items = {part: jailbroken(chat, sets.rows[part], s.max_length) for part in metrics.PARTS}
    if kind == "token noising":
        size = lm.hf.get_input_embeddings().weight.shape[0]
        items = {part: noised(items[part], s.noise_rate, size, seed) for part in metrics.PARTS}
    if kind == "GCG":
        items = {part: gcg(lm, chat, items[part], sets.device, steps=s.gcg_steps, seed=seed) for part in metrics.PARTS}
    return measure(lm, chat, sets, items)


# ------------------------------------------------------------------------------------------------------- correlations


def correlation(before: list[float], after: list[float]) -> tuple[float, float] | None:
    """(Pearson correlation, slope of the least-squares line) over models; None where a side does not vary, which leaves
    both undefined."""
    x, y = np.asarray(before, float), np.asarray(after, float)
    if len(x) < 3 or not np.isfinite([*x, *y]).all() or np.ptp(x) < 1e-12 or np.ptp(y) < 1e-12:
        return None
    return float(stats.pearsonr(x, y).statistic), float(stats.linregress(x, y).slope)


def summarise(population: list[dict], attacks: tuple[Attack, ...]) -> list[tuple[str, str, dict]]:
    """(attack, metric, what goes into a record) from the records' `study` metrics of a population of models."""
    out = []
    for kind in attacks:
        for metric in STUDIED:
            found: dict = {"models": len(population)}
            for part in metrics.PARTS:
                before = [m[f"study.{metric}_{part}"] for m in population]
                after = [m[f"study.{metric}_{part}@{kind}"] for m in population]
                found |= {f"before_{part}": before, f"after_{part}": after}
                both = correlation(before, after)
                if both:
                    found |= {f"PCC_{part}": both[0], f"slope_{part}": both[1]}
            out.append((kind, metric, found))
    return out
