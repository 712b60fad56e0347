"""EchoMod with Stable Diffusion and ControlNet through diffusers: the paper's kind of generator.

Weights are hub ids or local folders in diffusers' layout; nothing is downloaded without --download. The preset is that
of the ControlNet author's canny demonstration: 512 pixels, Canny thresholds 100/200 after upscaling, DDIM with 20
steps, eta 0, guidance 9, control strength 1.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from lab.runs import UserError

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PROMPT = "a photo of a {name}, best quality, extremely detailed"
NEGATIVE = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, "
)
NEGATIVE += "low quality"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CONTROLNETS = {
    "canny": "lllyasviel/sd-controlnet-canny",
    "tile": "lllyasviel/control_v11f1e_sd15_tile",
}
SAMPLERS = {"ddim": "DDIMScheduler", "dpm": "DPMSolverMultistepScheduler"}


@dataclass
class Knobs:
    """Everything the output depends on besides the weights."""

    mode: str = "img2img"
    """start: from noise, structure through the control alone; img2img: from the noised original (SDEdit)."""
    strength: float = 0.75
    steps: int = 20
    sampler: str = "ddim"
    guidance: float = 9.0
    control: str = "canny"
    """canny, tile (the image itself) or none (control strength 0)."""
    control_scale: float = 1.0
    control_start: float = 0.0
    control_end: float = 1.0
    resolution: int = 512
    canny_low: float = 100.0
    canny_high: float = 200.0
    prompt: str = PROMPT
    negative: str = NEGATIVE


def upscale(image: np.ndarray, resolution: int) -> Image.Image:
    """uint8 [H, W, C] -> RGB picture whose sides are multiples of 64, the shorter one about `resolution`."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    k = resolution / min(picture.size)
    size = tuple(max(64, round(side * k / 64) * 64) if resolution >= 64 else resolution for side in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS if k > 1 else Image.Resampling.BOX)


def canny(picture: Image.Image, low: float, high: float) -> Image.Image:
    """Edges of the upscaled picture, white on black, RGB."""
    import cv2

    edges = cv2.Canny(np.asarray(picture), low, high)
    return Image.fromarray(np.repeat(edges[..., None], 3, axis=2))


class StableControl:
    """Stable Diffusion + ControlNet behind `edit`; text embeddings of the C classes are computed once."""

    def __init__(self, pipeline, names: Sequence[str], knobs: Knobs, device: torch.device, dtype, told: dict):
        import diffusers

        self.knobs, self.device, self.names = knobs, device, tuple(names)
        config = pipeline.scheduler.config
        pipeline.scheduler = getattr(diffusers, SAMPLERS[knobs.sampler]).from_config(config)
        self.pipe = pipeline.to(device, dtype)
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.pipe.controlnet.to(memory_format=torch.channels_last)
        self.pipe.set_progress_bar_config(disable=True)
        words = [knobs.prompt.format(name=name) for name in names]
        with torch.no_grad():
            found = [self.pipe.encode_prompt(w, device, 1, True, knobs.negative) for w in words]
        self.positive = torch.cat([p for p, _ in found])
        self.negative = found[0][1]
        self._told = {"generator": "sd", **told, **vars(knobs), "classes": list(names), "dtype": str(dtype)}

    def about(self) -> dict:
        return dict(self._told)

    @torch.no_grad()
    def edit(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        k = self.knobs
        if k.mode == "img2img" and int(k.steps * k.strength) < 1:  # no step would be made
            return images.clone()
        pictures = [upscale(image, k.resolution) for image in images.numpy()]
        maps = [canny(p, k.canny_low, k.canny_high) for p in pictures] if k.control == "canny" else pictures
        generators = [torch.Generator().manual_seed(s) for s in seeds]  # on the CPU: the same on every device
        more = {
            "prompt_embeds": self.positive[labels.to(self.positive.device)],
            "negative_prompt_embeds": self.negative.expand(len(labels), -1, -1),
            "num_inference_steps": k.steps,
            "guidance_scale": k.guidance,
            "eta": 0.0,
            "generator": generators,
            "controlnet_conditioning_scale": 0.0 if k.control == "none" else float(k.control_scale),
            "control_guidance_start": k.control_start,
            "control_guidance_end": k.control_end,
            "output_type": "np",
        }
        if k.mode == "img2img":
            out = self.pipe(image=pictures, control_image=maps, strength=k.strength, **more).images
        else:
            out = self.pipe(image=maps, **more).images
        out = torch.from_numpy(np.rint(np.nan_to_num(out) * 255).astype(np.uint8))  # NaN: black, made again
        return out.float().mean(-1, keepdim=True).round().to(torch.uint8) if images.shape[-1] == 1 else out


def load(
    base: str,
    controlnet: str,
    names: Sequence[str],
    knobs: Knobs,
    device: torch.device,
    *,
    bf16: bool = False,
    download: bool = False,
    compile: bool = False,
) -> StableControl:
    """The pipeline from hub ids or local folders; UserError names what is missing."""
    import diffusers
    from diffusers import ControlNetModel

    control = controlnet or CONTROLNETS.get(knobs.control, CONTROLNETS["canny"])
    cls = "StableDiffusionControlNetImg2ImgPipeline" if knobs.mode == "img2img" else "StableDiffusionControlNetPipeline"
    dtype = torch.float32 if device.type == "cpu" and not bf16 else torch.bfloat16 if bf16 else torch.float16
    place, offline = {"dtype": dtype}, {"local_files_only": not download}
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers' own call, before our one line
    try:
        net = ControlNetModel.from_pretrained(control, **place, **offline)
        # Without the safety checker: it answers upscaled small pictures with black ones.
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = getattr(diffusers, cls).from_pretrained(base, controlnet=net, **place, **offline, **none)
    except (OSError, ValueError, RuntimeError) as error:
        places = " and ".join(f"weights/{name.split('/')[-1]}" for name in (base, control))
        raise UserError(
            f"weights of {base} and {control} could not be read ({str(error)[:160]}); get them from huggingface.co "
            f"into {places} of the data folder, give other folders in diffusers' layout by --sd.base and "
            "--sd.controlnet, or add --download"
        ) from None
    if compile:
        pipe.unet, pipe.controlnet = torch.compile(pipe.unet), torch.compile(pipe.controlnet)
    weights = hashlib.sha256()
    for module in (pipe.unet, net, pipe.vae, pipe.text_encoder):  # the sums tell other weights from these
        for k, v in module.state_dict().items():
            weights.update(f"{k} {v.double().sum().item():.6e}".encode() if v.is_floating_point() else k.encode())
    told = {"base": base, "controlnet": control, "weights": weights.hexdigest()[:16]}
    return StableControl(pipe, names, knobs, device, dtype, told)
