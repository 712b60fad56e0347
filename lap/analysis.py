"""What the layers of a trained run are worth: weights removed, loss surfaces under weight noise."""

from pathlib import Path

import evaluation
import layerwise
from settings import SHARE

# (name, which layers, largest entries?); the first removes nothing.
REMOVALS = (
    ("nothing", None, True),
    *(("former, largest", "former", True), ("former, smallest", "former", False)),
    *(("latter, largest", "latter", True), ("latter, smallest", "latter", False)),
)


def removal(t, steps: int, restarts: int, share: float = SHARE) -> dict[str, dict[str, float]]:
    """{removal: clean, FGSM and PGD accuracy, and how far they fall} of the trainer's network, on the images of the
    final evaluation or the first `removal_limit` of them."""
    limit = t.s.removal_limit or t.s.eval_limit
    index = evaluation.order(len(t.test.part), min(limit, len(t.test.part)))
    out: dict[str, dict[str, float]] = {}
    for name, which, largest in REMOVALS:
        names = layerwise.part(t.layers, which) if which else []
        with layerwise.without(t.model, t.layers, names, share, largest):
            found = evaluation.attack_all(t.model, t.test, index, t.s.eps, steps, restarts, t.seed)
        base = out.get("nothing", found)
        out[name] = found | {f"{k}_drop": base[k] - found[k] for k in ("clean", "fgsm", "pgd")}
    return out


def moments(curve: list[dict], chance: float = 10.0) -> dict[str, int]:
    """Epochs before (best PGD accuracy; none where the first epoch overfits), at the onset and after overfitting;
    without it, at one and two thirds and the end of training."""
    last, onset = len(curve), evaluation.onset(curve, chance)
    if onset is None:
        return {"early": max(1, last // 3), "middle": max(1, 2 * last // 3), "end": last}
    earlier = [row["probe_pgd"] for row in curve[: onset - 1]]
    before = {"before": 1 + earlier.index(max(earlier))} if earlier else {}
    return before | {"during": onset, "after": last}


def shown(names: list[str], n: int = 5) -> list[str]:
    """At most n names spread evenly from the first to the last."""
    picks = sorted({round(i * (len(names) - 1) / max(n - 1, 1)) for i in range(n)})
    return [names[k] for k in picks]


def surfaces(t, out: Path, images: int = 100, points: int = 9) -> dict:
    """{"epochs", "layers", "values" [moment][layer][points][points]}: loss on single-step images under noise in one
    layer, and in all (last column), at the moments whose weights were kept."""
    folder = out / f"seed{t.seed}" / "epochs"
    wanted, picked = moments(t.curve, 100 / t.data.kind.classes), shown(layerwise.main_path(t.layers))
    final = {k: v.clone() for k, v in t.model.state_dict().items()}
    epochs, values = {}, {}
    for moment, epoch in wanted.items():
        path = folder / f"{epoch:04d}.safetensors"
        if epoch < len(t.curve) and not path.is_file():
            continue
        if epoch < len(t.curve):
            t.load_weights(path)
        x, y = next(t.test.in_order(t.probe[:images]))
        x = layerwise.attacked(t.model, x, y, t.s.eps)
        groups = [[t.layers[k]] for k in picked] + [list(t.layers.values())]
        values[moment] = [layerwise.surface(t.model, g, x, y, points) for g in groups]
        epochs[moment] = epoch
        t.model.load_state_dict(final)
    return {"epochs": epochs, "layers": [*picked, "all layers"], "values": values}


def all_parts(t, out: Path, seed: int, steps: int, restarts: int, share=SHARE, images=100, points=9) -> list[tuple]:
    """[(file suffix, table, setting, method, metrics)]: a record for each removal and one for the layers."""
    label, found = t.s.label, []
    prefix = "" if t.s.table == "main" else f"{t.s.table}-"  # only runs of the main table have a place in RESULTS.md
    other = "" if share == SHARE else f", {100 * share:g} %"  # a row of its own, not the table's
    for name, metrics in removal(t, steps, restarts, share).items():
        suffix = f"removal-{name}{other.removesuffix(' %')}".replace(", ", "-")
        found.append((suffix, f"{prefix}removal", f"{t.s.setting}, {name}{other}", label, metrics))
    number = {"former_layers": len(layerwise.part(t.layers, "former")), "layers": len(t.layers)}
    collapsed = int(evaluation.onset(t.curve, 100 / t.data.kind.classes) is not None)
    layers = number | {"collapsed": collapsed, "names": list(t.layers), "surfaces": surfaces(t, out, images, points)}
    return [*found, ("layers", f"{prefix}layers", t.s.setting, label, layers)]
