"""Metrics, records and the printed lines of a run: what training and evaluation both need."""

from collections.abc import Iterable

from lab import runs

import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score
from torch import Tensor

import priors
from data import PAPER_SETS


def true_prior(y: Tensor, labelled: Tensor) -> Tensor:
    """Share of positives inside U (not in the graph), [S]."""
    return ((y == 1) & ~labelled).sum(-1) / (~labelled).sum(-1)


def scores(
    posterior: np.ndarray, y: np.ndarray, labelled: np.ndarray, held_p: np.ndarray, pi_hat: float, known: bool = True
) -> dict:
    """Metrics of one seed on U = ~labelled; posterior [N] = P(positive). Percent except priors, AUC and AP.

    f1 uses posterior > 0.5; f1_topk the floor(pi_hat |U|) highest posteriors (NaN pi_hat: left out). Without the truth
    about U (`known`) only what needs none.
    """
    u = ~labelled
    truth, score = y[u], posterior[u].astype(np.float64)
    said = (score > 0.5).astype(int)
    recall = float((posterior[held_p if held_p.any() else labelled] > 0.5).mean())
    out = {
        "predicted_positive": float(said.mean()),
        "one_class": float(said.min() == said.max()),  # a collapsed run
        # Needs no negative label (Lee & Liu 2003): recall on labelled positives squared over the predicted share.
        "lee_liu": recall**2 / max(float(said.mean()), 1e-12) if said.any() else 0.0,
    }
    if not known:
        return out | ({"pi_hat": pi_hat} if pi_hat == pi_hat else {})
    pi = float(truth.mean())
    out |= {
        "f1": 100 * float(f1_score(truth, said, pos_label=1, zero_division=0)),
        "accuracy": 100 * float(accuracy_score(truth, said)),
        "auc": float(roc_auc_score(truth, score)) if 0 < pi < 1 else 0.5,
        "ap": float(average_precision_score(truth, score)) if pi > 0 else 0.0,
        "f1_all_positive": 200 * pi / (1 + pi),
        "pi_true": pi,
    }
    if pi_hat == pi_hat:
        order = np.argsort(-score, kind="stable")[: int(np.floor(pi_hat * len(score) * (1 + 2e-7)))]
        top = np.zeros_like(said)
        top[order] = 1
        out |= {"f1_topk": 100 * float(f1_score(truth, top, pos_label=1, zero_division=0))}
        out |= prior_errors(pi_hat, pi)
    return out


def prior_errors(pi_hat: float, pi: float) -> dict:
    return {"pi_hat": pi_hat, "pi_error": abs(pi_hat - pi), "pi_signed_error": pi_hat - pi}


def describe(t, k: int) -> dict:
    """The `data` part of a record for the k-th seed."""
    g = t.graphs[k % len(t.graphs)]
    labelled = int(t.labelled[k].sum())
    return {
        "name": g.name,
        "variant": "own"
        if t.s.graph
        else "generated"
        if g.name in ("synthetic", "karate")
        else "paper"
        if g.name in PAPER_SETS
        else "not in the paper",
        "sha256": g.sha256,
        "n": len(g.y),
        "edges": g.edge.shape[1],
        "features": g.x.shape[1],
        "classes": int(g.classes.max()) + 1,
        "positives": int(g.y.sum()),
        "h": round(g.h, 4),
        "h_binary": round(g.h_binary, 4),
        "labelled": labelled,
        "unlabelled": len(g.y) - labelled,
    }


def measure(t, posterior: Tensor) -> list[dict]:
    """Metrics of every seed."""
    host = posterior.double().cpu().numpy()
    y, labelled, held = (v.cpu().numpy() for v in (t.batch.y, t.labelled, t.method.held_p))
    pi, extra = t.method.pi.tolist(), {k: v.tolist() for k, v in t.method.extra().items()}
    rows = []
    for k in range(len(pi)):
        known = t.graphs[k % len(t.graphs)].known
        row = scores(host[k], y[k], labelled[k], held[k], pi[k], known)
        untold = () if known else ("h_weighted", "s_precision")
        rows.append(row | {name: values[k] for name, values in extra.items() if name not in untold})
    return rows


def histograms(t, k: int) -> dict:
    """GPL only: edge weights of the k-th seed on 20 bins of [0, 1], apart for edges inside and between the binary
    classes and inside and between the original ones, and their means; means, too, of edges that join two positives
    (w_pp), a positive and a negative (w_pn), two negatives (w_nn), and of those with a positive of U at an end
    (w_hidden). Empty for other methods."""
    weight, g = getattr(t.method, "weight", None), t.graphs[k % len(t.graphs)]
    if weight is None or not g.known:
        return {}
    w, (i, j) = weight[k].cpu().numpy(), g.edge.numpy()
    out: dict = {}
    for name, labels in (("binary", g.y.numpy()), ("classes", g.classes.numpy())):
        same = labels[i] == labels[j]
        for side, mask in (("same", same), ("differ", ~same)):
            out[f"hist_{name}_{side}"] = np.histogram(w[mask], 20, (0, 1))[0].tolist()
            if mask.any():
                out[f"w_{name}_{side}"] = float(w[mask].mean())
        out[f"h_weighted_{name}"] = float(w[~same].sum() / w.sum())
    y, known = g.y.numpy() == 1, t.labelled[k].cpu().numpy()
    hidden = y & ~known
    ends = {"pp": y[i] & y[j], "pn": y[i] != y[j], "nn": ~y[i] & ~y[j], "hidden": hidden[i] | hidden[j]}
    return out | {f"w_{name}": float(w[mask].mean()) for name, mask in ends.items() if mask.any()}


