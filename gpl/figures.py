"""Pictures of RESULTS.md, drawn from records: <scale>-<name>.png."""

from pathlib import Path

from lab.records import long

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"gpl": "#c1272d", "gcn-ted": "#0072b2", "mlp-ted": "#56b4e9", "gcn": "#555555", "mlp": "#aaaaaa"}
NAMES = {"gpl": "GPL", "gcn-ted": "GCN + TED", "mlp-ted": "MLP + TED", "gcn": "GCN", "mlp": "MLP", "BBE": "GCN + BBE"}
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def draw(records: list[dict], folder: Path, scale: str) -> list[tuple[Path, str]]:
    """-> [(path, caption)] of the figures the records allow."""
    out = []
    for name, function in (("heterophily", against_h), ("labelled-share", against_rp), ("edge-weights", edge_weights)):
        figure_caption = function(records)
        if figure_caption:
            figure, caption = figure_caption
            path = folder / f"{scale}-{name}.png"
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            out.append((path, caption))
    return out


def _lines(axis, frame, methods: list[str], metric: str, scale: float = 1.0) -> None:
    places = sorted(frame["h"].unique())
    dodge = 0.012 * (places[-1] - places[0])  # side by side, so that the bars do not hide each other
    for k, m in enumerate(methods):
        part = frame[(frame["method"] == m) & (frame["metric"] == metric)]
        if len(part):
            g = part.groupby("h")["value"]
            mean, std = g.mean() * scale, g.std(ddof=0) * scale
            axis.errorbar(
                mean.index + dodge * (k - (len(methods) - 1) / 2),
                mean,
                std,
                marker="o",
                ms=4,
                capsize=2,
                label=NAMES[m],
                color=COLOURS.get(m, "#e69f00"),
            )


def against_h(records: list[dict]):
    """Error of the prior and F1 against heterophily."""
    main = [r for r in records if r["table"] in ("f1", "cpe") and r["setting"] == "r_p=0.5"]
    heterophily = {(r["run"], r["seed"]): r["data"]["h"] for r in main}
    frame = long(main)
    if frame.empty or len({round(h, 2) for h in heterophily.values()}) < 2:
        return None
    frame["h"] = [round(heterophily[k], 3) for k in zip(frame["run"], frame["seed"], strict=True)]
    sets = sorted({(round(r["data"]["h"], 3), r["data"]["name"]) for r in main})
    named = len({name for _, name in sets}) > 1  # different graphs: one place each, in the order of h
    if named:
        frame["h"] = frame["h"].map({h: k for k, (h, _) in enumerate(sets)})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    _lines(left, frame, ["BBE", "gcn-ted", "mlp-ted", "gpl"], "pi_signed_error")
    left.axhline(0, color="black", lw=0.8)
    left.set(xlabel="heterophily h (share of edges)", ylabel="estimated - true prior of U", title="Class prior")
    _lines(right, frame, ["gcn", "mlp", "gcn-ted", "mlp-ted", "gpl"], "f1")
    right.set(xlabel="heterophily h (share of edges)", ylabel="F1 on U (%)", title="Classification", ylim=(0, 100))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=9)
        if named:
            axis.set_xticks(range(len(sets)), [f"{name}\n{h:.2f}" for h, name in sets], rotation=45, fontsize=9)
            axis.set_xlabel("graphs by growing heterophily h")
    return figure, "Signed error of the class prior and F1 against heterophily; bars are one std over seeds."


def against_rp(records: list[dict]):
    """F1 against the share of labelled positives, one panel a graph."""
    main = [r for r in records if r["table"] in ("f1", "rp") and r["setting"].startswith("r_p=")]
    if not any(r["table"] == "rp" for r in main):
        return None
    frame = long(main)
    frame = frame[frame["metric"] == "f1"].assign(h=lambda f: f["setting"].str[4:].astype(float))
    sets = [d for d in dict.fromkeys(r["dataset"] for r in sorted(main, key=lambda r: r["data"]["h"]))]
    columns = 4
    figure, axes = plt.subplots(
        -(-len(sets) // columns), columns, figsize=(12, 2.9 * -(-len(sets) // columns)), squeeze=False
    )
    for axis, d in zip(axes.flat, sets, strict=False):
        _lines(axis, frame[frame["dataset"] == d], ["gcn", "mlp", "gcn-ted", "mlp-ted", "gpl"], "f1")
        axis.set(title=d, xlabel="share of positives labelled", ylabel="F1 on U (%)", xticks=[0.2, 0.3, 0.4, 0.5])
    for axis in list(axes.flat)[len(sets) :]:
        axis.set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure, (
        "F1 when fewer positives are labelled; graphs by growing heterophily, bars are one std over seeds. With fewer "
        "labels U holds more positives, which alone raises F1: compare methods at one share, not shares of one method."
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
