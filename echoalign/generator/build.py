"""The generator that the settings name, trained or loaded."""

from collections.abc import Callable
from pathlib import Path

import torch

import classes
import echomod
from cache import alone
from generator import nets as generators
from generator import stable


def build(
    s, d, seed: int, device: torch.device, cache: Path, local: Callable[[str], str], show: bool
) -> echomod.Generator:
    """`s`: Settings; `d`: the data, whose clean images a small generator is fitted to; `local`: a name or hub id to the
    folder of its weights where that is here."""
    if s.generator == "exact":
        return echomod.ExactDenoiser(d.pre.x, d.pre.y, s.strength, s.edit_steps, s.sampler)
    if s.generator in generators.NETS:
        place = cache / "generators" / f"{s.generator}-{seed}"
        with alone(place):
            net, about = generators.train(
                *(s.generator, d.pre.x, d.pre.y, d.kind.classes, place, device),
                seed=seed,
                steps=s.generator_steps,
                batch=s.generator_batch,
                lr=s.generator_lr,
                widths=s.widths,
                layers=s.generator_layers,
                control=s.control,
                control_dropout=s.control_dropout,
                flip=d.kind.flip,
                bf16=s.precision == "bf16",
                every=s.generator_checkpoint,
                show=show,
            )
        return generators.Trained(
            *(net, about, d.kind.classes, device),
            strength=s.strength,
            steps=s.edit_steps,
            sampler=s.sampler,
            guidance=s.guidance,
            control=s.control,
            control_scale=s.control_scale,
            control_end=s.control_end,
            bf16=s.precision == "bf16",
        )
    knobs = stable.Knobs(
        mode=s.sd_mode,
        strength=s.strength,
        steps=s.edit_steps,
        sampler=s.sampler,
        eta=s.eta,
        guidance=s.guidance,
        control=s.control,
        control_scale=s.control_scale,
        control_start=s.control_start,
        control_end=s.control_end,
        resolution=s.resolution,
        canny_low=s.canny[0],
        canny_high=s.canny[1],
        prompt=s.prompt,
        negative=s.negative_prompt,
    )
    words = classes.names(s.dataset)
    more = {"bf16": s.precision == "bf16", "download": s.download, "compile": s.compile}
    more["annotators"] = local(s.sd_annotators)
    control = s.sd_controlnet or stable.CONTROLNETS.get(s.control, stable.CONTROLNETS["canny"])
    return stable.load(local(s.sd_base), local(control), words, knobs, device, **more)
