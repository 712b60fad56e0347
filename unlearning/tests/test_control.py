"""Mixing and the search for alpha*: exact ends, exact sums, and what calibration promises for any curve."""

import ast
import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import control
import data
import evaluation
import metrics
import models

CPU = torch.device("cpu")


def ends(lm):
    a = {k: v.clone() for k, v in models.weights(lm).items()}
    g = torch.Generator().manual_seed(5)
    return a, {k: v + torch.randn(v.shape, generator=g) for k, v in a.items()}


def test_ends_are_the_two_models_bit_for_bit(tiny):
    lm, _ = tiny
    a, b = ends(lm)
    mixer = control.Mixer(lm, a, b)
    for alpha, want in ((0.3, None), (1.0, b), (0.7, None), (0.0, a), (1, b), (0, a)):
        mixer.set(alpha)
        assert want is None or all(torch.equal(v, want[k]) for k, v in models.weights(lm).items())


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_mixture_is_elementwise_and_alpha_weighs_the_unlearned(tiny, alpha):
    lm, _ = tiny
    a, b = ends(lm)
    control.Mixer(lm, a, b).set(alpha)
    for k, v in models.weights(lm).items():
        torch.testing.assert_close(
            v.double(), (1 - alpha) * a[k].double() + alpha * b[k].double(), rtol=1e-5, atol=1e-6
        )


def neighbours():
    """A linear map of bf16 weights, and what unlearning makes of it: most weights the same, the others moved by one
    step of the format, as measured after an epoch of unlearning in bf16."""
    torch.manual_seed(0)
    a = nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
    b = copy.deepcopy(a)
    moved = torch.rand(a.weight.shape) < 0.3
    b.weight[moved] = torch.nextafter(a.weight, torch.full_like(a.weight, torch.inf))[moved]
    return a, b, moved


def test_mixing_neighbours_of_bf16_is_no_switch():
    """Rounded to bf16 the mixture jumps at 0.5 from one end to the other; in float32 it goes with alpha, and so does
    what the search finds."""
    a, b, moved = neighbours()
    rounded = {alpha: torch.lerp(a.weight.float(), b.weight.float(), alpha).bfloat16() for alpha in (0.49, 0.51)}
    assert torch.equal(rounded[0.49], a.weight) and torch.equal(rounded[0.51], b.weight)  # the switch
    x = torch.randn(256, 64)
    before, after = (x @ m.weight.float().T for m in (a, b))

    def score(model):
        return 1 - float((model(x) - before).norm() / (after - before).norm())

    found, mixed = control.calibrate(a, b, score, 0.7)
    assert found.alpha == pytest.approx(0.3, abs=2e-3) and mixed.weight.dtype == torch.float32
    assert a.weight.dtype == torch.bfloat16  # the user's models are as they were
    part = (mixed.weight - a.weight.float())[moved] / (b.weight.float() - a.weight.float())[moved]
    torch.testing.assert_close(part, torch.full_like(part, found.alpha), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="mixtures need float32"):
        control.Mixer(a, a.state_dict(), b.state_dict())


def test_other_architectures_and_alphas_are_refused(tiny):
    lm, _ = tiny
    a, b = ends(lm)
    with pytest.raises(ValueError, match="one architecture"):
        control.Mixer(lm, a, dict(list(b.items())[1:]))
    with pytest.raises(ValueError, match="one architecture"):
        control.Mixer(lm, {**a, "more": torch.zeros(1)}, b)
    with pytest.raises(ValueError, match="one architecture"):
        control.Mixer(lm, {k: v[:1] for k, v in a.items()}, b)
    with pytest.raises(ValueError, match="alpha must lie"):
        control.Mixer(lm, a, b).set(1.2)


def test_a_tied_head_may_stand_in_both_ends_under_both_names(tiny):
    """state_dict() of a model with a tied head names the embedding twice, the parameters once."""
    hf = tiny[0].hf
    a = {k: v.clone() for k, v in hf.state_dict().items()}
    assert "lm_head.weight" in a and "lm_head.weight" not in dict(hf.named_parameters())
    b = {k: v + 1 for k, v in a.items()}
    control.Mixer(hf, a, b).set(0.25)
    torch.testing.assert_close(hf.lm_head.weight.detach(), a["lm_head.weight"] + 0.25)
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    with pytest.raises(ValueError, match="one architecture"):  # a head of its own weights is another network
        control.Mixer(hf, a, {**b, "lm_head.weight": b["lm_head.weight"] + 1})


def test_an_end_that_is_a_view_of_the_model_keeps_its_values(tiny):
    """Alpha 0 after alpha 1 is the original, though the reference was given as the model's own tensors."""
    lm, _ = tiny
    a, b = ends(lm)
    mixer = control.Mixer(lm, models.weights(lm), b)
    for alpha, want in ((1.0, b), (0.0, a)):
        mixer.set(alpha)
        assert all(torch.equal(v, want[k]) for k, v in models.weights(lm).items())


