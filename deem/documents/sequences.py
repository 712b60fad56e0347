"""Documents -> token ids, labels and the places of their images.

An image is the token <SOI> and `per_image` placeholders. A label is the token itself where it is learned and -100
where it is not: padding, placeholders, BOS, <SOI> right behind BOS, and prompts (parts with learn=False).
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lab.runs import UserError, sent

import torch
from torch import Tensor

IGNORED = -100
NEW_TOKENS = ("<soi>", "<image>", "<ref>", "</ref>", "<mask>", "<reserved>")  # 32,000 + 6: only two are named in public


class Tokenizer:
    """Text -> ids. Texts that come again (prompts, questions, captions of a small set) are looked up."""

    def __init__(self):
        self.lookup = functools.lru_cache(maxsize=1 << 16)(lambda text: tuple(self.ids(text)))

    def encode(self, text: str) -> list[int]:
        return list(self.lookup(text))


class WordTokenizer(Tokenizer):
    """Words, digits and marks of a closed vocabulary; for the digit scenes."""

    def __init__(self, words: Sequence[str]):
        super().__init__()
        self.words = ["<pad>", "<bos>", "<eos>", *dict.fromkeys(words)]
        self.index = {w: i for i, w in enumerate(self.words)}
        self.pad, self.bos, self.eos = 0, 1, 2
        self.text_size = len(self.words)
        self.new = {t: self.text_size + i for i, t in enumerate(NEW_TOKENS)}
        self.soi, self.image = self.new["<soi>"], self.new["<image>"]

    @staticmethod
    def split(text: str) -> list[str]:
        return re.findall(r"[a-z]+|\d|[^\sa-z\d]", text.lower())

    def ids(self, text: str) -> list[int]:
        try:
            return [self.index[w] for w in self.split(text)]
        except KeyError as error:
            raise UserError(
                f"word {error} of '{text[:60]}' is not in the vocabulary of the digit scenes, the only words that "
                "--preset digits and tiny know; give --lm.weights or a larger --preset"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids if 2 < i < self.text_size)

    def answers(self, word: str) -> list[int]:
        return self.encode(word)[:1]


class HFTokenizer(Tokenizer):
    """A tokenizer of transformers with the new tokens behind its vocabulary. Vicuna pads with id 31999."""

    def __init__(self, tokenizer, size: int, pad: int | None = None):
        super().__init__()
        self.tokenizer, self.text_size = tokenizer, size
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        given = next((i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id) if i is not None), size - 1)
        self.pad = given if pad is None else pad
        self.new = {t: size + i for i, t in enumerate(NEW_TOKENS)}
        self.soi, self.image = self.new["<soi>"], self.new["<image>"]
        # SentencePiece puts a blank before every text by itself: a text's own first blank would be a token of its own.
        plain, blank = (tokenizer(w, add_special_tokens=False).input_ids for w in ("yes", " yes"))
        self.blanks = len(blank) > len(plain) and blank[-len(plain) :] == plain

    def ids(self, text: str) -> list[int]:
        out = []
        for piece in re.split(r"(<ref>|</ref>|<mask>)", text):
            if piece in self.new:
                out.append(self.new[piece])
            elif piece:
                piece = piece.removeprefix(" ") if self.blanks else piece
                out += self.tokenizer(piece, add_special_tokens=False).input_ids if piece else []
        return out

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i < self.text_size], skip_special_tokens=True).strip()

    def answers(self, word: str) -> list[int]:
        """First tokens of a word written small and with a capital, also behind a blank, as behind a prompt: in BPE the
        blank is a part of the word."""
        written = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        return sorted({self.encode(w)[0] for w in written})


@dataclass
class Sequence_:
    """One row before padding: ids, labels, and (position of <SOI>, position of the document's BOS, picture)."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[tuple[int, int, object]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def is_text(part) -> bool:
    return hasattr(part, "text")


def encode(parts: Sequence, tok, per_image: int, *, end: bool = True, limit: int = 0) -> Sequence_:
    """A document with BOS in front and, with `end`, EOS behind; cut to `limit` tokens, never inside an image."""
    out = Sequence_([tok.bos], [IGNORED], [])
    last_learned = True
    for part in parts:
        if is_text(part):
            ids = tok.encode(part.text)
            learn, labels = part.learn, ids if part.learn else [IGNORED] * len(ids)
        else:
            ids = [tok.soi] + [tok.image] * per_image
            learn = last_learned  # an image inside a prompt is a prompt
            first = tok.soi if len(out) > 1 and learn else IGNORED
            labels = [first] + [IGNORED] * per_image
        if limit and len(out) + len(ids) > limit:
            if is_text(part):
                room = limit - len(out)
                out.ids += ids[:room]
                out.labels += labels[:room]
            return out
        if not is_text(part):
            out.images.append((len(out), 0, part))
        else:
            last_learned = learn
        out.ids += ids
        out.labels += labels
    if end and not (limit and len(out) >= limit):
        out.ids.append(tok.eos)
        out.labels.append(tok.eos)
    return out


def join(rows: Sequence[Sequence_]) -> Sequence_:
    """Documents one behind the other in one row."""
    out = Sequence_()
    for row in rows:
        at = len(out)
        out.ids += row.ids
        out.labels += row.labels
        out.images += [(soi + at, bos + at, picture) for soi, bos, picture in row.images]
    return out


class Packer:
    """Fill rows of `limit` tokens with documents; an image that would be cut ends the row, with what follows it.

    A document that does not fit is cut at the row's end, as the released code does; at most `max_images` a row.
    `single`: one document a row, as in stages II and III.
    """

    def __init__(self, tok, per_image: int, limit: int, max_images: int, single: bool = False):
        self.tok, self.per_image, self.limit, self.max_images = tok, per_image, limit, max_images
        self.single = single

    def row(self, documents) -> Sequence_:
        """Takes documents (anything with .parts) from an iterator until the row is full."""
        rows, used, images = [], 0, 0
        while used < self.limit and images < self.max_images:
            try:
                parts = next(documents).parts
            except StopIteration:
                break
            kept, count = [], 0
            for part in parts:
                if not is_text(part):
                    if images + count == self.max_images:
                        break
                    count += 1
                kept.append(part)
            row = encode(kept, self.tok, self.per_image, limit=self.limit - used)
            if len(row) < 2:
                break
            rows.append(row)
            used, images = used + len(row), images + len(row.images)
            if self.single:
                break
        return join(rows)


@dataclass
class Batch:
    """S rows of K tokens with B images.

    ids, labels (S, K); attend (S, K) bool; row, soi, bos (B,): row of an image, positions of its <SOI> and of its
    document's BOS; previous (B,): the image before it in the document, -1 for none; slots (S, N): images of a row in
    order, -1 for none; visible (S, K, N) bool: image n of the row lies in the same document and at or before k;
    images, targets (B, 3, R, R) in [0, 1] (encoder's and decoder's view); masks (B, H, W) or None; padded: whether a
    row is shorter than the others. `to` leaves labels, row, soi, bos and previous on the host: what is selected by them
    has a size, which the host would have to wait for.
    """

    ids: Tensor
    labels: Tensor
    attend: Tensor
    row: Tensor
    soi: Tensor
    bos: Tensor
    previous: Tensor
    slots: Tensor
    visible: Tensor
    images: Tensor | None = None
    targets: Tensor | None = None
    masks: Tensor | None = None
    padded: bool = False

    def to(self, device) -> "Batch":
        moved = ("ids", "attend", "slots", "visible", "images", "targets", "masks")
        return replace(self, **{k: sent(v, torch.device(device)) for k in moved if (v := getattr(self, k)) is not None})


def collate(rows: Sequence[Sequence_], tok, *, left: bool = False) -> tuple[Batch, list]:
    """-> (batch without pictures, pictures in the order of its images); `left` pads in front, for generation."""
    k = max(len(r) for r in rows)
    n = max([len(r.images) for r in rows] + [1])
    ids = torch.full((len(rows), k), tok.pad)
    labels, attend = torch.full_like(ids, IGNORED), torch.zeros(len(rows), k, dtype=torch.bool)
    slots = torch.full((len(rows), n), -1)
    visible = torch.zeros(len(rows), k, n, dtype=torch.bool)
    places, pictures = [], []
    for i, r in enumerate(rows):
        start = k - len(r) if left else 0
        here = slice(start, start + len(r))
        ids[i, here], labels[i, here], attend[i, here] = torch.tensor(r.ids), torch.tensor(r.labels), True
        begins = torch.where(ids[i] == tok.bos, torch.arange(k), -1).cummax(0).values
        before: dict[int, int] = {}
        for j, (soi, bos, picture) in enumerate(r.images):
            soi, bos = soi + start, bos + start
            slots[i, j] = len(pictures)
            visible[i, soi + 1 :, j] = begins[soi + 1 :] == begins[soi]
            visible[i, ~attend[i], j] = False
            places.append((i, soi, bos, before.get(bos, -1)))
            before[bos] = len(pictures)
            pictures.append(picture)
    row, soi, bos, previous = (torch.tensor([p[c] for p in places], dtype=torch.long).reshape(-1) for c in range(4))
    padded = not bool(attend.all())
    return Batch(ids, labels, attend, row, soi, bos, previous, slots, visible, padded=padded), pictures
