"""Interactive rounds with a simulated user, scored: J, F, area under the curve, J&F at 60 s, seconds a round.

    python eval.py --videos occluder pair --seeds 0 1               # procedural videos, GrabCut, no data or weights
    python eval.py --dataset davis2016 --method full --data-dir /data
    python eval.py --dataset davis2016 --segmenter vit_h --weights sam_vit_h_4b8939.pth --interaction scribble
    --rounds 8
    python eval.py --dataset mose --split train --method points     # for comparison: points alone

Nothing is trained. A video that is done is kept: the same command goes on where it was stopped.
"""

from pathlib import Path

from lab import runs
from lab.progress import progress

import cv2
import torch

import data
import export
import pipeline
from evaluation import play, show
from settings import EvalSettings


def main() -> None:
    s = runs.parse(EvalSettings, __doc__)
    s.check()
    folder = runs.data_dir(s.data_dir)
    names = list(s.videos) or (list(data.DRAWN) if s.dataset == "drawn" else data.names_of(s.dataset, s.split, folder))
    setting = f"{s.interaction}, {s.rounds} rounds" if s.rounds > 1 else f"{s.interaction}, 1 round"
    s.out = s.out or runs.default_out(s.scale, f"{s.table}-{s.dataset}-{s.interaction}-{s.segmenter}-{s.method}")
    if s.dry_run:
        print(f"{len(names)} videos ({', '.join(names)}), {setting}, method {s.method}, seeds {s.seeds}: {s.out}")
        return
    cv2.setNumThreads(torch.get_num_threads())
    run = runs.Run(Path(s.out), s, ("out", "data_dir", "device", "dry_run"))
    if run.complete:
        print(f"{run.out} is complete; delete it to run again")
        show([runs.read_record(p) for p in sorted(run.out.glob("seed*/record*.json"))], s)
        return
    todo = [(seed, name) for seed in s.seeds for name in names]
    lines = {}
    if s.human_scribbles:  # all of them first: a set that is missing shall not stop a run in its middle
        lines = {(seed, name): data.first_scribbles(s.dataset, name, s.split, folder, seed) for seed, name in todo}
    pipeline.find_weights(s, s.data_dir)  # after the run has stored the settings as they were given
    parts = pipeline.build(s)
    device = parts[1].device
    bar = progress(todo, s.method, len(todo))
    for seed, name in bar:
        path = run.folder(seed) / f"record-{name}.json"
        if path.is_file():
            continue
        bar.set_postfix_str(f"{name}, seed {seed}")
        began = run.seconds()
        video = data.load(s.dataset, name, s.split, folder, s.longest, s.frames, seed)
        found, labels = play(s, video, seed, parts, lines=lines.get((seed, name)))
        if s.save_masks:
            export.png(run.folder(seed) / "masks" / name, labels)
        info = {"name": name, "variant": video.variant, "n": len(video.frames), "sha256": video.sha256}
        where = {"table": s.table, "dataset": name, "setting": setting, "method": s.method, "scale": s.scale}
        run.record(
            seed, seconds=run.seconds() - began, data=info, metrics=found, where=where, device=device, suffix=f"-{name}"
        )
    show(run.finish(), s)
    print(f"records in {run.out}")


if __name__ == "__main__":
    runs.command(main)