def test_extraction_strength_of_any_model_equals_the_one_of_the_tables(tiny, corpus):
    """A user's call: model, tokenizer, texts; padding and batches change nothing."""
    lm, chat = tiny
    template = dataclasses.replace(chat, template="chat")
    rows = corpus.full[:9]
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    items = [data.encode(template, q.question, q.answer) for q in rows]
    batch = data.collate(items, chat.pad, CPU)
    for _ in range(45):  # so that ES is neither 0 nor 1 everywhere
        loss = torch.nn.functional.cross_entropy(lm(batch.ids, batch.mask, batch.places), batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    texts = [q.question for q in rows], [q.answer for q in rows]
    found = [control.extraction_strength(lm.hf, chat.tokenizer, *texts, batch=n) for n in (1, 4, 9)]
    want = metrics.score_items(lm, items, chat.pad, CPU).es
    assert 0 < want.mean() < 1 and len(set(want)) > 2
    for es in found:
        np.testing.assert_array_equal(es.numpy(), want)
    with pytest.raises(ValueError, match="no token"):
        control.extraction_strength(lm.hf, chat.tokenizer, ["Question ?"], [""])
    with pytest.raises(ValueError, match="1 questions and 2 answers"):
        control.extraction_strength(lm.hf, chat.tokenizer, ["Question ?"], ["a", "b"])


def test_the_snippet_of_the_readme(tiny, corpus, capsys):
    text = (Path(control.__file__).parent / "README.md").read_text()
    code = text.split("## In your own code")[1].split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 15
    lm, chat = tiny
    unlearned = copy.deepcopy(lm.hf)
    with torch.no_grad():
        next(unlearned.parameters()).add_(1)
    rows = corpus.full[:4]
    given = {
        f"{part}_{what}s": [getattr(q, what) for q in rows]
        for part in ("retain", "forget")
        for what in ("question", "answer")
    }
    exec(code, {"original": lm.hf, "unlearned": unlearned, "tokenizer": chat.tokenizer, **given})
    assert capsys.readouterr().out.startswith("alpha* 1.000: ES")  # a model that knows nothing: every alpha passes


def imported(node):
    if isinstance(node, ast.Import):
        return [a.name.split(".")[0] for a in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def test_control_stands_alone():
    """The contribution's file can be taken by itself: nothing of this folder, nothing but torch."""
    names = [n for x in ast.walk(ast.parse(Path(control.__file__).read_text())) for n in imported(x)]
    assert "torch" in names and set(names) <= {"copy", "dataclasses", "collections", "typing", "torch"}


# ------------------------------------------------------------------------------------------------------------- search


def falling(center, width=0.1):
    return lambda alpha: 1 / (1 + np.exp((alpha - center) / width))


@pytest.mark.parametrize("how", ["scan+bisect", "bisect"])
@pytest.mark.parametrize("tau", [0.4, 0.9, 0.95])
def test_both_searches_find_the_crossing_of_a_falling_curve(how, tau):
    g = falling(0.5)
    found = control.search(g, tau, how)
    grid = np.linspace(0, 1, 100001)
    want = grid[g(grid) >= tau * g(0.0)].max()
    assert found.alpha <= want + 1e-9 and want - found.alpha <= 1e-3 + 1e-9
    assert found.score >= found.bar and not found.vacuous


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(0.01, 1.0), st.sampled_from(["scan+bisect", "bisect"])
)
@settings(max_examples=200, deadline=None)
def test_alpha_star_always_passes(values, tau, how):
    """Any curve, monotone or not: the mixture that is reported keeps the bar."""
    places = np.linspace(0, 1, len(values))
    found = control.search(lambda a: float(np.interp(a, places, values)), tau, how)
    assert 0 <= found.alpha <= 1 and found.score >= tau * values[0] - 1e-12
    if values[-1] >= tau * values[0]:
        assert found.alpha == 1


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_a_smaller_bar_never_lowers_alpha(one, two):
    g = falling(0.4, 0.2)
    low, high = sorted((one, two))
    assert control.search(g, low).alpha >= control.search(g, high).alpha - 1e-3


def test_scan_finds_a_second_rise_that_bisection_misses():
    """Feasible again near 1 after a dip: the largest such alpha counts."""

    def g(alpha):
        return 0.0 if 0.3 < alpha < 0.8 or alpha > 0.91 else 1.0

    assert control.search(g, 0.9).alpha == pytest.approx(0.91, abs=1.1e-3)
    assert control.search(g, 0.9, "bisect").alpha == pytest.approx(0.3, abs=1.1e-3)


@pytest.mark.parametrize("how", ["scan+bisect", "bisect"])
def test_a_score_exactly_at_the_bar_passes(how):
    """ES is a mean of few values: plateaus at the bar are common."""
    g = lambda alpha: 1.0 if alpha <= 0.2 else 0.5 if alpha <= edge else 0.0  # noqa: E731
    for edge in (0.63, 0.8):  # between two points of the grid, and on one
        assert control.search(g, 0.5, how).alpha == pytest.approx(edge, abs=1.1e-3)


def test_the_scan_halves_only_the_interval_it_found():
    """0.85 is the first point of the grid that passes; five halvings of (0.85, 0.9) reach the tolerance."""
    found = control.search(lambda a: float(a <= 0.87), 0.5, step=0.05, tolerance=2e-3)
    assert 0.868 <= found.alpha <= 0.87
    assert found.evaluations == len([0.0, 1.0, 0.95, 0.9, 0.85]) + 5
    # With steps that do not divide 1 every point counts: 0.65, then 0.3, where alone the bar is kept.
    alone = control.search(lambda a: float(a == 0 or 0.28 <= a <= 0.32), 0.5, step=0.35, tolerance=1e-3)
    assert alone.alpha == pytest.approx(0.32, abs=1.1e-3)


def test_the_original_is_the_answer_when_nothing_else_passes():
    found = control.search(lambda a: 1.0 if a == 0 else 0.0, 0.5, tolerance=0.01)
    assert found.alpha <= 0.01 and control.search(lambda a: 1 - a, 1.0).alpha == 0
    assert control.search(lambda a: 1 - a, 0.5, step=1.0, tolerance=1.0).alpha == 0  # the ends alone


def test_an_original_that_knows_nothing_is_told_apart():
    found = control.search(lambda a: 0.0, 0.9)
    assert found.alpha == 1 and found.vacuous


@pytest.mark.parametrize("tau", [0, -0.1, 1.01, float("nan")])
def test_tau_outside_its_range(tau):
    with pytest.raises(ValueError, match=r"tau must lie in \(0, 1\]"):
        control.search(lambda a: 1.0, tau)


def test_no_point_is_evaluated_twice():
    calls = []

    def g(alpha):
        calls.append(alpha)
        return 1 - alpha

    found = control.search(g, 0.9)
    assert len(calls) == len(set(calls)) == found.evaluations


def test_exact_and_perturb_are_calibrated_apart_and_the_curve_meets_both_ends(tiny, corpus):
    lm, chat = tiny
    a, b = ends(lm)
    rows = corpus.retain_eval + corpus.forget["forget-small"]
    batch = data.collate([data.encode(chat, q.question, q.answer) for q in rows], chat.pad, CPU)
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    for _ in range(60):  # so that ES is not 0 everywhere
        loss = torch.nn.functional.cross_entropy(lm(batch.ids, batch.mask, batch.places), batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a = {k: v.clone() for k, v in models.weights(lm).items()}
    g = torch.Generator().manual_seed(0)
    b = {k: v + 0.3 * v.std() * torch.randn(v.shape, generator=g) for k, v in a.items()}
    sets, mixer = metrics.Sets(corpus, "forget-small", chat, CPU), control.Mixer(lm, a, b)
    mixer.set(0.0)
    along = evaluation.Along(mixer, lm, sets, sets.all_scores(lm))
    curve = along.curve(0.25)
    assert curve["alpha"] == [0, 0.25, 0.5, 0.75, 1]
    for alpha, place in ((0.0, 0), (1.0, -1)):
        mixer.set(alpha)
        for part in metrics.PARTS:
            assert curve[f"ES_exact_{part}"][place] == sets.scores(lm, "exact", part).es.mean()
    found, scores = along.calibrate(0.9, "scan+bisect")
    for kind in metrics.KINDS:
        assert found[f"ES_{kind}_retain"] >= 0.9 * along(0.0, kind, "retain").es.mean() > 0
        mixer.set(found[f"alpha_{kind}"])
        assert sets.scores(lm, kind, "unlearn").es.mean() == found[f"ES_{kind}_unlearn"]
        assert scores[kind, "unlearn"].es.mean() == found[f"ES_{kind}_unlearn"]
    assert found["alpha_exact"] != found["alpha_perturb"]


def test_what_the_search_saw_is_what_the_record_says(tiny, corpus, monkeypatch):
    """Under autocast too, where another layout of the batches turns an argmax: each point is evaluated once, and the
    record's retain score is the very one that passed the bar."""
    lm, chat = tiny
    lm.mixed = True
    a, b = ends(lm)
    sets, calls = metrics.Sets(corpus, "forget-small", chat, CPU), []
    mixer = control.Mixer(lm, a, {k: a[k] + 0.02 * (b[k] - a[k]) for k in a})
    score = metrics.score

    def counted(lm, batches):
        calls.append(id(batches))
        return score(lm, batches)

    monkeypatch.setattr(metrics, "score", counted)
    along = evaluation.Along(mixer, lm, sets)
    along.curve(0.25)
    for tau in (0.9, 0.5):
        found, scores = along.calibrate(tau, "scan+bisect", 0.25, 0.05)
        for kind in metrics.KINDS:
            assert found[f"ES_{kind}_retain"] >= found[f"bar_{kind}"]
            assert along(found[f"alpha_{kind}"], kind, "retain") is scores[kind, "retain"]
    assert len(calls) == len(along.known) and len(set(calls)) == 4  # four sets, one layout each
