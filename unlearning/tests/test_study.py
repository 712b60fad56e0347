"""The metric study: every number equals the metric taken alone, and shared passes give what separate ones do."""

import types

import numpy as np
import pytest
import torch

import control
import data
import evaluation
import metrics
import study
from models import set_weights, weights

CPU = torch.device("cpu")
SETTINGS = types.SimpleNamespace(
    relearn_lr=3e-3, train_batch=16, train_accum=1, probe_layers=(1 / 3, 2 / 3, 1.0), noise_rate=0.3, max_length=500,
    gcg_steps=1,
)  # fmt: skip


LEARNED: dict[str, torch.Tensor] = {}  # weights after training, the same for every test


@pytest.fixture()
def bench(tiny, corpus):
    """(LM that knows a little, Chat, sets of unequal sizes, fine-tuning items)."""
    lm, chat = tiny
    sets = metrics.Sets(corpus, "forget-small", chat, CPU)
    sets.rows["retain"] = sets.rows["retain"][:7]
    for kind in metrics.KINDS:
        sets.items[kind, "retain"] = sets.items[kind, "retain"][:7]
    full = [data.encode(chat, q.question, q.answer) for q in corpus.full]
    if not LEARNED:
        for seed in range(8):
            study.relearn(lm, full, chat, lr=1e-2, batch=16, accum=1, seed=seed, show=False)
        LEARNED.update({k: v.clone() for k, v in weights(lm).items()})
    set_weights(lm, LEARNED)
    return lm, chat, sets, full


def alone(lm, chat, sets, items):
    """Each metric by itself, one set after the other."""
    out = {}
    for part in metrics.PARTS:
        rows = sets.rows[part]
        s, wrong = metrics.score_items(lm, items[part], chat.pad, CPU), []
        for q, e in zip(rows, items[part], strict=True):
            texts = [chat.answer_ids(a) for a in (q.base_answer, *q.perturbed_answer)]
            every = [data.Encoded((*e.ids[: e.start], *t, chat.end), e.start, len(t)) for t in texts]
            wrong.append(metrics.score_items(lm, every, chat.pad, CPU).nll)
        wrong = np.array(wrong)
        ratio = np.exp(wrong[:, 1:].mean(1) - wrong[:, 0])
        rouge, _ = metrics.rouge_items(lm, chat, rows, items[part], CPU)
        values = {"ES": s.es, "EM": s.em, "PPL": np.exp(s.nll), "logPPL": s.nll, "ROUGE-L": rouge}
        values["truth_ratio"] = np.minimum(ratio, 1 / ratio)
        out |= {f"{k}_{part}": v.mean() for k, v in values.items()}
    return out


def exact(sets):
    return {part: sets.items["exact", part] for part in metrics.PARTS}


def test_measure_equals_each_metric_alone(bench):
    lm, chat, sets, _ = bench
    found = study.measure(lm, chat, sets, exact(sets))
    assert found == pytest.approx(alone(lm, chat, sets, exact(sets)), rel=1e-4, abs=1e-6)
    assert found["logPPL_retain"] != found["logPPL_unlearn"] and 0 < found["EM_retain"] < 1


def test_every_set_is_scored_as_it_is_alone_and_at_an_alpha_of_its_own(bench):
    lm, chat, sets, _ = bench
    joined = sets.all_scores(lm)
    assert list(joined) == list(sets.items)
    for key, items in sets.items.items():
        one = metrics.score_items(lm, items, chat.pad, CPU)
        np.testing.assert_array_equal(joined[key].es, one.es)
        np.testing.assert_array_equal(joined[key].nll_sum, one.nll_sum)
    kinds = {"exact": 1.0, "perturb": 0.5}
    a = {k: v.clone() for k, v in weights(lm).items()}
    mixer = control.Mixer(lm, {k: 0.5 * v for k, v in a.items()}, a)
    found = evaluation.Along(mixer, lm, sets).at(kinds)
    assert set(found) == set(sets.items)
    for (kind, part), s in found.items():
        mixer.set(kinds[kind])
        own = metrics.score_items(lm, sets.items[kind, part], chat.pad, CPU)
        np.testing.assert_allclose(s.nll, own.nll, rtol=1e-5)


def test_probing_averages_the_layers_and_the_last_is_the_plain_pass(bench):
    lm, chat, sets, full = bench
    items, layers = exact(sets), []
    for layer in (1, 2, 3):
        with lm.cut(layer):
            layers.append(alone(lm, chat, sets, items))
    want = {k: np.mean([f[k] for f in layers]) for k in layers[0]}
    assert layers[2] == alone(lm, chat, sets, items) and layers[0] != layers[2]
    plain = study.measure(lm, chat, sets, items)
    for known in (plain, None):
        found = study.attack("embedding probing", lm, chat, sets, SETTINGS, 0, full, known)
        assert found == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_relearning_and_probing_do_not_take_the_plain_numbers_of_before(bench):
    lm, chat, sets, full = bench
    plain, before = study.measure(lm, chat, sets, exact(sets)), {k: v.clone() for k, v in weights(lm).items()}
    found = study.attack("relearning+probing", lm, chat, sets, SETTINGS, 0, full, plain)
    assert any(not torch.equal(v, before[k]) for k, v in weights(lm).items())
    again = study.probed(lm, chat, sets, exact(sets), SETTINGS.probe_layers, None)
    assert found == again
    set_weights(lm, before)
    after = study.attack("relearning", lm, chat, sets, SETTINGS, 0, full, plain)
    assert after["logPPL_retain"] < plain["logPPL_retain"] and after["logPPL_unlearn"] < plain["logPPL_unlearn"]
    set_weights(lm, before)
    assert after == study.attack("relearning", lm, chat, sets, SETTINGS, 0, full, plain)
    set_weights(lm, before)  # the seed orders the items
    assert after != study.attack("relearning", lm, chat, sets, SETTINGS, 1, full, plain)


