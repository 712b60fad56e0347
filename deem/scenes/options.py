"""The options of scenes, and what stands where none is given."""

from dataclasses import dataclass

# What the scenes of a dataset begin with, where a setting is -1: training scenes, and steps of what is pretrained.
BASES = {
    "digits": {"count": 6000, "text": 1000, "encoder": 500, "denoiser": 400, "align": 250, "questions": 170},
    # The language model and the encoder come out of packages.
    "photos": {"count": 20000, "text": 0, "encoder": 0, "denoiser": 6000, "align": 1000, "questions": 170},
}


@dataclass
class SceneSettings:
    """The scenes of --dataset digits or photos, and what is pretrained on the spot for them."""

    count: int = -1
    """Training scenes; -1: 6000 of digits, 20000 of photographs."""
    text: int = -1
    """Steps of the text-only warm-up of the language model; -1: digits 1000, photos 0 (SmolLM2 reads)."""
    encoder: int = -1
    """Steps of the encoder's pretraining on captions, as CLIP's; -1: digits 500, photos 0 (it knows ImageNet)."""
    denoiser: int = -1
    """Steps of the denoiser's pretraining on complete descriptions; -1: digits 400, photos 6000."""
    align: int = -1
    """Steps of resampler and language model on captions alone, behind the frozen trunk, before any run begins; -1:
    digits 250, photos 1000."""
    questions: int = -1
    """Scenes of each tiny-POPE list, 6 questions a scene; tiny-MMVP has three times as many pairs; -1: 170."""
    pretrained: int = -1
    """Seed of the pretrained parts; -1: the run's own. With a number the runs of all seeds begin with the same, as the
    paper's do with one Vicuna, one CLIP, one Stable Diffusion."""
