"""Train a model of the paper in one of its three stages, with or without the feedback of the diffusion model (CSR).

    python train.py --variant deem --seeds 0 1 2                    # digit scenes: needs no data; evaluates at the end
    python train.py --variant clean --seeds 0 1 2                   # the same without CSR
    python train.py --preset photos --dataset photos --variant deem --then 2        # CIFAR-10, SmolLM2; a GPU
    python train.py --preset deem --stage 1 --dataset paper --precision bf16 --checkpointing --download
    python train.py --preset deem --stage 2 --init runs/paper/NAME --dataset paper --precision bf16 --checkpointing
    accelerate launch --config_file configs/ddp.yaml train.py --preset deem --stage 1 --dataset paper ...

Several processes were run on two CPUs (configs/ddp.yaml); configs/fsdp.yaml and configs/deepspeed.yaml are UNTESTED.

The run lands in runs/<scale>/<name>/ and goes on from its last checkpoint when started again.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lab import runs
from lab.progress import progress
from lab.runs import UserError

import torch

import recipe
from build import build, data_of, inherited, made_here, reader, title, world_of
from evaluation.asking import check_data, evaluate
from evaluation.sets import BENCHMARKS
from model import Deem
from scenes import study
from settings import NOT_PART_OF_A_RUN, EvalSettings, Settings
from trainer import Feeder, Trainer, accelerator_of, schedule

LOG_EVERY = 20  # steps between lines of metrics.jsonl; the only waits for the device


def fit(t: Trainer, path: Path, log: Callable[[list[dict]], None], *, until: int, title: str) -> float:
    """Run to step `until`, with a checkpoint every --checkpoint-steps and at the end if that is not the last step.
    Returns the seconds spent, those of earlier starts included."""
    s, lines, lead = t.s, [], t.accelerator.is_main_process
    started, bad = time.perf_counter(), torch.zeros((), device=t.accelerator.device)

    def flush() -> None:
        if not math.isfinite(float(bad)):
            raise UserError(
                f"{title}: the loss or its gradient is not a finite number in a step up to {t.step}; the last "
                "checkpoint before it is kept; lower the learning rate"
            )
        rows = [{k: v if isinstance(v, int | float) else float(v) for k, v in line.items()} for line in lines]
        if lead and rows:
            log(rows)
        lines.clear()

    t.modes()
    for _ in progress(range(t.step, until), title, until, t.step, hide=not lead):
        logged = t.update()
        bad += sum(0 * v.float().to(bad.device) for v in logged.values())
        t.step += 1
        if t.step % LOG_EVERY == 0 or t.step == until:
            lines.append({"step": t.step, "lr_share": schedule(t.step - 1, s.steps, s.warmup), **logged})
        if (s.checkpoint_steps and t.step % s.checkpoint_steps == 0) or t.step == until:
            flush()
            if t.step < s.steps:
                t.save(path, t.before + time.perf_counter() - started)
    t.model.eval()
    return t.before + time.perf_counter() - started


def train(s: Settings, seed: int, run: runs.Run | None, accelerator, later: bool = False) -> bool:
    """One seed of one stage: training, evaluation, record; `later`: a stage of --then. False when --max-steps
    ended it before the last step."""
    folder = Path(s.out) / f"seed{seed}"
    final, clock = folder / "model.safetensors", time.perf_counter()
    names = recipe.benchmarks_of(s.stage, s.variant, s.benchmarks, first=not later)
    asked = benchmarks_of(s, seed, names) if names else None  # what is missing is told before training
    model = build(s, seed, accelerator.device)
    feeder = Feeder(s, model, reader(s, seed, accelerator), seed, accelerator.process_index)
    t = Trainer(s, model, feeder, accelerator, seed)
    counts = {"parameters": sum(p.numel() for p in model.parameters())}
    counts["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    path = Path(s.out) / "checkpoint" / f"seed{seed}.safetensors"
    t.load(path)
    if run:
        run.same_data(seed, [data_of(s, seed)["sha256"]])
        run.log(seed, [], keep_to=t.step)
    until = min(s.steps, t.step + s.max_steps) if s.max_steps else s.steps
    title = f"stage {s.stage} {s.label} seed {seed}"
    before = t.step
    seconds = fit(t, path, lambda lines: run.log(seed, lines), until=until, title=title)
    if t.step < s.steps:
        print(f"stopped after step {t.step} of {s.steps}; start again with the same command to go on")
        return False
    tensors = t.weights(lambda k: s.small and made_here(model, k))
    if run is None:
        return True
    tensors = {**inherited(s, seed), **tensors} if not s.small else tensors
    runs.write_tensors(final, tensors)
    for k, g in enumerate(model.gates()):
        counts[f"gate_{k}"] = float(g.detach().tanh())
    skipped = {"skipped": feeder.reader.skipped} if not s.on_scenes else {}
    metrics = {"steps": t.step, **skipped, "step_seconds": seconds / max(1, t.step), **counts}
    metrics |= {k: v for k, v in last_line(folder).items() if k in ("ntp", "nip", "csr", "total")}
    if s.on_scenes:
        found, rows = study.score(model, world_of(s), s, seed)
        metrics |= found
        runs.write_tensors(folder / "pictures.safetensors", study.pictures(model, world_of(s), seed))
        if rows:
            runs.write_text(folder / "answers.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    where = {**place(s), "scale": s.scale}
    total = t.before + time.perf_counter() - clock if before else time.perf_counter() - clock
    if asked:
        root = runs.data_dir(s.data_dir) / "deem"
        evaluate(asked, run, seed, model.eval(), s.prompt_form, row(s), root, accelerator.device)
    run.record(seed, seconds=total, data=data_of(s, seed), metrics=metrics, where=where, device=accelerator.device)
    path.unlink(missing_ok=True)
    return True


def benchmarks_of(s: Settings, seed: int, names: tuple[str, ...]):
    """Settings of eval.py for what a stage is scored on; UserError for an unknown name or data that is not there."""
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown:
        raise UserError(f"--benchmarks {unknown[0]} is unknown; use stage or one of {', '.join(BENCHMARKS)}")
    given = {"run": s.out, "benchmark": names, "table": s.benchmark_table, "scale": s.scale, "data_dir": s.data_dir}
    e = EvalSettings(**given, seeds=(seed,), download=s.download)
    e.check()
    check_data(e, runs.data_dir(s.data_dir) / "deem")
    return e


def place(s: Settings) -> dict[str, str]:
    """Where a training record stands; the demo's tables are by stage, the paper's name a model after its stage."""
    method = s.label if s.on_scenes else row(s)
    return {"table": s.table, "dataset": title(s), "setting": setting(s), "method": method}


def row(s: Settings) -> str:
    """Row of the paper's tables: the given label, else the paper's name for the variant after this stage."""
    return s.label if s.label != recipe.LABELS[s.variant] else recipe.LATER.get((s.stage, s.variant), s.label)


def last_line(folder: Path) -> dict:
    """The last line of metrics.jsonl that can be read."""
    path = folder / "metrics.jsonl"
    for line in reversed(path.read_text(errors="replace").splitlines() if path.exists() else []):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return {}


def setting(s: Settings) -> str:
    """Column of the own tables: stage, form, what differs from the paper's settings."""
    parts = [f"stage {s.stage}"]
    if s.form == "official":
        parts.append("as released")
    elif s.csr_use_mmfs == "on" and recipe.CSR[s.variant]:
        parts.append("with maps")
    return ", ".join(parts)


