"""Scores of answers, captions, rankings and drawn pictures; all shares in per cent.

VQA accuracy   mean over annotators i of min(1, #{j != i : a_j = answer} / 3), after the official normalisation
NDCG@k         DCG of the k best options over the best possible, DCG = sum rel_r / log2(r + 1), k = options with rel > 0
CIDEr, METEOR  by pycocoevalcap (its tokenizer and METEOR need Java);  FID by torchmetrics
"""

import contextlib
import io
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from lab.runs import UserError

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.parsers import extract_answer

# ----------------------------------------------------------------------------------------------------- short answers

NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(), [0, *range(11)], strict=True))
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The contractions the official evaluation mends: each is recognised with one of its apostrophes lost.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
MENDED = {w[:k] + w[k + 1 :]: w for w in CONTRACTIONS for k, c in enumerate(w) if c == "'"}
MENDED["somebody'd"] = "somebodyd"  # the official table has this pair the wrong way round


def strip_punctuation(text: str) -> str:
    """Punctuation becomes a blank, or nothing where it stands beside a blank or the text has a number like 1,000; full
    stops go unless a digit follows."""
    out, number = text, re.search(r"\d,\d", text)
    for p in PUNCTUATION:
        out = out.replace(p, "" if p + " " in text or " " + p in text or number else " ")
    return re.sub(r"\.(?!\d)", "", out)


def plain_words(text: str) -> str:
    """Lower case, number words as digits, no articles, lost apostrophes put back."""
    words = [str(NUMBERS.get(w, w)) for w in text.lower().split()]
    return " ".join(MENDED.get(w, w) for w in words if w not in ARTICLES)


def vqa_accuracy(answer: str, annotators: Sequence[str], style: str = "vqa") -> float:
    """Share in [0, 1] of one answer.

    As officially coded: the answer is always normalised, the annotators' only lose punctuation, and only where they do
    not all agree. `style="vizwiz"`: both are normalised where annotators differ, neither where they agree, and case
    does not count.
    """
    said = answer.replace("\n", " ").replace("\t", " ").strip()
    told, differ = list(annotators), len({*annotators}) > 1
    if style == "vqa":
        said = plain_words(strip_punctuation(said))
        told = [strip_punctuation(a) for a in told] if differ else told
    else:
        told = [a.replace("\n", " ").replace("\t", " ").strip() for a in told]
        if len({*told}) > 1:
            said, *told = (plain_words(strip_punctuation(a)) for a in (said, *told))
        said, told = said.lower(), [a.lower() for a in told]
    hits = [a == said for a in told]
    return sum(min(1.0, (sum(hits) - own) / 3) for own in hits) / len(hits)


def score_vqa(records: Sequence[dict], style: str = "vqa") -> dict[str, float]:
    """Accuracy of records with `answer` and `answers` after the released code's `extract_answer`; `accuracy_raw` is
    that of the text as said."""
    if not records:
        raise UserError("no answered question to score")
    means = {}
    for key, read in (("accuracy", extract_answer), ("accuracy_raw", str)):
        shares = [vqa_accuracy(read(r["answer"]), r["answers"], style) for r in records]
        means[key] = 100 * sum(shares) / len(shares)
    return {**means, "n": len(records)}


def score_exact(records: Sequence[dict]) -> dict[str, float]:
    """GQA: share of answers that equal the label, case and outer blanks aside, after `extract_answer`."""
    if not records:
        raise UserError("no answered question to score")
    right = [extract_answer(r["answer"]) == r["label"].strip().lower() for r in records]
    raw = [r["answer"].strip().lower() == r["label"].strip().lower() for r in records]
    return {"accuracy": 100 * sum(right) / len(right), "accuracy_raw": 100 * sum(raw) / len(raw), "n": len(right)}


# --------------------------------------------------------------------------------------------------------- rankings


def score_rankings(records: Sequence[dict]) -> dict[str, float]:
    """VisDial: NDCG in per cent, and with `right` (the index of the human answer) mean reciprocal rank and recall at 1,
    5, 10. Records need `scores` (higher is better) and `relevance`, of equal length; tied options keep their order."""
    if not records:
        raise UserError("no ranked question to score")
    ndcg, ranks = [], []
    for r in records:
        scores, gain = np.asarray(r["scores"], float), np.asarray(r["relevance"], float)
        if scores.shape != gain.shape or not np.isfinite(scores).all():
            raise UserError(f"question {r.get('question_id')}: {scores.shape} scores for {gain.shape} options, or NaN")
        order, k = np.argsort(-scores, kind="stable"), int((gain > 0).sum())
        if k:
            discount = 1 / np.log2(np.arange(2, k + 2))
            ndcg.append(float(gain[order[:k]] @ discount / (np.sort(gain)[::-1][:k] @ discount)))
        if r.get("right") is not None:
            ranks.append(int(np.flatnonzero(order == r["right"])[0]) + 1)
    if not ndcg:
        raise UserError("no question has a relevant option")
    out = {"ndcg": 100 * float(np.mean(ndcg)), "n": len(records)}
    if ranks:
        place = np.array(ranks)
        out |= {"mrr": 100 * float((1 / place).mean()), "mean_rank": float(place.mean())}
        out |= {f"recall_{k}": 100 * float((place <= k).mean()) for k in (1, 5, 10)}
    return out


