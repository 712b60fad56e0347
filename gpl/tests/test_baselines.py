"""Compared methods against independent references."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import shortest_path
from test_gpl import graph, random_graph
from torch.nn import functional as F

import baselines
from data import GraphBatch
from methods import GRAB
from train import Settings, Trainer


def dense(g, weight=None) -> torch.Tensor:
    a = torch.zeros(len(g.y), len(g.y))
    a[g.edge[0], g.edge[1]] = torch.ones(g.edge.shape[1]) if weight is None else weight
    return a + a.t()


# ----------------------------------------------------------------------------------------------------------------- nnPU


@pytest.mark.parametrize("prior", [0.1, 0.9])
def test_nnpu_value_and_gradient_against_loops(prior):
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(1, 10)) + np.array([2.0] * 4 + [0.0] * 6), requires_grad=True)
    p = torch.tensor([[True] * 4 + [False] * 6])
    objective, risk = baselines.nnpu_loss(z, p, ~p, torch.tensor([prior]), gamma=0.7, beta=0.01)

    def sigmoid(v):
        return 1 / (1 + math.exp(-v))

    zp, zu = z[0, :4].tolist(), z[0, 4:].tolist()
    r_plus = prior * sum(sigmoid(-v) for v in zp) / 4
    r_minus = sum(sigmoid(v) for v in zu) / 6 - prior * sum(sigmoid(v) for v in zp) / 4
    assert (r_minus < -0.01) == (prior == 0.9)  # both branches are seen
    (g,) = torch.autograd.grad(objective.sum(), z)
    d = [sigmoid(v) * (1 - sigmoid(v)) for v in zp + zu]
    if r_minus < -0.01:  # the value is R+ - beta, the gradient that of -gamma R-
        assert risk.item() == pytest.approx(r_plus - 0.01)
        want = [0.7 * prior * x / 4 for x in d[:4]] + [-0.7 * x / 6 for x in d[4:]]
    else:
        assert risk.item() == pytest.approx(r_plus + r_minus)
        want = [-2 * prior * x / 4 for x in d[:4]] + [x / 6 for x in d[4:]]
    assert g[0].tolist() == pytest.approx(want)


def test_cvir_drops_the_most_positive_share():
    posterior = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.7]])
    u = torch.tensor([[False, True, True, True, True]])
    assert baselines.cvir_negatives(posterior, u, torch.tensor([0.5])).tolist() == [[False, True, False, True, False]]


# ----------------------------------------------------------------------------------------------------------------- GRAB


def marginals_by_enumeration(g, prior_logit, edge):
    """Exact marginals of the pairwise field, by summing over all labellings."""
    n = len(g.y)
    total = np.zeros(n)
    norm = 0.0
    for labels in itertools.product((0, 1), repeat=n):
        weight = math.exp(sum(prior_logit[i] for i in range(n) if labels[i]))
        for i, j in g.edge.t().tolist():
            weight *= edge / 2 if labels[i] == labels[j] else (1 - edge) / 2
        norm += weight
        total += weight * np.array(labels)
    return total / norm


def test_belief_propagation_is_exact_on_trees():
    trees = [graph(6, [(0, 1), (0, 2), (2, 3), (2, 4), (4, 5)]), graph(6, [(0, 1), (1, 2), (2, 3), (3, 4), (0, 5)])]
    batch = GraphBatch(trees, 2, "cpu")
    logit = torch.tensor(np.random.default_rng(0).normal(size=(2, 6)), dtype=torch.float32)
    got = baselines.belief_propagation(batch, logit, 0.8)
    for s, tree in enumerate(trees):
        want = marginals_by_enumeration(tree, logit[s].tolist(), 0.8)
        np.testing.assert_allclose(got[s].numpy(), want, rtol=1e-4, atol=1e-5)


def test_grab_loss_halves_the_unlabelled_part():
    z, p = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[True, False, False]])
    b = torch.tensor([[0.0, 0.3, 1.0]])
    two_class = torch.stack([torch.zeros(3), z[0]], 1).log_softmax(1)  # (negative, positive)
    ce_p = -two_class[0, 1]
    expected = -(b[0, 1:] * two_class[1:, 1] + (1 - b[0, 1:]) * two_class[1:, 0])
    want = ce_p + expected.sum() / (2 * 2)  # mean over nodes x classes
    assert baselines.grab_loss(z, p, ~p, b).item() == pytest.approx(want.item(), rel=1e-6)


def test_grab_keeps_the_round_of_the_lowest_loss_and_stops_after_two_worse_ones():
    s = Settings(method="grab", seeds=(0, 1), dataset="karate", grab_epochs=6, grab_rounds=9)
    s.check()
    t = Trainer(s, torch.device("cpu"))
    method: GRAB = t.method
    history: list[list[tuple[float, dict]]] = [[], []]  # a seed: per round its lowest loss and the weights before it

    def close(seen):
        for k in range(2):
            history[k].append(min(((loss[k].item(), state) for loss, state in seen), key=lambda pair: pair[0]))

    seen, at_stop = [], {}
    for epoch in range(method.epochs):
        if epoch and epoch % 6 == 0:
            close(seen)
            seen = []
        method.begin(epoch, t)
        for k in range(2):
            if method.bad[k] >= 2:
                at_stop.setdefault(k, len(history[k]))
        if method.done:
            break
        t.model.train()
        state = {n: v.clone() for n, v in t.model.state_dict().items()}
        loss = method.loss(t.model)
        seen.append((loss.detach(), state))
        t.optimizer.zero_grad()
        loss.sum().backward()
        t.optimizer.step()
    else:
        close(seen)
    method.end(t)
    for k in range(2):
        rounds = history[k][: at_stop.get(k, len(history[k]))]
        lowest, state = min(rounds, key=lambda pair: pair[0])
        assert method.lowest[k].item() == lowest
        assert all(torch.equal(v[k], t.model.state_dict()[n][k]) for n, v in state.items())
        if k in at_stop:  # the last two rounds were no improvement, and never two in a row before
            best_before = min(loss for loss, _ in rounds[:-2])
            assert min(loss for loss, _ in rounds[-2:]) >= best_before


# --------------------------------------------------------------------------------------------------------------- PU-GNN


def test_near_nodes_equal_shortest_paths():
    g = random_graph(25, 28, 2)
    p = torch.zeros(1, 25, dtype=torch.bool)
    p[0, [0, 7]] = True
    distance = shortest_path(dense(g).numpy(), unweighted=True, indices=[0, 7]).min(0)
    for delta in (1, 3):
        near = baselines.near_nodes(GraphBatch([g], 1, "cpu"), p, delta)
        assert near[0].tolist() == (distance <= delta).tolist()


def test_pugnn_loss_matches_averages_and_ignores_empty_parts():
    q = torch.tensor([[0.9, 0.5, 0.7, 0.2]], requires_grad=True)
    p, near, far = (torch.tensor([m]).bool() for m in ([1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]))
    a, b = torch.tensor([0.6]), torch.tensor([0.3])
    want = 2 * 0.9 * abs(0.9 - 1) + abs(0.6 - 0.6) + abs(0.2 - 0.3)
    assert baselines.pugnn_loss(q, p, near, far, a, b).item() == pytest.approx(want, abs=1e-6)
    none = torch.zeros_like(far)
    assert baselines.pugnn_loss(q, p, near, none, a, b).item() == pytest.approx(want - 0.1, abs=1e-6)


@pytest.mark.parametrize("per_edge", [1, 40])
def test_negative_samples_both_ways(per_edge):
    """Counted and sparse pairs give the loss and gradient of the plain double loop; no drawn pair is an edge."""
    g = random_graph(20, 30, 3)
    batch = GraphBatch([g], 1, "cpu")
    sparse = baselines.NegativeSamples(batch, [5], per_edge, dense=False)
    kept = sparse.pairs[0]
    pairs = []
    for i in range(20):
        for e in range(int(kept.crow[i]), int(kept.crow[i + 1])):
            pairs += [(i, int(kept.col[e]))] * int(kept.counts[e])
    assert len(pairs) == sparse.total[0] == 2 * 30 * per_edge
    adjacency = dense(g)
    assert all(adjacency[i, k] == 0 and i != k for i, k in pairs)
    degree = adjacency.sum(1)
    assert [sum(i == node for i, _ in pairs) for node in range(20)] == [int(d) * per_edge for d in degree]
    z = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    plain = sum(torch.sigmoid(z[0, i] @ z[0, k]) ** 2 for i, k in pairs) / len(pairs)
    want = torch.autograd.grad(plain, z)[0]
    for sample in (sparse, baselines.NegativeSamples(batch, [5], per_edge, dense=True)):
        loss = sample.loss(z)
        torch.testing.assert_close(loss[0], plain)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), z)[0], want)


def test_counted_pairs_over_several_row_blocks():
    """More rows than a block holds: the blocks must meet without a gap or an overlap."""
    z = torch.randn(700, 3, dtype=torch.float64, requires_grad=True)
    counts = torch.randint(3, (700, 700)).triu(1).to(torch.int16)
    total = baselines._CountedPairs.apply(z, counts)
    plain = ((z @ z.t()).sigmoid().square() * counts).sum()
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(torch.autograd.grad(total, z)[0], torch.autograd.grad(plain, z)[0])


def test_negatives_are_drawn_block_by_block(monkeypatch):
    g = random_graph(30, 40, 6)
    monkeypatch.setattr(baselines, "BLOCK", 7)
    kept = baselines.NegativeSamples(GraphBatch([g], 1, "cpu"), [1], 5, dense=False).pairs[0]
    per_row = [int(kept.counts[kept.crow[i] : kept.crow[i + 1]].sum()) for i in range(30)]
    adjacency = dense(g)
    assert per_row == [int(d) * 5 for d in adjacency.sum(1)]
    row = torch.repeat_interleave(torch.arange(30), kept.crow.diff().long())
    assert (adjacency[row, kept.col.long()] == 0).all() and (row != kept.col).all()


@pytest.mark.parametrize("as_table", [True, False])
def test_a_node_joined_to_all_others_has_no_negatives(as_table):
    star = graph(5, [(0, k) for k in range(1, 5)])
    sample = baselines.NegativeSamples(GraphBatch([star], 1, "cpu"), [0], 3, dense=as_table)
    assert sample.total == [4 * 3]  # only the leaves draw
    if as_table:
        assert int(sample.pairs[0][0].sum()) == 0 and int(sample.pairs[0].sum()) == 12
    else:
        assert int(sample.pairs[0].crow[1]) == 0 and not (sample.pairs[0].col == 0).any()


def test_structure_loss_of_joined_nodes():
    g = graph(4, [(0, 1)])
    batch = GraphBatch([g], 1, "cpu")
    z = torch.randn(1, 4, 3)
    sample = baselines.NegativeSamples(batch, [0], 2)
    want = (torch.sigmoid(z[0, 0] @ z[0, 1]) - 1) ** 2 + sample.loss(z)[0]
    torch.testing.assert_close(baselines.structure_loss(z, batch, sample)[0], want)


# ---------------------------------------------------------------------------------------------------------------- LSDAN


def test_hop_neighbours_are_the_pattern_of_powers():
    g = random_graph(15, 18, 4)
    a = dense(g)
    for copies in ([g], [g, random_graph(15, 18, 5)]):
        lists = baselines.hop_neighbours(GraphBatch(copies, 2, "cpu"), 3, limit=15)
        for k, (place, filled) in enumerate(lists, 1):
            walks = torch.linalg.matrix_power(a, k) > 0
            for i in range(15):
                assert set(place[i][filled[i]].tolist()) == set(walks[i].nonzero().squeeze(1).tolist())
            assert (place[15:][filled[15:]] >= 15).all()  # the second seed points into its own block


def test_hop_neighbours_respect_the_limit():
    (place, filled), *_ = baselines.hop_neighbours(GraphBatch([random_graph(15, 60, 4)], 1, "cpu"), 1, limit=3)
    assert place.shape == (15, 3) and filled.all()


def test_csr_forms_of_gather_and_weighted_sum_have_the_gradients_of_the_plain_ones():
    place = torch.randint(6, (6, 4), generator=torch.Generator().manual_seed(0))
    hop = baselines.Hop(place, torch.ones_like(place, dtype=torch.bool))
    x, w, h = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6,), (6, 4), (6, 3)))
    assert torch.autograd.gradcheck(lambda x: baselines._Gather.apply(x, hop), x)
    assert torch.autograd.gradcheck(lambda w, h: baselines._WeightedSum.apply(w, h, hop), (w, h))
    torch.testing.assert_close(baselines._WeightedSum.apply(w, h, hop), (w.unsqueeze(-1) * h[place]).sum(1))


def test_lsdan_attention_against_loops():
    g = random_graph(9, 12, 6)
    batch = GraphBatch([g], 1, "cpu")
    model = baselines.LSDAN(batch, 4, 0.0, [0]).eval()
    h = (g.x @ model.base.w1[0] + model.base.b1[0]).detach()
    want = []
    for i in range(9):
        per_hop = [h[i]]
        for one, a_source, a_target in zip(model.lists, model.source, model.target, strict=True):
            neighbours = one.place[i][one.filled[i]].tolist()
            e = [F.leaky_relu(h[i] @ a_target[0, :, 0] + h[j] @ a_source[0, :, 0], 0.2) for j in neighbours]
            weights = torch.softmax(torch.stack(e), 0) if e else []
            per_hop.append(sum((w * h[j] for w, j in zip(weights, neighbours, strict=True)), torch.zeros(4)))
        hop = torch.softmax(torch.stack([F.leaky_relu(z @ model.hop[0, :, 0], 0.2) for z in per_hop]), 0)
        z = sum(w * v for w, v in zip(hop, per_hop, strict=True)).relu()
        want.append((z @ model.base.w2[0] + model.base.b2[0]).reshape(()))
    torch.testing.assert_close(model()[0], torch.stack(want), rtol=1e-4, atol=1e-5)
