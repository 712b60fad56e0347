"""What a model still knows: extraction strength and its fellows, one teacher-forced pass a set; TOFU's two summaries.

A set is a list of data.Encoded; every function keeps its order and takes the model as it is (eval mode is set and
undone).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from lab.progress import progress
from lab.runs import UserError

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

import control
from data import QA, Batch, Encoded, by_length, collate, encode

# Padded tokens of an evaluation batch: on a CPU what stays in its caches (a third faster than 4096 there).
EVAL_TOKENS = {"cpu": 1024}
EVAL_TOKENS_ELSE = 4096


@dataclasses.dataclass
class Scores:
    """An entry an item. es, em in [0, 1] over the answer without its end token; nll: mean loss over the supervised
    tokens, the end token included; nll_sum, tokens: its sum and their number."""

    es: np.ndarray
    em: np.ndarray
    nll_sum: np.ndarray
    tokens: np.ndarray

    def part(self, which: slice) -> "Scores":
        return Scores(self.es[which], self.em[which], self.nll_sum[which], self.tokens[which])

    @property
    def nll(self) -> np.ndarray:
        return self.nll_sum / self.tokens

    @property
    def ppl(self) -> np.ndarray:
        """exp(mean loss), held below e^80 so that a mean over items stays finite."""
        return np.exp(np.minimum(self.nll, 80.0))

    @property
    def probability(self) -> np.ndarray:
        """TOFU's length-normalised probability, 1 / perplexity."""
        return np.exp(-self.nll)


@contextlib.contextmanager
def evaluating(lm) -> Iterator[None]:
    """Without gradients, in eval mode, in the precision of the run. Autocast is opened once for all batches, so that
    the weights are rounded once; it must be closed before they change."""
    training = lm.training
    lm.eval()
    with torch.no_grad(), lm.autocast():
        yield
    lm.train(training)


def prepare(items: Sequence[Encoded], pad: int, device: torch.device, tokens: int = 0) -> list:
    """Batches of a set, sorted by length, once for many passes: [(indices, Batch)]. tokens: see EVAL_TOKENS."""
    tokens = tokens or EVAL_TOKENS.get(torch.device(device).type, EVAL_TOKENS_ELSE)
    return [(index, collate([items[i] for i in index], pad, device)) for index in by_length(items, tokens)]


def score(lm, batches: list[tuple[list[int], Batch]]) -> Scores:
    """One forward pass over the supervised positions of each batch. Waits for the device once."""
    parts, order = [], []
    with evaluating(lm):
        for index, b in batches:
            logits = lm(b.ids, b.attend, b.places).float()
            nll = F.cross_entropy(logits, b.target, reduction="none")
            correct = logits.argmax(-1) == b.target
            es = control.strength(correct, b.row, b.inside, b.size)
            zero = torch.zeros(b.size, device=nll.device, dtype=torch.float64)
            n = zero.index_add(0, b.row, b.inside.double()).clamp(min=1)
            em = zero.index_add(0, b.row, (correct & b.inside).double()) / n
            total = zero.index_add(0, b.row, torch.ones_like(nll, dtype=torch.float64))
            parts.append(torch.stack([es, em, zero.index_add(0, b.row, nll.double()), total]))
            order += index
    if not parts:
        raise UserError("an evaluation set is empty; choose more --items")
    found = torch.cat(parts, 1).cpu().numpy()
    if not np.isfinite(found).all():  # argmax of NaN is a token like any other: such a model would get a score
        raise UserError("the model's outputs are not finite; lower the learning rate and train it again")
    back = np.argsort(order)
    return Scores(*found[:, back])


def score_items(lm, items: Sequence[Encoded], pad: int, device: torch.device) -> Scores:
    return score(lm, prepare(items, pad, device))


# ----------------------------------------------------------------------------------------------------------- generation


