"""Deem: image encoder, resampler, language model and diffusion model, and the three losses that tie them.

    images -> F (maps), Q -> resampler -> e;   e^L = W_t e for the language model,  e^D = W_i e for the diffusion model
    total = ntp L_NTP + nip L_NIP + csr L_CSR

What trains in which stage stands in recipe.py; the digit scenes use this class with smaller parts (presets.py).
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.runs import UserError, sent

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import packages
import recipe
from deem import csr_loss
from diffusion import Denoiser, Latents, Pixels, load_diffusion, nip_error
from documents import sequences
from documents.sequences import Batch
from evaluation.answering import Answering, Seen
from presets import Loss, Parts
from vision.encoder import Encoder, make_trunk
from vision.grids import sincos_1d
from vision.mmfs import GatedMMFS, synchronise
from vision.resampler import Resampler

# On a CPU oneDNN prepares each convolution anew for each number of images and keeps 1024 of them; a step of the digit
# model has hundreds and a number of its own. Read when the first convolution runs; changes no result.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32768")


class Head(nn.Module):
    """Output head: the language model's own, and a small one for the new tokens whose bias starts at -5."""

    def __init__(self, base: nn.Linear, new: int):
        super().__init__()
        self.base, self.new = base, nn.Linear(base.in_features, new)
        nn.init.normal_(self.new.weight, std=0.02)
        nn.init.constant_(self.new.bias, -5.0)

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([self.base(h), self.new(h).to(h.dtype)], -1)


