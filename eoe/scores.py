"""The scores of EOE and of the methods it is compared with; larger always means "more in-distribution".

An image x and a label name c have the similarity s = cos(image(x), text("a photo of a c")), without CLIP's logit scale.
Labels 1..K are the in-distribution (ID) names, labels K+1..K+L the envisioned outlier names. Every score below needs
only a few numbers an image (the two largest similarities and three log-sum-exps), so an image set is reduced
once, in chunks, to `Stats`; after that each score, beta and temperature costs a handful of vector operations.

Similarities are float32, what is computed from them float64: at T = 1 all probabilities are close to 1/(K+L) and
scores differ in the fifth or sixth decimal, which half precision cannot rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

BETA = 0.25  # weight of the outlier term (Eq. 3, Sec. 3.2)
T_ENERGY = 0.01  # temperature of Energy and S_Energy, the inverse of CLIP's logit scale


def normalise(x: Tensor) -> Tensor:
    """[N, d] any float -> [N, d] float32 rows of length 1 (a zero row stays zero)."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


@dataclass
class Stats:
    """What the scores need of an image set; float64 vectors [N].

    top_id, top_out: largest similarity to an ID / envisioned name (-inf without envisioned names); id_name, out_name:
    which one; sums[T] = (log sum exp(s/T) over ID names, the same over envisioned names).
    """

    k: int
    top_id: Tensor
    top_out: Tensor
    id_name: Tensor
    out_name: Tensor
    sums: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.top_id)


def reduce(
    images: Tensor,
    id_text: Tensor,
    out_text: Tensor,
    temperatures: tuple[float, ...] = (1.0, T_ENERGY),
    chunk: int = 8192,
) -> Stats:
    """images [N, d], id_text [K, d], out_text [L, d] (L may be 0), unit rows -> Stats.

    Memory: two [chunk, K + L] float32 matrices, 105 MB for 8,192 images and 1,600 labels, whatever N is.
    """
    if len(id_text) == 0:
        raise ValueError("at least one ID name is needed")
    k, device = len(id_text), images.device
    text = torch.cat([x.to(device, torch.float32) for x in (id_text, out_text)]).T.contiguous()
    n, double = len(images), dict(dtype=torch.float64, device=device)
    stats = Stats(
        k, *(torch.full((n,), -math.inf, **double) for _ in range(2)), *(torch.full((n,), -1) for _ in range(2))
    )
    stats.id_name, stats.out_name = stats.id_name.to(device), stats.out_name.to(device)
    stats.sums = {t: tuple(torch.full((n,), -math.inf, **double) for _ in range(2)) for t in temperatures}
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        sim = images[part].float() @ text
        for which, block, top, name in (
            (0, sim[:, :k], stats.top_id, stats.id_name),
            (1, sim[:, k:], stats.top_out, stats.out_name),
        ):
            if block.shape[1] == 0:
                continue
            best, index = block.max(1)
            top[part], name[part] = best.double(), index
            for t in temperatures:
                total = torch.exp_((block - best[:, None]).mul_(1 / t)).sum(1)
                stats.sums[t][which][part] = total.double().log() + best.double() / t
    return stats


# ------------------------------------------------------------------------------------------ scores over K + L names


def eoe(images: Tensor, id_text: Tensor, out_text: Tensor, beta: float = BETA, t: float = 1.0) -> Tensor:
    """Eq. 3 from features: images [N, d], ID prompts [K, d], prompts of envisioned names [L, d], of any length ->
    scores [N], float64, larger is ID. What open_clip's `encode_image` and `encode_text` give, or those of transformers.
    """
    for name, x in (("images", images), ("id_text", id_text), ("out_text", out_text)):
        if x.ndim != 2 or x.shape[1] != images.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; all three are rows of one length")
        if not x.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    return s_eoe(reduce(normalise(images), normalise(id_text), normalise(out_text), (t,)), beta, t)


