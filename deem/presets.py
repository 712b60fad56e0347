"""What a model is made of, how its losses weigh, and the models of --preset: the paper's, its variants, small ones."""

from dataclasses import dataclass

import packages
from scenes.digits import WORDS


@dataclass(frozen=True)
class Parts:
    """What a model is made of; the defaults are the paper's 7B model. A config dict in place of a source: random
    weights of that size."""

    encoder: str = "open_clip:convnext_base_w_320"
    encoder_weights: str = "laion_aesthetic_s13b_b82k"
    drop_path: float = 0.1
    width: int = 1024
    grid: int = 16  # of the table of positions
    token_level: int = 2  # the map that becomes tokens: stride 16
    reader: str = "resampler"  # or mlp: LLaVA's projector, a token a patch
    patch: int = 16  # side of a token in pixels, for mlp
    queries: int = 77
    resampler_layers: int = 12
    resampler_width: int = 768
    resampler_heads: int = 12
    dropout: float = 0.1
    init_std: float = 0.02  # of the resampler's weights and queries
    head_std: float = 1e-3  # of W_t and W_i
    llm: str | dict = "lmsys/vicuna-7b-v1.5"
    tokenizer: tuple[str, ...] = ()  # words of a closed vocabulary; empty: the language model's own
    pad: int | None = 31999
    llm_every: int = 4
    llm_levels: int = 3  # the coarsest maps
    llm_base: int = 16
    mmfs_width: int = 1024
    mmfs_heads: int = 16
    mmfs_points: int = 8
    diffusion: str | dict = "stabilityai/stable-diffusion-2-1-base"
    decoder_width: int = 1024
    decoder_heads: int = 16
    resolution: int = 256
    decoder_resolution: int = 512
    masks: bool = False  # the five region tokens of stage III

    @property
    def per_image(self) -> int:
        """Tokens of an image in the language model."""
        if self.reader == "mlp":
            return (self.resolution // self.patch) ** 2
        return self.queries


@dataclass
class Loss:
    """Weights and forms of the losses; see settings.py for where paper and released code stand."""

    ntp: float = 1.0
    nip: float = 5.0
    csr: float = 5.0
    squeeze: float = 1.0  # 0.6: the code's timesteps 200..799 for CSR
    csr_maps: bool = False  # the U-Net also reads the maps of the image it denoises
    null_share: float = 0.1
    twice: bool = False  # the released code's target of NIP, 2 (2 v - 1) - 1
    waste: bool = False  # compute NIP where its weight is 0, as the released code does in stage II
    share: float = 1.0  # of a batch's images that the diffusion losses see

    @property
    def diffusion(self) -> bool:
        return self.nip > 0 or self.csr > 0

    @property
    def maps(self) -> bool:
        """Whether the U-Net reads maps in any loss."""
        return self.nip > 0 or self.waste or (self.csr > 0 and self.csr_maps)


_WORDS = tuple(w for w in dict.fromkeys(WORDS))
_LLAMA = {"vocab_size": 3 + len(_WORDS), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_LLAMA |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_LLAMA |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "cross_attention_dim": 64}
_UNET |= {"block_out_channels": (24, 32), "norm_num_groups": 8, "attention_head_dim": 2}
_UNET |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
_UNET |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
_PHOTOS = {"sample_size": 32, "in_channels": 12, "out_channels": 12, "layers_per_block": 1, "cross_attention_dim": 192}
_PHOTOS |= {"block_out_channels": (64, 128, 192), "norm_num_groups": 16, "attention_head_dim": 4}
_PHOTOS |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
_PHOTOS |= {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
# The real classes at a size for trying out: every part random.
_TINY_UNET = {**_UNET, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 32}
_TINY_UNET |= {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "layers_per_block": 2}
_TINY_UNET |= {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "use_linear_projection": True}
_TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 64}
_TINY_VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
_TINY_VAE |= {"scaling_factor": 0.18215}

PRESETS: dict[str, Parts] = {
    "digits": Parts(
        encoder="conv:16,32,64", encoder_weights="random", drop_path=0.0, width=64, grid=4, token_level=1, queries=8,
        resampler_layers=2, resampler_width=64, resampler_heads=2, dropout=0.0, init_std=0.1, head_std=0.02, llm=_LLAMA,
        tokenizer=_WORDS, llm_every=2, llm_levels=2, llm_base=4, mmfs_width=32, mmfs_heads=2, mmfs_points=4,
        diffusion={"unet": _UNET, "scheduler": {"prediction_type": "v_prediction"}},
        decoder_width=64, decoder_heads=4, resolution=16, decoder_resolution=16,
    ),
    "photos": Parts(
        encoder="timm:tf_efficientnet_lite0", encoder_weights="package", drop_path=0.0, width=192, grid=8, queries=16,
        resampler_layers=3, resampler_width=192, resampler_heads=6, dropout=0.0, init_std=0.1, head_std=0.02,
        llm=packages.SMOLLM2, pad=None, llm_every=6, llm_base=8, mmfs_width=96, mmfs_heads=4, mmfs_points=4,
        diffusion={"unet": _PHOTOS, "scheduler": {"prediction_type": "v_prediction"}},
        decoder_width=192, decoder_heads=6, resolution=128, decoder_resolution=64,
    ),
    "tiny": Parts(
        encoder="timm:test_convnext", encoder_weights="random", drop_path=0.1, width=32, grid=4, queries=8,
        resampler_layers=4, resampler_width=32, resampler_heads=4, llm={**_LLAMA, "num_hidden_layers": 5},
        tokenizer=_WORDS, llm_every=4, llm_base=4, mmfs_width=32, mmfs_heads=4, mmfs_points=4,
        diffusion={"unet": _TINY_UNET, "vae": _TINY_VAE}, decoder_width=32, decoder_heads=4, resolution=64,
        decoder_resolution=64,
    ),
    "deem": Parts(),
    "deem-large": Parts(encoder="open_clip:convnext_large_d_320", encoder_weights="laion2b_s29b_b131k_ft_soup"),
    "deem-13b": Parts(llm="lmsys/vicuna-13b-v1.3"),
    "deem-vit": Parts(encoder="open_clip:ViT-L-14", encoder_weights="openai"),
    "llava": Parts(
        encoder="plain:ViT-L-14-336", encoder_weights="openai", drop_path=0.0, token_level=0, patch=14, reader="mlp",
        grid=24, llm_every=0, resolution=336,
    ),
}  # fmt: skip
SMALL = ("digits", "photos", "tiny")  # random or pretrained on the spot: the run keeps what comes from nowhere else
