"""Scores against references written from the formulas, and against hand-counted examples."""

import re
import shutil

from lab.runs import UserError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import scores


def leave_one_out(answer: str, annotators: list[str]) -> float:
    """Plain loops over the ten sets of nine annotators, no normalisation."""
    total = 0.0
    for i in range(len(annotators)):
        others = [a for j, a in enumerate(annotators) if j != i]
        total += min(1.0, sum(a == answer for a in others) / 3)
    return total / len(annotators)


@given(
    st.lists(st.sampled_from(["cat", "dog", "red"]), min_size=2, max_size=12), st.sampled_from(["cat", "dog", "elk"])
)
def test_vqa_accuracy_leaves_one_annotator_out(annotators, answer):
    assert scores.vqa_accuracy(answer, annotators) == pytest.approx(leave_one_out(answer, annotators))


def test_vqa_accuracy_by_hand():
    three = ["yes"] * 3 + ["no"] * 7
    assert scores.vqa_accuracy("yes", three) == pytest.approx((3 * 2 / 3 + 7 * 1.0) / 10)
    assert scores.vqa_accuracy("no", three) == 1.0
    assert scores.vqa_accuracy("yes", ["yes"] + ["no"] * 9) == pytest.approx(0.3)


def test_vqa_normalisation_is_the_official_one():
    for said, read in (
        ("Two dogs.", "2 dogs"), ("the cat", "cat"), ("a man, a woman", "man woman"), ("dont know", "don't know"),
        ("1,000", "1000"), ("3.5", "3.5"), ("none", "0"), ("t-shirt", "t shirt"), ("yes/no", "yes no"), ("an hour",
        "hour"), ("couldnt've", "couldn't've"), ("ten", "10"), ("U.S.", "us"), ("what ?", "what"),
    ):  # fmt: skip
        assert scores.plain_words(scores.strip_punctuation(said)) == read, said
    assert len(scores.MENDED) == 114 and scores.MENDED["yall'd've"] == "y'all'd've"
    mixed = ["2"] * 9 + ["two"]
    assert scores.vqa_accuracy("two", mixed) == 1.0
    # Annotators keep their words where they all agree, as officially coded, so the number word fails; VizWiz reads both
    # sides alike.
    assert scores.vqa_accuracy("two", ["two"] * 10) == 0.0
    assert scores.vqa_accuracy("Two", ["two"] * 10, "vizwiz") == 1.0
    assert scores.vqa_accuracy("2", ["two"] * 5 + ["2"] * 5, "vizwiz") == 1.0
    assert scores.vqa_accuracy("2", ["two"] * 5 + ["2"] * 5) == 1.0 and scores.vqa_accuracy("red", ["two"] * 10) == 0


def test_vqa_scores_read_the_answer_first():
    rows = [{"answer": "It is a dog", "answers": ["dog"] * 10}, {"answer": "cat", "answers": ["dog"] * 10}]
    assert scores.score_vqa(rows) == {"accuracy": 50.0, "accuracy_raw": 0.0, "n": 2}
    gqa = scores.score_exact([{"answer": "the left side.", "label": "Left side"}, {"answer": "no", "label": "yes"}])
    assert gqa == {"accuracy": 50.0, "accuracy_raw": 0.0, "n": 2}
    for empty in (scores.score_vqa, scores.score_exact, scores.score_rankings, scores.score_captions):
        with pytest.raises(UserError, match="no .* to score"):
            empty([])


def slow_ndcg(score: list[float], gain: list[float]) -> float:
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    k = sum(g > 0 for g in gain)
    dcg = sum(gain[order[r]] / np.log2(r + 2) for r in range(k))
    best = sum(g / np.log2(r + 2) for r, g in enumerate(sorted(gain, reverse=True)[:k]))
    return dcg / best


@given(st.lists(st.tuples(st.integers(-5, 5), st.sampled_from([0, 0.2, 0.5, 1])), min_size=2, max_size=20))
def test_ndcg_equals_the_formula(rows):
    score, gain = [float(a) for a, _ in rows], [float(b) for _, b in rows]
    record = {"scores": score, "relevance": gain, "right": 0}
    if not any(gain):
        with pytest.raises(UserError, match="no question has a relevant option"):
            scores.score_rankings([record])
        return
    got = scores.score_rankings([record])
    assert got["ndcg"] == pytest.approx(100 * slow_ndcg(score, gain))
    rank = 1 + sum(s > score[0] for s in score)
    assert got["mean_rank"] == rank and got["mrr"] == pytest.approx(100 / rank) and got["recall_1"] == 100 * (rank == 1)


def test_ndcg_agrees_with_scikit_learn_without_ties():
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(0)
    gain, score = rng.choice([0, 0, 0.5, 1], (6, 100)), rng.normal(size=(6, 100))
    mine = scores.score_rankings([{"scores": s, "relevance": g} for s, g in zip(score, gain, strict=True)])["ndcg"]
    theirs = [ndcg_score([g], [s], k=int((g > 0).sum())) for s, g in zip(score, gain, strict=True)]
    assert mine == pytest.approx(100 * np.mean(theirs))
    with pytest.raises(UserError, match="or NaN"):
        scores.score_rankings([{"scores": [float("nan"), 0], "relevance": [1, 0]}])
    with pytest.raises(UserError, match="scores for"):
        scores.score_rankings([{"scores": [1.0], "relevance": [1, 0]}])


