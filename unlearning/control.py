"""Unlearning with control: how much of an answer a model still gives away, and how to compare models that forgot more
with models that kept more. This file needs nothing but torch and takes any causal language model of transformers.

ES(x, y) = 1 - k* / n, k* the least number of given answer tokens after which greedy decoding makes the rest of the n;
theta(alpha) = (1 - alpha) theta_ref + alpha theta_u; alpha* is the largest alpha with
ES(D_r; theta(alpha)) >= tau ES(D_r; theta_ref). The released code's `update_ratio` is 1 - alpha.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Search = Literal["scan+bisect", "bisect"]

# ------------------------------------------------------------------------------------------------ extraction strength


def strength(correct: Tensor, row: Tensor, inside: Tensor, size: int) -> Tensor:
    """ES of each of `size` sequences, [size] float64, from one teacher-forced pass; NaN for one without answer tokens.

    correct [N]: the argmax at a supervised position is the next token; row [N]: its sequence, ascending; inside [N]: it
    is an answer token (no end token). Greedy decoding from the first k answer tokens gives the rest exactly when no
    argmax behind k is wrong (induction over positions), so k* is the 1-based place of the last wrong one, 0 if none."""
    # By sums and maxima alone: a boolean index or bincount would make the host wait for the device.
    n = torch.zeros(size, dtype=torch.long, device=row.device).index_add(0, row, inside.long())
    place = torch.cumsum(inside.long(), 0) - (torch.cumsum(n, 0) - n)[row]
    wrong = torch.where(inside & ~correct, place, 0)
    last = torch.zeros(size, dtype=torch.long, device=row.device).scatter_reduce(0, row, wrong, "amax")
    return 1 - last.double() / n  # 0 / 0 is NaN


def prompt_of(tokenizer, question: str) -> tuple[str, str]:
    """(prompt, what stands between it and the answer): the tokenizer's chat template where it has one, else
    `Question: ... Answer:` with a space."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), ""
    return f"{tokenizer.bos_token or ''}Question: {question}\nAnswer:", " "


@torch.no_grad()
def extraction_strength(
    model: nn.Module, tokenizer, questions: Sequence[str], answers: Sequence[str], batch: int = 8
) -> Tensor:
    """ES of every answer after its question, [N] float64 in [0, 1], in the order given. Prompt and answer are tokenised
    apart; ValueError for lists of unlike length and for an answer without a token."""
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions and {len(answers)} answers")
    items = []
    for question, answer in zip(questions, answers, strict=True):
        prompt, between = prompt_of(tokenizer, question)
        head, tail = (tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, between + answer))
        if not tail:
            raise ValueError(f"the answer to {question!r} has no token")
        items.append((head, tail))
    device, training, out = next(model.parameters()).device, model.training, []
    model.eval()
    for first in range(0, len(items), batch):
        some = items[first : first + batch]
        length = max(len(h) + len(t) for h, t in some)
        ids, mask = (torch.zeros(len(some), length, dtype=torch.long) for _ in range(2))
        inside = torch.zeros(len(some), length - 1, dtype=torch.bool)
        for b, (head, tail) in enumerate(some):
            ids[b, : len(head) + len(tail)] = torch.tensor(head + tail)
            mask[b, : len(head) + len(tail)] = 1
            inside[b, len(head) - 1 : len(head) + len(tail) - 1] = True
        guess = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1].argmax(-1).cpu()
        rows = torch.arange(len(some))[:, None].expand_as(inside).flatten()
        out.append(strength((guess == ids[:, 1:]).flatten(), rows, inside.flatten(), len(some)))
    model.train(training)
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- mixing


