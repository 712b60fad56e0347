"""Readers of the training sets: WebDataset tars, parquet, MMC4, LLaVA-665K, benchmark questions, regions.

Each returns a `document.Source`, an endless seeded iterator over Documents that resumes exactly.
"""

import gzip
import json
import random
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.runs import UserError

import numpy as np

from documents import prompts
from documents.document import Document, Mixture, Picture, Raw, Source, Text, find_shards

__all__ = ["Document", "Mixture", "Picture", "Source", "Text", "find_shards"]  # and the readers below


def _lines(path: Path) -> Iterator[Raw]:
    """(file:number, line) of a text file that may be gzip-compressed."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):  # noqa: B007
                if line.strip():
                    yield f"{path}:{number}", line
    except FileNotFoundError:
        raise UserError(f"no file {path}; place it there or give another --data-dir") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged after line {number} ({error}); fetch it again") from None


def _parse(name: str, text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not valid JSON ({error}); fetch the file again") from None


# -------------------------------------------------------------------------------------------------- pictures + captions


@dataclass(frozen=True)
class _Pairs:
    """What a caption must be, and on which side of it its picture stands."""

    shortest: int
    lower: bool
    image_first: float

    def document(self, name: str, picture: Picture, caption: Any, rng: random.Random) -> Document | None:
        if not isinstance(caption, str):
            raise UserError(f"{name} has no caption text; fetch the file again")
        words = caption.strip().lower() if self.lower else caption.strip()
        if len(words) < self.shortest:
            return None
        parts = (picture, Text(words))
        return Document(parts if rng.random() < self.image_first else parts[::-1], name)


def captions_webdataset(
    shards, *, shortest: int = 10, lower: bool = True, image_first: float = 0.5, regroup: float = 0.25, **source
) -> Source:
    """Tar shards of img2dataset: `<key>.jpg|png|webp` beside `<key>.txt` or `<key>.json` with a caption.

    Captions shorter than `shortest` characters are left out and the rest lower-cased; the picture stands before its
    caption with probability `image_first` (else behind it, where its drawing is learned), as for stage I.
    """
    pairs = _Pairs(shortest, lower, image_first)

    def build(name: str, sample: dict, rng: random.Random) -> Document | None:
        image = next((sample[k] for k in ("jpg", "jpeg", "png", "webp") if k in sample), None)
        if image is None:
            raise UserError(f"{name} has no picture; fetch the shard again")
        if "txt" in sample:
            try:
                caption = sample["txt"].decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{name} has a caption that is not UTF-8 ({error.reason}); fetch it again") from None
        else:
            found = _parse(name, sample.get("json", b"{}"))
            caption = found.get("caption") if isinstance(found, dict) else None
        return pairs.document(name, Picture(image, name=name), caption, rng)

    return Source(shards, read_tar, build, regroup=regroup, **source)


def read_tar(path: Path) -> Iterator[Raw]:
    """(name, {extension: bytes}) of every sample of a tar; UserError names the member at which it is damaged.

    tarfile ends quietly at a damaged header in the middle, so the end mark (a block of zeros) is looked for.
    """
    from webdataset.tariterators import group_by_keys

    def members() -> Iterator[dict]:
        number = 0
        try:
            with tarfile.open(path, "r:*") as tar:
                for number, member in enumerate(tar, 1):
                    if member.isfile():
                        data = tar.extractfile(member).read()
                        if len(data) != member.size:
                            raise tarfile.ReadError("file ends inside the member")
                        yield {"fname": member.name, "data": data, "__url__": f"{path}:{number}"}
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(512) != bytes(512):
                    raise tarfile.ReadError("no end mark: cut off, or a broken header")
        except FileNotFoundError:
            raise UserError(f"no file {path}; place it there or give another --data-dir") from None
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{path} is damaged at or after member {number} ({error}); fetch it again") from None

    try:
        for sample in group_by_keys(members()):
            yield f"{sample['__url__']} ({Path(sample['__key__']).name})", sample
    except ValueError as error:
        raise UserError(f"{path} has two members of one name ({error.args[0]}); make it again") from None


def captions_parquet(
    shards,
    *,
    image: str = "image",
    caption: str = "caption",
    image_root: Path | None = None,
    shortest: int = 10,
    lower: bool = True,
    image_first: float = 0.5,
    regroup: float = 0.25,
    **source,
) -> Source:
    """Parquet files with a caption column and an image column: bytes, {bytes, path} as `datasets` writes it, or a
    path."""
    pairs = _Pairs(shortest, lower, image_first)

    def read(path: Path) -> Iterator[Raw]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        row = 0
        try:
            file = ParquetFile(path)
            gone = [c for c in (image, caption) if c not in file.schema_arrow.names]
            if gone:
                raise UserError(f"{path} has no column {gone[0]}; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(256, columns=[image, caption]):
                for item in batch.to_pylist():
                    row += 1
                    yield f"{path}:{row}", item
        except FileNotFoundError:
            raise UserError(f"no file {path}; place it there or give another --data-dir") from None
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged after row {row} ({error}); fetch it again") from None

    def build(name: str, item: dict, rng: random.Random) -> Document | None:
        found = item[image]
        if isinstance(found, dict):
            found = found.get("bytes") or found.get("path")
        if not found or not isinstance(found, str | bytes):
            raise UserError(f"{name} has no picture; fetch the file again")
        if isinstance(found, str):
            return pairs.document(name, Picture(Path(image_root or ".") / found), item[caption], rng)
        return pairs.document(name, Picture(found, name=name), item[caption], rng)

    return Source(shards, read, build, regroup=regroup, **source)


# ---------------------------------------------------------------------------------------------------------- interleaved


def mmc4(
    shards, image_root: Path, *, similarity: float = 0.24, most: int = 6, keep_single: float = 0.5, **source
) -> Source:
    """MMC4 JSON lines (`text_list`, `image_info` with image_name, matched_text_index, matched_sim); pictures by name.

    Pictures below `similarity` are dropped, at most `most` kept (a random subset in the original order), documents
    without one dropped, those with one kept with probability `keep_single`; a picture stands before or after its
    sentence with equal odds.
    """

    def build(name: str, line: bytes, rng: random.Random) -> Document | None:
        row = _parse(name, line)
        try:
            sentences = [str(s) for s in row["text_list"]]
            infos = [i for i in row["image_info"] if float(i["matched_sim"]) >= similarity]
            placed = [(int(i["matched_text_index"]), str(i["image_name"])) for i in infos]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{name} is not an MMC4 document ({error!r}); fetch the file again") from None
        wrong = [k for k, _ in placed if not 0 <= k < len(sentences)]
        if wrong:
            raise UserError(f"{name} puts a picture at sentence {wrong[0]} of {len(sentences)}; fetch the file again")
        chosen = sorted(rng.sample(range(len(placed)), min(most, len(placed))))
        if not chosen or (len(chosen) == 1 and rng.random() >= keep_single):
            return None
        before: dict[int, list] = {}
        after: dict[int, list] = {}
        for k in chosen:
            sentence, file = placed[k]
            side = before if rng.random() < 0.5 else after
            side.setdefault(sentence, []).append(Picture(Path(image_root) / file))
        parts: list[Text | Picture] = []
        for k, sentence in enumerate(sentences):
            parts += before.get(k, [])
            between = " " if parts and isinstance(parts[-1], Text) else ""  # no blank beside a picture
            parts += [Text(between + sentence.strip()), *after.get(k, [])]
        return Document(tuple(parts), name)

    return Source(shards, _lines, build, **source)


# ------------------------------------------------------------------------------------------ questions, dialogs, regions


def _read_list(path: Path) -> list:
    try:
        found = _parse(str(path), Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"no file {path}; place it there or give another --data-dir") from None
    if not isinstance(found, list):
        raise UserError(f"{path} is not a list of items; fetch it again")
    return found


def llava665k(path: Path, image_root: Path, *, form: str = "paper", rounds: str = "single", **source) -> Source:
    """`llava_v1_5_mix665k.json`: conversations about a picture; items without one are left out.

    `rounds`: each question with its answer is a document of its own (`single`, as the released code), or the
    conversation stays whole (`all`). Only answers are learned.
    """
    if rounds not in ("single", "all"):
        raise UserError(f"rounds are to be 'single' or 'all', not {rounds}")

    def read(place: Path) -> Iterator[Raw]:
        for number, item in enumerate(_read_list(place)):
            if isinstance(item, dict) and "image" not in item:
                continue
            turns = item.get("conversations") if isinstance(item, dict) else None
            try:
                said = [(t["from"], str(t["value"])) for t in turns]
                asked = [(q, a) for (_, q), (_, a) in zip(said[::2], said[1::2], strict=True)]
                right = all(who == "human" for who, _ in said[::2]) and all(who == "gpt" for who, _ in said[1::2])
            except (KeyError, TypeError, ValueError):
                right = False
            if not right or not asked or not isinstance(item["image"], str):
                yield f"{place} item {number}", None
            elif rounds == "all":
                yield f"{place} item {number}", (item["image"], asked)
            else:
                for k, pair in enumerate(asked):
                    yield f"{place} item {number} round {k}", (item["image"], [pair])

    def build(name: str, item, rng: random.Random) -> Document:
        if item is None:
            raise UserError(f"{name} is not a conversation of human and gpt in turn; fetch the file again")
        file, asked = item
        parts: list[Text | Picture] = []
        for k, (question, answer) in enumerate(asked):
            question = question.replace("<image>\n", "").replace("\n<image>", "").replace("<image>", "").strip()
            if k == 0:
                parts += prompts.train_vqa(question, Picture(Path(image_root) / file), form)
            else:
                parts.append(Text(prompts.next_turn(question, form), learn=False))
            parts.append(Text(f" {answer.strip()}"))
        return Document(tuple(parts), name)

    return Source([path], read, build, window=0, **source)


def questions(items: Sequence, image_root: Path, *, form: str = "paper", **source) -> Source:
    """Documents of benchmark Questions (VQAv2, OK-VQA, GQA, TextVQA train splits) in the stage-II frame; the answer is
    learned."""

    def build(name: str, q, rng: random.Random) -> Document:
        picture = Picture(Path(image_root) / str(q.image))
        return Document((*prompts.train_vqa(q.question, picture, form), Text(f" {q.answer}")), name)

    def read(path: Path) -> Iterator[Raw]:
        return ((f"{path} {k}", q) for k, q in enumerate(items))

    return Source([Path(items[0].group if items else "questions")], read, build, window=0, **source)


def regions(path: Path, image_root: Path, *, form: str = "paper", **source) -> Source:
    """Region captions of stage III: a COCO-style JSON (`images`, `annotations` with a segmentation, and a `caption` on
    the annotation or, as in the RefCOCO files, on its image), or Osprey's list of {file_name, height, width,
    annotation, conversations} whose questions name <region1>, <region2>, ...
    """

    def read(place: Path) -> Iterator[Raw]:
        try:
            data = _parse(str(place), Path(place).read_bytes())
        except FileNotFoundError:
            raise UserError(f"no file {place}; place it there or give another --data-dir") from None
        if isinstance(data, list):
            yield from ((f"{place} item {k}", ("osprey", item)) for k, item in enumerate(data))
            return
        try:
            images = {i["id"]: i for i in data["images"]}
            for k, a in enumerate(data["annotations"]):
                yield f"{place} annotation {k}", ("coco", (images[a["image_id"]], a))
        except (KeyError, TypeError) as error:
            raise UserError(f"{place} is not a COCO-style file ({error!r}); fetch it again") from None

    def build(name: str, item, rng: random.Random) -> Document:
        kind, value = item
        try:
            if kind == "coco":
                image, a = value
                caption = str(a.get("caption") or image["caption"]).strip()
                mask = region_mask(a["segmentation"], image["height"], image["width"], name)
                picture = Picture(Path(image_root) / image["file_name"], mask)
                return Document((*prompts.region(picture, form), Text(f" {caption}")), name)
            masks = [region_mask(a["segmentation"], value["height"], value["width"], name) for a in value["annotation"]]
            turns = [str(t["value"]) for t in value["conversations"]]
            source_path = Path(image_root) / value["file_name"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{name} is not a region item ({error!r}); fetch the file again") from None
        parts: list[Text | Picture] = [Picture(source_path)]
        for k, turn in enumerate(turns):
            parts += _with_regions(turn, source_path, masks, k % 2 == 1, name)
        return Document(tuple(parts), name)

    return Source([path], read, build, window=0, **source)


def _with_regions(text: str, file: Path, masks: list, learn: bool, name: str) -> Iterator[Text | Picture]:
    """Text with <region1>, <region2>, ... replaced by the masked picture."""
    for piece in re.split(r"(<region\d+>)", text.replace("<image>\n", "").replace("<image>", "")):
        if found := re.fullmatch(r"<region(\d+)>", piece):
            number = int(found[1])
            if not 1 <= number <= len(masks):
                raise UserError(f"{name} names region {number} of {len(masks)}; fetch the file again")
            yield Picture(file, masks[number - 1])
        elif piece:
            yield Text(piece if not learn else f" {piece.strip()}", learn=learn)


def region_mask(segmentation: Any, height: int, width: int, name: str = "region") -> np.ndarray:
    """COCO segmentation (polygons, or a run-length code) -> [height, width] bool."""
    from pycocotools import mask as coco

    try:
        if isinstance(segmentation, list):
            # Without this pycocotools ends the process: it walks along the outline pixel by pixel.
            far = [x for polygon in segmentation for x in polygon if not abs(x) <= 10 * max(height, width)]
            if far:
                raise ValueError(f"coordinate {far[0]}")
            code = coco.merge(coco.frPyObjects(segmentation, height, width))
        else:
            raw = isinstance(segmentation["counts"], list)
            code = coco.frPyObjects(segmentation, height, width) if raw else segmentation
        mask = coco.decode(code).astype(bool)
    except Exception as error:  # pycocotools raises whatever its C code meets
        raise UserError(f"{name} has no readable segmentation ({error!r}); fetch the file again") from None
    if mask.shape != (height, width):
        raise UserError(f"{name} has a mask of {mask.shape}, its picture is {(height, width)}; fetch the file again")
    return mask
