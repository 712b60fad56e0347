"""Evaluate a trained run again, on all or some test images, by FGSM, PGD with restarts and AutoAttack.

    python eval.py --run runs/demo/own-patches-v-aaer-40
    python eval.py --run runs/paper/main-cifar10-rs-aaer-08 --steps 50 --restarts 10 --autoattack standard

A run is a folder that train.py wrote, or one seed of it.
"""

from pathlib import Path

from lab import runs
from lab.runs import UserError

import torch

from evaluation import attack_all, auto_attack, order, show
from settings import EvalSettings, Settings
from trainer import Trainer


def main() -> None:
    e = runs.parse(EvalSettings, __doc__)
    e.check()
    folder, only = Path(e.run), None
    if not (folder / "settings.json").is_file() and (folder.parent / "settings.json").is_file():
        folder, only = folder.parent, folder.name
    given = {"data_dir": e.data_dir, "device": e.device, "download": False, "test_batch": e.batch}
    s = runs.settings_from(folder / "settings.json", Settings, **given)
    s.check()
    s.resolve()
    torch.set_float32_matmul_precision("high")  # as in training
    t = Trainer(s, runs.device(e.device, s.precision == "bf16"))
    seeds = [k for k in s.seeds if only in (None, f"seed{k}")]
    if not seeds:
        raise UserError(f"{folder} has no {only}; its seeds are {', '.join(map(str, s.seeds))}")
    eps, steps, restarts = e.eps or s.eps, e.steps or s.test_steps, e.restarts or s.test_restarts
    index = order(len(t.test.part), min(e.limit or s.eval_limit, len(t.test.part)))
    rows = []
    for seed in seeds:
        t.fresh(seed)
        t.load_weights(folder / f"seed{seed}" / "model.safetensors")
        metrics = attack_all(t.model, t.test, index, eps, steps, restarts, seed)
        if e.autoattack:
            metrics |= auto_attack(t.model, t.test, index, eps, e.autoattack, seed)
        rows.append({"seed": seed, "metrics": metrics})
    print(f"{folder}: eps {255 * eps:g}/255, PGD-{steps}-{restarts}, {len(index)} images")
    show(rows)
    same = (eps, steps, restarts, e.limit, e.batch) == (s.eps, s.test_steps, s.test_restarts, 0, s.test_batch)
    for row in rows:
        path = folder / f"seed{row['seed']}" / "record.json"
        if path.is_file():
            old = runs.read_record(path)
            if same and any(abs(old["metrics"][k] - row["metrics"][k]) > 1e-6 for k in ("clean", "fgsm", "pgd")):
                print(f"seed {row['seed']}: the record says otherwise: {old['metrics']['pgd']:.2f} % PGD")
            if e.write:
                setting = f"{old['setting']}, eval eps={255 * eps:g}/255 PGD-{steps}-{restarts} n={len(index)}"
                runs.write_json(
                    path.with_name("record-eval.json"),
                    {**old, "metrics": row["metrics"], "table": old["table"] + "-eval", "setting": setting},
                )


if __name__ == "__main__":
    runs.command(main)