def estimate(t, posterior: Tensor) -> list[dict[str, float]]:
    """Class prior of every seed by every score-based estimator, and by KM on the node features."""
    host = posterior.double().cpu().numpy()
    labelled = t.labelled.cpu().numpy()
    out = []
    sample_p, sample_u = (v.cpu().numpy() for v in (t.method.estimate_p, t.method.estimate_u))
    for k in range(len(host)):
        p, u = sample_p[k], sample_u[k]
        x = t.graphs[k % len(t.graphs)].x.numpy()
        # KM looks at features, not at scores: nothing was fitted to them, so it gets all of P and U.
        about_km = (x[labelled[k]], x[~labelled[k]])
        out.append(priors.estimate_all(host[k][p], host[k][u], *about_km, seed=t.s.seeds[k]))
    return out


def show(records: Iterable[dict]) -> None:
    """Print a line a seed and the mean."""
    rows = list(records)
    for r in rows:
        m = r["metrics"]
        prior = f"  pi_hat {m['pi_hat']:.4f}" if "pi_hat" in m else ""
        if "f1" in m:
            prior += f"  |error| {m['pi_error']:.4f}" if "pi_hat" in m else ""
            print(f"seed {r['seed']}: F1 {m['f1']:.2f} %  AUC {m['auc']:.4f}  pi {m['pi_true']:.4f}{prior}")
        else:
            print(f"seed {r['seed']}: {100 * m['predicted_positive']:.2f} % of U called positive{prior}")
        if m["predicted_positive"] in (0.0, 1.0):
            print(f"  warning: every node of U got the same label ({'all' if m['predicted_positive'] else 'none'} +)")
    if any("f1" not in r["metrics"] for r in rows):
        return
    f1 = np.array([r["metrics"]["f1"] for r in rows])
    line = f"mean of {len(rows)} seeds: F1 {f1.mean():.2f} +- {f1.std():.2f} %"
    if all("pi_error" in r["metrics"] for r in rows):
        line += f", |prior error| {np.mean([r['metrics']['pi_error'] for r in rows]):.4f}"
    print(f"{line}; all positive would give {np.mean([r['metrics']['f1_all_positive'] for r in rows]):.2f} %")


def variant(of_data: str, row: dict) -> str:
    """Tables print in a cell what is not plainly the paper's or the generator's: a collapsed run says so there."""
    if not row["one_class"]:
        return of_data
    return "one class" if of_data in ("paper", "generated") else f"{of_data}, one class"


def predictions(posterior: Tensor, labelled: Tensor) -> str:
    """A line a node: posterior, what is said of it at 0.5, whether it was labelled."""
    nodes = zip(posterior.tolist(), labelled.tolist(), strict=True)
    lines = [f"{i},{p:.6f},{int(p > 0.5 or known)},{int(known)}" for i, (p, known) in enumerate(nodes)]
    return "\n".join(["node,posterior,positive,labelled", *lines]) + "\n"


def record(t, run: runs.Run, posterior: Tensor) -> None:
    """Write weights and records of every seed of this process."""
    s, seconds = t.s, run.seconds() / len(t.s.seeds)
    where: dict = {"table": s.table, "dataset": s.about, "setting": s.setting, "method": s.label, "scale": s.scale}
    if s.about == "synthetic":
        where["dataset"] = f"synthetic h={s.h:g}"
    rows = [row | histograms(t, k) for k, row in enumerate(measure(t, posterior))]
    guesses = estimate(t, posterior) if s.estimators else []
    for k, seed in enumerate(s.seeds):
        tensors = {name: v[k] for name, v in t.model.state_dict().items()}
        tensors |= {f"method.{name}": v[k] for name, v in t.method.kept().items()}
        runs.write_tensors(run.folder(seed) / "model.safetensors", tensors, {"method": s.method})
        if s.graph:
            runs.write_text(run.folder(seed) / "predictions.csv", predictions(posterior[k], t.labelled[k]))
        about = {"seconds": seconds, "data": describe(t, k), "device": t.device}
        for name, value in guesses[k].items() if guesses else ():
            metrics = {"pi_true": rows[k]["pi_true"], **prior_errors(value, rows[k]["pi_true"])}
            run.record(seed, metrics=metrics, where={**where, "method": name}, suffix=f"-{name}", **about)
        about["data"]["variant"] = variant(about["data"]["variant"], rows[k])
        run.record(seed, metrics=rows[k], where=where, **about)
