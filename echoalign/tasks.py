"""What each method learns from: the images, labels and selections of one seed."""

from lab.runs import UserError

from echoselect import mixture
from prepare import Prepared
from readers import Part
from settings import Settings
from trainer import Task

SELECTORS = {"small-loss": "small-loss", "gmm": "GMM on loss", "knn": "kNN agreement", "cleanlab": "cleanlab"}
SELECTORS |= {"prior-filter": "prior", "clipcleaner": "CLIPCleaner"}


def task_of(p: Prepared, method: str) -> Task:
    """What a method learns from."""
    d, use = p.data, p.train
    x, y = p.seen("train"), p.y
    more = {"test": p.test, "kind": d.kind, "rho": p.s.rate, "noise": p.s.noise}
    more["val"] = Part(x[~use], y[~use]) if bool((~use).any()) else None
    if method == "echoalign":
        m, chosen = p.modified, p.selected
        x_all, y_all, c = mixture(x[use], p.seen("modified")[use], y[use], chosen[use], m.ok[use], p.s.modified_set)
        return Task(x_all, y_all, c=c, tune=p.part(chosen), **more)
    if method == "pretrain":
        return Task(p.seen("pre"), d.pre.y, **{**more, "val": None})
    if method == "ce-clean":
        return Task(x[use], d.train.y[use], **more)
    if method == "modified-only":
        fine = use & p.modified.ok
        return Task(p.seen("modified")[fine], y[fine], **more)
    if method == "selected-only":
        chosen = p.selected
    elif method in SELECTORS:
        chosen = next((kept for _, _, kept in p.scores((SELECTORS[method],))), None)
        if chosen is None:
            raise UserError(
                f"--methods {method} needs something that knows no noisy label: clean images (--pretrain), --features "
                "clip, or on cifar10 --features lite0"
            )
    else:
        return Task(x[use], y[use], **more)
    part = p.part(chosen)
    if len(part) < 2:
        raise UserError(f"--methods {method}: its selection keeps {len(part)} samples, too few to train on")
    return Task(part.x, part.y, **more)


def needs_edits(s: Settings) -> bool:
    return s.stage != "all" or bool({"echoalign", "modified-only", "selected-only"} & set(s.methods))
