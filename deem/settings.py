"""The settings of train.py and eval.py: every field with the paper's value and source, ranges, defaults."""

from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Literal

from lab.runs import Number, UserError, default_out

import recipe
from documents.prompts import FORMS
from evaluation import parsers
from evaluation.sets import BENCHMARKS
from presets import PRESETS, SMALL, Loss, Parts
from recipe import Rates
from scenes.options import BASES, SceneSettings

# Of the scenes, in stages 1 and 2.
OWN_RATES = {
    "digits": (Rates(1e-3, 2e-4, 3e-4, 3e-4, 1e-3, 1e-4), Rates(5e-4, 1e-3, 3e-4, 5e-4, 5e-4, 1e-4)),
    "photos": (Rates(5e-4, 5e-5, 1e-4, 0.0, 5e-4, 1e-4), Rates(2e-4, 5e-5, 1e-4, 2e-5, 2e-4, 5e-5)),
}

# What may change between starts of one run.
NOT_PART_OF_A_RUN = ("out", "base", "data_dir", "device", "download", "dry_run", "checkpoint_steps", "max_steps")
NOT_PART_OF_A_RUN += ("workers",)
NOT_PART_OF_AN_EVALUATION = ("run", "out", "data_dir", "device", "download")


@dataclass
class EncoderSettings:
    """The image encoder."""

    name: str = ""
    """Another image encoder: open_clip:NAME, timm:NAME or conv:WIDTHS; default the preset's."""
    weights: str = ""
    """File or open_clip tag of its weights, or random; default the preset's."""
    resolution: int = 0
    """Side of its view; 0: 256 in stage 1, 448 in 2 and 3 (paper), the preset's on digits, photos and tiny."""
    lr: Number = -1.0
    """Its rate; -1: 2e-5 (paper), digits 2e-4, photos 5e-5."""


@dataclass
class LanguageSettings:
    """The language model."""

    weights: str = ""
    """Folder or hub id of another model of the Llama family; default the preset's."""
    lr: Number = -1.0
    """Its rate in stages 2 and 3; -1: 1e-6 (paper), 1e-5 (code, whose key matches nothing)."""


@dataclass
class DiffusionSettings:
    """The diffusion model."""

    weights: str = ""
    """Folder or hub id of another Stable Diffusion (paper: 2.1; code: 2.1-base); epsilon or v prediction."""
    resolution: int = 0
    """Side of the decoder's view; 0: the preset's (paper: 512)."""
    lr: Number = -1.0
    """Rate of the U-Net where it trains; -1: 1e-5 (code), digits 3e-4."""


