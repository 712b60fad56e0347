"""Classifiers against torch_geometric, limits of the knobs, and what must never reach training."""

import pytest
import torch
from test_gpl import graph, random_graph
from torch_geometric.nn import GCNConv

import data
import gpl
import priors
from data import GraphBatch
from methods import CLASSES
from models import Adjacency, Classifier
from train import Settings, Trainer

# ---------------------------------------------------------------------------------------------------------- classifier


def test_gcn_equals_torch_geometric_with_edge_weights_in_value_and_gradient():
    g = random_graph(12, 25, 0)
    batch = GraphBatch([g], 2, "cpu")
    model = Classifier(batch, 5, 0.5, [0, 1]).eval()
    weight = torch.rand(2, batch.E) * 0.9 + 0.1
    logits = model(Adjacency(batch, weight))
    logits.square().sum().backward()
    for s in range(2):
        one, two = GCNConv(12, 5, bias=True), GCNConv(5, 1, bias=True)
        with torch.no_grad():
            one.lin.weight.copy_(model.w1[s].t())
            one.bias.copy_(model.b1[s, 0])
            two.lin.weight.copy_(model.w2[s].t())
            two.bias.copy_(model.b2[s, 0])
        edge, w = torch.cat([g.edge, g.edge.flip(0)], 1), weight[s].repeat(2)
        z = two(one(g.x, edge, w).relu(), edge, w).squeeze(-1)
        torch.testing.assert_close(logits[s], z, rtol=1e-4, atol=1e-5)
        z.square().sum().backward()
        torch.testing.assert_close(model.w1.grad[s], one.lin.weight.grad.t(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(model.b2.grad[s].reshape(-1), two.bias.grad, rtol=1e-3, atol=1e-5)


def test_sparse_and_dense_features_give_the_same_classifier():
    g = random_graph(30, 40, 1)  # one-hot features: sparse storage
    sparse = GraphBatch([g], 2, "cpu")
    thick = GraphBatch([g, g], 2, "cpu")  # a graph a seed: dense storage
    assert sparse.x_t is not None and thick.x_t is None
    a, b = Classifier(sparse, 4, 0.0, [0, 1]), Classifier(thick, 4, 0.0, [0, 1])
    za, zb = a(Adjacency(sparse)), b(Adjacency(thick))
    torch.testing.assert_close(za, zb, rtol=1e-5, atol=1e-6)
    za.square().sum().backward()
    zb.square().sum().backward()
    torch.testing.assert_close(a.w1.grad, b.w1.grad, rtol=1e-4, atol=1e-6)


def test_a_seed_does_not_depend_on_the_others_of_its_batch():
    def losses(seeds):
        s = Settings(seeds=tuple(seeds), dataset="karate", warmup=3, epochs=4, cpe_holdout=0.4)
        s.check()
        t = Trainer(s, torch.device("cpu"))
        for epoch in range(t.method.epochs):
            t.method.begin(epoch, t)
            t.model.train()
            loss = t.method.loss(t.model)
            t.optimizer.zero_grad()
            loss.sum().backward()
            t.optimizer.step()
        return dict(zip(seeds, loss.tolist(), strict=True))

    together = losses([3, 1, 7])
    for seed, value in together.items():
        assert losses([seed])[seed] == pytest.approx(value, rel=1e-4)


def test_dropout_is_off_in_posteriors():
    s = Settings(seeds=(0,), dataset="karate", cpe_holdout=0.4)
    s.check()
    t = Trainer(s, torch.device("cpu"))
    t.model.train()
    assert torch.equal(t.method.posterior(t.model), t.method.posterior(t.model)) and not t.model.training


# ------------------------------------------------------------------------------------------------------ limits of knobs


def trained(**changes) -> torch.Tensor:
    s = Settings(**{**dict(seeds=(0, 1), dataset="karate", warmup=3, epochs=4, cpe_holdout=0.4), **changes})
    s.check()
    t = Trainer(s, torch.device("cpu"))
    for epoch in range(t.method.epochs):
        t.method.begin(epoch, t)
        t.model.train()
        t.optimizer.zero_grad()
        t.method.loss(t.model).sum().backward()
        t.optimizer.step()
    return t.method.posterior(t.model)


def test_gpl_without_lpl_and_selection_is_the_naive_gcn():
    held = dict(cpe_holdout=0.4, cpe_holdout_u=0.4)
    torch.testing.assert_close(
        trained(method="gpl", inner_steps=0, selection="none", **held), trained(method="gcn", **held), rtol=0, atol=0
    )


@pytest.mark.parametrize("edges", ["constant", "random", "ideal"])
def test_fixed_masks_stand_where_the_learned_one_would(edges):
    held = dict(cpe_holdout=0.4, cpe_holdout_u=0.4)
    s = Settings(dataset="karate", seeds=(0, 1), warmup=2, epochs=3, edges=edges, **held)
    s.check()
    t = Trainer(s, torch.device("cpu"))
    for epoch in range(5):
        t.step(epoch)
        assert bool((t.method.weight == 1).all()) == (epoch < 2)
    assert torch.equal(t.method.weight, gpl.fixed_mask(t.batch, edges, s.edge_weight, s.seeds))


def test_the_flipped_loss_moves_the_mask_the_other_way():
    weights = {}
    for edges in ("learned", "flipped"):
        s = Settings(dataset="karate", seeds=(0,), warmup=2, epochs=1, inner_steps=1, edges=edges, cpe_holdout=0.4)
        s.check()
        t = Trainer(s, torch.device("cpu"))
        t.fit()
        weights[edges] = t.method.weight[0]
    moved = {k: (w < 1) for k, w in weights.items()}
    # The start is the bound: an edge that one sign lowers is held there by the other.
    assert all(m.any() for m in moved.values()) and not (moved["learned"] & moved["flipped"]).any()


def test_each_prior_is_what_it_says():
    def pi(**words) -> torch.Tensor:
        s = Settings(method="gcn-ted", dataset="synthetic", seeds=(0, 1), warmup=5, epochs=6, **words)
        s.check()
        t = Trainer(s, torch.device("cpu"))
        seen = []
        for epoch in range(11):
            t.step(epoch)
            seen.append(t.method.pi)
        return torch.stack(seen[5:]), t

    given, _ = pi(prior="given", pi=0.37)
    assert (given == torch.tensor(0.37)).all()
    true, t = pi(prior="true")
    assert torch.equal(true[-1], t.true_pi)
    frozen, _ = pi(prior="frozen")
    bbe, _ = pi(prior="bbe")
    assert torch.equal(frozen[0], bbe[0]) and (frozen == frozen[0]).all() and not (bbe == bbe[0]).all()
    rempe, t = pi(prior="rempe")
    scores = torch.rand(2, 600, generator=torch.Generator().manual_seed(0))
    got = t.method.estimate(scores)
    for k in range(2):
        p, u = (scores[k][m[k]].double().numpy() for m in (t.method.estimate_p, t.method.estimate_u))
        assert got[k].item() == pytest.approx(priors.regroup(priors.bbe, p, u), abs=1e-6)
    assert not torch.equal(rempe, bbe)


def test_ted_that_drops_nothing_is_the_naive_gcn(monkeypatch):
    held = dict(cpe_holdout=0.4, cpe_holdout_u=0.4)
    monkeypatch.setattr(CLASSES["gcn-ted"], "estimate", lambda self, posterior: torch.zeros(2))
    assert torch.equal(trained(method="gcn-ted", **held), trained(method="gcn", **held))


def test_mlp_is_blind_to_edges(monkeypatch):
    before = trained(method="mlp")
    karate = data.karate()
    other = graph(34, [(0, k) for k in range(1, 34)])
    fake = data.Graph("karate", karate.x, karate.y, karate.classes, other.edge, 0.0, "")
    monkeypatch.setattr(data, "karate", lambda: fake)
    assert torch.equal(trained(method="mlp"), before)
    assert not torch.equal(trained(method="gcn"), before)


def test_held_out_nodes_never_enter_a_loss():
    """Trap: a prior estimated on nodes that were trained on reproduces itself."""
    for name, cls in CLASSES.items():
        s = Settings(method=name, seeds=(0,), dataset="karate", warmup=0, cpe_holdout=0.4, cpe_holdout_u=0.4)
        s.check()
        t = Trainer(s, torch.device("cpu"))
        t.method.begin(0, t)
        held = (t.method.held_p | (~t.labelled & ~t.method.fit_u))[0]
        assert held.any() and isinstance(t.method, cls)
        if name in ("pugnn", "lsdan"):
            assert not ((t.method.fit_p | t.method.fit_u)[0] & held).any()
            continue

        class Logits(torch.nn.Module):
            """A classifier whose logits are its parameters, so that the loss tells which nodes it looks at."""

            def __init__(self, like):
                super().__init__()
                self.z = torch.nn.Parameter(torch.linspace(-1, 1, like.numel()).view_as(like))

            def forward(self, adjacency):
                return self.z

        model = Logits(t.labelled.float())
        t.method.loss(model).sum().backward()
        assert (model.z.grad[0][held] == 0).all() and (model.z.grad[0][~held] != 0).any()


def test_held_out_nodes_never_enter_the_inner_loss(monkeypatch):
    s = Settings(seeds=(0, 1), dataset="synthetic", warmup=2, epochs=3)
    s.check()
    t = Trainer(s, torch.device("cpu"))
    seen, original = [], gpl.propagate

    def watched(*args):
        belief = original(*args)
        belief.retain_grad()
        seen.append(belief)
        return belief

    def grad(outputs, inputs):
        outputs.backward(inputs=[inputs, seen[-1]], retain_graph=True)
        return (inputs.grad,)

    monkeypatch.setattr(gpl, "propagate", watched)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    for epoch in range(t.method.epochs):
        t.method.begin(epoch, t)
    held = t.method.held_p | (~t.labelled & ~t.method.fit_u)
    assert len(seen) == 3 * s.inner_steps and held.any()
    for belief in seen:
        assert (belief.grad[held] == 0).all() and (belief.grad[~held] != 0).any()


def test_labels_of_the_unlabelled_never_reach_training(monkeypatch):
    """Other labels on U, same P: the trained classifier is the same to the last bit."""
    real = data.karate()
    split = data.pu_split(real.y, 0.5, 0.4, 0.4, 0)
    monkeypatch.setattr(data, "pu_split", lambda *args: split)

    def posterior(method, y):
        fake = data.Graph("karate", real.x, y, real.classes, real.edge, real.h, real.sha256)
        monkeypatch.setattr(data, "karate", lambda: fake)
        return trained(method=method, seeds=(0,), grab_rounds=3, grab_epochs=20)

    flipped = torch.where(split.labelled, real.y, 1 - real.y)
    for method in ("gpl", "gcn", "gcn-ted", "grab"):
        assert torch.equal(posterior(method, real.y), posterior(method, flipped))


def test_dropout_does_not_repeat_the_initial_weights():
    g = random_graph(30, 40, 1)
    model = Classifier(GraphBatch([g], 1, "cpu"), 16, 0.5, [0])
    kept = model.drop(torch.ones(1, 30, 16))[0] > 0
    assert not torch.equal(kept, model.w1[0] > 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", CLASSES)
def test_cpu_and_gpu_agree(method):
    """Same initial weights everywhere; dropout, whose draws differ by device, is switched off."""

    def posterior(device: str) -> torch.Tensor:
        s = Settings(method=method, seeds=(0, 1), dataset="karate", warmup=3, epochs=4, dropout=0.0, cpe_holdout=0.4)
        s.pugnn_epochs = 5
        s.grab_epochs, s.grab_rounds = 4, 2
        s.check()
        t = Trainer(s, torch.device(device))
        for epoch in range(t.method.epochs):
            t.method.begin(epoch, t)
            t.model.train()
            t.optimizer.zero_grad()
            t.method.loss(t.model).sum().backward()
            t.optimizer.step()
        return t.method.posterior(t.model).cpu()

    torch.testing.assert_close(posterior("cuda"), posterior("cpu"), rtol=1e-3, atol=1e-3)