# --------------------------------------------------------------------------------------------------------- captions


def score_captions(
    records: Sequence[dict], metrics: Sequence[str] = ("cider", "meteor"), tokenize: str = "ptb"
) -> dict:
    """Corpus CIDEr and METEOR, times 100. Records need `answer` and `references`; `tokenize`: `ptb` (official, needs
    Java) or `plain` (lower case, punctuation off; numbers differ slightly and the record says so)."""
    if not records:
        raise UserError("no caption to score")
    if tokenize not in ("ptb", "plain"):
        raise UserError(f"tokenizer {tokenize} is unknown; use ptb or plain")
    if (tokenize == "ptb" or "meteor" in metrics) and shutil.which("java") is None:
        raise UserError("the PTB tokenizer and METEOR need Java; install it, or use --tokenize plain --metrics cider")
    said = {k: [{"caption": r["answer"].replace("\n", " ")}] for k, r in enumerate(records)}
    told = {k: [{"caption": c.replace("\n", " ")} for c in r["references"]] for k, r in enumerate(records)}
    if tokenize == "ptb":
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        said, told = PTBTokenizer().tokenize(said), PTBTokenizer().tokenize(told)
    else:
        said, told = ({k: [_words(c["caption"]) for c in v] for k, v in x.items()} for x in (said, told))
    out: dict[str, float] = {"n": len(records)}
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its own progress
        if "cider" in metrics:
            from pycocoevalcap.cider.cider import Cider

            out["cider"] = 100 * float(Cider().compute_score(told, said)[0])
        if "meteor" in metrics:
            from pycocoevalcap.meteor.meteor import Meteor

            try:
                meteor = Meteor()
                out["meteor"] = 100 * float(meteor.compute_score(told, said)[0])
            except (BrokenPipeError, ValueError, OSError) as error:
                raise UserError(f"METEOR's Java program ended ({error}); is Java 8 or newer installed?") from None
    return out


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


# ------------------------------------------------------------------------------------------------------- drawn pictures


INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_FROM = f"{INCEPTION} of github.com/toshas/torch-fidelity"


class Fid:
    """Frechet distance between the features of real and drawn pictures, fed in batches of uint8 [B, 3, H, W].

    `features`: "inception" (pool3 of the 2015 Inception network, 2048 wide, as torch-fidelity ships it) or any module
    from uint8 pictures to [B, d]. Sums are kept in float64.
    """

    def __init__(
        self,
        features: str | nn.Module = "inception",
        device: str | torch.device = "cpu",
        size: int = 299,
        download: bool = False,
    ):
        from torchmetrics.image.fid import FrechetInceptionDistance

        place = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
        if isinstance(features, str):
            if features != "inception":
                raise UserError(f"features {features} are unknown; use inception")
            if not place.is_file() and not download:
                raise UserError(f"no Inception weights {place}; place them there ({INCEPTION_FROM}), or add --download")
            if place.is_file():  # the library would unpickle whatever lies there
                try:
                    torch.load(place, map_location="cpu", weights_only=True)
                except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
                    text = f"{place} does not hold plain tensors ({str(error)[:120]})"
                    raise UserError(f"{text}; place {INCEPTION_FROM} there") from None
        shape = (
            {"feature": 2048} if isinstance(features, str) else {"feature": features, "input_img_size": (3, size, size)}
        )
        try:
            self.metric = FrechetInceptionDistance(**shape)
        except ModuleNotFoundError as error:
            raise UserError(f"FID needs torch-fidelity ({error}); install requirements.txt") from None
        except (OSError, RuntimeError) as error:  # no network, or a damaged file
            raise UserError(
                f"the Inception weights could not be loaded ({error}); place {INCEPTION_FROM} in {place.parent}"
            ) from None
        self.metric.to(device)

    def add(self, images: Tensor, real: bool) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"FID takes uint8 pictures [B, 3, H, W], not {images.dtype} {tuple(images.shape)}")
        self.metric.update(images.to(self.metric.device), real=real)

    def score(self) -> float:
        real, drawn = int(self.metric.real_features_num_samples), int(self.metric.fake_features_num_samples)
        if min(real, drawn) < 2:
            raise UserError(f"FID needs two or more pictures a side, not {real} real and {drawn} drawn ones")
        return float(self.metric.compute())


def best_of(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Index [N] of the drawn picture closest to its caption: image_features [N, k, d], text_features [N, d]."""
    images, texts = (nn.functional.normalize(x.float(), dim=-1) for x in (image_features, text_features))
    return torch.einsum("nkd,nd->nk", images, texts).argmax(1)
