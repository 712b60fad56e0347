"""Other ways to tell right labels from wrong ones, as scores (higher: more surely right) and as decisions."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from baselines.semi import clean_probability, scaled


def knn_agreement(features: Tensor, y: Tensor, k: int = 10, chunk: int = 1024) -> Tensor:
    """Share of the k nearest other samples (cosine) with the same noisy label, in [0, 1], plus a little of their mean
    similarity to part ties: features [n, D], y [n] -> [n]."""
    f = F.normalize(features.float(), dim=1)
    k = min(k, len(f) - 1)
    out = []
    for i in range(0, len(f), chunk):
        near = f[i : i + chunk] @ f.T
        near[torch.arange(len(near)), torch.arange(i, i + len(near))] = -torch.inf
        value, who = near.topk(k, 1)
        same = (y[who] == y[i : i + chunk, None]).float()
        out.append(same.mean(1) + 1e-3 * (same * value).mean(1))
    return torch.cat(out).double()


def label_probability(p: Tensor, y: Tensor) -> Tensor:
    """Probability [n] that a model with posteriors p [n, C] gives the noisy label."""
    return p.gather(1, y[:, None])[:, 0].double()


def regression(width: int, c: float) -> LogisticRegression:
    """c: 1 / L2 penalty. On features as wide as a network's the solver may stop earlier, which saves most of its time
    and moves hardly a rank."""
    return LogisticRegression(max_iter=1000, C=c, tol=1e-4 if width < 500 else 2e-3)


def logistic(features: Tensor, y: Tensor) -> Tensor:
    """Posteriors [n, C] of a logistic regression on the (noisy) labels; classes that do not occur get 0."""
    f = F.normalize(features.float(), dim=1).numpy()
    out = torch.zeros(len(y), int(y.max()) + 1)
    if len(y.unique()) < 2:
        out[:, y[0]] = 1.0
        return out
    model = regression(f.shape[1], 1.0).fit(f, y.numpy())
    out[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(f)).float()
    return out


def per_class_gmm(value: Tensor, y: Tensor) -> Tensor:
    """Posterior of the high-mean component of a two-component GMM fitted to each noisy class by itself: [n] -> [n]."""
    out = torch.zeros(len(y), dtype=torch.float64)
    for k in y.unique():
        mine = y == k
        out[mine] = clean_probability(scaled(-value[mine])) if int(mine.sum()) > 2 else 0.5
    return out


def clipcleaner(zero_shot: Tensor, fitted: Tensor, y: Tensor, sure: float = 0.5, consistent: float = 0.8):
    """CLIPCleaner (Feng et al. 2024): kept by both posteriors, each by a per-class GMM (>= sure) and by the consistency
    ratio p_y / max p (>= consistent). -> (score [n]: the smallest of the four, kept bool [n])."""
    keep, score = torch.ones(len(y), dtype=torch.bool), torch.full((len(y),), torch.inf, dtype=torch.float64)
    for p in (zero_shot, fitted):
        mine = label_probability(p, y)
        ratio = mine / p.double().amax(1).clamp(min=1e-12)
        part = per_class_gmm(mine, y)
        keep &= (part >= sure) & (ratio >= consistent)
        score = torch.minimum(score, torch.minimum(part, ratio))
    return score, keep


def cleanlab(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(label quality [n], kept bool [n]) of the cleanlab library from out-of-sample posteriors p [n, C]."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    v = p.double().clamp(min=1e-12)
    v = (v / v.sum(1, keepdim=True)).numpy()
    labels = y.numpy()
    present = np.unique(labels)
    remap = np.searchsorted(present, labels)  # the library wants every class of the columns to occur
    v = v[:, present] / v[:, present].sum(1, keepdims=True)
    if len(present) < 2:
        return torch.ones(len(y), dtype=torch.float64), torch.ones(len(y), dtype=torch.bool)
    score = get_label_quality_scores(remap, v)
    return torch.from_numpy(score.copy()), ~torch.from_numpy(find_label_issues(remap, v, n_jobs=1).copy())


def fitted(f: Tensor, y: Tensor, new: Tensor, n: int, c: float = 1.0) -> Tensor:
    """Posteriors [m, n] of `new` by a logistic regression on features f [k, d] and labels y [k]; c: 1 / L2 penalty."""
    out = torch.zeros(len(new), n)
    if len(y.unique()) < 2:
        out[:, y[0]] = 1.0
        return out
    f, new = (F.normalize(v.float(), dim=1).numpy() for v in (f, new))
    model = regression(f.shape[1], c).fit(f, y.numpy())
    out[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(new)).float()
    return out


def out_of_sample(f: Tensor, y: Tensor, n: int, seed: int, folds: int = 5, c: float = 1.0) -> Tensor:
    """Posteriors [k, n] of logistic regressions on features f [k, d] and (noisy) labels y [k], each sample's by one
    that was fitted to the other folds."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    out = torch.zeros(len(y), n)
    for fold in order.chunk(folds):
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[fold] = False
        out[fold] = fitted(f[rest], y[rest], f[fold], n, c)
    return out