@dataclass
class Settings:
    preset: Literal[tuple(PRESETS)] = "digits"
    """Parts: digits (0.5 M, from scratch), photos (EfficientNet-Lite0, SmolLM2-135M, an own U-Net), tiny (the
    real classes, small and random), deem (paper: ConvNeXt-B, Vicuna-7B, SD 2.1-base), deem-large (ConvNeXt-L),
    deem-13b, deem-vit (ViT-L/14, ViT-Adapter), llava (Table 5)."""
    stage: int = 1
    """1: alignment on pairs and interleaved pages, 2: instructions, 3: regions, without diffusion (paper)."""
    variant: Literal[recipe.VARIANTS] = "deem"
    """deem; deem-star: baseline; clean: deem without CSR; both: trunk and U-Net trained; llava, llava-csr."""
    then: tuple[int, ...] = ()
    """Go on with these stages in the same run, each in <out>/stage<n>/ with its own defaults and a record."""
    then_steps: int = 0
    """Steps of each stage of --then; 0: that stage's default."""
    form: Literal["paper", "official"] = "paper"
    """Where equations and released code differ: the paper's form, or the code's in all: maps of the own image and
    timesteps 200..799 in CSR, flips tossed apart, NIP's target mapped to [-1, 1] twice where CSR runs first, NIP
    computed in stage 2 with weight 0, drop-path of a frozen trunk active, the language model's rate."""
    init: str = ""
    """Run folder of an earlier stage to start from (the same seeds)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other (code: 32 for the trainer, 0 for data)."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """The image encoder."""
    lm: LanguageSettings = field(default_factory=LanguageSettings)
    """The language model."""
    sd: DiffusionSettings = field(default_factory=DiffusionSettings)
    """The diffusion model."""
    scenes: SceneSettings = field(default_factory=SceneSettings)
    """The scenes of --dataset digits or photos, and what is pretrained on the spot for them."""

    lambda_csr: Number = 5.0
    """Weight of L_CSR in stages 1 and 2 (paper: 5; table 8: 1, 5, 10)."""
    lambda_nip: Number = 5.0
    """Weight of L_NIP in stage 1 (paper: 5)."""
    lambda_ntp: Number = 1.0
    """Weight of L_NTP (paper: 1); 0 leaves the diffusion losses alone."""
    csr_use_mmfs: Literal["auto", "on", "off"] = "auto"
    """CSR: the U-Net also reads the maps of the image it denoises; auto: off (paper, Eq. 5), on (code)."""
    squeeze: Number = -1.0
    """CSR: factor that draws timesteps towards 500; -1: 1 (paper: none), 0.6 (code: 200..799)."""
    null_share: Number = 0.1
    """NIP: share of samples with the learned null condition (paper: 0.1)."""

    steps: int = 0
    """Optimizer steps; 0: 10000 (paper), photos 4000, digits and tiny 300."""
    batch: int = 0
    """Rows of a micro-batch on one device; 0: 4, 16, 2 by stage (paper, 32 GPUs), digits and photos 32, tiny 2."""
    accum: int = 1
    """Micro-batches a step on each device."""
    max_tokens: int = 0
    """Tokens of a row; 0: 2048 (paper), digits, photos and tiny: one document a row."""
    max_images: int = 0
    """Images of a row; 0: 15 in stage 1, else 1 (code)."""
    lr: Number = -1.0
    """Base rate; -1: 1e-4, 1e-5, 1e-5 by stage (paper), digits 1e-3 and 5e-4, photos 5e-4 and 2e-4."""
    mmfs_lr: Number = -1.0
    """Rate of the synchronisers and gates; -1: 1e-4, 5e-6, 5e-6 by stage (code)."""
    offsets_lr: Number = -1.0
    """Rate of sampling offsets; -1: 1e-5, 5e-6, 5e-6 by stage (code)."""
    weight_decay: Number = 0.05
    """AdamW, not on biases, norms, offsets, gates (paper: 0.05)."""
    warmup: int = -1
    """Steps of linear warm-up before the cosine; -1: 1000, 500, 500 by stage (paper), digits, photos and tiny 20."""
    clip: Number = 1.0
    """Largest norm of the gradient (code: 1)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast, and bf16 weights of what stays frozen (paper: fp16); losses and the VAE stay in fp32."""
    checkpointing: bool = False
    """Make activations again in the backward pass (code: language model, Q-Former, U-Net)."""
    compile: bool = False
    """torch.compile the U-Net."""
    images_share: Number = 1.0
    """CSR and NIP on this share of a batch's images; below 1 results change (an ablation of speed)."""

    dataset: Literal["digits", "photos", "paper", "files"] = "digits"
    """digits: scenes of scans inside scikit-learn; photos: of CIFAR-10 below --data-dir; paper: the stage's
    sets below --data-dir; files: --files."""
    files: tuple[str, ...] = ()
    """dataset files: tar shards, parquet, MMC4 or LLaVA or region JSON, told apart by --files-kind."""
    files_kind: Literal["webdataset", "parquet", "mmc4", "llava", "regions"] = "webdataset"
    """What --files are."""
    image_root: str = ""
    """Folder of the pictures that --files name; default their own folder."""
    broken: Literal["stop", "skip"] = "stop"
    """paper, files: a broken or missing picture or line stops the run, or is left out, told and counted."""
    prompt_form: Literal[FORMS] = "paper"
    """Wording of prompts: paper, code (with its misspelling), plain (scenes)."""
    workers: int = 0
    """Threads that decode pictures ahead of training; 0: none."""
    benchmarks: tuple[str, ...] = ()
    """Sets of eval.py to answer after training; `stage`: those the paper reports for the stage (in stages of --then
    only these)."""
    benchmark_table: str = "main"
    """Table of their records."""
    table: str = "own"
    """Table of RESULTS.md the records belong to; own: none of them (plan.yaml names the tables of its runs)."""
    label: str = ""
    """Row of the table; may name settings as in "lambda={lambda_csr:g}"; default the variant's name."""
    scale: Literal["smoke", "demo", "real", "paper"] = "demo"
    """Goes into the record; changes nothing else."""
    out: str = ""
    """Run folder; default runs/<scale>/<table>-<preset>-stage<n>-<variant>."""
    base: str = ""
    """digits, photos: folder of the pretrained parts that runs share; default base/ beside the run folder."""
    data_dir: str = ""
    """Folder of data and weights; default $REPRO_DATA, else ./data (inside: deem/, weights/)."""
    download: bool = False
    """Fetch weights from the hub."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    checkpoint_steps: int = 500
    """Steps between checkpoints; 0: none inside a run."""
    max_steps: int = 0
    """Stop after so many steps of this start and keep the checkpoint; 0: to the end."""
    dry_run: bool = False
    """Print what would be trained, then stop."""

    @property
    def small(self) -> bool:
        return self.preset in SMALL

    @property
    def on_scenes(self) -> bool:
        return self.dataset in BASES

    @property
    def flip(self) -> str:
        """Mirroring in stage 1: one toss for both views, in the code one each; none on scenes."""
        if self.preset in BASES or self.stage > 1:
            return "none"
        return "independent" if self.form == "official" else "shared"

    @property
    def drop_paths(self) -> bool:
        """Whether a frozen trunk's drop-path stays active, as in the code."""
        return self.form == "official"

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        recipe.trained(self.stage, self.variant)
        chain = (self.stage, *self.then)
        if list(chain) != sorted({*chain}) or chain[-1] > 3:
            raise UserError(f"--then {' '.join(map(str, self.then))}: name later stages in their order, at most 3")
        low = {"steps": 0, "batch": 0, "accum": 1, "max_tokens": 0, "max_images": 0, "warmup": -1, "workers": 0}
        low |= {"scenes.pretrained": -1, "then_steps": 0, "checkpoint_steps": 0, "max_steps": 0}
        low |= {"encoder.resolution": 0, "sd.resolution": 0, "weight_decay": 0}
        low |= {"lambda_csr": 0, "lambda_nip": 0, "lambda_ntp": 0}
        for name, least in low.items():
            if (value := attrgetter(name)(self)) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value:g}")
        for name in BASES["digits"]:
            value, least = getattr(self.scenes, name), {"count": 10, "questions": 10}.get(name, 0)
            if value < least and value != -1:
                raise UserError(f"--scenes.{name} must be at least {least}, not {value}")
        for name in ("lr", "encoder.lr", "sd.lr", "lm.lr", "mmfs_lr", "offsets_lr"):
            if (value := attrgetter(name)(self)) <= 0 and value != -1:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
        if self.clip <= 0:
            raise UserError(f"--clip must be above 0, not {self.clip:g}")
        if not 0 <= self.null_share <= 1:
            raise UserError(f"--null-share must lie in [0, 1], not {self.null_share:g}")
        if not 0 < self.images_share <= 1:
            raise UserError(f"--images-share must lie in (0, 1], not {self.images_share:g}")
        if self.squeeze != -1 and not 0 < self.squeeze <= 1:
            raise UserError(f"--squeeze must lie in (0, 1], not {self.squeeze:g}")
        own = (self.encoder.name or PRESETS[self.preset].encoder).startswith("conv:")
        if own and self.encoder.weights not in ("", "random"):
            raise UserError("--encoder.weights goes with open_clip, timm and plain encoders; conv:WIDTHS is random")
        if self.dataset == "files" and not self.files:
            raise UserError("--dataset files needs --files")
        if self.variant.startswith("llava") != (self.preset == "llava"):
            raise UserError("--preset llava goes with --variant llava or llava-csr, and with no other")
        if self.preset == "llava" and self.stage == 3:
            raise UserError("--preset llava has stages 1 and 2")
        if self.dataset == "digits" and self.preset not in ("digits", "tiny"):
            more = "--dataset photos" if self.preset == "photos" else "--dataset paper or files"
            raise UserError(f"--dataset digits goes with --preset digits or tiny; give {more}")
        if self.dataset == "photos" and self.preset != "photos":
            raise UserError("--dataset photos goes with --preset photos")
        if self.on_scenes and self.stage == 3:
            raise UserError("the scenes have stages 1 and 2; stage 3 needs --dataset paper or files")
        if self.preset == "digits" and self.dataset != "digits":
            raise UserError("--preset digits knows only the words of its scenes; use a larger one")

    def resolve(self) -> None:
        """Put the defaults of stage, preset and form where none was given."""
        k, made, code = self.stage - 1, self.preset in BASES, self.form == "official"
        self.steps = self.steps or (4000 if self.preset == "photos" else 300 if self.small else 10000)
        self.batch = self.batch or (32 if made else 2 if self.small else (4, 16, 2)[k])
        self.max_tokens = self.max_tokens or (0 if self.small else 2048)
        self.max_images = self.max_images or (15, 1, 16)[k]  # stage 3: the whole picture and a masked one a region
        own = self.small or self.preset == "llava"
        side = PRESETS[self.preset].resolution if own else (256, 448, 448)[k]
        self.encoder = replace(self.encoder, resolution=self.encoder.resolution or side)
        p = self.parts()
        if isinstance(p.diffusion, dict):
            halved = [p.diffusion[k]["block_out_channels"] for k in ("vae", "unet") if k in p.diffusion]
            least = 2 ** sum(len(x) - 1 for x in halved) * (1 if "vae" in p.diffusion else 2)
            if p.decoder_resolution % least:
                raise UserError(f"--sd.resolution {p.decoder_resolution} must be a multiple of {least}")
        if not p.encoder.startswith("conv:") and p.resolution < 32:
            raise UserError(f"--encoder.resolution {p.resolution}: this encoder needs 32 or more, its largest stride")
        levels = max(p.token_level + 1, p.llm_levels)
        if p.encoder.startswith("conv:") and p.encoder.count(",") + 1 < levels:
            raise UserError(f"--encoder.name {p.encoder} has too few stages; give {levels} widths or more")
        least = p.per_image + 3  # <s>, <SOI>, a word
        if 0 < self.max_tokens < least:
            raise UserError(f"--max-tokens {self.max_tokens} leaves no room for an image; at least {least}")
        self.warmup = min(20 if self.small else (1000, 500, 500)[k], self.steps - 1) if self.warmup < 0 else self.warmup
        self.csr_use_mmfs = ("on" if code else "off") if self.csr_use_mmfs == "auto" else self.csr_use_mmfs
        self.squeeze = (0.6 if code else 1.0) if self.squeeze == -1 else self.squeeze
        self.prompt_form = "plain" if self.on_scenes else self.prompt_form
        for name, value in BASES.get(self.dataset, {}).items():
            given = getattr(self.scenes, name)
            self.scenes = replace(self.scenes, **{name: value if given == -1 else given})
        r = self.rates()
        self.lr, self.mmfs_lr, self.offsets_lr = r.base, r.synchroniser, r.offsets
        self.encoder, self.sd = replace(self.encoder, lr=r.trunk), replace(self.sd, lr=r.unet)
        self.lm = replace(self.lm, lr=r.llm)
        name = f"{self.table}-{self.preset}-stage{self.stage}-{self.variant}"
        self.out = self.out or default_out(self.scale, name)
        try:
            self.label = self.label.format(**vars(self)) or recipe.LABELS[self.variant]
        except (KeyError, IndexError) as error:
            raise UserError(f"--label {self.label}: {error} is no setting") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"--label {self.label} cannot be filled in: {error}") from None

    def rates(self) -> Rates:
        r = recipe.RATES[self.stage]
        if self.preset in OWN_RATES and self.stage < 3:
            r = OWN_RATES[self.preset][self.stage - 1]
        elif self.form == "official" and self.stage > 1:
            r = replace(r, llm=r.base)
        given = {"base": self.lr, "trunk": self.encoder.lr, "unet": self.sd.lr, "llm": self.lm.lr}
        given |= {"synchroniser": self.mmfs_lr, "offsets": self.offsets_lr}
        return replace(r, weight_decay=self.weight_decay, **{k: v for k, v in given.items() if v != -1})

    def parts(self) -> Parts:
        p = PRESETS[self.preset]
        given = {"encoder": self.encoder.name, "encoder_weights": self.encoder.weights, "llm": self.lm.weights}
        given |= {"diffusion": self.sd.weights, "decoder_resolution": self.sd.resolution}
        given["resolution"] = self.encoder.resolution
        return replace(p, masks=self.stage == 3, **{k: v for k, v in given.items() if v})

    def loss(self) -> Loss:
        csr, stage = recipe.CSR[self.variant], self.stage
        slip = self.form == "official" and csr  # without CSR's pass in front NIP's is the first and maps once
        return Loss(
            ntp=self.lambda_ntp,
            nip=self.lambda_nip if stage == 1 and self.preset != "llava" else 0.0,
            csr=self.lambda_csr if csr and stage < 3 else 0.0,
            squeeze=self.squeeze, csr_maps=self.csr_use_mmfs == "on", null_share=self.null_share,
            twice=slip, waste=stage == 2 and slip,
            share=self.images_share,
        )  # fmt: skip