def describe(s: Settings, model: Deem, accelerator) -> str:
    parts = recipe.table(model)
    lines = [f"{s.label}, stage {s.stage}, preset {s.preset}, {s.steps} steps of {s.batch} x {s.accum} rows on each of "
             f"{accelerator.num_processes} processes; {accelerator.device}"]  # fmt: skip
    w = s.loss()
    lines.append(f"loss: {w.ntp:g} NTP + {w.nip:g} NIP + {w.csr:g} CSR (maps {s.csr_use_mmfs}, squeeze {s.squeeze:g})")
    for part, (n, trained) in parts.items():
        rate = f"{trained:>15,} trained at {s.rates().of(part):g}" if trained else f"{'frozen':>15}"
        lines.append(f"  {part:14s} {n:>15,} parameters {rate}")
    return "\n".join(lines)


def main() -> None:
    given = runs.parse(Settings, __doc__)
    s = replace(given)
    s.check()
    s.resolve()
    device = runs.device(s.device, s.precision == "bf16")
    torch.set_float32_matmul_precision("high")
    accelerator = accelerator_of(device)
    if s.init and not s.dry_run:
        for seed in s.seeds:
            if not (Path(s.init) / f"seed{seed}" / "model.safetensors").is_file():
                raise UserError(f"--init {s.init} holds no weights of seed {seed}; train that stage first")
    if s.dry_run:
        with torch.device("meta") if s.preset == "digits" else torch.device("cpu"):
            model = Deem(s.parts(), folder=runs.data_dir(s.data_dir) / "weights", diffusion=s.stage < 3, loss=s.loss())
        model.freeze(s.stage, s.variant)
        print(describe(s, model, accelerator))
        return
    run = runs.Run(Path(s.out), s, NOT_PART_OF_A_RUN) if accelerator.is_main_process else None
    if (Path(s.out) / "records.jsonl").is_file():
        if run:
            print(f"{s.out} is complete; delete it to run again")
            show(run.finish())
        return
    accelerator.wait_for_everyone()
    whole, later = True, {}
    for seed in s.seeds:
        whole = stages(s, given, seed, run, later, accelerator) and whole
    if run and whole:
        for inner in later.values():
            inner.finish()
        show(run.finish())
        print(f"records in {s.out}")


