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


class Stream:
    """All metrics with the OOD scores arriving in chunks: exact, no histogram, memory O(distinct ID scores).

    Between two neighbouring ID scores recall does not change, so counting OOD scores between and at the ID scores
    holds all that AUROC, AUPR and both FPR95 need.
    """

    def __init__(self, id_scores):
        found = np.asarray(id_scores, dtype=np.float64).ravel()
        if not len(found):
            raise ValueError("both score lists must hold at least one score")
        if not np.isfinite(found).all():
            raise ValueError("a score is not a finite number")
        self.values, counts = np.unique(found, return_counts=True)
        self.ids = counts[::-1].cumsum()[::-1]  # ID scores at or above each distinct value
        self.at = np.zeros(len(self.values), dtype=np.int64)  # OOD scores equal to it
        self.below = np.zeros(len(self.values) + 1, dtype=np.int64)  # strictly between it and the value below

    def add(self, ood_scores) -> "Stream":
        chunk = np.asarray(ood_scores, dtype=np.float64).ravel()
        if not np.isfinite(chunk).all():
            raise ValueError("a score is not a finite number")
        left = np.searchsorted(self.values, chunk, "left")
        equal = left < np.searchsorted(self.values, chunk, "right")
        self.at += np.bincount(left[equal], minlength=len(self.at))
        self.below += np.bincount(left[~equal], minlength=len(self.below))
        return self

    def result(self, recall: float = 0.95) -> dict[str, float]:
        """FPR95, FPR95_first, AUROC, AUPR in per cent of what was added so far."""
        n_id, n_ood = int(self.ids[0]), int(self.at.sum() + self.below.sum())
        if not n_ood:
            raise ValueError("both score lists must hold at least one score")
        # OOD scores at or above each distinct ID score, and above the ID score below it.
        reach = (self.at + self.below[1:])[::-1].cumsum()[::-1]
        above = reach + self.below[:-1]
        above[0] = reach[0]  # the list of thresholds ends at the smallest ID score
        tpr, each = self.ids / n_id, np.diff(self.ids, append=0) * -1
        official = int(np.argmin(np.abs(tpr - recall)))
        first = len(tpr) - 1 - int(np.argmax(tpr[::-1] >= recall))
        wins = (each * (n_ood - reach + 0.5 * self.at)).sum()
        return {
            "FPR95": 100 * float(above[official] / n_ood),
            "FPR95_first": 100 * float(reach[first] / n_ood),
            "AUROC": 100 * float(wins / (n_id * n_ood)),
            "AUPR": 100 * float((each / n_id * self.ids / (self.ids + reach)).sum()),
        }


def measure(id_scores, ood_scores) -> dict[str, float]:
    """All metrics of one ID set against one OOD set, per cent."""
    return Stream(id_scores).add(ood_scores).result()
