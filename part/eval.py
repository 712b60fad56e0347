"""Evaluate a trained run again: PGD, MMA, AutoAttack, attacks that know the masks, corruptions.

    python eval.py --run runs/demo/own-glyphs-at-part-8 --adaptive --limit 500
    python eval.py --run runs/paper/main-cifar10-at-s1 --autoattack standard --corruptions --write

A run is a folder that train.py wrote, or one seed of it.
"""

from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch

import evaluation
from settings import EvalSettings, Settings
from trainer import Trainer


def main() -> None:
    e = runs.parse(EvalSettings, __doc__)
    e.check_values()
    folder, only = Path(e.run), None
    if folder.name.startswith("seed") and not (folder / "settings.json").is_file():
        folder, only = folder.parent, folder.name
    given = {"data_dir": e.data_dir, "device": e.device, "download": False, "test_batch": e.batch}
    s = runs.settings_from(folder / "settings.json", Settings, **given)
    if e.arm and e.arm not in s.method:
        raise UserError(f"{folder} has no arm {e.arm}; its arms are {', '.join(s.method)}")
    if e.corruptions and s.dataset != "cifar10":
        raise UserError(f"--corruptions is for runs on cifar10; {folder} is on {s.dataset}")
    t = Trainer(s, runs.device(e.device, s.precision == "bf16"))
    seeds = [k for k in s.seeds if only in (None, f"seed{k}")]
    if not seeds:
        raise UserError(f"{folder} has no {only}; its seeds are {', '.join(map(str, s.seeds))}")
    eps, steps = e.eps or s.test_eps, e.steps or s.test_steps
    index = evaluation.order(len(t.test.part), min(e.limit or s.eval_limit, len(t.test.part)))
    rows = []
    for seed in seeds:
        t.fresh(seed)
        for arm in [e.arm] if e.arm else s.method:
            where = folder / f"seed{seed}"
            t.load_weights(where / f"model-{arm}.safetensors")
            given = (eps, s.test_step, steps, seed, s.final_attacks)
            found = evaluation.attack_all(t.model, t.test, index, *given, world=t)
            if e.autoattack:
                found["autoattack"] = evaluation.auto_attack(t.model, t.test, index, eps, e.autoattack, seed, t)
            if e.adaptive:
                more = evaluation.adaptive(t.model, t.test, index, eps, s.test_step, seed, t.own_budget, world=t)
                strongest = [more["union"], *(found[k] for k in ("pgd", "mma", "autoattack") if k in found)]
                found |= more | {"union": torch.stack(strongest).all(0)}
            metrics = evaluation.percent(found)
            if e.corruptions:
                metrics |= evaluation.corruption_accuracy(t.model, runs.data_dir(e.data_dir), e.batch, t.device)
            rows.append({"seed": seed, "arm": arm, "method": s.label(arm), "metrics": metrics})
            rows[-1]["images"] = found
    if t.rank:
        return
    print(
        f"{folder}: eps {255 * eps:g}/255 at every pixel, {steps} steps of {255 * s.test_step:g}/255, "
        f"{len(index)} images"
    )
    evaluation.show(rows)
    extra = [k for k in rows[0]["metrics"] if k not in evaluation.SHOWN and not k.startswith("corruption_")]
    for k in extra:
        print(f"  {k}: " + ", ".join(f"{r['method']} seed {r['seed']} {r['metrics'][k]:.2f}" for r in rows))
    same = (eps, steps, e.limit, e.batch) == (s.test_eps, s.test_steps, 0, s.test_batch)
    for row in rows:
        path = folder / f"seed{row['seed']}" / f"record-{row['arm']}.json"
        if not path.is_file():
            continue
        old = runs.read_record(path)
        differs = [k for k in ("natural", *s.final_attacks) if abs(old["metrics"].get(k, 0) - row["metrics"][k]) > 1e-6]
        if same and differs:
            k = differs[0]
            print(f"seed {row['seed']}, {row['arm']}: the record says otherwise: {k} {old['metrics'].get(k, 0):.2f} %")
        if e.write:
            setting = f"{old['setting']}, eval eps={255 * eps:g}/255 steps={steps} n={len(index)}"
            new = {**old, "metrics": row["metrics"], "table": old["table"] + "-eval", "setting": setting}
            runs.write_json(path.with_name(f"record-{row['arm']}-eval.json"), new)
            runs.write_tensors(path.with_name(f"images-{row['arm']}.safetensors"), {**row["images"], "index": index})


if __name__ == "__main__":
    runs.command(main)
