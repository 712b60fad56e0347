"""Every unlearning method as a loss for one loop: which term pushes the forget set away and which one holds the
rest."""

import dataclasses
from collections.abc import Callable

from lab.runs import sent

import torch
from torch import Tensor

import losses
from data import Batch, Corpus, Encoded, collate, encode, generator
from metrics import evaluating, prepare
from models import LM, Chat
from trainer import Trainer, block, by_size


@dataclasses.dataclass(frozen=True)
class Method:
    """forget: the term of the forget set; retain: ce, kl, stay (RMU's own) or none; weight: default of
    --retain-weight."""

    label: str
    forget: str
    retain: str = ""
    weight: float = 1.0


METHODS = {
    "ga": Method("GA", "ga"),
    "gd": Method("GD", "ga", "ce"),
    "kl": Method("KL", "ga", "kl"),
    "po": Method("PO", "po"),
    "po-kl": Method("PO+KL", "po", "kl"),
    "npo": Method("NPO", "npo"),
    "npo-kl": Method("NPO+KL", "npo", "kl", 20.0),
    "rmu": Method("RMU", "rmu"),
    "rmu-kl": Method("RMU+KL", "rmu", "kl"),
    "rmu-origin": Method("RMU-origin", "rmu", "stay", 100.0),
    "wga": Method("WGA", "wga"),
    "wga-kl": Method("WGA+KL", "wga", "kl"),
    "satimp": Method("SatImp", "satimp", "ce", 0.1),
    "simnpo": Method("SimNPO", "simnpo", "ce"),
    "dpo": Method("DPO", "dpo"),
}
BETA = {"npo": 0.5, "simnpo": 4.5, "dpo": 0.1, "wga": 5.0, "satimp": 5.0}  # default of --beta by forget term


def reference_sums(lm: LM, items: list[Encoded], chat: Chat, device: torch.device) -> Tensor:
    """Summed loss of every item under the present weights, [len(items)]: one number an item is all that NPO needs of
    the reference model."""
    out = torch.zeros(len(items), device=device)
    with evaluating(lm):
        for index, b in prepare(items, chat.pad, device):
            nll = losses.token_nll(lm(b.ids, b.attend, b.places), b.target)
            out[torch.tensor(index, device=device)] = losses.sums(nll, b.row, b.size)
    return out


