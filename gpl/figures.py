"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

from pathlib import Path

from lab.records import long

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

METHODS = {  # colour, name
    "gpl": ("#c1272d", "GPL"),
    "gcn-ted": ("#0072b2", "GCN + TED"),
    "mlp-ted": ("#56b4e9", "MLP + TED"),
    "gcn": ("#333333", "GCN, balanced"),
    "mlp": ("#999999", "MLP, balanced"),
    "gcn-nnpu": ("#009e73", "GCN + nnPU"),
    "mlp-nnpu": ("#7fcfb8", "MLP + nnPU"),
    "lsdan": ("#cc79a7", "LSDAN"),
    "grab": ("#e69f00", "GRAB"),
    "pugnn": ("#b8860b", "PU-GNN"),
    "BBE": ("#6a3d9a", "GCN + BBE"),
}
MASKS = {
    "gpl": ("#c1272d", "learned (GPL)"),
    "constant": ("#999999", "constant 0.03"),
    "flipped": ("#0072b2", "sign flipped"),
    "random": ("#e69f00", "random cut"),
    "ideal": ("#009e73", "ideal"),
}
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    out = []
    for name, function in (
        ("heterophily", against_h),
        ("labelled-share", against_rp),
        ("edge-weights", edge_weights),
        ("masks", masks),
    ):
        figure_caption = function(records)
        if figure_caption:
            figure, caption = figure_caption
            path = folder / f"{scale}-{name}.png"
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            out.append((path, caption))
    return out


def _points(axis, frame, names: dict, metric: str, x: str = "x", joined: bool = True) -> None:
    """Mean and std over seeds at each place, methods side by side; `joined` by a line where places are one family."""
    places = sorted(frame[x].unique())
    here = [m for m in names if ((frame["method"] == m) & (frame["metric"] == metric)).any()]
    dodge = (0.012 * (places[-1] - places[0]) if joined else 0.75 / max(len(here), 1)) if places else 0
    for k, m in enumerate(here):
        g = frame[(frame["method"] == m) & (frame["metric"] == metric)].groupby(x)["value"]
        mean, std = g.mean(), g.std(ddof=0)
        colour, label = names[m]
        at = mean.index + dodge * (k - (len(here) - 1) / 2)
        axis.errorbar(at, mean, std, fmt="o-" if joined else "o", ms=4, capsize=2, label=label, color=colour)


def _placed(records: list[dict]):
    """(long frame with a column x, names of the places; empty where x is h itself). Different graphs get a place each
    in the order of their binary heterophily, generated ones stand at theirs."""
    h = {r["dataset"]: r["data"]["h_binary"] for r in records}
    named = len({r["data"]["name"] for r in records}) > 1
    order = sorted(h, key=lambda d: h[d])
    frame = long(records)
    frame["x"] = frame["dataset"].map({d: float(k) if named else round(h[d], 3) for k, d in enumerate(order)})
    return frame, [f"{d}\n{h[d]:.2f}" for d in order] if named else []


def _mark(axis, places: list[str], ylabel: str, title: str, **more) -> None:
    axis.set(xlabel="binary heterophily h", ylabel=ylabel, title=title, **more)
    if places:
        axis.set_xticks(range(len(places)), places, rotation=45, fontsize=9)
        axis.set_xlabel("graphs by growing binary heterophily h")


def against_h(records: list[dict]):
    """Error of the prior and F1 against heterophily."""
    # Methods are scored in table f1; the cpe runs train a GCN for the estimators alone.
    wanted = [r for r in records if r["table"] == "f1" or r["table"] == "cpe" and r["method"] == "BBE"]
    main = [r for r in wanted if r["setting"] == "r_p=0.5"]
    if len({r["dataset"] for r in main}) < 2:
        return None
    frame, places = _placed(main)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4))
    pi = {m: METHODS[m] for m in ("BBE", "gcn-ted", "mlp-ted", "grab", "gpl")}
    _points(left, frame, pi, "pi_signed_error", joined=not places)
    left.axhline(0, color="black", lw=0.8)
    _mark(left, places, "estimated - true prior of U", "Class prior")
    _points(right, frame, {m: v for m, v in METHODS.items() if m != "BBE"}, "f1", joined=not places)
    _mark(right, places, "F1 on U (%)", "Classification", ylim=(0, 100))
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure, "Signed error of the class prior and F1 against binary heterophily; bars are one std over seeds."