def generate(lm, prompts: Sequence[Sequence[int]], most: Sequence[int], end: int, device, batch: int = 64) -> list:
    """Greedy continuations of at most most[i] tokens, up to and without the end token. Batched by length, padded
    left."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + most[i])
    out: list[list[int]] = [[] for _ in prompts]
    with evaluating(lm):
        for at in progress(range(0, len(order), batch), "generating", hide=len(order) < 500):
            index = order[at : at + batch]
            longest = max(len(prompts[i]) for i in index)
            rows = [[end] * (longest - len(prompts[i])) + list(prompts[i]) for i in index]
            mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in index]
            made = lm.hf.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max(most[i] for i in index),
                **{"do_sample": False, "num_beams": 1, "eos_token_id": end, "pad_token_id": end, "use_cache": True},
                **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
            )[:, longest:].tolist()
            for i, ids in zip(index, made, strict=True):
                ids = ids[: ids.index(end)] if end in ids else ids
                out[i] = ids[: most[i]]
    return out


def extraction_strength_literal(lm, items: Sequence[Encoded], end: int, device) -> np.ndarray:
    """ES by its definition: for k = 0, 1, ... generate from the first k answer tokens until the rest comes out. Slow; a
    cross-check of `score`."""
    out, open_ = np.zeros(len(items)), list(range(len(items)))
    k = 0
    while open_:
        done = [i for i in open_ if items[i].n == k]  # the empty rest always fits: ES = 0
        open_ = [i for i in open_ if items[i].n > k]
        for i in done:
            out[i] = 0.0
        prompts = [items[i].ids[: items[i].start + k] for i in open_]
        # Once more than asked for is never needed: a prefix decides about the whole.
        made = generate(lm, prompts, [items[i].n - k for i in open_], end, device) if open_ else []
        left = []
        for i, ids in zip(open_, made, strict=True):
            e = items[i]
            if tuple(ids) == e.ids[e.start + k : e.start + e.n]:
                out[i] = 1 - k / e.n
            else:
                left.append(i)
        open_, k = left, k + 1
    return out


def rouge_l(texts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """ROUGE-L recall of each text against its answer, with stemming, as in TOFU."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([scorer.score(a, t)["rougeL"].recall for t, a in zip(texts, answers, strict=True)])


def rouge_items(lm, chat, rows: Sequence[QA], items: Sequence[Encoded], device) -> tuple[np.ndarray, list[str]]:
    """(ROUGE-L recall, generated texts) from the prompts of `items`; at most 16 tokens more than the answer has."""
    prompts = [e.ids[: e.start] for e in items]
    made = generate(lm, prompts, [e.n + 16 for e in items], chat.end, device)
    texts = [chat.decode(ids) for ids in made]
    return rouge_l(texts, [q.answer for q in rows]), texts


# -------------------------------------------------------------------------------------- truth ratio, utility, quality


@dataclasses.dataclass
class Truth:
    """Mean losses of the right answer in other words [M] and of the wrong ones [M, K]."""

    right: np.ndarray
    wrong: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """Right over wrong with the geometric mean of the wrong probabilities: the form whose distribution forget
        quality compares."""
        return np.exp(np.clip(self.wrong.mean(1) - self.right, -80, 80))

    @property
    def arithmetic(self) -> np.ndarray:
        """Right over wrong with the arithmetic mean of the wrong probabilities: the form of TOFU's model utility."""
        worst = self.wrong.min(1)
        log_mean = np.log(np.exp(worst[:, None] - self.wrong).mean(1)) - worst
        return np.exp(np.clip(-self.right - log_mean, -80, 80))

    @property
    def utility(self) -> np.ndarray:
        """max(0, 1 - wrong / right) of the arithmetic ratio: TOFU's form for model utility."""
        return np.maximum(0, 1 - 1 / self.arithmetic)

    @property
    def utility_geometric(self) -> np.ndarray:
        """The same of the geometric ratio: open-unlearning's form for model utility."""
        return np.maximum(0, 1 - 1 / self.ratio)

    @property
    def balanced(self) -> np.ndarray:
        """min(R, 1 / R) of the geometric ratio: nearest to 1 when right and wrong are alike (open-unlearning prints
        this form for the forget set)."""
        return np.minimum(self.ratio, 1 / self.ratio)

    @property
    def balanced_arithmetic(self) -> np.ndarray:
        """The same of the arithmetic ratio: the form of TOFU's own summary of the forget set."""
        return np.minimum(self.arithmetic, 1 / self.arithmetic)


def truth(lm, chat, rows: Sequence[QA], device, max_length: int = 500) -> Truth:
    """All answers in one pass over the original question. Rows need wrong answers; their least number is used."""
    k = min((len(q.perturbed_answer) for q in rows), default=0)
    if not k:
        raise UserError("truth ratio needs wrong answers (perturbed_answer), and a row has none")
    items = [encode(chat, q.question, a, max_length) for q in rows for a in (q.base_answer, *q.perturbed_answer[:k])]
    nll = score_items(lm, items, chat.pad, device).nll.reshape(len(rows), k + 1)
    return Truth(nll[:, 0], nll[:, 1:])


