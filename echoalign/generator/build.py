"""The generator that the settings name, trained or loaded."""

from collections.abc import Callable
from pathlib import Path

from lab.runs import UserError

import torch

import echomod
import readers
from cache import alone
from generator import nets as generators
from generator import stable


def refuse(s) -> None:
    """UserError for settings whose edits would be no honest stand-in."""
    if s.generator == "exact" and s.dataset in readers.PHOTOGRAPHS:
        raise UserError(
            "--generator exact is refused on photographs: the closed form gives back the nearest clean image of "
            "the class; use concat (trained on --pretrain images) or sd"
        )


def build(
    s, d, seed: int, device: torch.device, cache: Path, local: Callable[[str], str], show: bool
) -> echomod.Generator:
    """`s`: Settings; `d`: the data, whose clean images a small generator is fitted to; `local`: a name or hub id to the
    folder of its weights where that is here."""
    if s.generator == "none":
        raise UserError("--generator none edits nothing; name one for this method or stage")
    refuse(s)
    if s.generator == "exact":
        if not len(d.pre):
            raise UserError("--generator exact needs clean images: give --pretrain")
        return echomod.ExactDenoiser(d.pre.x, d.pre.y, s.strength, s.edit.steps, s.edit.sampler)
    if s.generator in generators.NETS:
        place = cache / "generators" / f"{s.generator}-{seed}"
        with alone(place):
            net, about = generators.train(
                *(s.generator, d.pre.x, d.pre.y, d.kind.classes, place, device),
                seed=seed,
                steps=s.net.steps,
                batch=s.net.batch,
                lr=s.net.lr,
                widths=s.net.widths,
                layers=s.net.layers,
                control=s.edit.control,
                control_dropout=s.net.control_dropout,
                flip=d.kind.flip,
                bf16=s.precision == "bf16",
                every=s.net.checkpoint,
                show=show,
            )
        return generators.Trained(
            *(net, about, d.kind.classes, device),
            strength=s.strength,
            steps=s.edit.steps,
            sampler=s.edit.sampler,
            guidance=s.edit.guidance,
            control=s.edit.control,
            control_scale=s.edit.control_scale,
            control_end=s.edit.control_end,
            bf16=s.precision == "bf16",
        )
    knobs = stable.Knobs(
        mode=s.sd.mode,
        strength=s.strength,
        steps=s.edit.steps,
        sampler=s.edit.sampler,
        guidance=s.edit.guidance,
        control=s.edit.control,
        control_scale=s.edit.control_scale,
        control_start=s.sd.control_start,
        control_end=s.edit.control_end,
        resolution=s.sd.resolution,
        canny_low=s.sd.canny[0],
        canny_high=s.sd.canny[1],
        prompt=s.sd.prompt,
        negative=s.sd.negative,
    )
    words = readers.names(s.dataset)
    more = {"bf16": s.precision == "bf16", "download": s.download, "compile": s.compile}
    control = s.sd.controlnet or stable.CONTROLNETS.get(s.edit.control, stable.CONTROLNETS["canny"])
    return stable.load(local(s.sd.base), local(control), words, knobs, device, **more)