@dataclass
class EvalSettings:
    """Score a run on the paper's benchmarks; without --benchmark, score a finished run on scenes again."""

    run: str = ""
    """Run folder written by train.py."""
    benchmark: tuple[Literal[tuple(BENCHMARKS)], ...] = ()
    """Benchmarks, one or more; none: the run's own measurements again."""
    data_dir: str = ""
    """Folder with deem/; default $REPRO_DATA, else ./data."""
    items: int = 0
    """Only the first so many questions of each set; 0: all (paper)."""
    parser: Literal[tuple(parsers.PARSERS)] = "deem"
    """How yes/no answers are read: deem (released code, paper's tables), pope (authors of POPE), strict (lmms-eval).
    The record also has the scores by pope."""
    fast: bool = False
    """Yes/no questions: compare the log-probabilities of yes and no in one pass instead of a beam search. Not the
    paper's."""
    form: Literal["", *FORMS] = ""
    """Wording of the prompts: paper, code, plain; default the run's own."""
    beams: int = 0
    """Beams of generation; 0: the paper's (3 for answers, 5 for captions)."""
    batch_size: int = 16
    """Questions a step."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the run. Without --benchmark: all it has."""
    tokenize: Literal["ptb", "plain"] = "ptb"
    """Captions: ptb is official and needs Java; plain does without, and the record says so."""
    metrics: tuple[Literal["cider", "meteor"], ...] = ("cider", "meteor")
    """Caption metrics; meteor needs Java."""
    draw_steps: int = 250
    """Denoising steps of a drawn picture (code: 250)."""
    guidance: Number = 3.5
    """Classifier-free guidance of a drawn picture (code: 3.5)."""
    samples: int = 0
    """Drawn pictures a caption, best by CLIP kept; 0: 8 for MS-COCO, 1 for LN-COCO (paper)."""
    clip: str = "ViT-L-14"
    """open_clip model that re-ranks drawn pictures."""
    clip_weights: str = "openai"
    """Its weights: open_clip tag or file."""
    export: bool = False
    """Also write samples_<set>.jsonl and results.json in the manner of lmms-eval."""
    table: str = "own"
    """Table of the records."""
    label: str = ""
    """Method of the records; default the run's label."""
    setting: str = ""
    """Setting of the records; default says parser, form and what is not the paper's."""
    scale: Literal["smoke", "demo", "real", "paper"] = "paper"
    """Scale the records belong to."""
    out: str = ""
    """Folder of logs and records; default <run>-eval-<benchmarks> beside the run folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    download: bool = False
    """Let libraries fetch weights."""

    def check(self) -> None:
        if self.items < 0 or self.beams < 0 or self.samples < 0 or self.batch_size < 1 or self.draw_steps < 1:
            raise UserError("--items, --beams and --samples take 0 or more, --batch-size and --draw-steps 1 or more")
        if not self.run:
            raise UserError("give --run RUN, a folder that train.py wrote")