class Deem(Answering, nn.Module):
    def __init__(self, p: Parts, *, folder: Path | None = None, download: bool = False, dtype=torch.float32,
                 diffusion: bool = True, loss: Loss | None = None):  # fmt: skip
        """folder: weights below it; dtype: of the language model and the U-Net where they come frozen from a source."""
        super().__init__()
        self.p, self.loss = p, loss or Loss()
        place = Path(folder) if folder else Path("data/weights")
        trunk = make_trunk(p.encoder, p.encoder_weights, place, drop_path=p.drop_path, download=download)
        grid = {"token_level": p.token_level, "grid": p.grid, "regions": p.masks}
        self.encoder = Encoder(trunk, p.width, **grid)

        self.llm, self.tok = self._llm(place, download, dtype)
        d = self.llm.config.hidden_size
        self.context = None
        size = {"width": p.mmfs_width, "heads": p.mmfs_heads, "points": p.mmfs_points}
        if p.llm_every:
            self.context = synchronise(
                self.llm.model, p.llm_every, p.width, levels=p.llm_levels, base=p.llm_base, **size
            )
        self.soi = nn.Parameter(torch.zeros(d))

        source = self._diffusion(place, download, dtype) if diffusion else None
        width = source[0].config.cross_attention_dim if source else p.decoder_width
        self.resampler = self.projector = None
        if p.reader == "resampler":
            self.resampler = Resampler(
                p.queries, p.resampler_width, p.resampler_layers, p.resampler_heads, p.width, dropout=p.dropout,
                std=p.init_std,
            )  # fmt: skip
            self.text_head = nn.Linear(p.resampler_width, d)
            heads = [self.text_head]
        else:  # LLaVA: an MLP a patch; the condition's resampler on its tokens is an assumption
            self.projector = nn.Sequential(nn.Linear(p.width, d), nn.GELU(), nn.Linear(d, d))
            self.condition_reader = Resampler(p.queries, p.resampler_width, 2, p.resampler_heads, d, dropout=p.dropout)
            heads = []
        self.condition_head = nn.Linear(p.resampler_width, width)
        for head in [*heads, self.condition_head]:
            nn.init.normal_(head.weight, std=p.head_std)
            nn.init.zeros_(head.bias)

        self.denoiser = None
        if source:
            unet, latents, scheduler, empty = source
            self.denoiser = Denoiser(
                unet, latents, scheduler, value_width=p.width, levels=len(trunk.widths), tokens=p.queries, **size
            )
            if empty is not None:
                with torch.no_grad():
                    self.denoiser.null.copy_(empty)
            self.context_proj = nn.Linear(d, d)
            self.context_reader = Resampler(p.queries, width, 1, p.decoder_heads, d, dropout=0.0)
            # No buffer: it is made when a context is read, and its length is each process's own.
            self.places = torch.zeros(0, d)

    # --------------------------------------------------------------------------------------------------------- building

    def _llm(self, place: Path, download: bool, dtype):
        p = self.p
        if isinstance(p.llm, dict):
            llm = LlamaForCausalLM(LlamaConfig(**p.llm))
            if not p.tokenizer:
                raise UserError("a language model from a config needs a vocabulary of words")
            tok = sequences.WordTokenizer(p.tokenizer)
            if llm.config.vocab_size != tok.text_size:
                raise UserError(f"the config has {llm.config.vocab_size} tokens, the vocabulary {tok.text_size}")
        else:
            from transformers import AutoTokenizer

            places = (Path(p.llm).expanduser(), place / p.llm.split("/")[-1])
            here = packages.smollm2() if p.llm == packages.SMOLLM2 else next((f for f in places if f.is_dir()), None)
            if here is None and not download:
                raise UserError(
                    f"language model {p.llm} is missing: put its folder to {place / p.llm.split('/')[-1]}, name one by "
                    "--lm.weights, or add --download"
                )
            try:
                name, more = str(here or p.llm), {"local_files_only": not download}
                llm = LlamaForCausalLM.from_pretrained(name, dtype=dtype, **more)
                inner = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **more)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"language model {p.llm} could not be loaded ({str(error)[:200]})") from None
            pad = p.pad if p.pad is not None and p.pad < llm.config.vocab_size else None
            tok = sequences.HFTokenizer(inner, llm.config.vocab_size, pad)
        old, new = llm.model.embed_tokens, len(sequences.NEW_TOKENS)
        table = nn.Embedding(tok.text_size + new, old.embedding_dim, dtype=old.weight.dtype)
        with torch.no_grad():
            table.weight.normal_(std=0.02)
            table.weight[: tok.text_size] = old.weight
        llm.model.embed_tokens = table
        base = nn.Linear(old.embedding_dim, tok.text_size, bias=False, dtype=old.weight.dtype)
        base.load_state_dict({"weight": llm.lm_head.weight.detach()})  # a copy: a tied head stays as it was
        llm.lm_head = Head(base, new)
        llm.config.vocab_size, llm.config.tie_word_embeddings = tok.text_size + new, False
        llm.generation_config.pad_token_id, llm.generation_config.eos_token_id = tok.pad, tok.eos
        llm.generation_config.bos_token_id = tok.bos
        return llm, tok

    def _diffusion(self, place: Path, download: bool, dtype):
        p = self.p
        if isinstance(p.diffusion, str):
            unet, vae, scheduler, empty = load_diffusion(p.diffusion, place, download, dtype)
            side = p.decoder_resolution // 2 ** (len(vae.config.block_out_channels) - 1)
            unet.register_to_config(sample_size=side)
            return unet, Latents(vae), scheduler, empty
        c = dict(p.diffusion)
        vae = AutoencoderKL(**c["vae"]) if "vae" in c else None
        unet = UNet2DConditionModel(**c["unet"])
        return (
            unet,
            Latents(vae) if vae else Pixels(c["unet"]["in_channels"]),
            DDPMScheduler(**c.get("scheduler", {})),
            None,
        )

    def checkpointing(self, unet: bool = True) -> None:
        """Make activations again in the backward pass (paper: language model, Q-Former, U-Net)."""
        self.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.resampler is not None:
            self.resampler.checkpointing = True
        if self.denoiser is not None and unet:
            self.denoiser.unet.enable_gradient_checkpointing()
            self.denoiser.net.checkpointing = True

    # --------------------------------------------------------------------------------------------------------- encoding

    def encode_images(self, images: Tensor, masks: Tensor | None = None) -> Seen:
        """images (B, 3, R, R) in [0, 1], masks (B, H, W) -> Seen, which can be kept and used for many prompts."""
        f = self.encoder(images, masks)
        if self.projector is not None:
            text = self.projector(f.tokens[:, -self.p.per_image :])
            e = self.condition_reader(text)
        else:
            e = self.resampler(f.tokens)
            text = self.text_head(e)
        return Seen(f.maps, text, self.condition_head(e) if self.denoiser is not None else None)

    def tokens(self, images: Tensor) -> Tensor:
        """e, the resampler's output (B, queries, width): what is left of an image."""
        q = self.encoder(images).tokens
        return self.resampler(q) if self.resampler is not None else self.projector(q[:, -self.p.per_image :])

    def embed(self, b: Batch, seen: Seen | None) -> Tensor:
        """Token embeddings (S, K, d) with e^L at the placeholders and the SOI vector added at <SOI>."""
        x = self.llm.model.embed_tokens(b.ids)
        if seen is not None and len(b.row):
            row, soi = (sent(v, x.device) for v in (b.row, b.soi))
            at = soi[:, None] + 1 + torch.arange(seen.text.shape[1], device=x.device)
            x = x.index_put((row[:, None], at), seen.text.to(x.dtype))
            x = x.index_put((row, soi), self.soi.to(x.dtype).expand(len(b.row), -1), accumulate=True)
        return x

    def set_context(self, b: Batch, seen: Seen | None) -> None:
        """Show the images of each row to the synchronising layers."""
        if self.context is None:
            return
        if seen is None or not len(b.row):
            return self.context.set(None, None)
        levels = seen.maps[-self.p.llm_levels :]
        here = (b.slots >= 0)[:, :, None, None, None]
        maps = [m[b.slots.clamp(min=0)] * here.to(m.dtype) for m in levels]
        return self.context.set(maps, b.visible)

    def hidden(self, b: Batch, seen: Seen | None) -> Tensor:
        """Last hidden states (S, K, d)."""
        self.set_context(b, seen)
        places = (b.attend.long().cumsum(1) - 1).clamp(min=0)
        mask = b.attend.long()
        if b.padded and self.llm.config._attn_implementation == "sdpa":
            # As the library would build it after a look at the mask, for which the host would wait.
            causal = torch.ones(*[mask.shape[1]] * 2, dtype=torch.bool, device=mask.device).tril()
            mask = causal & b.attend[:, None, None]
        out = self.llm.model(inputs_embeds=self.embed(b, seen), attention_mask=mask, position_ids=places,
                             use_cache=False)  # fmt: skip
        return out.last_hidden_state

    # ----------------------------------------------------------------------------------------------------------- losses

    def ntp(self, h: Tensor, labels: Tensor) -> Tensor:
        """L_NTP: mean cross-entropy over kept next tokens, in float32; zero without one."""
        target = labels[:, 1:].flatten()
        keep = (target != sequences.IGNORED).nonzero()[:, 0]
        logits = self.llm.lm_head(h[:, :-1].flatten(0, 1).index_select(0, sent(keep, h.device))).float()
        return F.cross_entropy(logits, sent(target[keep], h.device), reduction="sum") / max(1, len(keep))

    def image_context(self, h: Tensor, b: Batch) -> tuple[Tensor, Tensor]:
        """What R_D reads of each image: hidden states from its <SOI> back to its BOS, newest first, through a linear
        map, plus 1-D positions: (B, L, d), and which of them there are (B, L) bool; L is the longest context."""
        lengths = b.soi - b.bos + 1
        back = torch.arange(int(lengths.max()))
        at = (b.soi[:, None] - back).clamp(min=0)
        row, at, keep = (sent(v, h.device) for v in (b.row[:, None], at, back < lengths[:, None]))
        states = self.context_proj(h)[row, at]  # a token once, not once an image behind it
        if len(self.places) < len(back) or self.places.device != h.device:
            self.places = sincos_1d(h.shape[-1], torch.arange(len(back))).to(h.device)
        return states + self.places[: len(back)].to(states.dtype), keep

    def losses(self, b: Batch, seed: int | None = None) -> dict[str, Tensor]:
        """ntp, nip, csr and their weighted sum. A loss whose weight is 0 is not computed and not in the answer.

        seed fixes the draws: latents, CSR and NIP have a stream of their own each, so that a run without CSR sees the
        same noise in NIP as one with it."""
        w, out = self.loss, {}
        some = b.images is not None and len(b.images) > 0
        seen = self.encode_images(b.images, b.masks) if some else None
        nip = (w.nip > 0 or w.waste) and some and self.denoiser is not None
        h = self.hidden(b, seen) if w.ntp > 0 or nip else None
        if w.ntp > 0:
            out["ntp"] = self.ntp(h, b.labels)
        if some and self.denoiser is not None and (nip or w.csr > 0):
            out |= self.denoising(*self.part(b, seen), h if nip else None, seed)
        out["total"] = sum(getattr(w, k) * v for k, v in out.items())
        return out

    def part(self, b: Batch, seen: Seen) -> tuple[Batch, Seen]:
        """The first ceil(share B) images; the order of a batch is random."""
        n = math.ceil(self.loss.share * len(b.row))
        if n == len(b.row):
            return b, seen
        keys = ("row", "soi", "bos", "previous", "images", "targets", "masks")
        cut = {k: v[:n] for k in keys if (v := getattr(b, k)) is not None}
        return replace(b, **cut), seen.select(range(n))

    def denoising(self, b: Batch, seen: Seen, h: Tensor | None, seed: int | None) -> dict[str, Tensor]:
        """L_CSR and, with hidden states, L_NIP: one encoding of the targets and one call of the U-Net for both."""
        w, den, dev, n = self.loss, self.denoiser, b.targets.device, len(b.targets)

        def stream(k: int) -> torch.Generator | None:
            return None if seed is None else torch.Generator(dev).manual_seed((seed * 4 + k) % 2**63)

        z0, out = den.latents.encode(b.targets, stream(0)), {}
        following, found = [], []
        if h is not None:
            again = den.latents.encode(2 * b.targets - 1, stream(0)) if w.twice else z0
            rider, target, real = self.next_image(b, seen, h, again, stream(2))
            following = [rider]

        def u_net(z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            """CSR's samples and, behind them in the same call, NIP's."""
            there = torch.ones(n, dtype=torch.bool)
            own = (z, t, condition, seen.maps, there) if w.csr_maps else (z, t, condition, None, None)
            first, *rest = self.predict([own, *following])
            found.extend(rest)
            return first

        if w.csr > 0:
            more = {"prediction": den.kind, "masks": b.masks, "squeeze": w.squeeze, "generator": stream(1)}
            out["csr"] = csr_loss(u_net, seen.condition, z0, den.abar, **more)
        elif following:
            found = self.predict(following)
        if h is not None:
            out["nip"] = nip_error(found[0], target, n) * real
        return out

    def next_image(self, b: Batch, seen: Seen, h: Tensor, z0: Tensor, g: torch.Generator | None):
        """((noised latents, t, condition, maps of the image before, whether there is one), target, 1.0) of the images
        that NIP draws from the text before them; one that opens a document has zero loss and is left out. Where all do,
        the first stands for them with weight 0.0, so that every step has a gradient for every weight."""
        den, dev, n = self.denoiser, z0.device, len(z0)
        places = (b.soi - b.bos + 1 > 2).nonzero()[:, 0]
        real = float(len(places) > 0)
        places = places if real else places.new_zeros(1)
        learned, previous = (sent(v, dev) for v in (places, b.previous[places].clamp(min=0)))
        t = torch.randint(den.steps, (n,), generator=g, device=dev)
        z, target = den.noised(z0, torch.randn(z0.shape, generator=g, device=dev), t)
        drop = torch.rand(n, 1, 1, generator=g, device=dev) < self.loss.null_share
        own = replace(b, row=b.row[places], soi=b.soi[places], bos=b.bos[places])
        c = self.context_reader(*self.image_context(h, own))
        c = torch.where(drop[learned], den.null.to(c.dtype), c)
        maps = [m[previous] for m in seen.maps]
        return (z[learned], t[learned], c, maps, b.previous[places] >= 0), target[learned], real

    def predict(self, parts: list[tuple]) -> list[Tensor]:
        """One call of the U-Net for parts (z, t, condition, maps, seen); parts without maps (None) come first."""
        z, t, c, maps, there = zip(*parts, strict=True)
        maps, there = ([x for x in some if x is not None] for some in (maps, there))
        joined = [torch.cat(m) for m in zip(*maps, strict=True)] if maps else None
        more = {"maps": joined, "seen": torch.cat(there) if there else None}
        more["first"] = sum(map(len, z)) - sum(map(len, there))
        dtype = next(self.denoiser.unet.parameters()).dtype
        condition = torch.cat([x.to(z[0].dtype) for x in c]).to(dtype)
        found = self.denoiser(torch.cat(z).to(dtype), torch.cat(t), condition, **more)
        return list(found.split([len(x) for x in z]))

    forward = losses  # what DistributedDataParallel and FSDP wrap

    @property
    def device(self) -> torch.device:
        return self.soi.device

    # --------------------------------------------------------------------------------------------------------- training

    def trainable_groups(self, stage: int, variant: str, **rates) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer, see recipe.groups."""
        return recipe.groups(self, stage, variant, **rates)

    def freeze(self, stage: int, variant: str) -> None:
        """Set requires_grad as in the table of recipe.py."""
        recipe.freeze(self, stage, variant)

    def gates(self) -> list[Tensor]:
        return [m.gate for m in self.modules() if isinstance(m, GatedMMFS)]
