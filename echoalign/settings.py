"""What train.py can be told: every option with its default, the published values behind it, and the checks."""

from dataclasses import dataclass
from typing import Literal

from lab.runs import Number, UserError, default_out

import methods
import models
import noise as label_noise
import readers
from baselines import promix, semi, single
from generator import hints, stable
from trainer import Learner

# --methods -> (row of the tables, class of the loop)
METHODS: dict[str, tuple[str, type[Learner]]] = {
    "echoalign": ("EchoAlign", methods.Echo),
    "ce": ("CE", Learner),
    "ce-clean": ("CE-clean", Learner),
    "modified-only": ("Modified-only", Learner),
    "selected-only": ("Selected-only", Learner),
    "small-loss": ("small-loss", Learner),
    "gmm": ("GMM on loss", Learner),
    "knn": ("kNN agreement", Learner),
    "cleanlab": ("cleanlab", Learner),
    "clipcleaner": ("CLIPCleaner", Learner),
    "prior-filter": ("filtered by the prior", Learner),
    "pretrain": ("CE on the clean pretraining images", Learner),
    "forward": ("Forward", single.Forward),
    "reweight": ("Reweight", single.Reweight),
    "t-revision": ("T-Revision", single.Revision),
    "ptd": ("PTD", single.Parts),
    "co-teaching": ("Co-teaching", single.CoTeaching),
    "jocor": ("JoCoR", single.JoCoR),
    "elr": ("ELR", single.Elr),
    "cores": ("CORES", single.Cores),
    "dividemix": ("DivideMix", semi.DivideMix),
    "promix": ("ProMix", promix.ProMix),
}
# Released code: threshold of the CLIP similarity by (data set, noise); it belongs to the authors' generator.
PUBLISHED_TAU = {("cifar10", "instance"): "0.52", ("cifar100", "instance"): "0.52", ("cifar10", "random1"): "0.43"}


