"""Evaluate the classifiers of a run again, or rank a folder of pictures by how well label and picture fit.

    python eval.py --run runs/demo/own-mnist5k-instance-0.5
    python eval.py --run runs/demo/own-mnist5k-instance-0.5/seed0 --taus 0.4 0.5 0.6 --check 0.5
    python eval.py --images ~/pictures                         # pictures/<class>/*.jpg -> labels.csv, labels.html

A run is a folder that train.py wrote, or one seed of it.
"""

from pathlib import Path

from lab import checkpoints, runs
from lab.runs import UserError

import torch

import pictures
from echoselect import by_threshold, quality
from evaluation import official_seed, weights
from features import Lite0
from prepare import Prepared
from settings import METHODS, EvalSettings, Settings
from tasks import needs_edits, task_of


def open_run(run: str, **changed):
    """(settings, folder, seeds asked for) of a run folder or of one seed's folder in it."""
    folder, only = Path(run), None
    if not (folder / "settings.json").is_file() and (folder.parent / "settings.json").is_file():
        folder, only = folder.parent, folder.name
    s = runs.settings_from(folder / "settings.json", Settings, download=False, **changed)
    seeds = [k for k in s.seeds if only in (None, f"seed{k}")]
    if not seeds:
        raise UserError(f"{folder} has no {only}; its seeds are {', '.join(map(str, s.seeds))}")
    return s, folder, seeds


def main() -> None:
    e = runs.parse(EvalSettings, __doc__)
    if bool(e.run) == bool(e.images):
        raise UserError("give --run, a folder that train.py wrote, or --images, a folder of pictures")
    if e.images:
        rank_folder(e)
        return
    changed = {"data_dir": e.data_dir, "device": e.device, "check": e.check, **({"cache": e.cache} if e.cache else {})}
    s, folder, seeds = open_run(e.run, **changed)
    torch.set_float32_matmul_precision("high")
    device = runs.device(s.device, s.precision == "bf16")
    for seed in seeds:
        p = Prepared(s, seed, device)
        for m in [m for m in METHODS if m in s.methods and s.stage == "all"]:
            if not (folder / f"seed{seed}" / f"model-{m}.safetensors").is_file():
                raise UserError(f"no file {folder}/seed{seed}/model-{m}.safetensors; train the run to its end first")
            path = folder / f"seed{seed}" / f"record-{m}.json"
            old = runs.read_record(path)
            name, cls = METHODS[m]
            task = task_of(p, "ce")  # the training images do not matter here
            task.c, task.tune = torch.zeros(len(task.x)).long(), task.test
            learner = cls(s, task, seed, device)
            load(learner, folder / f"seed{seed}" / f"model-{m}.safetensors")
            metrics = {"accuracy": learner.accuracy(p.test)}
            if e.official:
                metrics["accuracy_official"] = learner.accuracy(p.test, official_seed(seed))
            text = "".join(f"  {k} {v:.2f} %" for k, v in metrics.items())
            print(f"seed {seed} {name:36s}{text}")
            if abs(metrics["accuracy"] - old["metrics"]["accuracy"]) > 1e-6:
                print(f"seed {seed} {name}: the record says otherwise: {old['metrics']['accuracy']:.2f} %")
            if e.write:
                new = {**old, "metrics": metrics, "table": old["table"] + "-eval"}
                runs.write_json(path.with_name(f"record-eval-{m}.json"), new)
        if e.taus and not needs_edits(s):
            raise UserError("--taus looks at modified images, and this run has none; give a run with echoalign")
        for tau in e.taus:
            kept = by_threshold(p.similarity, tau)
            q = quality(kept, p.right)
            numbers = "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in q.items())
            print(f"seed {seed} tau {tau:.3f}: {numbers}")
        if e.check:
            p.check()
            print(f"seed {seed}: the generator passes its check")


def rank_folder(e: EvalSettings) -> None:
    """--images: labels.csv and labels.html of a folder of pictures."""
    if e.worst < 1:
        raise UserError(f"--worst must be at least 1, not {e.worst}")
    folder = runs.home(e.images)
    out = Path(e.out or runs.default_out("images", folder.resolve().name))
    pictures.find(folder)  # before the network is loaded
    r = pictures.report(folder, Lite0(runs.device(e.device)), out, e.worst)
    doubted = int((r.likeliest != r.y).sum())
    print(f"{len(r.y)} pictures of {len(r.classes)} classes; for {doubted} another class is likelier than their label")
    for i in r.worst()[:5]:
        said, other = r.classes[r.y[i]], r.classes[r.likeliest[i]]
        print(f"  {r.files[i]}: " + (f"{other} rather than {said}" if other != said else f"{said}, unsure"))
    print(f"{out / 'labels.csv'} and {out / 'labels.html'}")


def load(learner, path: Path) -> None:
    tensors, _ = runs.read_weights(path)
    try:
        checkpoints.check_tensors(tensors, weights(learner), path)
    except UserError as error:
        raise UserError(f"{path} holds weights of another network ({str(error)[:200]}); train it again") from None
    for k, net in enumerate(learner.plain):
        net.load_state_dict({n.removeprefix(f"{k}."): v for n, v in tensors.items() if n.startswith(f"{k}.")})


if __name__ == "__main__":
    runs.command(main)