class Mixer:
    """Writes theta(alpha) into `model` in place. `reference`, `unlearned`: {name: tensor} of both ends, such as
    `state_dict()` gives them; alpha 0 and 1 copy them bit for bit.

    The model's weights are float32, and so should those of the ends be: unlearning moves most bf16 weights by no step
    of their format or by one, and the rounded mixture of two neighbours is a switch at alpha = 0.5. A forward pass
    under autocast may round. ValueError for models of another architecture or precision, and for an alpha outside
    [0, 1]."""

    def __init__(self, model: nn.Module, reference: Mapping[str, Tensor], unlearned: Mapping[str, Tensor]):
        own = dict(model.named_parameters())
        low = [k for k, p in own.items() if p.is_floating_point() and p.dtype not in (torch.float32, torch.float64)]
        if low:
            raise ValueError(f"{low[0]} is {own[low[0]].dtype}; mixtures need float32: call model.float() first")
        first = {id(p): k for k, p in own.items()}
        # A tied head stands in a state_dict under both of its names.
        names = {k: first[id(p)] for k, p in model.named_parameters(remove_duplicate=False)}
        self.to = [p.detach() for p in own.values()]
        self.reference, self.unlearned = (self.end(model, own, names, e) for e in (reference, unlearned))

    @staticmethod
    def end(model: nn.Module, own: dict, names: dict[str, str], given: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors of one end in the order of the model's parameters, none of them in its memory."""
        odd = [k for k in own if k not in given or given[k].shape != own[k].shape]
        odd += [k for k in given if k not in names and k not in dict(model.named_buffers())]
        odd += [k for k, k1 in names.items() if k in given and k1 not in odd and not torch.equal(given[k], given[k1])]
        if odd:
            raise ValueError(f"the models to mix are not of one architecture ({odd[0]})")
        ours = {p.untyped_storage().data_ptr() for p in own.values()}
        out = [given[k].detach().to(p) for k, p in own.items()]
        # Views of the model itself would change with it.
        return [t.clone() if t.untyped_storage().data_ptr() in ours else t for t in out]

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
        torch._foreach_copy_(self.to, self.unlearned if alpha == 1 else self.reference)
        if 0 < alpha < 1:  # one pass over memory, nothing allocated
            torch._foreach_lerp_(self.to, self.unlearned, alpha)


# -------------------------------------------------------------------------------------------------------- calibration


@dataclasses.dataclass
class Calibration:
    """alpha*, the retain score there, the bar tau * g(0), and how many points were looked at. `vacuous`: the original
    model scores 0, every alpha passes, and nothing was controlled."""

    alpha: float
    score: float
    bar: float
    evaluations: int
    vacuous: bool


def search(
    g: Callable[[float], float], tau: float, how: Search = "scan+bisect", step: float = 0.05, tolerance: float = 1e-3
) -> Calibration:
    """The largest alpha in [0, 1] with g(alpha) >= tau g(0); every point is evaluated once.

    scan+bisect: from 1 downward in steps to the first alpha that passes, then halve the last interval down to
    `tolerance`; g need not be monotone on the whole. bisect: halve [0, 1], as the paper's algorithm is named; it
    needs a monotone g. ValueError for a tau, step or tolerance outside its range."""
    if not 0 < tau <= 1:
        raise ValueError(f"tau must lie in (0, 1], not {tau:g}: it is a share of the original model's retention")
    if not 0 < step <= 1 or not 1e-9 <= tolerance <= 1:
        raise ValueError("the step of the alpha grid must lie in (0, 1], its tolerance in [1e-9, 1]")
    known: dict[float, float] = {}

    def at(alpha: float) -> float:
        if alpha not in known:
            known[alpha] = g(alpha)
        return known[alpha]

    bar = tau * at(0.0)
    low, high = 0.0, 1.0
    if at(1.0) >= bar:
        low = 1.0
    elif how == "scan+bisect":
        # Grid points count from 1 down; the last step may be shorter and ends at 0, which always passes.
        for point in (max(round(1 - step * k, 9), 0.0) for k in range(1, int(1 / step + 2))):
            if at(point) >= bar:
                low = point
                break
            high = point
    while low < 1 and high - low > tolerance:
        middle = (low + high) / 2
        if at(middle) >= bar:
            low = middle
        else:
            high = middle
    return Calibration(low, at(low), bar, len(known), at(0.0) == 0)


def calibrate(
    original: nn.Module, unlearned: nn.Module, retain_score: Callable[[nn.Module], float], tau: float = 0.95,
    how: Search = "scan+bisect", step: float = 0.05, tolerance: float = 1e-3,
) -> tuple[Calibration, nn.Module]:  # fmt: skip
    """-> (calibration, a new float32 model at alpha*). retain_score(model): what is to be kept, larger is better, such
    as the mean of `extraction_strength` on the retain set."""
    mixed = copy.deepcopy(original).float().requires_grad_(False)
    mixer = Mixer(mixed, original.state_dict(), unlearned.state_dict())

    def g(alpha: float) -> float:
        mixer.set(alpha)
        return float(retain_score(mixed))

    found = search(g, tau, how, step, tolerance)
    mixer.set(found.alpha)
    return found, mixed
