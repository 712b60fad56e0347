"""Heads against loops; a batch equals single tasks; padding changes nothing; TSA and fine-tuning at their limits."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import backbones
import heads
import hsic
import methods
import tuning

torch.set_num_threads(1)


def tasks(seed: int = 0) -> heads.Tasks:
    """Two tasks of 3 and 2 classes, 7 and 5 support images."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.zeros(2, 7, 4), torch.full((2, 7), -1)
    y[0], y[1, :5] = torch.tensor([0, 0, 1, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 1])
    x[0], x[1, :5] = torch.rand(7, 4, generator=rng), torch.rand(5, 4, generator=rng)
    q, t = torch.rand(2, 6, 4, generator=rng), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, -1, -1]])
    return heads.Tasks(x, y, q * (t >= 0).unsqueeze(-1), t)


def single(t: heads.Tasks, i: int) -> heads.Tasks:
    m, n = int((t.labels[i] >= 0).sum()), int((t.targets[i] >= 0).sum())
    return heads.Tasks(
        t.support[i : i + 1, :m], t.labels[i : i + 1, :m], t.query[i : i + 1, :n], t.targets[i : i + 1, :n]
    )


def loop_centroids(x, y) -> list[torch.Tensor]:
    return [
        torch.stack([a for a, b in zip(x, y.tolist(), strict=True) if b == c]).mean(0) for c in range(int(y.max()) + 1)
    ]


def test_centroids_and_ncc_equal_loops():
    t = tasks()
    logits = heads.ncc(t)
    for i in range(2):
        s = single(t, i)
        c = loop_centroids(s.support[0], s.labels[0])
        for j, q in enumerate(s.query[0]):
            for k, centre in enumerate(c):
                expected = 10 * float(q @ centre) / math.sqrt(float(q @ q) * float(centre @ centre))
                assert logits[i, j, k].item() == pytest.approx(expected, abs=1e-5)
    assert (logits[1, :, 2] == float("-inf")).all()  # the second task has no third class


def test_accuracy_counts_only_queries_that_are_there():
    t = tasks()
    logits = torch.zeros(2, 6, 3)
    logits[0, torch.arange(6), torch.tensor([0, 1, 2, 1, 1, 1])] = 1
    logits[1, torch.arange(6), torch.tensor([0, 0, 0, 0, 0, 0])] = 1
    assert heads.accuracy(logits, t.targets).tolist() == pytest.approx([100 * 4 / 6, 50.0])


