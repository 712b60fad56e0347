"""AUROC, AUPR and FPR95 in per cent; ID is the positive class, a larger score means "more ID"."""

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


def _join(id_scores, ood_scores) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (id_scores, ood_scores))
    if not len(a) or not len(b):
        raise ValueError("both score lists must hold at least one score")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a score is not a finite number")
    return np.concatenate([np.ones(len(a)), np.zeros(len(b))]), np.concatenate([a, b])


def auroc(id_scores, ood_scores) -> float:
    return 100 * float(roc_auc_score(*_join(id_scores, ood_scores)))


def aupr(id_scores, ood_scores) -> float:
    """Average precision with ID positive (Table 10)."""
    return 100 * float(average_precision_score(*_join(id_scores, ood_scores)))


def fpr95_official(id_scores, ood_scores, recall: float = 0.95) -> float:
    """FPR at the threshold whose ID recall is nearest to 95 %, the rule behind the printed numbers.

    Every distinct score, of OOD images too, is a threshold ("score >= threshold is ID"). Among equally near recalls the
    lowest threshold counts: OOD scores between two neighbouring ID scores go in. Recall may be just below 95 %.
    """
    fpr, tpr, _ = roc_curve(*_join(id_scores, ood_scores), drop_intermediate=False)
    fpr, tpr = fpr[1:], tpr[1:]  # the first point is the empty acceptance
    last = int(np.argmax(tpr >= 1))  # the highest threshold that accepts every ID image ends the list
    fpr, tpr = fpr[: last + 1][::-1], tpr[: last + 1][::-1]
    return 100 * float(fpr[np.argmin(np.abs(tpr - recall))])


def fpr95_first(id_scores, ood_scores, recall: float = 0.95) -> float:
    """FPR at the highest threshold with at least 95 % ID recall, the usual rule of OOD libraries."""
    fpr, tpr, _ = roc_curve(*_join(id_scores, ood_scores), drop_intermediate=False)
    return 100 * float(fpr[np.argmax(tpr >= recall)])


def threshold95(id_scores, recall: float = 0.95) -> float:
    """lambda of Eq. 4: the highest threshold that keeps at least 95 % of the given ID scores."""
    ordered = np.sort(np.asarray(id_scores, dtype=np.float64))[::-1]
    return float(ordered[int(np.ceil(recall * len(ordered) - 1e-9)) - 1])


def measure(id_scores, ood_scores) -> dict[str, float]:
    """All metrics of one ID set against one OOD set, per cent."""
    return {
        "FPR95": fpr95_official(id_scores, ood_scores),
        "FPR95_first": fpr95_first(id_scores, ood_scores),
        "AUROC": auroc(id_scores, ood_scores),
        "AUPR": aupr(id_scores, ood_scores),
    }
