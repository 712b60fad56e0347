"""The contribution against slow references written from the formulas (loops, float64), and its exact consequences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import gpl
from data import Graph, GraphBatch


def graph(n: int, edges: list[tuple[int, int]], positives: set[int] = frozenset()) -> Graph:
    y = torch.tensor([int(k in positives) for k in range(n)])
    edge = torch.tensor(sorted(edges)).t().reshape(2, -1).long()
    return Graph("test", torch.eye(n), y, y.clone(), edge, 0.0, "")


def random_graph(n: int, m: int, seed: int) -> Graph:
    rng = np.random.default_rng(seed)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    chosen = [pairs[k] for k in rng.permutation(len(pairs))[:m]]
    return graph(n, chosen, set(rng.permutation(n)[: n // 2].tolist()))


def reference(edge, weight, start, alpha, steps, clamp=None):
    """E <- alpha E + (1 - alpha) D^-1 A E with dense float64 matrices, both columns, autograd left on."""
    n = len(start)
    a = torch.zeros(n, n, dtype=torch.float64)
    for e, (i, j) in enumerate(edge.t().tolist()):
        a = a.index_put((torch.tensor([i, j]), torch.tensor([j, i])), weight[e].expand(2), accumulate=True)
    degree = a.sum(1)
    belief = torch.stack([1 - start, start], 1)
    for _ in range(steps):
        rows = [a[i] @ belief / degree[i] if degree[i] > 0 else belief[i] for i in range(n)]
        belief = alpha * belief + (1 - alpha) * torch.stack(rows)
        if clamp is not None:
            belief = torch.where(clamp.unsqueeze(1), torch.tensor([1.0, 0.0], dtype=torch.float64), belief)
    return belief


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12), st.integers(0, 30), st.floats(0.05, 0.95), st.integers(1, 6), st.booleans(), st.integers(0, 999)
)
def test_propagation_and_its_gradient_equal_the_dense_reference(n, m, alpha, steps, clamped, seed):
    graphs = [random_graph(n, min(m, n * (n - 1) // 2), seed + s) for s in range(2)]
    batch = GraphBatch(graphs, 2, "cpu")
    rng = torch.Generator().manual_seed(seed)
    weight = (torch.rand(2, batch.E, generator=rng, dtype=torch.float64) * 0.9 + 0.1).requires_grad_(True)
    start = torch.rand(2, n, generator=rng, dtype=torch.float64)
    clamp = torch.rand(2, n, generator=rng) < 0.3 if clamped else None
    head = torch.randn(2, n, generator=rng, dtype=torch.float64)

    ours = gpl.propagate(weight, start, batch, alpha, steps, clamp)
    theirs = torch.stack(
        [
            reference(g.edge, weight[s], start[s], alpha, steps, None if clamp is None else clamp[s])[:, 1]
            for s, g in enumerate(graphs)
        ]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if batch.E:
        (got,) = torch.autograd.grad((ours * head).sum(), weight, retain_graph=True)
        (want,) = torch.autograd.grad((theirs * head).sum(), weight)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_gradient_by_finite_differences():
    batch = GraphBatch([random_graph(7, 10, 3)], 1, "cpu")
    start = torch.rand(1, 7, dtype=torch.float64)
    weight = (torch.rand(1, batch.E, dtype=torch.float64) * 0.8 + 0.1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda w: gpl.propagate(w, start, batch, 0.4, 4), weight)


def test_rows_of_the_reference_keep_sum_one_and_beliefs_stay_in_range():
    g = random_graph(9, 12, 1)
    weight = torch.rand(12, dtype=torch.float64) + 0.1
    belief = reference(g.edge, weight, torch.rand(9, dtype=torch.float64), 0.3, 5)
    torch.testing.assert_close(belief.sum(1), torch.ones(9, dtype=torch.float64))
    ours = gpl.propagate(weight.unsqueeze(0), belief[:, 1].unsqueeze(0), GraphBatch([g], 1, "cpu"), 0.3, 5)
    assert (ours >= 0).all() and (ours <= 1 + 1e-12).all()


def test_equal_neighbours_give_no_gradient():
    # A star whose leaves all believe the same: no leaf's edge can move the centre.
    batch = GraphBatch([graph(5, [(0, k) for k in range(1, 5)])], 1, "cpu")
    weight = torch.rand(1, 4, dtype=torch.float64).add(0.1).requires_grad_(True)
    start = torch.tensor([[0.2, 0.7, 0.7, 0.7, 0.7]], dtype=torch.float64)
    out = gpl.propagate(weight, start, batch, 0.5, 1)
    (g,) = torch.autograd.grad(out[0, 0], weight)
    assert g.abs().max() < 1e-12


def test_one_step_gradient_points_away_from_the_more_negative_neighbours():
    batch = GraphBatch([graph(4, [(0, 1), (0, 2), (0, 3)])], 1, "cpu")
    weight = torch.full((1, 3), 0.5, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0.0, 1.0, 0.4, 0.0]], dtype=torch.float64)
    out = gpl.propagate(weight, start, batch, 0.5, 1)
    loss = gpl.lpl(out, torch.tensor([[True, False, False, False]]))
    (g,) = torch.autograd.grad(loss.sum(), weight)
    mean = start[0, 1:].mean()
    assert torch.equal(g[0] > 0, start[0, 1:] > mean)
    # Scale-free in the row of node 0, the only one the loss looks at: sum_j M_0j dL/dM_0j = 0.
    assert abs((weight * g).sum().item()) < 1e-12


def test_one_weight_serves_both_directions():
    g = random_graph(6, 8, 5)
    batch = GraphBatch([g], 1, "cpu")
    values = batch.values(torch.arange(8.0).unsqueeze(0))
    dense = torch.sparse_csr_tensor(batch.crow, batch.col, values, (6, 6)).to_dense()
    assert torch.equal(dense, dense.t())
    assert torch.equal(values, values[batch.reverse])
    for e, (i, j) in enumerate(g.edge.t().tolist()):
        assert dense[i, j] == e


def test_any_constant_start_of_the_unlabelled_gives_the_same_mask():
    """Why there is no option for it: E is linear in its start."""
    g = random_graph(12, 25, 4)
    batch = GraphBatch([g], 1, "cpu")
    p = (g.y == 1).unsqueeze(0)
    assert gpl.start_belief(p).tolist() == [[0.0 if k else 1.0 for k in g.y.tolist()]]

    def gradient(constant: float) -> torch.Tensor:
        weight = torch.full((1, batch.E), 0.7, dtype=torch.float64, requires_grad=True)
        out = gpl.propagate(weight, constant * gpl.start_belief(p).double(), batch, 0.5, 3)
        return torch.autograd.grad(gpl.lpl(out, p).sum(), weight)[0]

    assert gradient(1.0).abs().max() > 1e-3
    torch.testing.assert_close(gradient(0.4), gradient(1.0), rtol=1e-9, atol=1e-12)


def test_posterior_start_is_the_negative_share_and_labelled_positives_are_certain():
    start = gpl.start_belief(torch.tensor([[True, False]]), torch.tensor([[0.2, 0.9]]))
    torch.testing.assert_close(start, torch.tensor([[0.0, 0.1]]))


def test_losses_against_loops():
    rng = np.random.default_rng(0)
    negative = torch.from_numpy(rng.random((2, 8)))
    p, s = torch.from_numpy(rng.random((2, 8)) < 0.4), torch.from_numpy(rng.random((2, 8)) < 0.5)
    for k in range(2):
        pos = [negative[k, i].item() for i in range(8) if p[k, i]]
        neg = [negative[k, i].item() for i in range(8) if s[k, i]]
        log = sum(math.log(v) for v in pos) / len(pos)
        ce = sum(-math.log(1 - v) for v in pos) / len(pos)
        assert gpl.lpl(negative, p)[k].item() == pytest.approx(log, rel=1e-9)
        assert gpl.lpl(negative, p, "ce")[k].item() == pytest.approx(ce, rel=1e-9)
        joint = log + 0.3 * sum(math.log(1 - v) for v in neg) / len(neg)
        assert gpl.lpl_joint(negative, p, s, weight=0.3)[k].item() == pytest.approx(joint, rel=1e-9)


def test_floor_keeps_loss_and_gradient_finite():
    negative = torch.tensor([[0.0, 1.0]], requires_grad=True)
    for form in ("log", "ce"):
        loss = gpl.lpl(negative, torch.tensor([[True, True]]), form)
        (g,) = torch.autograd.grad(loss.sum(), negative)
        assert torch.isfinite(loss).all() and torch.isfinite(g).all()
    assert gpl.lpl(negative, torch.zeros(1, 2, dtype=torch.bool)).item() == 0.0  # an empty group


@pytest.mark.parametrize("reduction", ["set", "all"])
def test_two_set_loss_against_loops(reduction):
    rng = np.random.default_rng(1)
    z = torch.from_numpy(rng.normal(size=(1, 9)))
    p = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 1, 0]]).bool()
    n = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 0, 0]]).bool()
    plus = [-math.log(1 / (1 + math.exp(-v))) for v in z[0][p[0]].tolist()]
    minus = [-math.log(1 - 1 / (1 + math.exp(-v))) for v in z[0][n[0]].tolist()]
    want = sum(plus) / 3 + sum(minus) / 4 if reduction == "set" else (sum(plus) + sum(minus)) / 7
    assert gpl.two_set_loss(z, p, n, reduction).item() == pytest.approx(want, rel=1e-9)


def test_selection_takes_the_floor_and_breaks_ties_by_node_id():
    posterior = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.1, 0.99]])
    unlabelled = torch.tensor([[True, True, True, True, True, False]])
    chosen = gpl.select(posterior, unlabelled, torch.tensor([0.59]))  # floor(0.59 * 5) = 2
    assert chosen.tolist() == [[True, True, False, False, False, False]]
    assert gpl.select(posterior, unlabelled, torch.tensor([0.6])).sum() == 3  # 0.6 * 5 is 3, also in floating point
    assert gpl.select(posterior, unlabelled, torch.tensor([0.0])).sum() == 0
    for n in (7, 1000, 6618):  # a float32 prior of k/n picks k nodes, not k - 1
        scores, everyone = torch.rand(n, n if n < 100 else 1).t().contiguous(), torch.ones(1, n, dtype=torch.bool)
        for k in range(0, n, max(1, n // 50)):
            assert gpl.select(scores[:1], everyone, torch.tensor([k / n])).sum() == k
    assert torch.equal(gpl.select(posterior, unlabelled, torch.tensor([1.0])), unlabelled)


@pytest.mark.parametrize("kind", ["clamp", "sigmoid", "exp"])
def test_mask_starts_at_one_and_stays_positive_and_bounded(kind):
    raw = gpl.mask_start((2, 5), kind, torch.device("cpu"))
    start = gpl.mask_of(raw, kind)
    assert (start == 1).all() if kind != "sigmoid" else (start > 0.98).all()
    for push in (-50.0, 50.0):
        w = gpl.mask_of(gpl.project(raw + push, kind), kind)
        assert (w > 0).all() and (w <= 1).all()


def test_inner_problem_is_adam_with_projection_and_stops_seed_by_seed():
    target = torch.tensor([[0.5, 0.9], [1.0, 1.0]])  # the second seed starts at its optimum

    def loss_of(w):
        return ((w - target) ** 2).sum(-1)

    raw = torch.ones(2, 2)
    got, state, _ = gpl.learn_mask(raw, gpl.adam_start(raw), loss_of, "clamp", 20, 0.05, "adam")
    w = torch.ones(2, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.05)
    for _ in range(20):
        adam.zero_grad()
        ((w - target[0]) ** 2).sum().backward()
        adam.step()
        w.data.clamp_(gpl.MASK_MIN, 1.0)
    torch.testing.assert_close(got[0], w.detach(), rtol=1e-5, atol=1e-6)
    # Its loss does not change between the first and the second look: one step was taken, then it was frozen.
    assert state[2].squeeze(-1).tolist() == [20.0, 1.0] and torch.equal(got[1], torch.ones(2))


def test_plain_inner_steps_follow_the_gradient_and_the_projection():
    target = torch.tensor([[0.5, 0.9, 3.0]])
    raw = torch.ones(1, 3)
    got, _, loss = gpl.learn_mask(
        raw, gpl.adam_start(raw), lambda w: ((w - target) ** 2).sum(-1), "clamp", 3, 0.1, "sgd"
    )
    w = raw[0].clone()
    for _ in range(3):
        before = ((w - target[0]) ** 2).sum()
        w = (w - 0.1 * 2 * (w - target[0])).clamp(gpl.MASK_MIN, 1.0)
    torch.testing.assert_close(got[0], w)
    torch.testing.assert_close(loss[0], before)
    assert got[0, 2] == 1.0  # pulled beyond the bound, and held there


def solved(g: Graph, known: torch.Tensor, steps: int, oracle: bool = False) -> tuple[torch.Tensor, float, float]:
    """Mask [E] after `steps` inner steps from one, and the loss before and after; Eq. 6, or Eq. 9 with true labels."""
    batch, p = GraphBatch([g], 1, "cpu"), known.unsqueeze(0)
    start, losses = gpl.start_belief(p), []

    def loss_of(w):
        out = gpl.propagate(w, start, batch, 0.5, 5)
        losses.append(gpl.lpl_joint(out, p, ~p) if oracle else gpl.lpl(out, p))
        return losses[-1]

    raw = gpl.mask_start((1, batch.E), "clamp", batch.device)
    tied = p.sum(-1, keepdim=True)
    raw, _, _ = gpl.learn_mask(raw, gpl.adam_start(raw), loss_of, "clamp", steps, 0.3, tied=tied)
    return raw[0], losses[0].item(), losses[-1].item()


def weighted_h(g: Graph, weight: torch.Tensor) -> float:
    differ = g.y[g.edge[0]] != g.y[g.edge[1]]
    return (weight * differ).sum().item() / weight.sum().item()


@pytest.mark.parametrize("n", [200, 20_000])
def test_with_oracle_labels_the_mask_halves_heterophily_at_any_size(n):
    g = data.synthetic(0, 0.3, n=n)
    weight, before, after = solved(g, g.y == 1, 12, oracle=True)
    assert after < before and weighted_h(g, weight) < g.h_binary / 2


def test_the_mask_does_not_depend_on_the_size_of_the_graph():
    """Thirty copies of a graph side by side: every copy gets the weights that the graph gets alone."""
    g = random_graph(20, 40, 7)
    offsets = torch.arange(30).repeat_interleave(40) * 20
    many = Graph("many", torch.eye(600), g.y.repeat(30), g.y.repeat(30), g.edge.repeat(1, 30) + offsets, 0.0, "")
    alone, _, _ = solved(g, g.y == 1, 12)
    together, _, _ = solved(many, many.y == 1, 12)
    assert (alone - 1).abs().max() > 0.2
    torch.testing.assert_close(together.view(30, 40), alone.expand(30, 40), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("h, lower", [(0.3, True), (0.7, False)])
def test_theorem_4_2_holds_at_low_heterophily_and_not_at_high(h, half, lower):
    """A mask that lowers P(negative) of known positives lowers h of the weighted graph, says Theorem 4.2. True at
    h = 0.3, with all positives known and with half of them. At h = 0.7 the same loss raises h, even with all known: a
    positive has hardly any positive neighbour, so its belief is kept clean by negatives that face positives only, that
    is by keeping edges between the classes and cutting those inside the negative one."""
    g = data.synthetic(0, h, n=200)
    known = data.pu_split(g.y, 0.5, 0, 0, 0).labelled if half else g.y == 1
    weight, before, after = solved(g, known, 100)
    assert after < before
    assert weighted_h(g, weight) < g.h_binary - 0.05 if lower else weighted_h(g, weight) > g.h_binary + 0.05


def test_with_oracle_labels_heterophily_falls_at_high_heterophily_too():
    g = data.synthetic(0, 0.7, n=200)
    weight, before, after = solved(g, g.y == 1, 100, oracle=True)
    assert after < before and weighted_h(g, weight) < g.h_binary / 2


def test_inner_loop_is_left_when_every_seed_has_stopped():
    calls = []

    def loss_of(w):
        calls.append(1)
        return (w * 0).sum(-1) + 1

    raw = torch.ones(2, 3)
    gpl.learn_mask(raw, gpl.adam_start(raw), loss_of, "clamp", 500, 0.1)
    assert len(calls) == 10


@pytest.mark.parametrize("kind", ["constant", "random", "ideal"])
def test_fixed_masks(kind):
    g = data.synthetic(0, 0.5, n=200)
    batch = GraphBatch([g], 2, "cpu")
    mask = gpl.fixed_mask(batch, kind, 0.03, [0, 1])
    assert mask.shape == (2, batch.E) and (mask >= gpl.MASK_MIN).all() and (mask <= 1).all()
    if kind == "constant":
        assert (mask == 0.03).all()
    elif kind == "random":
        assert 0.7 < (mask[0] == gpl.MASK_MIN).float().mean() < 0.9 and not torch.equal(mask[0], mask[1])
        assert torch.equal(mask[1:], gpl.fixed_mask(GraphBatch([g], 1, "cpu"), kind, 0.03, [1]))
    else:
        assert weighted_h(g, mask[0]) < 0.001


def test_propagation_refuses_impossible_constants():
    batch = GraphBatch([graph(2, [(0, 1)])], 1, "cpu")
    for alpha, steps in ((0.0, 1), (1.0, 1), (0.5, 0)):
        with pytest.raises(ValueError):
            gpl.propagate(torch.ones(1, 1), torch.ones(1, 2), batch, alpha, steps)