def test_attacks_on_prompts_are_measured_on_the_attacked_prompts(bench):
    lm, chat, sets, full = bench
    size = len(chat.tokenizer)
    for kind, items in (
        ("jail-breaking", {p: study.jailbroken(chat, sets.rows[p], 500) for p in metrics.PARTS}),
        ("token noising", {p: study.noised(sets.items["exact", p], 0.3, size, 5) for p in metrics.PARTS}),
    ):
        found = study.attack(kind, lm, chat, sets, SETTINGS, 5, full)
        assert found == pytest.approx(alone(lm, chat, sets, items), rel=1e-4, abs=1e-6)
        assert found != study.measure(lm, chat, sets, exact(sets))
    assert study.noised(full, 0.3, size, 5) != study.noised(full, 0.3, size, 6)


def test_noise_hits_its_share_of_the_prompt_tokens(bench):
    _, chat, _, full = bench
    for rate, low, high in ((1e-9, 1, 1), (1.0, 6, 99)):
        for a, b in zip(full, study.noised(full, rate, len(chat.tokenizer), 0), strict=True):
            moved = [k for k, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)) if x != y]
            assert len(moved) <= high and all(0 < k < a.start for k in moved)
            assert rate < 1 or len(moved) >= low
    # However small the rate, one token of each prompt is drawn anew (and seldom is the one that stood there).
    drawn = [a.ids != b.ids for a, b in zip(full, study.noised(full, 1e-9, len(chat.tokenizer), 0), strict=True)]
    assert np.mean(drawn) > 0.9


def test_probed_layers_are_shares_of_the_depth():
    assert study.layers_of(24, (1 / 3, 0.9, 1.0)) == [8, 22, 24] and study.layers_of(3, (0.01, 0.5, 0.6)) == [1, 2]


def test_relearning_is_one_epoch_of_the_fine_tuning(bench, monkeypatch):
    lm, chat, _, full = bench
    seen = {}

    class Spy(study.Trainer):
        def __init__(self, *args, **more):
            seen.update(more)
            super().__init__(*args, **more)

    monkeypatch.setattr(study, "Trainer", Spy)
    study.relearn(lm, full, chat, lr=1e-3, batch=16, accum=2, seed=0, show=False)
    assert seen == {"lr": 1e-3, "steps": len(full) // 32, "warmup": 1, "accum": 2, "alone": True}


def test_the_first_gcg_step_follows_the_slope(bench):
    """With every candidate tried, one step is at least as good as with the same tokens ranked the other way round."""
    lm, chat, sets, _ = bench
    items = sets.items["exact", "unlearn"][:4]
    size = len(chat.tokenizer)
    loss = lambda attacked: metrics.score_items(lm, attacked, chat.pad, CPU).nll.mean()  # noqa: E731
    found = [
        loss(study.gcg(lm, chat, items, CPU, length=3, steps=6, tries=12, top=top, seed=seed))
        for top in (8, size)
        for seed in range(4)
    ]
    assert np.mean(found[:4]) < np.mean(found[4:])  # the gradient's best tokens beat tokens drawn from all


def test_a_line_an_item_names_the_question_that_was_asked(bench):
    lm, chat, sets, _ = bench
    scores = sets.all_scores(lm)
    rows = evaluation.item_rows(sets, scores, {"exact": 0.25, "perturb": 0.5}, 0.9)
    assert len(rows) == sum(map(len, sets.items.values()))
    for row in rows:
        q, s = sets.rows[row["part"]][row["item"]], scores[row["questions"], row["part"]]
        exact = row["questions"] == "exact"
        assert row["question"] == (q.question if exact else q.paraphrased_question) and row["answer"] == q.answer
        assert row["alpha"] == (0.25 if exact else 0.5) and row["tau"] == 0.9
        assert (row["es"], row["em"], row["nll"]) == tuple(x[row["item"]] for x in (s.es, s.em, s.nll))


def test_jumps_and_rank_correlations_of_a_curve():
    found = evaluation.monotone({"alpha": [0, 0.5, 1], "ES_exact_retain": [0.9, 0.2, 0.4], "ES_exact_unlearn": [0] * 3})
    assert found == {"jump_exact_retain": pytest.approx(0.7), "spearman_exact_retain": pytest.approx(-0.5),
                     "jump_exact_unlearn": 0}  # fmt: skip


def test_both_searches_are_of_different_kinds(bench):
    """On a curve with a dip they disagree."""
    lm, _, sets, _ = bench
    a = {k: v.clone() for k, v in weights(lm).items()}

    class Dip(evaluation.Along):
        def __call__(self, alpha, kind, part):
            es = np.array([0.0 if 0.3 < alpha < 0.8 or alpha > 0.91 else 1.0])
            return metrics.Scores(es, es, es, np.ones(1))

    along = Dip(control.Mixer(lm, a, a), lm, sets)
    for how, alpha, other in (("scan+bisect", 0.91, 0.3), ("bisect", 0.3, 0.91)):
        m, _ = along.calibrate(0.9, how, both=True)
        assert (m["alpha_exact"], m["alpha_perturb_other"]) == pytest.approx((alpha, other), abs=1.1e-3)