def test_url_equals_a_literal_loop():
    t = tasks()
    found = heads.url(t, 1.0, steps=6)
    for i in range(2):
        s = single(t, i)
        x, y = s.support[0].double(), s.labels[0]
        theta = torch.eye(4, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.Adadelta([theta], lr=1.0)
        for _ in range(6):
            z = x @ theta.T
            c = torch.stack(loop_centroids(z, y))
            logits = 10 * F.normalize(z, dim=1) @ F.normalize(c, dim=1).T
            optimizer.zero_grad()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
        assert torch.allclose(found[i].double(), theta, atol=1e-4)
        assert not torch.allclose(found[i], torch.eye(4), atol=1e-3)


@pytest.mark.parametrize(("gamma", "given"), [(3.0, {}), (0.02, {"gamma": 0.02})])
def test_ssl_hsic_equals_a_literal_loop(gamma, given):
    """-HSIC(Z,Y) + gamma sqrt(HSIC(Z,Z)), both kernels written out, times the number of images."""
    t = tasks()
    found = heads.ssl_hsic(t, 0.5, 0.01, steps=6, **given)
    for i in range(2):
        s = single(t, i)
        x, y = s.support[0].double(), F.one_hot(s.labels[0]).double()
        m, theta = len(x), torch.eye(4, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.Adadelta([theta], lr=0.5, weight_decay=0.01)
        H = torch.eye(m, dtype=torch.float64) - 1 / m

        def imq(a):
            return 1 / (1 + ((a[:, None] - a[None]) ** 2).sum(-1)).sqrt()

        for _ in range(6):
            K, L = imq(F.normalize(x @ theta.T, dim=1)), imq(y)
            loss = gamma * ((K @ H @ K @ H).trace() / m**2).sqrt() - hsic.unbiased(K, L)
            optimizer.zero_grad()
            (m * loss).backward()
            optimizer.step()
        assert torch.allclose(found[i].double(), theta, atol=1e-4)
        assert not torch.allclose(found[i], torch.eye(4), atol=1e-3)


@pytest.mark.parametrize("kind", ["fp-maml", "linear", "cosine"])
def test_layers_equal_literal_loops(kind):
    t = tasks()
    found = methods.answer(methods.parse(kind), t, {"lr": 0.05, "steps": 7}).logits
    for i in range(2):
        s = single(t, i)
        x, y, q = s.support[0].double(), s.labels[0], s.query[0].double()
        w = torch.stack(loop_centroids(x, y))
        b = -(w**2).sum(1)
        if kind == "fp-maml":
            w = 2 * w
        elif kind == "linear":
            w, b = torch.zeros_like(w), torch.zeros_like(b)
        w.requires_grad_(), b.requires_grad_()
        optimizer = torch.optim.SGD([w, b], lr=0.05) if kind == "fp-maml" else torch.optim.Adam([w, b], lr=0.05)

        def scores(a, w=w, b=b):
            return 10 * F.normalize(a, dim=1) @ F.normalize(w, dim=1).T if kind == "cosine" else a @ w.T + b

        for _ in range(7):
            optimizer.zero_grad()
            F.cross_entropy(scores(x), y).backward()
            optimizer.step()
        assert torch.allclose(found[i, : len(q), : len(w)].double(), scores(q), atol=1e-4)


def test_protonet_equals_a_loop():
    t = tasks()
    for i in range(2):
        s = single(t, i)
        for j, q in enumerate(s.query[0]):
            for k, c in enumerate(loop_centroids(s.support[0], s.labels[0])):
                expected = -float(((q - c) ** 2).sum())
                assert heads.protonet(t)[i, j, k].item() == pytest.approx(expected, abs=1e-5)


def test_proto_maml_starts_as_protonet():
    """With no step 2 c.q - |c|^2 ranks the classes as the squared distance does; steps lower the loss."""
    t = tasks()
    start, after = heads.linear(t, "proto", 0, 0.1), heads.linear(t, "proto", 20, 0.1)
    assert torch.equal(start.argmax(-1), heads.protonet(t).argmax(-1))
    own = heads.Tasks(t.support, t.labels, t.support, t.labels)
    a, b = (heads.cross_entropy(heads.linear(own, "proto", k, 0.1), own.labels) for k in (0, 20))
    assert (b < a).all() and not torch.allclose(start[:, :2], after[:, :2])


@pytest.mark.parametrize("text", ["ncc", "url", "ssl-hsic", "mokd", "protonet", "fp-maml", "linear", "cosine"])
def test_every_method_is_the_same_alone_and_in_a_batch(text):
    m, t = methods.parse(text), tasks(3)
    o = methods.settings(m, "mnist", "varied", False, {})
    together = methods.answer(m, t, o).logits
    for i in range(2):
        s = single(t, i)
        alone = methods.answer(m, s, o).logits[0]
        assert torch.allclose(alone, together[i, : alone.shape[0], : alone.shape[1]], atol=2e-3), text


def test_cross_entropy_is_the_mean_over_the_task():
    t = tasks()
    logits = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    for i in range(2):
        m = int((t.labels[i] >= 0).sum())
        expected = F.cross_entropy(logits[i, :m], t.labels[i, :m])
        assert heads.cross_entropy(logits, t.labels)[i].item() == pytest.approx(expected.item(), rel=1e-6)


def test_cross_cosine_equals_a_loop():
    t = tasks()
    for i in range(2):
        s = single(t, i)
        x, y = s.support[0], s.labels[0]
        pairs = [F.cosine_similarity(x[a], x[b], 0) for a in range(len(y)) for b in range(len(y)) if y[a] != y[b]]
        assert heads.cross_cosine(t)[i].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


def test_settings_follow_the_released_rules():
    assert methods.published("mnist", "varied") == {"lr": 1.0, "weight_decay": 0.0, "gamma": 1.0}
    assert methods.published("traffic_sign", "varied") == {"lr": 1.0, "weight_decay": 0.0, "gamma": 3.0}
    assert methods.published("ilsvrc_2012", "varied") == {"lr": 0.25, "weight_decay": 0.25, "gamma": 3.0}
    assert methods.published("quickdraw", "5shot")["gamma"] == 1.0 and methods.published("dtd", "1shot")["gamma"] == 0.0
    url = methods.parse("url")
    assert [methods.settings(url, "dtd", "varied", seen, {})["lr"] for seen in (True, False)] == [0.1, 1.0]
    t, m = tasks(), methods.parse("url:lr=0.3")
    o = methods.settings(m, "dtd", "varied", True, {})
    assert o["lr"] == 0.3 and torch.equal(methods.answer(m, t, o).theta, heads.url(t, 0.3))
    assert methods.settings(methods.parse("ssl-hsic"), "dtd", "varied", False, {})["gamma"] == 3.0
    own = methods.settings(methods.parse("mokd:gamma=2"), "dtd", "varied", True, {"gamma": 5.0, "kernel": "imq"})
    assert own["gamma"] == 2.0 and own["kernel"] == "imq" and own["weight_decay"] == 0.25
    assert methods.parse("mokd:bandwidth=none").label == "MOKD(no TPM)"
    assert methods.parse("mokd:gamma=0.5,lr=1").label == "MOKD(gamma=0.5,lr=1)"


# ---------------------------------------------------------------------------------------------- through the backbone


@pytest.fixture
def network():
    torch.manual_seed(0)
    return backbones.ResNet18((4, 4, 8, 8)).eval()


def pictures(seed: int, n: int) -> torch.Tensor:
    return torch.rand(n, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_adapters_sit_beside_the_3x3_convolutions(network):
    adapted, alphas = tuning.adapters(network)
    shapes = [m.weight.shape[:2] for k, m in network.named_modules() if isinstance(m, torch.nn.Conv2d) and ".conv" in k]
    assert [a.shape[:2] for a in alphas] == shapes and len(alphas) == 16
    assert all(p.requires_grad == ("alpha" in k) for k, p in adapted.named_parameters())
    with torch.no_grad():
        for a in alphas:
            a.zero_()
    x = pictures(0, 3)
    assert torch.allclose(adapted(x), network(x), atol=1e-6)


def test_tsa_and_finetune_adapt_a_copy(network):
    before = copy.deepcopy(network.state_dict())
    x, y, q, t = pictures(1, 6), torch.tensor([0, 0, 1, 1, 2, 2]), pictures(2, 4), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        start = heads.ncc(heads.Tasks(network(x)[None], y[None], network(q)[None], t[None]))
    # TSA written out: adapters by hooks, a head, two learning rates, the NCC loss with centroids of the same pictures.
    for seen, rates in ((True, (0.05, 0.1)), (False, (0.5, 1.0))):
        model, theta, alphas = copy.deepcopy(network), torch.eye(8).requires_grad_(), []
        for name, conv in model.named_modules():
            if isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (3, 3) and name != "conv1":
                alpha = (1e-4 * torch.eye(conv.out_channels, conv.in_channels))[..., None, None].requires_grad_()
                alphas.append(alpha)
                conv.register_forward_hook(
                    lambda m, inputs, out, a=alpha: out + F.conv2d(inputs[0], a, stride=m.stride)
                )
        optimizer = torch.optim.Adadelta([{"params": alphas, "lr": rates[0]}, {"params": [theta], "lr": rates[1]}])

        def logits(a, model=model, theta=theta):
            z = model(x) @ theta.T
            c = torch.stack([z[y == k].mean(0) for k in range(3)])
            return 10 * F.normalize(model(a) @ theta.T, dim=1) @ F.normalize(c, dim=1).T

        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(logits(x), y).backward()
            optimizer.step()
        found = tuning.tsa(network, x, y, q, t, seen, steps=3)[0]
        assert torch.allclose(found, logits(q), atol=2e-3)
        assert not torch.allclose(found, start[0], atol=2e-2)
    unadapted = tuning.tsa(network, x, y, q, t, False, steps=0)
    assert torch.allclose(unadapted, start, atol=0.05)  # adapters of 1e-4 change next to nothing
    seen, unseen = (tuning.tsa(network, x, y, q, t, s, steps=2) for s in (True, False))
    assert (seen - start).norm() < (unseen - start).norm()  # ten times smaller rates
    assert torch.allclose(tuning.finetune(network, x, y, q, t, 1e-3, 0), start, atol=1e-5)
    model = copy.deepcopy(network)
    with torch.no_grad():
        w = torch.stack([model(x)[y == k].mean(0) for k in range(3)])
    optimizer = torch.optim.Adam([*model.parameters(), w.requires_grad_()], lr=1e-3)
    for k in range(3):
        tuned = 10 * F.normalize(model(q), dim=1) @ F.normalize(w, dim=1).T
        assert torch.allclose(tuning.finetune(network, x, y, q, t, 1e-3, k)[0], tuned, atol=2e-3)
        optimizer.zero_grad()
        F.cross_entropy(10 * F.normalize(model(x), dim=1) @ F.normalize(w, dim=1).T, y).backward()
        optimizer.step()
    assert not torch.allclose(tuned, start[0], atol=1e-2)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert not network.training
