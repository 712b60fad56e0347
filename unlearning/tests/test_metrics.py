"""Extraction strength by one pass equals its definition; the other metrics equal their formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from waits import Waits

import control
import data
import metrics
import models

CPU = torch.device("cpu")


def literal(table, prompt, answer):
    """The definition with a Markov model: table[t] is the greedy successor of token t."""
    n = len(answer)
    for k in range(n + 1):
        made, last = [], (prompt + answer[:k])[-1]
        for _ in range(n - k):
            last = table[last]
            made.append(last)
        if made == answer[k:]:
            return 1 - k / n
    raise AssertionError


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_one_pass_equals_the_definition_for_markov_models(draw):
    table = draw.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    answers = draw.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4))
    prompt = [draw.draw(st.integers(0, 3))]
    correct, row, inside = [], [], []
    for b, answer in enumerate(answers):
        text = prompt + answer
        correct += [table[text[t]] == text[t + 1] for t in range(len(answer))] + [draw.draw(st.booleans())]
        row += [b] * (len(answer) + 1)
        inside += [True] * len(answer) + [False]  # the end token never counts
    es = control.strength(torch.tensor(correct), torch.tensor(row), torch.tensor(inside), len(answers))
    assert es.tolist() == pytest.approx([literal(table, prompt, a) for a in answers])


@given(st.integers(0, 10**6), st.floats(0.5, 30.0))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_pass_equals_generate_and_search_on_random_networks(seed, sharpness):
    """A random Llama; answers partly its own greedy text, so that values between 0 and 1 occur."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    lm = models.LM(LlamaForCausalLM(config)).eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(sharpness)
    g = torch.Generator().manual_seed(seed)
    items = []
    for k in range(4):
        prompt = torch.randint(2, 11, (2 + k % 2,), generator=g).tolist()
        wrong = int(torch.randint(0, 5, (1,), generator=g))
        answer: list[int] = torch.randint(2, 11, (wrong,), generator=g).tolist()
        while len(answer) < 6:
            with torch.no_grad():
                z = lm(torch.tensor([prompt + answer]), torch.ones(1, len(prompt + answer), dtype=torch.long))
            token = int(z[0, -1].argmax())
            answer.append(token if token != 1 else 2)
        items.append(data.Encoded((*prompt, *answer, 1), len(prompt), 6))
    quick = metrics.score_items(lm, items, 1, CPU).es
    slow = metrics.extraction_strength_literal(lm, items, 1, CPU)
    np.testing.assert_allclose(quick, slow, atol=1e-9)


def test_ends_of_extraction_strength():
    def es(correct):
        n = len(correct)
        ones = torch.ones(n, dtype=torch.bool)
        return float(control.strength(torch.tensor(correct), torch.zeros(n, dtype=torch.long), ones, 1))

    assert es([True] * 4) == 1 and es([False] * 4) == 0
    assert es([True, True, True, False]) == 0  # the last token is missed: only the empty rest fits
    assert es([False, True, True, True]) == pytest.approx(0.75)
    assert es([False]) == 0 and es([True]) == 1  # one-token answers: wrong is 0, not 1 / n
    alone = torch.tensor([True, False]), torch.tensor([0, 1]), torch.tensor([False, True])  # an end token and no answer
    assert control.strength(*alone, 2).isnan().tolist() == [True, False]


def encoded(chat, corpus, n=6):
    return [data.encode(chat, q.question, q.answer) for q in corpus.full[:n]]


def test_scores_equal_a_loop_over_items(tiny, corpus):
    lm, chat = tiny
    items = encoded(chat, corpus)
    found = metrics.score_items(lm, items, chat.pad, CPU)
    for i, e in enumerate(items):
        ids = torch.tensor([e.ids])
        with torch.no_grad():
            logp = torch.log_softmax(lm.hf(ids).logits[0].double(), -1)
        nll = [-float(logp[t - 1, e.ids[t]]) for t in range(e.start, len(e.ids))]
        right = [int(logp[t - 1].argmax()) == e.ids[t] for t in range(e.start, e.start + e.n)]
        assert found.nll_sum[i] == pytest.approx(sum(nll), rel=1e-4)
        assert found.tokens[i] == len(nll) == e.n + 1  # the end token counts for losses
        assert found.em[i] == pytest.approx(sum(right) / e.n)
        assert found.ppl[i] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
        assert found.probability[i] == pytest.approx(1 / found.ppl[i])


def test_scores_do_not_depend_on_batches(tiny, corpus):
    lm, chat = tiny
    items = encoded(chat, corpus, 20)
    one = metrics.score(lm, metrics.prepare(items, chat.pad, CPU, tokens=1))
    many = metrics.score(lm, metrics.prepare(items, chat.pad, CPU, tokens=10**6))
    assert len(metrics.prepare(items, chat.pad, CPU, tokens=1)) == 20
    np.testing.assert_allclose(one.nll, many.nll, rtol=1e-4)
    np.testing.assert_array_equal(one.es, many.es)


