"""Options of train.py that belong to one part of it, `--sd.resolution`; a part's own help is `--sd.help`."""

from dataclasses import dataclass
from typing import Literal

from lab.runs import Number

from generator import stable


@dataclass
class Edit:
    """How EchoMod edits, whichever generator it has."""

    steps: int = 0
    """Denoising steps; 0: 10, sd 20. With sd the steps made are int(steps x strength)."""
    sampler: Literal["ddim", "dpm"] = "ddim"
    """ddim (eta 0) or dpm (DPM-Solver++ 2M)."""
    guidance: Number = -1.0
    """Classifier-free guidance; -1: small networks 2, sd 9."""
    control: Literal["auto", "ink", "box", "canny", "tile", "none"] = "auto"
    """Structure the generator is held to; auto: ink (small networks), canny (sd)."""
    control_scale: Number = -1.0
    """Strength of the control; -1: small networks 0.5, sd 1."""
    control_end: Number = -1.0
    """Share of the steps after which control ends; -1: small networks 0.5, sd 1."""
    batch: int = 64
    """Images edited at once."""
    shard: int = 512
    """Images in a file of the modification pass; a pass that was cut goes on after the last file."""


@dataclass
class Net:
    """The small diffusion networks (--generator concat, controlnet) and their training on clean images."""

    widths: tuple[int, ...] = (16, 32)
    """Channels of the levels."""
    layers: int = 1
    """Blocks of a level."""
    steps: int = 600
    """Training steps."""
    batch: int = 64
    """Images a step."""
    lr: Number = 2e-3
    """AdamW's highest rate."""
    checkpoint: int = 200
    """Steps between checkpoints."""
    control_dropout: Number = 0.5
    """Share of training images whose control is blanked."""


@dataclass
class Sd:
    """Stable Diffusion with ControlNet (--generator sd)."""

    mode: Literal["img2img", "start"] = "img2img"
    """From the noised original, or from pure noise with structure by the control alone."""
    base: str = stable.BASE
    """Hub id or local folder of the base model."""
    controlnet: str = ""
    """Hub id or local folder of the ControlNet; default by --edit.control."""
    resolution: int = 512
    """Shorter side the images are brought to."""
    canny: tuple[Number, Number] = (100.0, 200.0)
    """Thresholds of the edge map, after upscaling."""
    control_start: Number = 0.0
    """Share of the steps before control sets in."""
    prompt: str = stable.PROMPT
    """Prompt; {name} is the class."""
    negative: str = stable.NEGATIVE
    """Negative prompt."""


@dataclass
class Clip:
    """CLIP (--features clip)."""

    model: str = "ViT-B-32"
    """open_clip's model name (released code)."""
    weights: str = "laion2b_s34b_b79k"
    """open_clip's weights name (released code) or a local checkpoint."""


@dataclass
class Transition:
    """Forward, Reweight, T-Revision and PTD, which estimate a transition matrix T."""

    estimate_epochs: int = 0
    """Epochs before T is estimated; 0: a tenth of --epochs."""
    percentile: Number = 97.0
    """Percentile of the anchor point; 100: the highest."""
    revise_epochs: int = 0
    """T-Revision, PTD: epochs of revision; 0: a quarter of --epochs (published: 50)."""
    parts: int = 10
    """PTD: parts (published: 10)."""
    parts_steps: int = 1500
    """PTD: steps that fit the parts' matrices (published)."""


@dataclass
class Pair:
    """Co-teaching and JoCoR, which are two networks."""

    forget_rate: Number = -1.0
    """Share left out at the end; -1: the noise rate, half of it for asymmetric and pair."""
    ramp: int = 10
    """Epochs until that share is reached."""
    jocor_lambda: Number = 0.9
    """JoCoR: weight of the agreement (published: 0.9 on CIFAR-10, 0.85 on CIFAR-100)."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam at --pair.lr, flat then straight to 0 (published), or SGD as the others."""
    lr: Number = 1e-3
    """Adam's rate."""


@dataclass
class Cores:
    """CORES."""

    beta: Number = 2.0
    """Weight of the confidence regulariser after its ramp."""
    warmup: int = 0
    """Epochs before the sieve; 0: 10 (30 with 100 classes), wheel sets 5."""


@dataclass
class Divide:
    """DivideMix."""

    warmup: int = 0
    """Epochs of plain training; 0: 10 (30 with 100 classes), wheel sets 5."""
    lr: Number = 0.02
    """Rate (published: 0.02)."""
    batch: int = 64
    """Labelled images a step (published: 64)."""
    threshold: Number = 0.5
    """Posterior above which a sample counts as clean (published: 0.5)."""
    lambda_u: Number = -1.0
    """Weight of the unlabelled loss; -1: 0 for asymmetric and 20 % symmetric, 150 from 80 % on, else 25."""


@dataclass
class Promix:
    """ProMix."""

    warmup: int = 0
    """Epochs of plain training; 0: 10 (30 with 100 classes), wheel sets 5."""
    lr: Number = 0.05
    """Rate (published: 0.05)."""
    batch: int = 256
    """Images a step (published: 256)."""
    tau: Number = -1.0
    """Confidence that adds a sample; -1: 0.99 (10 classes), 0.95."""
    rho: Number = 0.5
    """Share of a class in the base selection (published: 0.7 for 20 % symmetric noise, else 0.5)."""
    debias: Number = -1.0
    """Strength of the debiasing; -1: 0.8 (10 classes), 0.5 (published)."""
    ramp: int = 50
    """Epochs over which strong views and mixing come in (published: 50)."""
    expand: int = 250
    """Last epochs, with label guessing (published: 250)."""