def slow_cider(said: list[str], told: list[list[str]]) -> float:
    """CIDEr-D from its formula: tf-idf n-grams up to 4, clipped cosine, Gaussian on the length difference, times 10."""
    from collections import Counter

    grams = lambda text, n: Counter(tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1))  # noqa: E731
    per_item = []
    for c, refs in zip(said, told, strict=True):
        by_n = []
        for n in range(1, 5):
            seen = Counter(g for r in told for g in {g for one in r for g in grams(one, n)})
            weigh = lambda x, n=n, seen=seen: {  # noqa: E731
                g: k * (np.log(len(told)) - np.log(max(1.0, seen[g]))) for g, k in grams(x, n).items()
            }
            a, sims = weigh(c), []
            for r in refs:
                b = weigh(r)
                dot = sum(min(v, b[g]) * b[g] for g, v in a.items() if g in b)
                norm = np.sqrt(sum(v * v for v in a.values())) * np.sqrt(sum(v * v for v in b.values()))
                # The library counts lengths in bigrams.
                gap = (len(c.split()) - 1) - (len(r.split()) - 1)
                sims.append((dot / norm if norm else dot) * np.exp(-(gap**2) / 72))
            by_n.append(np.mean(sims))
        per_item.append(np.mean(by_n) * 10)
    return float(np.mean(per_item))


CAPTIONS = [
    ("A dog runs over the grass.", ["A dog runs over grass", "the brown dog is running on a lawn"]),
    ("two men", ["two men sit on a bench", "Two men, sitting."]),
    ("a red car", ["A bus stands on the road", "the red bus"]),
]


def test_cider_without_java_equals_the_formula(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    rows = [{"answer": a, "references": r} for a, r in CAPTIONS]
    got = scores.score_captions(rows, ("cider",), "plain")
    plain = lambda x: " ".join(re.findall(r"[a-z0-9']+", x.lower()))  # noqa: E731
    expected = slow_cider([plain(a) for a, _ in CAPTIONS], [[plain(x) for x in r] for _, r in CAPTIONS])
    assert got["cider"] == pytest.approx(100 * expected, rel=1e-6) and got["n"] == 3
    with pytest.raises(UserError, match="need Java; install it, or use --tokenize plain --metrics cider"):
        scores.score_captions(rows)
    with pytest.raises(UserError, match="need Java"):
        scores.score_captions(rows, ("cider", "meteor"), "plain")
    with pytest.raises(UserError, match="tokenizer words is unknown"):
        scores.score_captions(rows, ("cider",), "words")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
def test_official_tokenizer_and_meteor():
    rows = [{"answer": a, "references": r} for a, r in CAPTIONS]
    got = scores.score_captions(rows)
    assert got["cider"] > 0 and 0 < got["meteor"] < 100
    perfect = scores.score_captions([{"answer": r[0], "references": r} for _, r in CAPTIONS])
    assert perfect["meteor"] > got["meteor"] and perfect["cider"] > got["cider"]


class Pool(torch.nn.Module):
    """A feature network of a few numbers: mean and deviation of each channel."""

    def forward(self, x):
        x = x.float().flatten(2) / 255
        return torch.cat([x.mean(2), x.std(2)], 1)


def test_fid_equals_the_formula_on_a_small_feature_network():
    from scipy.linalg import sqrtm

    g = torch.Generator().manual_seed(0)
    real, drawn = (torch.randint(0, hi, (40, 3, 8, 8), generator=g, dtype=torch.uint8) for hi in (255, 200))
    fid = scores.Fid(Pool(), size=8)
    for part in real.split(7):
        fid.add(part, real=True)
    fid.add(drawn, real=False)
    a, b = (Pool()(x).double().numpy() for x in (real, drawn))
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert fid.score() == pytest.approx(expected, rel=1e-4)


def test_fid_tells_what_it_cannot_use(monkeypatch, tmp_path):
    fid = scores.Fid(Pool(), size=8)
    with pytest.raises(UserError, match="takes uint8"):
        fid.add(torch.rand(2, 3, 8, 8), real=True)
    fid.add(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), real=True)
    with pytest.raises(UserError, match="2 real and 0 drawn"):
        fid.score()
    with pytest.raises(UserError, match="features dino are unknown"):
        scores.Fid("dino")
    import torchmetrics.image.fid as library
    from torch_fidelity import feature_extractor_inceptionv3 as source

    assert source.URL_INCEPTION_V3.endswith(scores.INCEPTION)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=f"no Inception weights {tmp_path}/checkpoints/{scores.INCEPTION}; place them"):
        scores.Fid()
    (tmp_path / "checkpoints").mkdir()
    place = tmp_path / "checkpoints" / scores.INCEPTION
    torch.save({"f": Pool()}, place)  # a class, not tensors: to read it would run what the file says
    with pytest.raises(UserError, match="does not hold plain tensors"):
        scores.Fid()
    place.unlink()

    def offline(**more):
        raise OSError("no route")

    monkeypatch.setattr(library, "FrechetInceptionDistance", offline)
    with pytest.raises(UserError, match=r"could not be loaded \(no route\)"):
        scores.Fid(download=True)


@given(st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_the_closest_picture_to_the_caption_is_kept(n, k):
    g = torch.Generator().manual_seed(n * 10 + k)
    images, texts = torch.randn(n, k, 6, generator=g), torch.randn(n, 6, generator=g)
    got = scores.best_of(images * 7, texts * 3)
    for i in range(n):
        cosine = [float(images[i, j] @ texts[i] / images[i, j].norm()) for j in range(k)]
        assert got[i] == max(range(k), key=cosine.__getitem__)