# What --then starts anew: a later stage has its own defaults of these.
FRESH = {"batch": 0, "warmup": -1, "max_tokens": 0, "max_images": 0, "then": ()}
FRESH |= dict.fromkeys(("lr", "mmfs_lr", "offsets_lr"), -1.0)


def following(given: Settings, stage: int, init: str, out: str) -> Settings:
    """Settings of a stage of --then."""
    label = f"{given.label}, stage {stage}" if given.label else ""  # a row of its own
    where = {"init": init, "out": f"{out}/stage{stage}", "label": label}
    rates = {"encoder": replace(given.encoder, lr=-1.0, resolution=0), "sd": replace(given.sd, lr=-1.0)}
    rates["lm"] = replace(given.lm, lr=-1.0)
    own = replace(given, stage=stage, steps=given.then_steps, **where, **rates, **FRESH)
    own.check()
    own.resolve()
    return own


def stages(s: Settings, given: Settings, seed: int, run: runs.Run | None, later: dict, accelerator) -> bool:
    """The run's stage, then those of --then, each from the weights of the one before and with a record that the run
    keeps too. `given`: the settings before defaults were put in; `later`: run folders of the later stages."""
    folder = Path(s.out) / f"seed{seed}"
    if not (folder / "record.json").is_file():
        if not train(s, seed, run, accelerator):
            return False
        accelerator.wait_for_everyone()
    elif run:  # a start that was killed between record and checkpoint
        (Path(s.out) / "checkpoint" / f"seed{seed}.safetensors").unlink(missing_ok=True)
    before = s.out
    for stage in s.then:
        own = following(given, stage, before, s.out)
        record, inner = folder / f"record-stage{stage}.json", Path(own.out) / f"seed{seed}" / "record.json"
        if run and stage not in later and (inner.is_file() or not record.is_file()):  # if only to finish its folder
            later[stage] = runs.Run(Path(own.out), own, (*NOT_PART_OF_A_RUN, "init"))  # --init follows from --out
        if not record.is_file():
            if not inner.is_file() and not train(own, seed, later.get(stage), accelerator, later=True):
                return False
            accelerator.wait_for_everyone()
            if run:
                for path in inner.parent.glob("record-*.json"):  # of benchmarks
                    runs.write_json(folder / f"record-stage{stage}{path.name[6:]}", runs.read_record(path))
                runs.write_json(record, runs.read_record(inner))
        before = own.out
    return True


def show(records: list[dict]) -> None:
    keys = ("caption_accuracy", "caption_guess", "text_accuracy", "csr_ratio", "probe_uncaptioned", "probe_shape")
    keys += ("POPE_accuracy", "MMVP_accuracy", "MMVP_single_accuracy", "ntp", "csr", "nip")
    for r in records:
        m = r["metrics"]
        found = ", ".join(f"{k} {m[k]:.3g}" for k in keys if k in m)
        print(f"{r['method']}, {r['setting']}, seed {r['seed']}: {found} ({r['seconds']:.0f} s)")


if __name__ == "__main__":
    runs.command(main)