def against_rp(records: list[dict]):
    """F1 against the share of labelled positives, one panel a graph."""
    main = [r for r in records if r["table"] in ("f1", "rp") and r["setting"].startswith("r_p=")]
    if not any(r["table"] == "rp" for r in main):
        return None
    frame = long(main)
    frame = frame[frame["metric"] == "f1"].assign(x=lambda f: f["setting"].str[4:].astype(float))
    h = {r["dataset"]: r["data"]["h_binary"] for r in main}
    sets, columns = sorted(h, key=lambda d: h[d]), 4
    height = -(-len(sets) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(13, 2.9 * height), squeeze=False)
    names = {m: v for m, v in METHODS.items() if m != "BBE"}
    for axis, d in zip(axes.flat, sets, strict=False):
        _points(axis, frame[frame["dataset"] == d], names, "f1")
        axis.set(title=d, xlabel="share of positives labelled", ylabel="F1 on U (%)", xticks=[0.2, 0.3, 0.4, 0.5])
    for axis in list(axes.flat)[len(sets) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="upper center", ncols=10)
    figure.subplots_adjust(top=0.9)
    return figure, (
        "F1 when fewer positives are labelled; graphs by growing binary heterophily, bars are one std over seeds. With "
        "fewer labels U holds more positives, which alone raises F1: compare methods at one share, not shares of one "
        "method."
    )


def masks(records: list[dict]):
    """What each mask does to heterophily, and which edges the learned one keeps."""
    main = [r for r in records if r["table"] == "f1" and r["setting"] == "r_p=0.5" and r["method"] in MASKS]
    if len({r["method"] for r in main}) < 2:
        return None
    frame, places = _placed(main)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    _points(axes[0], frame, MASKS, "f1", joined=not places)
    _mark(axes[0], places, "F1 on U (%)", "GPL with each mask", ylim=(0, 100))
    _points(axes[1], frame, MASKS, "h_weighted", joined=not places)
    _mark(axes[1], places, "h of the weighted graph", "Heterophily left by the mask", ylim=(-0.02, 1.02))
    kinds = {"w_pp": ("#c1272d", "P-P"), "w_pn": ("#e69f00", "P-N"), "w_nn": ("#0072b2", "N-N")}
    kinds["w_hidden"] = ("#6a3d9a", "with a hidden positive")
    learned = frame[(frame["method"] == "gpl") & frame["metric"].isin(kinds)]
    _points(axes[2], learned.assign(method=learned["metric"], metric="weight"), kinds, "weight", joined=not places)
    _mark(axes[2], places, "mean learned weight", "Which edges GPL keeps", ylim=(-0.02, 1.02))
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure, (
        "Controls of the mask. Left: F1 of GPL with its learned mask and with others in its place (the ideal one knows "
        "all labels). Middle: heterophily of the weighted graph. Right: mean learned weight by kind of edge (P "
        "positive, N negative). Bars are one std over seeds."
    )


def edge_weights(records: list[dict]):
    """Learned weights of homophilic against heterophilic edges; before training every weight is 1."""
    rows = [r for r in records if r["table"] == "f1" and r["method"] == "gpl" and "hist_binary_same" in r["metrics"]]
    sets = list(dict.fromkeys(r["dataset"] for r in sorted(rows, key=lambda r: r["data"]["h"])))
    if not sets:
        return None
    columns = min(4, len(sets))
    height = -(-len(sets) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(3 * columns, 2.7 * height), squeeze=False, sharey=True)
    edges = np.linspace(0, 1, 21)
    for axis, d in zip(axes.flat, sets, strict=False):
        for side, colour, label in (("same", "#009e73", "same class"), ("differ", "#d55e00", "different class")):
            counts = np.sum([r["metrics"][f"hist_binary_{side}"] for r in rows if r["dataset"] == d], axis=0)
            axis.stairs(counts / max(counts.sum(), 1), edges, color=colour, label=label, lw=1.6)
        axis.axvline(1, color="grey", ls=":", lw=1)
        axis.set(title=d, xlabel="edge weight")
    for axis in list(axes.flat)[len(sets) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("share of edges")
    axes.flat[0].legend(frameon=False, fontsize=9, loc="upper center")
    figure.tight_layout()
    return figure, (
        "Edge weights that GPL learned, apart for edges inside and between the binary classes, over all seeds. "
        "Before training every weight is 1 (dotted)."
    )