class Unlearner:
    """The loss of a method. Begins with the original weights in `lm`, from which the reference scores are taken; only
    DPO and methods with a KL or `stay` term need `reference`, a frozen copy of the model."""

    def __init__(self, s, method: str, lm: LM, reference: LM | None, chat: Chat, corpus: Corpus, split: str, seed: int):
        self.s, self.m, self.lm, self.reference, self.chat = s, METHODS[method], lm, reference, chat
        self.seed, self.device = seed, next(lm.parameters()).device
        self.questions = [q.question for q in corpus.forget[split]]
        self.forget = [encode(chat, q.question, q.answer, s.max_length) for q in corpus.forget[split]]
        self.retain = [encode(chat, q.question, q.answer, s.max_length) for q in corpus.retain_train(split)]
        self.size = s.batch * s.accum
        self.beta = BETA.get(self.m.forget, 0.0) if s.beta < 0 else s.beta
        self.weight = self.m.weight if s.retain_weight < 0 else s.retain_weight
        self.refusals = corpus.refusals if self.m.forget in ("po", "dpo") else []
        if self.m.forget in ("npo", "dpo"):
            self.forget_ref = reference_sums(lm, self.forget, chat, self.device)
        self.layer = max(1, min(lm.depth, round(s.rmu_layer * lm.depth)))
        if self.m.forget == "rmu":
            u = losses.rmu_direction(lm.width, generator(seed, "rmu"), method == "rmu-origin")
            self.direction = u.to(self.device)

    def trained(self, method: str) -> Callable[[str], bool] | None:
        """Which parameters move. RMU's loss reaches the blocks up to the steered one (naming them lets several
        processes know it); its origin moves only the down projections of the last three of these. All others: all
        (None)."""
        if method == "rmu-origin":
            blocks = [f".layers.{k}." for k in range(max(0, self.layer - 3), self.layer)]
            return lambda key: any(b in key for b in blocks) and any(w in key for w in ("down_proj", "mlp.fc2"))
        if method == "rmu" and self.layer < self.lm.depth:
            blocks = ["embed_tokens", *(f".layers.{k}." for k in range(self.layer))]
            return lambda key: any(b in key for b in blocks)
        return (lambda key: "lm_head" not in key) if method == "rmu" else None

    # ------------------------------------------------------------------------------------------------- what a step sees

    def draw(self, step: int) -> tuple[list[list[tuple[int, int]]], list[list[int]]]:
        """(micro-batches of (forget item, its refusal), of retain items) of a step. The retain item of each forget
        item is drawn uniformly with replacement, anew each epoch; order, retain items and refusals are streams of
        their own."""
        n = len(self.forget)
        chosen = block(step, self.size, n, self.seed, "order")

        def drawn(stream: str, most: int) -> list[int]:
            rows = {e: torch.randint(most, (n,), generator=generator(self.seed, stream, e)) for e in dict(chosen)}
            return [int(rows[e][i]) for e, i in chosen]

        refusals = drawn("refusal", len(self.refusals)) if self.refusals else [0] * len(chosen)
        pairs = [(i, r) for (_, i), r in zip(chosen, refusals, strict=True)]
        forget = by_size(pairs, lambda pair: len(self.forget[pair[0]].ids), self.s.accum)
        partners = drawn("retain", len(self.retain)) if self.m.retain else []
        return forget, by_size(partners, lambda i: len(self.retain[i].ids), self.s.accum)

    def refused(self, i: int, r: int) -> Encoded:
        """Forget question i with refusal r as its answer."""
        return encode(self.chat, self.questions[i], self.refusals[r], self.s.max_length)

    def batch(self, items: list[Encoded]) -> Batch:
        return collate(items, self.chat.pad, self.device, self.s.pad_to)

    # ------------------------------------------------------------------------------------------------------- the loss

    def bind(self, trainer: Trainer) -> None:
        """Forward passes go through the trainer's model (compiled, in several processes)."""
        self.call = trainer.call

    def micro(self, step: int, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {its two terms}) of micro-batch k of a step."""
        forget, retain = self.draw(step)
        s, f = self.s, self.forget_term(forget[k])
        parts = {"forget": f}
        if not self.m.retain:
            return f, parts
        r = self.retain_term(retain[k])
        parts["retain"] = r
        if s.cap > 0 and self.m.forget == "ga":
            return s.cap_weight * f + (1 - s.cap_weight) * r, parts
        return f + self.weight * r, parts

    def forget_term(self, pairs: list[tuple[int, int]]) -> Tensor:
        s, kind, index = self.s, self.m.forget, [i for i, _ in pairs]
        refused = [self.refused(i, r) for i, r in pairs] if self.refusals else []
        b = self.batch(refused if kind == "po" else [self.forget[i] for i in index])
        if kind == "rmu":
            return losses.rmu(self.call(b.ids, b.attend, b.places, self.layer), self.direction, s.rmu_scale)
        at = sent(torch.tensor(index), self.device)
        nll = losses.token_nll(self.call(b.ids, b.attend, b.places), b.target, s.temperature if kind == "ga" else 1.0)
        if kind == "po":
            return nll.mean()
        if kind == "ga":
            if s.cap > 0:
                per_token = s.cap_unit == "token"
                return losses.capped_tokens(nll, s.cap) if per_token else losses.capped(nll, b.row, b.size, s.cap)
            return losses.ga(nll) if s.select >= 1 else losses.selected(nll, b.row, b.size, s.select)
        if kind == "wga":
            return losses.wga(nll, self.beta)
        if kind == "satimp":
            return losses.satimp(nll, self.beta, s.beta2)
        total = losses.sums(nll, b.row, b.size)
        if kind == "npo":
            return losses.npo(total, self.forget_ref[at], self.beta)
        if kind == "simnpo":
            return losses.simnpo(total, losses.counts(b.row, b.size), self.beta, s.margin)
        c = self.batch(refused)
        other = losses.sums(losses.token_nll(self.call(c.ids, c.attend, c.places), c.target), c.row, c.size)
        with torch.no_grad():  # of the refusals that are drawn, not of all there are before all questions
            logits = self.reference(c.ids, c.attend, c.places)
            before = losses.sums(losses.token_nll(logits, c.target), c.row, c.size)
        return losses.dpo(other, before, total, self.forget_ref[at], self.beta)

    def retain_term(self, index: list[int]) -> Tensor:
        s, b = self.s, self.batch([self.retain[i] for i in index])
        if self.m.retain == "ce":
            return losses.token_nll(self.call(b.ids, b.attend, b.places), b.target).mean()
        if self.m.retain == "stay":
            with torch.no_grad():
                before = self.reference(b.ids, b.attend, b.text, self.layer)
            return losses.stay(self.call(b.ids, b.attend, b.text, self.layer), before)
        keep = None if s.kl == "positions" else b.text
        with torch.no_grad():
            before = self.reference(b.ids, b.attend, keep)
        return losses.kl(self.call(b.ids, b.attend, keep), before, b.mask, s.kl, s.kl_length)