def probability_among(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """exp(-loss) of the right answer over the sum with the wrong ones: TOFU's probability on real authors and world
    facts."""
    p, q = np.exp(-right), np.exp(-wrong).sum(1)
    return p / np.maximum(p + q, 1e-300)


def model_utility(parts: dict[str, dict[str, np.ndarray]]) -> tuple[float, dict[str, float]]:
    """(harmonic mean of the nine means, the nine). parts: {retain | real | world: {rouge, probability, truth}}."""
    nine = {f"{part}_{k}": float(np.mean(v)) for part, values in parts.items() for k, v in values.items()}
    if len(nine) != 9:
        raise UserError(f"model utility is over nine numbers, not {len(nine)}")
    return float(stats.hmean([max(v, 0.0) for v in nine.values()])), nine


def forget_quality(unlearned: Truth, retrained: Truth) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios on the forget set."""
    return float(stats.ks_2samp(unlearned.ratio, retrained.ratio).pvalue)


def utility_of(lm, chat, corpus, device, max_length: int = 500) -> dict[str, float]:
    """Model utility over the retain evaluation part, real authors and world facts: TOFU's (`model_utility`), the one
    with open-unlearning's form of the truth ratio (`model_utility_geometric`), and the nine numbers of the first."""
    out, geometric = {}, {}
    for part, rows in {"retain": corpus.retain_eval, "real": corpus.real_authors, "world": corpus.world_facts}.items():
        items = [encode(chat, q.question, q.answer, max_length) for q in rows]
        s, t = score_items(lm, items, chat.pad, device), truth(lm, chat, rows, device, max_length)
        share = s.probability if part == "retain" else probability_among(s.nll, t.wrong)
        rouge, _ = rouge_items(lm, chat, rows, items, device)
        out[part] = {"rouge": rouge, "probability": share, "truth": t.utility}
        geometric[part] = out[part] | {"truth": t.utility_geometric}
    value, nine = model_utility(out)
    both = {"model_utility": value, "model_utility_geometric": model_utility(geometric)[0]}
    return both | {f"utility.{k}": v for k, v in nine.items()}


# ------------------------------------------------------------------------------------------- sets of one unlearned
# model

KINDS = ("exact", "perturb")
PARTS = ("retain", "unlearn")


class Sets:
    """The evaluation sets of a forget split: of each kind of question (exact; perturb puts the paraphrased question
    before the original answer) the retain and the unlearn part, tokenised and batched once."""

    def __init__(
        self, corpus, split: str, chat, device, limit: int = 0, seed: int = 42, max_length: int = 500, kinds=KINDS
    ):
        self.rows: dict[str, list[QA]] = {}
        for part, rows in {"retain": corpus.retain_eval, "unlearn": corpus.forget[split]}.items():
            if limit and limit < len(rows):  # a fixed random part, as the released evaluation takes 50
                chosen = sorted(np.random.RandomState(seed).permutation(len(rows))[:limit].tolist())
                rows = [rows[i] for i in chosen]
            self.rows[part] = list(rows)
        self.chat, self.device, self.max_length, self.kinds = chat, device, max_length, tuple(kinds)
        self.items: dict[tuple[str, str], list[Encoded]] = {}
        self.prepared: dict[tuple[str, str], list] = {}
        self.truths: dict[tuple[Encoded, ...], list] = {}  # of the metric study: batches with the wrong answers
        for kind in self.kinds:
            for part, rows in self.rows.items():
                ask: Callable[[QA], str] = lambda q, k=kind: q.question if k == "exact" else q.paraphrased_question  # noqa: E731
                self.items[kind, part] = [encode(chat, ask(q), q.answer, max_length) for q in rows]

    def scores(self, lm, kind: str, part: str) -> Scores:
        """Scores of one set. Its batches are always the same: in low precision another layout may turn an argmax."""
        if (kind, part) not in self.prepared:
            self.prepared[kind, part] = prepare(self.items[kind, part], self.chat.pad, self.device)
        return score(lm, self.prepared[kind, part])

    def all_scores(self, lm) -> dict[tuple[str, str], Scores]:
        return {key: self.scores(lm, *key) for key in self.items}


def four(found: dict[tuple[str, str], Scores]) -> dict[str, float]:
    """The four ES of the paper's tables (two without paraphrases), and the other one-pass metrics beside them."""
    out = {}
    for (kind, part), s in found.items():
        out |= {f"ES_{kind}_{part}": s.es.mean(), f"EM_{kind}_{part}": s.em.mean()}
        out |= {f"logPPL_{kind}_{part}": s.nll.mean()}
    return {k: float(v) for k, v in out.items()}
