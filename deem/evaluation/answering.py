"""How a Deem answers: texts by beam search, yes or no, scores of options, pictures drawn from a document or from an
image's tokens. What the losses need stands in model.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lab.runs import UserError, sent

import torch
import torch.nn.functional as F
from torch import Tensor

from documents import sequences
from documents.readers import Text
from documents.sequences import Batch
from vision.views import to_tensor


@dataclass
class Seen:
    """Encoded images: maps, levels of (B, width, H, W); text (B, per_image, d); condition (B, n, condition width)."""

    maps: list[Tensor]
    text: Tensor
    condition: Tensor | None

    def __len__(self) -> int:
        return len(self.text)

    def select(self, index) -> "Seen":
        i = torch.as_tensor(list(index) if isinstance(index, range) else index, device=self.text.device)
        i = i.long() if not i.numel() else i
        return Seen([m[i] for m in self.maps], self.text[i], None if self.condition is None else self.condition[i])

    @staticmethod
    def cat(parts: list["Seen"]) -> "Seen":
        maps = [torch.cat(m) for m in zip(*(p.maps for p in parts), strict=True)]
        condition = None if parts[0].condition is None else torch.cat([p.condition for p in parts])
        return Seen(maps, torch.cat([p.text for p in parts]), condition)


class Answering:
    """The part of Deem (model.py) that answers; its parts and `encode_images`, `embed`, `hidden` are Deem's."""

    def pictures(self, found: list, size: int | None = None) -> Tensor:
        """Pictures -> (B, 3, R, R) in [0, 1], resized to a square (bicubic), as in stages II and III."""
        return torch.stack([to_tensor(p.load(), size or self.p.resolution) for p in found]).to(self.device)

    def prepare(self, prompts: list[list], images: Seen | None, *, left: bool, end: bool = False) -> tuple[Batch, Seen]:
        rows = [sequences.encode(p, self.tok, self.p.per_image, end=end) for p in prompts]
        b, found = sequences.collate(rows, self.tok, left=left)
        b = b.to(self.device)
        if images is None and found:
            masks = self.masks_of(found)
            images = self.encode_images(self.pictures(found), masks)
        if images is not None and len(images) != len(found):
            raise ValueError(f"{len(images)} encoded images for {len(found)} pictures in the prompts")
        return b, images

    def masks_of(self, found: list) -> Tensor | None:
        masks = [getattr(p, "mask", None) for p in found]
        if all(m is None for m in masks):
            return None
        size = (self.p.resolution, self.p.resolution)
        full = [
            torch.ones(size) if m is None
            else F.interpolate(torch.as_tensor(m)[None, None].float(), size, mode="nearest")[0, 0]
            for m in masks
        ]  # fmt: skip
        return torch.stack(full).to(self.device)

    @torch.no_grad()
    def generate(
        self, prompts: list[list], *, num_beams: int = 1, max_new_tokens: int = 10, min_new_tokens: int = 0,
        length_penalty: float = 1.0, repetition_penalty: float = 1.0, images: Seen | None = None,
    ) -> list[str]:  # fmt: skip
        """Texts that follow the prompts (lists of Text and Picture parts), by beam search without sampling.

        images: the prompts' pictures encoded before (`encode_images(...).select(...)`), in their order."""
        b, seen = self.prepare(prompts, images, left=True)
        self.set_context(b, seen)
        out = self.llm.generate(
            inputs_embeds=self.embed(b, seen), attention_mask=b.attend.long(), num_beams=num_beams, do_sample=False,
            max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens or None, length_penalty=length_penalty,
            repetition_penalty=repetition_penalty, suppress_tokens=sorted(self.tok.new.values()),
        )  # fmt: skip
        return [self.tok.decode(row.tolist()) for row in out]

    @torch.no_grad()
    def yes_no(self, prompts: list[list], images: Seen | None = None) -> Tensor:
        """(B, 2): log-probability that the first token of the answer is yes, and no; one pass, no search."""
        return self.word_scores(prompts, ("yes", "no"), images)

    @torch.no_grad()
    def word_scores(self, prompts: list[list], words: Sequence[str], images: Seen | None = None) -> Tensor:
        """(B, words): log-probability that the first token behind a prompt is a word's first; one pass, no search."""
        b, seen = self.prepare(prompts, images, left=True)
        scores = self.llm.lm_head(self.hidden(b, seen)[:, -1]).float().log_softmax(-1)
        return torch.stack([scores[:, self.tok.answers(w)].logsumexp(1) for w in words], 1)

    @torch.no_grad()
    def option_scores(self, prompts: list[list], options: list[list[str]], images: Seen | None = None) -> list[Tensor]:
        """Summed log-probabilities of each option as what follows its prompt (VisDial)."""
        out = []
        count = [sum(not sequences.is_text(x) for x in p) for p in prompts]
        if images is None:
            pictures = [x for p in prompts for x in p if not sequences.is_text(x)]
            images = self.encode_images(self.pictures(pictures), self.masks_of(pictures)) if pictures else None
        at = 0
        for parts, texts, n in zip(prompts, options, count, strict=True):
            fixed = [Text(x.text, learn=False) if sequences.is_text(x) else x for x in parts]
            own = None if images is None else images.select(list(range(at, at + n)) * len(texts))
            at += n
            b, seen = self.prepare([[*fixed, Text(t)] for t in texts], own, left=False)
            h, target = self.hidden(b, seen)[:, :-1], b.labels[:, 1:]
            keep = (target != sequences.IGNORED) & (target != self.tok.soi)
            places, row, target = (
                sent(v, h.device) for v in (keep.flatten().nonzero()[:, 0], keep.nonzero()[:, 0], target[keep])
            )
            # Where an option stands, and nowhere else.
            scores = self.llm.lm_head(h.flatten(0, 1).index_select(0, places)).float().log_softmax(-1)
            picked = scores.gather(1, target[:, None])[:, 0]
            out.append(picked.new_zeros(len(texts)).index_add(0, row, picked).cpu())
        return out

    @torch.no_grad()
    def draw(self, documents: list[list], steps: int = 250, guidance: float = 3.5, seed: int = 0) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] that follow the documents (lists of parts): the next image of each."""
        if self.denoiser is None:
            raise UserError("this run holds no diffusion model (stage 3 loads none); draw with a run of stage 1")
        rows = [sequences.encode(p, self.tok, self.p.per_image, end=False) for p in documents]
        for r in rows:  # the <SOI> behind which the image would stand
            r.ids.append(self.tok.soi)
            r.labels.append(sequences.IGNORED)
        b, found = sequences.collate(rows, self.tok)
        b = b.to(self.device)
        seen = self.encode_images(self.pictures(found), self.masks_of(found)) if found else None
        x = self.embed(b, seen)
        rows_, ends = torch.arange(len(rows)), torch.tensor([len(r) - 1 for r in rows])
        x[sent(rows_, x.device), sent(ends, x.device)] += self.soi.to(x.dtype)
        self.set_context(b, seen)
        h = self.llm.model(inputs_embeds=x, attention_mask=b.attend.long(), use_cache=False).last_hidden_state
        last = [int(s[s >= 0].max()) if (s >= 0).any() else -1 for s in b.slots.cpu()]
        there = torch.tensor(last) >= 0
        at = replace(b, row=rows_, soi=ends, bos=torch.zeros_like(ends))
        condition = self.context_reader(*self.image_context(h, at))
        if seen is not None:
            previous, real = (sent(v, self.device) for v in (torch.tensor(last).clamp(min=0), there.view(-1, 1, 1, 1)))
            maps = [m[previous] * real for m in seen.maps]
        else:
            side = self.p.resolution
            maps = [condition.new_zeros(len(rows), self.p.width, side // s, side // s) for s in self.encoder.strides]
        return self.denoiser.draw(condition, steps=steps, guidance=guidance, seed=seed, maps=maps, seen=there)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, targets: Tensor | None = None, *, steps: int = 250, guidance: float = 1.0,
                    strength: float = 1.0, seed: int = 0, maps: bool = False) -> Tensor:  # fmt: skip
        """Images (B, 3, H, W) drawn from the tokens e^D of `images` alone, or with their maps; `targets` (decoder
        views) with strength < 1 are where the drawing starts."""
        seen = self.encode_images(images)
        start = self.denoiser.latents.encode(targets) if targets is not None and strength < 1 else None
        more = {"maps": seen.maps, "seen": torch.ones(len(images), dtype=torch.bool)} if maps else {}
        return self.denoiser.draw(
            seen.condition, steps=steps, guidance=guidance, seed=seed, start=start, strength=strength, **more
        )