def test_evaluation_is_in_the_precision_of_the_run(tiny, corpus):
    """`mixed` rounds evaluation like training, and a mixture that is set afterwards is not scored by old weights."""
    lm, chat = tiny
    items, whole = encoded(chat, corpus), {}
    for mixed in (False, True):
        lm.mixed = mixed
        whole[mixed] = metrics.score_items(lm, items, chat.pad, CPU).nll
    assert not np.array_equal(whole[False], whole[True])
    np.testing.assert_allclose(whole[False], whole[True], rtol=2e-2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (_, b), *rest = metrics.prepare(items, chat.pad, CPU)
        assert not rest
        nll = torch.nn.functional.cross_entropy(lm(b.ids, b.attend, b.places).float(), b.target, reduction="none")
    total = torch.zeros(b.size).index_add(0, b.row, nll)
    np.testing.assert_allclose(np.sort(total.numpy()), np.sort(whole[True] * [e.n + 1 for e in items]), rtol=1e-6)
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(0)
    assert metrics.score_items(lm, items, chat.pad, CPU).nll == pytest.approx(math.log(len(chat.tokenizer)), rel=1e-3)


def test_scoring_a_set_reads_the_device_once(tiny, corpus):
    """Between its batches nothing is read back; what is read at the end is not seen here, because it is a copy."""
    lm, chat = tiny
    batches = metrics.prepare(encoded(chat, corpus, 20), chat.pad, CPU, tokens=64)
    with Waits() as found:
        metrics.score(lm, batches)
    # The library looks once a pass at the mask of a batch without padding.
    assert len(batches) > 3 and len(found.places) <= 2 * sum(not b.padded for _, b in batches)
    assert all(place.startswith("models.py") for place in found.places)


def test_a_model_with_nan_gets_no_score(tiny, corpus):
    lm, chat = tiny
    with torch.no_grad():
        next(lm.parameters()).fill_(math.nan)
    with pytest.raises(metrics.UserError, match="not finite"):
        metrics.score_items(lm, encoded(chat, corpus), chat.pad, CPU)


def test_a_collapsed_model_gets_finite_numbers(tiny, corpus):
    """After gradient ascent losses are huge: perplexity is held, nothing overflows."""
    s = metrics.Scores(np.zeros(1), np.zeros(1), np.array([5000.0]), np.array([4.0]))
    assert np.isfinite(s.ppl).all() and s.probability[0] == 0
    t = metrics.Truth(np.array([900.0]), np.array([[1.0, 2.0]]))
    assert np.isfinite(t.ratio).all() and np.isfinite(t.utility).all() and t.utility[0] == 0


def test_generation_is_greedy_and_ends(tiny, corpus):
    """Batched generation with left padding equals the greedy loop of a single prompt."""
    lm, chat = tiny
    prompts = [list(e.ids[: e.start]) for e in encoded(chat, corpus, 5)]
    made = metrics.generate(lm, prompts, [4, 3, 4, 2, 4], chat.end, CPU, batch=3)
    for prompt, most, ids in zip(prompts, [4, 3, 4, 2, 4], made, strict=True):
        want: list[int] = []
        while len(want) < most:
            with torch.no_grad():
                token = int(lm.hf(torch.tensor([prompt + want])).logits[0, -1].argmax())
            if token == chat.end:
                break
            want.append(token)
        assert ids == want


def test_rouge_is_recall():
    assert metrics.rouge_l(["the cat sat down there"], ["the cat sat"])[0] == 1.0
    assert metrics.rouge_l(["cats"], ["the cat"])[0] == 0.5  # stemmed
    assert metrics.rouge_l([""], ["the cat"])[0] == 0.0


def test_truth_ratio_forms():
    """Quality: geometric mean of the wrong, right over wrong. Utility: arithmetic mean, 1 - wrong / right, at least
    0."""
    t = metrics.Truth(np.array([0.5, 2.0]), np.array([[1.0, 3.0], [0.1, 0.2]]))
    geometric = [math.exp(-0.5) / math.sqrt(math.exp(-1) * math.exp(-3)), math.exp(-2) / math.exp(-0.15)]
    assert t.ratio.tolist() == pytest.approx(geometric)
    arithmetic = [1 - (math.exp(-1) + math.exp(-3)) / 2 / math.exp(-0.5), 0.0]
    assert t.utility.tolist() == pytest.approx(arithmetic)
    assert t.utility_geometric.tolist() == pytest.approx([max(0, 1 - 1 / r) for r in geometric])
    assert t.balanced.tolist() == pytest.approx([min(r, 1 / r) for r in geometric])
    wrong = [(math.exp(-1) + math.exp(-3)) / 2, (math.exp(-0.1) + math.exp(-0.2)) / 2]
    plain = [math.exp(-0.5) / wrong[0], math.exp(-2) / wrong[1]]
    assert t.arithmetic.tolist() == pytest.approx(plain)
    assert t.balanced_arithmetic.tolist() == pytest.approx([min(r, 1 / r) for r in plain])


# Of the log that TOFU's authors publish of Phi-1.5 fine-tuned on all of TOFU (2e-5, weight decay 0.01), real authors 88
# to 97: mean losses of the right answer and of three wrong ones, and what the log itself makes of them.
TOFU_LOG = [  # right, wrong, wrong, wrong, truth_ratio, normalized_gt_loss
    (3.712542, 1.895130, 2.767946, 3.421261, 2.766999, 2.403861),
    (2.595047, 3.310614, 4.034128, 5.061715, 0.214287, 0.593839),
    (1.880598, 3.805055, 3.281605, 3.962001, 0.164921, 0.416773),
    (5.858037, 3.818942, 6.180418, 5.521836, 1.982393, 2.380258),
    (2.139110, 3.464793, 3.894372, 2.055886, 0.368159, 0.926347),
    (3.413631, 6.040680, 4.278709, 3.308275, 0.323381, 0.957209),
    (4.366525, 4.308743, 4.706227, 3.893417, 1.065804, 1.476236),
    (6.849620, 6.737839, 3.915051, 5.990028, 3.676571, 3.148189),
    (3.443425, 5.143523, 4.549006, 2.440014, 0.548397, 1.444859),
    (4.032139, 4.093627, 3.709285, 4.508453, 0.930857, 1.371814),
]


def test_truth_ratio_and_probability_are_those_of_tofus_stored_log():
    """Its ratio is wrong over right with the geometric mean, its probability that of the right among all four."""
    log = np.array(TOFU_LOG)
    right, wrong, ratio, loss = log[:, 0], log[:, 1:4], log[:, 4], log[:, 5]
    t = metrics.Truth(right, wrong)
    np.testing.assert_allclose(1 / t.ratio, ratio, rtol=2e-6)
    np.testing.assert_allclose(-np.log(metrics.probability_among(right, wrong)), loss, rtol=2e-6)
    # The arithmetic form is another one on the same ten items, never below in wrong over right.
    assert (1 / t.arithmetic > ratio).all() and (1 / t.arithmetic - ratio).max() > 1


def test_truth_uses_the_paraphrase_and_every_wrong_answer(tiny, corpus):
    lm, chat = tiny
    rows = corpus.retain_eval[:3]
    t = metrics.truth(lm, chat, rows, CPU)
    assert t.right.shape == (3,) and t.wrong.shape == (3, 5)
    one = data.encode(chat, rows[1].question, rows[1].paraphrased_answer)
    assert t.right[1] == pytest.approx(metrics.score_items(lm, [one], chat.pad, CPU).nll[0], rel=1e-5)
    plain = metrics.truth(lm, chat, corpus.world_facts[:2], CPU)  # no paraphrase: the answer itself
    assert plain.wrong.shape[1] >= 1


def test_model_utility_is_the_harmonic_mean_of_nine():
    rng = np.random.default_rng(0)
    parts = {p: {k: rng.random(4) for k in ("rouge", "probability", "truth")} for p in ("retain", "real", "world")}
    value, nine = metrics.model_utility(parts)
    means = [np.mean(v) for part in parts.values() for v in part.values()]
    assert value == pytest.approx(9 / sum(1 / m for m in means)) and len(nine) == 9
    parts["real"]["rouge"] = np.zeros(4)
    assert metrics.model_utility(parts)[0] == 0  # one that is lost loses all
    with pytest.raises(metrics.UserError, match="nine"):
        metrics.model_utility({"retain": parts["retain"]})


def test_forget_quality_is_the_ks_p_value_and_knows_no_inversion():
    rng = np.random.default_rng(1)
    a, b = (metrics.Truth(rng.normal(1, 0.3, 40), rng.normal(m, 0.3, (40, 5))) for m in (2, 2.3))
    p = metrics.forget_quality(a, b)
    assert p == pytest.approx(stats.ks_2samp(1 / a.ratio, 1 / b.ratio).pvalue)
    assert metrics.forget_quality(a, a) == pytest.approx(1.0) and p < 0.05


def test_probability_among():
    got = metrics.probability_among(np.array([1.0]), np.array([[1.0, 1.0, 1.0]]))
    assert got[0] == pytest.approx(0.25)


def test_eval_items_are_a_fixed_choice(tiny, corpus):
    _, chat = tiny
    a, b = (metrics.Sets(corpus, "forget-small", chat, CPU, 5, 42) for _ in range(2))
    assert a.rows == b.rows and len(a.rows["retain"]) == len(a.rows["unlearn"]) == 5
    assert a.rows != metrics.Sets(corpus, "forget-small", chat, CPU, 5, 43).rows
    whole = metrics.Sets(corpus, "forget-small", chat, CPU)
    assert whole.rows["retain"] == corpus.retain_eval and len(whole.items["perturb", "unlearn"]) == 20
    e, p = whole.items["exact", "retain"][0], whole.items["perturb", "retain"][0]
    assert e.ids[e.start :] == p.ids[p.start :] and e.ids[: e.start] != p.ids[: p.start]  # same answer, other question