@dataclass
class Settings:
    methods: tuple[Literal[tuple(METHODS)], ...] = ("ce", "modified-only", "selected-only", "echoalign")
    """Classifiers to train, one after the other; echoalign is the paper's, the others are its baselines."""
    stage: Literal["all", "generator", "modify", "select"] = "all"
    """Stop after training the generator, after modifying the images, after the selection's records; all: go on to the
    classifiers."""
    dataset: Literal[tuple(readers.KINDS)] = "mnist5k"
    """Data set; mnist5k and digits lie inside wheels."""
    noise: Literal[("none", *label_noise.SYNTHETIC, *label_noise.HUMAN)] = "instance"
    """Label noise: part-dependent (instance), symmetric, pair, asymmetric, or the human labels of CIFAR-10N/100N."""
    rate: Number = 0.5
    """Noise rate of the synthetic kinds (paper: 0.3 and 0.5 are known); human labels: the rate given to selectors."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other; each gives its own split, noise, edits, weights and order (released code: 1)."""
    norm_std: Number = 0.1
    """instance: standard deviation of the flip rates (released code: 0.1)."""
    noise_scale: Literal["unit", "raw"] = "unit"
    """instance: pixels in [0, 1] (released code) or in [0, 255] (Xia et al. 2020)."""
    pretrain: int = 0
    """Clean images taken out of the training part for generator and features; the wheel sets have their own share."""
    train_limit: int = 0
    """Keep so many training images at random; 0: all."""
    val_fraction: Number = -1.0
    """Share held out for validation, noisy too and used for nothing; -1: 0.1 (released code), wheel sets 0."""

    generator: Literal["exact", "concat", "controlnet", "sd"] = "exact"
    """EchoMod's generator: closed form on clean images, small diffusion networks trained on them, or Stable Diffusion
    with ControlNet (the paper's kind)."""
    strength: Number = -1.0
    """How far an image is noised before it is denoised towards its label, in [0, 1]; 0 returns it. -1: exact 0.1, small
    networks 0.5, sd 0.75 (the paper's: not known)."""
    edit_steps: int = 0
    """Denoising steps; 0: 10, sd 20. With sd the steps made are int(steps x strength)."""
    sampler: Literal["ddim", "dpm", "unipc"] = "ddim"
    """ddim (eta 0), dpm (DPM-Solver++ 2M) or, with sd, unipc."""
    guidance: Number = -1.0
    """Classifier-free guidance; -1: small networks 2, sd 9."""
    control: Literal["auto", "ink", "box", "canny", "softedge", "tile", "shuffle", "none"] = "auto"
    """Structure the generator is held to; auto: ink (small networks), canny (sd)."""
    control_scale: Number = -1.0
    """Strength of the control; -1: small networks 0.5, sd 1."""
    control_start: Number = 0.0
    """sd: share of the steps before control sets in."""
    control_end: Number = -1.0
    """Share of the steps after which control ends; -1: small networks 0.5, sd 1."""
    edit_batch: int = 64
    """Images edited at once."""
    shard: int = 512
    """Images in a file of the modification pass; a pass that was cut goes on after the last file."""
    check: bool = False
    """Stop with exit code 2 if the generator ignores the label or returns the instance."""
    check_agreement: Number = 0.5
    """--check: least share of wrong-labelled samples whose modified image fits the label."""
    widths: tuple[int, ...] = (16, 32)
    """Small networks: channels of the levels."""
    generator_layers: int = 1
    """Small networks: blocks of a level."""
    generator_steps: int = 600
    """Small networks: training steps."""
    generator_batch: int = 64
    """Small networks: images a step."""
    generator_lr: Number = 2e-3
    """Small networks: AdamW's highest rate."""
    generator_checkpoint: int = 200
    """Small networks: steps between checkpoints."""
    control_dropout: Number = 0.5
    """Small networks: share of training images whose control is blanked."""
    sd_mode: Literal["img2img", "start"] = "img2img"
    """sd: from the noised original, or from pure noise with structure by the control alone."""
    sd_base: str = stable.BASE
    """sd: hub id or local folder of the base model."""
    sd_controlnet: str = ""
    """sd: hub id or local folder of the ControlNet; default by --control."""
    sd_annotators: str = hints.ANNOTATORS
    """sd: hub id or local folder of HED's weights, for --control softedge."""
    resolution: int = 512
    """sd: shorter side the images are brought to."""
    eta: Number = 0.0
    """sd: eta of DDIM."""
    canny: tuple[Number, Number] = (100.0, 200.0)
    """sd: thresholds of the edge map, after upscaling."""
    prompt: str = stable.PROMPT
    """sd: prompt; {name} is the class."""
    negative_prompt: str = stable.NEGATIVE
    """sd: negative prompt."""

    features: Literal["pca", "cnn", "clip"] = "pca"
    """Features of the similarity: of clean images (pca, cnn), or CLIP (released code)."""
    pca_width: int = 40
    """pca: components."""
    clip_model: str = "ViT-B-32"
    """clip: open_clip's model name (released code)."""
    clip_weights: str = "laion2b_s34b_b79k"
    """clip: open_clip's weights name (released code) or a local checkpoint."""
    feature_batch: int = 512
    """Images a batch of the feature extractor."""
    similarity_size: Literal["full", "small"] = "full"
    """Compare with the modified image at the generator's resolution (released code) or at the data set's."""
    threshold: str = "auto"
    """tau: a number, gmm or otsu (from the similarities alone); auto: the released code's number for sd and clip, else
    gmm."""
    select: Literal["auto", "similarity", "small-loss"] = "auto"
    """Rule; auto: small-loss for symmetric noise, else similarity (released code)."""
    small_loss_epochs: int = 0
    """Warm-up of the small-loss rule; 0: 70 (released code), wheel sets 15."""
    small_loss_ratio: Number = -1.0
    """Share of each class the rule keeps; -1: min(1 - 1.2 rate, 0.9 (1 - rate)) (released code)."""
    neighbours: int = 10
    """kNN agreement: neighbours."""
    judge: Literal["auto", "nearest", "clip"] = "auto"
    """Who says what a modified image shows; auto: clip with --features clip, else nearest truly labelled image."""

    model: Literal[("auto", *models.NAMES)] = "auto"
    """Classifier; auto: resnet18 (CIFAR-10), resnet34 (CIFAR-100), resnet50 (Clothing1M), cnn (wheel sets, MNIST)."""
    backbone_weights: str = ""
    """resnet50: "imagenet" (released scripts) or a state_dict file."""
    epochs: int = 0
    """Epochs; 0: 200 (released code), wheel sets 30."""
    finetune: int = -1
    """Epochs on the selected originals after that; -1: 40 (released code), wheel sets 6, Clothing1M 0."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the rate falls; default: half and three quarters (released code: 100, 150), Clothing1M 30 40."""
    lr: Number = 0.1
    """Learning rate of SGD (released code: 0.1)."""
    lr_decay: Number = 0.1
    """Factor at a milestone (released code: 0.1)."""
    momentum: Number = 0.9
    """Momentum, not Nesterov's (released code: 0.9)."""
    weight_decay: Number = 1e-4
    """L2 on every parameter (released code: 1e-4)."""
    batch: int = 128
    """Images a step (released code: 128)."""
    modified_set: Literal["all", "unselected"] = "all"
    """Modified images in the training set: all (released code), or those whose original was not kept."""
    weighting: Literal["cross", "equal", "swapped"] = "cross"
    """Loss weights: each group the share of the other one (released code), 1, or its own share."""
    normalise: bool = False
    """Divide the loss by the sum of weights instead of the batch size; not what the released code does."""
    official_eval: bool = False
    """Also measure on cropped and flipped test images, the released code's protocol."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Forward and backward pass; losses stay in fp32 (released code: fp16)."""
    compile: bool = False
    """torch.compile the networks."""

    estimate_epochs: int = 0
    """Forward, Reweight, T-Revision, PTD: epochs before T is estimated; 0: a tenth of --epochs."""
    anchor_percentile: Number = 97.0
    """Forward and its kin: percentile of the anchor point; 100: the highest."""
    revise_epochs: int = 0
    """T-Revision, PTD: epochs of revision; 0: a quarter of --epochs (published: 50)."""
    revision_lr: Number = 5e-7
    """T-Revision, PTD: Adam's rate in the revision (published)."""
    parts: int = 10
    """PTD: parts (published: 10)."""
    parts_steps: int = 1500
    """PTD: steps that fit the parts' matrices (published)."""
    anchors: int = 20
    """PTD: anchor points a class."""
    forget_rate: Number = -1.0
    """Co-teaching, JoCoR: share left out at the end; -1: the noise rate, half of it for asymmetric and pair."""
    forget_ramp: int = 10
    """Co-teaching, JoCoR: epochs until that share is reached."""
    jocor_lambda: Number = 0.9
    """JoCoR: weight of the agreement (published: 0.9 on CIFAR-10, 0.85 on CIFAR-100)."""
    pair_optimizer: Literal["adam", "sgd"] = "adam"
    """Co-teaching, JoCoR: Adam at --pair-lr, flat then straight to 0 (published), or SGD as the others."""
    pair_lr: Number = 1e-3
    """Co-teaching, JoCoR: Adam's rate."""
    cores_beta: Number = 2.0
    """CORES: weight of the confidence regulariser after its ramp."""
    warmup: int = 0
    """CORES, DivideMix, ProMix: epochs of plain training; 0: 10 (30 with 100 classes), wheel sets 5."""
    semi_lr: Number = 0.02
    """DivideMix, ProMix: rate (published: DivideMix 0.02, ProMix 0.05)."""
    semi_batch: int = 64
    """DivideMix: labelled images a step (published: 64); ProMix: images a step (256)."""
    divide_threshold: Number = 0.5
    """DivideMix, GMM on loss: posterior above which a sample counts as clean."""
    lambda_u: Number = -1.0
    """DivideMix: weight of the unlabelled loss; -1: 0 for asymmetric and 20 % symmetric, 150 from 80 % on, else 25."""
    promix_tau: Number = -1.0
    """ProMix: confidence that adds a sample; -1: 0.99 (10 classes), 0.95."""
    promix_rho: Number = 0.5
    """ProMix: share of a class in the base selection (published: 0.7 for 20 % symmetric noise, else 0.5)."""
    promix_debias: Number = -1.0
    """ProMix: strength of the debiasing; -1: 0.8 (10 classes), 0.5 (published)."""
    promix_ramp: int = 50
    """ProMix: epochs over which strong views and mixing come in (published: 50)."""
    promix_expand: int = 250
    """ProMix: last epochs, with label guessing (published: 250)."""

    eval_every: int = 0
    """Epochs between evaluations; 0: 5, wheel sets 10; the last ones are always measured."""
    eval_last: int = 10
    """So many last epochs are measured each."""
    test_batch: int = 500
    """Images a batch in evaluation."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    setting: str = ""
    """Label inside the table; default the noise and its rate."""
    label: str = ""
    """Row of the table, for a run of a single method; default the method's name."""
    scale: Literal["smoke", "demo", "real", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-<dataset>-<noise>-<rate>."""
    cache: str = ""
    """Noise files, generators, modified images and features; default ./data/cache."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    download: bool = False
    """Let torchvision, diffusers and open_clip fetch what is missing."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Print the data and what would be done, then stop."""

    def check_values(self) -> None:
        """Raise UserError for a value outside its range."""
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise UserError("--methods takes one or more different methods")
        if self.label and len(self.methods) > 1:
            raise UserError("--label names the row of one method; give one --methods")
        if not 0 <= self.rate < 1:
            raise UserError(f"--rate must lie in [0, 1), not {self.rate:g}")
        at_least = {"edit_batch": 1, "shard": 1, "generator_steps": 1, "generator_batch": 1, "generator_layers": 1}
        at_least |= {"generator_checkpoint": 1, "resolution": 1, "pca_width": 1, "feature_batch": 1, "neighbours": 1}
        at_least |= {"batch": 2, "test_batch": 1, "checkpoint_every": 1, "eval_last": 1, "parts": 1, "parts_steps": 1}
        at_least |= {"anchors": 1, "forget_ramp": 1, "semi_batch": 2, "epochs": 0, "edit_steps": 0, "pretrain": 0}
        at_least |= {"train_limit": 0, "small_loss_epochs": 0, "estimate_epochs": 0, "revise_epochs": 0, "warmup": 0}
        at_least |= {"promix_ramp": 0, "promix_expand": 0}
        at_least |= {"eval_every": 0, "finetune": -1, "lr": 0, "weight_decay": 0, "norm_std": 1e-6}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {max(low, 0)}, not {getattr(self, name)}")
        share = (
            "strength",
            "control_end",
            "val_fraction",
            "forget_rate",
            "small_loss_ratio",
            "promix_tau",
            "promix_debias",
        )
        plain = (
            "control_start",
            "control_dropout",
            "check_agreement",
            "divide_threshold",
            "promix_rho",
            "jocor_lambda",
        )
        for name in (*share, *plain, "momentum"):
            v = getattr(self, name)
            if not (0 <= v <= 1 or v == -1 and name in share):
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1], not {v:g}")
        if self.generator != "sd" and (self.sampler == "unipc" or self.control in stable.CONTROLNETS):
            raise UserError(f"--sampler unipc, --control {', '.join(stable.CONTROLNETS)} belong to --generator sd")
        if self.generator == "sd" and self.control in ("ink", "box"):
            raise UserError(
                f"--control ink and box belong to the small networks; use {', '.join(stable.CONTROLNETS)} or none"
            )
        if self.threshold not in ("auto", "gmm", "otsu"):
            try:
                ok = -1 <= float(self.threshold) <= 1
            except ValueError:
                ok = False
            if not ok:
                raise UserError(
                    f"--threshold {self.threshold} is no cosine in [-1, 1]; give a number, auto, gmm or otsu"
                )
        if not 0 <= self.anchor_percentile <= 100:
            raise UserError(f"--anchor-percentile must lie in [0, 100], not {self.anchor_percentile:g}")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise UserError("--milestones must be rising epoch numbers from 1 on")
        if self.backbone_weights == "imagenet" and not self.download:
            raise UserError("--backbone-weights imagenet is fetched by torchvision: add --download, or give a file")
        if "{name}" not in self.prompt:
            raise UserError("--prompt must contain {name}, the class")

    def resolve(self) -> None:
        """Put the published values where -1, 0, auto or nothing was given."""
        sd, small = self.generator == "sd", self.dataset in readers.WHEEL
        wide = readers.KINDS[self.dataset].classes > 10
        shop = self.dataset == "clothing1m"
        defaults = {
            "strength": 0.75 if sd else 0.1 if self.generator == "exact" else 0.5,
            "guidance": 9.0 if sd else 2.0,
            "control_scale": 1.0 if sd else 0.5,
            "control_end": 1.0 if sd else 0.5,
            "val_fraction": 0.0 if small or self.dataset in readers.REAL else 0.1,
            "finetune": 6 if small else 0 if shop else 40,
        }
        for name, value in defaults.items():
            if getattr(self, name) == -1:
                setattr(self, name, value)
        self.edit_steps = self.edit_steps or (20 if sd else 10)
        self.control = ("canny" if sd else "ink") if self.control == "auto" else self.control
        self.epochs = self.epochs or (30 if small else 200)
        self.milestones = self.milestones or ((30, 40) if shop else (self.epochs // 2, self.epochs * 3 // 4))
        self.small_loss_epochs = self.small_loss_epochs or (15 if small else 70)
        self.warmup = self.warmup or (5 if small else 30 if wide else 10)
        self.eval_every = self.eval_every or (10 if small else 5)
        self.estimate_epochs = self.estimate_epochs or max(1, self.epochs // 10)
        self.revise_epochs = self.revise_epochs or max(1, self.epochs // 4)
        by_data = {"cifar100": "resnet34", "clothing1m": "resnet50", "mnist": "cnn"}
        auto = "cnn" if small else by_data.get(self.dataset, "resnet18")
        self.model = auto if self.model == "auto" else self.model
        self.judge = ("clip" if self.features == "clip" else "nearest") if self.judge == "auto" else self.judge
        if self.threshold == "auto":
            published = PUBLISHED_TAU.get((self.dataset, self.noise), "gmm")
            self.threshold = published if sd and self.features == "clip" else "gmm"
        place = f"{self.noise} {self.rate:g}" if self.noise in label_noise.SYNTHETIC else self.noise
        self.setting = self.setting or place
        name = place.replace(" ", "-")
        self.out = self.out or default_out(self.scale, f"{self.table}-{self.dataset}-{name}")


# A run may be started again with other values of these.
IGNORE = (
    *("out", "data_dir", "device", "download", "dry_run", "checkpoint_every", "generator_checkpoint", "cache", "check"),
    *("feature_batch", "methods", "stage", "check_agreement"),
)


@dataclass
class EvalSettings:
    run: str
    """Run folder written by train.py, or one seed of it (runs/.../seed0)."""
    taus: tuple[Number, ...] = ()
    """Thresholds to try on the similarities: samples kept, precision, recall."""
    check: bool = False
    """Run the generator's check: exit code 2 if it ignores the label or returns the instance."""
    official: bool = False
    """Also measure on cropped and flipped test images, the released code's protocol."""
    write: bool = False
    """Write what was measured into records of their own (record-eval-<method>.json, table <table>-eval)."""
    cache: str = ""
    """Noise files, generators and modified images; default the run's."""
    data_dir: str = ""
    """Folder of the raw data; default $REPRO_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