def s_eoe(s: Stats, beta: float = BETA, t: float = 1.0) -> Tensor:
    """Eq. 3: max over ID of the softmax over all K + L names, minus beta times its max over the envisioned names."""
    every = torch.logaddexp(*s.sums[t])
    return (s.top_id / t - every).exp() - beta * (s.top_out / t - every).exp()


def s_msp(s: Stats, t: float = 1.0) -> Tensor:
    """Eq. 3 with beta = 0: the envisioned names only take part in the denominator."""
    return s_eoe(s, 0.0, t)


def s_max(s: Stats, t: float = 1.0) -> Tensor:
    """Eq. 7: MCM, but 1/K (its smallest possible value) wherever an envisioned name is the nearest of all names."""
    return torch.where(s.top_id < s.top_out, torch.full_like(s.top_id, 1 / s.k), mcm(s, t))


def s_energy(s: Stats, t: float = T_ENERGY) -> Tensor:
    """Eq. 9 with the sign turned, so that larger is ID: free energy of the ID names minus that of the envisioned.

    T = 0.01 as the released code advises; at T = 1 it is nearly the difference of two mean similarities.
    """
    return t * (s.sums[t][0] - s.sums[t][1])


def s_maxlogit(s: Stats) -> Tensor:
    """Eq. 8: nearest ID similarity minus nearest envisioned similarity."""
    return s.top_id - s.top_out


# ---------------------------------------------------------------------------------------------- scores over K names


def mcm(s: Stats, t: float = 1.0) -> Tensor:
    """Maximum concept matching: max softmax over the ID names; EOE without an envisioned name."""
    return (s.top_id / t - s.sums[t][0]).exp()


def energy(s: Stats, t: float = T_ENERGY) -> Tensor:
    """Free energy of the ID names, at the temperature of CLIP's logit scale."""
    return t * s.sums[t][0]


def maxlogit(s: Stats) -> Tensor:
    """Largest ID similarity."""
    return s.top_id


# ------------------------------------------------------------------------------------------------------ related work


def neglabel(
    images: Tensor, id_text: Tensor, out_text: Tensor, t: float = 0.01, groups: int = 1, chunk: int = 8192
) -> Tensor:
    """NegLabel: share of the softmax mass on ID names, averaged over `groups` slices of the negative names."""
    if not 1 <= groups <= max(len(out_text), 1):
        raise ValueError(f"groups must lie between 1 and the number of negative names, not {groups}")
    total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    for g in range(groups):
        s = reduce(images, id_text, out_text[g::groups], (t,), chunk)
        total += torch.sigmoid(s.sums[t][0] - s.sums[t][1])
    return total / groups


def clipn(images: Tensor, yes: Tensor, no: Tensor, tau: float = 0.01) -> tuple[Tensor, Tensor]:
    """CLIPN from its two text encoders, yes and no [K, d] -> (competing-to-win, agreeing-to-differ) scores [N].

    p = softmax(s_yes / tau), q = the share of "no" between a name's two prompts; competing-to-win is 1 - q of the
    nearest name, agreeing-to-differ is sum (1 - q) p, that is one minus the probability of "none of them".
    """
    s_yes, s_no = (images.double() @ text.double().T / tau for text in (yes, no))
    p, keep = s_yes.softmax(1), torch.sigmoid(s_yes - s_no)
    return keep.gather(1, p.argmax(1, keepdim=True))[:, 0], (keep * p).sum(1)


# Scores by the names of the paper's tables. `labels` says which names they use: none, or the envisioned ones.
SCORES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "MCM": (mcm, False),
    "Energy": (energy, False),
    "MaxLogit": (maxlogit, False),
    "EOE": (s_eoe, True),
    "S_EOE": (s_eoe, True),
    "S_MSP": (s_msp, True),
    "S_MAX": (s_max, True),
    "S_Energy": (s_energy, True),
    "S_MaxLogit": (s_maxlogit, True),
}
