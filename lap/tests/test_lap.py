"""The contribution against a literal reference: a trial step of a real optimiser, measured and taken back."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lap
import models
import vit

EPS = 0.1


class Net(nn.Module):
    """A small network in float64 with batch norm, biases and a parameter that must be left alone."""

    def __init__(self):
        super().__init__()
        self.scale_weight = nn.Parameter(torch.ones(4))
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        h = F.relu(self.norm(self.stem(x))) * self.scale_weight.view(1, -1, 1, 1)
        return self.linear(torch.tanh(self.conv(h)).mean((2, 3)) + self.token)


def setup(seed=0):
    torch.manual_seed(seed)
    net = Net().double().train()
    optimizer = torch.optim.SGD(net.parameters(), 0.2, 0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.0, 0.2, 4, 4, base_momentum=0.8, max_momentum=0.9)
    return net, optimizer, scheduler


def batches(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(8, 2, 5, 5, generator=g).double(), torch.randint(3, (8,), generator=g)) for _ in range(n)]


def literal(net, optimizer, scheduler, x, y, eta, step, ball, beta, gamma):
    """One iteration with the trial step made in earnest: deep copies of weights, statistics and optimiser."""
    names = [k for k, p in net.named_parameters() if "weight" in k and p.dim() > 1]
    delta = eta.clone().requires_grad_(True)
    optimizer.zero_grad()
    F.cross_entropy(net(x + delta), y).backward()
    g = delta.grad.clone()
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    diff = {}
    for k, p in net.named_parameters():
        if k in names:
            moved = p.detach() - weights[k]
            diff[k] = weights[k].norm() / (moved.norm() + 1e-20) * moved
    net.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(state))
    delta = eta + step * g.sign()
    delta = delta.clamp(-ball, ball) if ball else delta
    delta = torch.clamp(x + delta, 0, 1) - x
    with torch.no_grad():
        for i, k in enumerate(names, 1):
            level = 1 - (math.log(i) / math.log(len(names))) ** gamma if i > 1 else 1.0
            net.get_parameter(k).add_(beta * level * diff[k])
    optimizer.zero_grad()
    F.cross_entropy(net(x + delta), y).backward()
    optimizer.step()
    scheduler.step()


def closed(net, optimizer, scheduler, x, y, eta, step, ball, beta, gamma, recipe=lap.RECIPES["lap"]):
    """The same iteration through lap.py."""
    weights = list(lap.layers(net).values())
    sizes = beta * torch.tensor(lap.schedule(len(weights), gamma), dtype=torch.float64)
    at = (x + eta).requires_grad_(True)
    optimizer.zero_grad()
    F.cross_entropy(net(at), y, reduction="sum").backward()
    delta = eta + step * at.grad.sign()
    delta = delta.clamp(-ball, ball) if ball else delta
    delta = torch.clamp(x + delta, 0, 1) - x
    found = lap.perturb_(weights, [w.grad for w in weights], optimizer, sizes, recipe, 1 / len(y))
    optimizer.zero_grad()
    F.cross_entropy(net(x + delta), y).backward()
    optimizer.step()
    scheduler.step()
    return found


@pytest.mark.parametrize("start", ["v", "r", "n"])
def test_closed_form_equals_the_trial_step_over_a_whole_cycle(start):
    """Eight steps in float64, the first with rate 0; statistics and momentum are compared too."""
    shape, g = lap.GEOMETRY[start], torch.Generator().manual_seed(9)
    one, two = setup(), setup()
    rates = []
    for x, y in batches(8):
        eta = shape.noise * EPS * (2 * torch.rand(x.shape, generator=g, dtype=torch.float64) - 1)
        eta = torch.clamp(x + eta, 0, 1) - x
        rates.append(one[1].param_groups[0]["lr"])
        args = (x, y, eta, shape.step * EPS, EPS if shape.clamp else None, 0.3, 0.3)
        literal(*one, *args)
        closed(*two, *args)
        for (k, a), b in zip(one[0].state_dict().items(), two[0].state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=k)
        for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
            a, b = one[1].state[p]["momentum_buffer"], two[1].state[q]["momentum_buffer"]
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert rates[0] == 0 and max(rates) == pytest.approx(0.2)


def test_the_reference_moves_far_enough_to_tell():
    """Bare gradients, the other sign, another exponent: each of them is seen by the comparison above."""
    kinds = {"same": {}, "gamma": {"gamma": 1.0}}
    kinds |= {"ascent": {"recipe": lap.Recipe(direction="ascent")}, "bare": {"recipe": lap.Recipe(bare=True)}}
    ends = {}
    for name, more in kinds.items():
        net, optimizer, scheduler = setup()
        for x, y in batches(4):
            closed(net, optimizer, scheduler, x, y, 0 * x, EPS, EPS, **{"beta": 0.3, "gamma": 0.3, **more})
        ends[name] = net.stem.weight.detach().clone()
    assert all((ends[k] - ends["same"]).norm() > 1e-3 * ends["same"].norm() for k in ends if k != "same")


def perturbed(beta=0.5, gamma=0.3, recipe=lap.RECIPES["lap"], lr=0.1, steps=1, seed=3):
    """(weights before, moves, weights after, optimiser state before and after) of one perturbation."""
    net, optimizer, scheduler = setup()
    for x, y in batches(steps):
        closed(net, optimizer, scheduler, x, y, 0 * x, EPS, EPS, 0.0, 0.3)
    optimizer.param_groups[0]["lr"] = lr
    weights = list(lap.layers(net).values())
    x, y = batches(1, seed)[0]
    optimizer.zero_grad()
    F.cross_entropy(net(x), y, reduction="sum").backward()
    before, state = [w.detach().clone() for w in weights], copy.deepcopy(optimizer.state_dict())
    sizes = beta * torch.tensor(lap.schedule(len(weights), gamma), dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    found = lap.perturb_(weights, [w.grad for w in weights], optimizer, sizes, recipe, 1 / len(y), g)
    return before, found, weights, state, optimizer.state_dict(), net


def test_optimiser_is_untouched_and_only_the_weights_move():
    before, found, after, state, now, net = perturbed()
    start = perturbed(beta=0.0)[-1]
    moved = {k for k, p in net.named_parameters() if not torch.equal(p, start.get_parameter(k))}
    assert moved == {"stem.weight", "conv.weight"}  # the last layer's lambda is 0
    assert state["param_groups"] == now["param_groups"] and state["state"].keys() == now["state"].keys()
    assert all(
        torch.equal(state["state"][k]["momentum_buffer"], now["state"][k]["momentum_buffer"]) for k in state["state"]
    )
    for b, d, a in zip(before, found, after, strict=True):
        torch.testing.assert_close(b + d, a.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("variant", list(lap.RECIPES))
def test_size_of_the_move_is_beta_lambda_times_the_weight(variant):
    recipe = lap.RECIPES[variant]
    before, found, *_ = perturbed(beta=0.4, recipe=recipe)
    levels = lap.schedule(len(before), 0.3)  # the helper above hands the schedule over; a run hands over levels_of
    for b, d, level in zip(before, found, levels, strict=True):
        size = b.abs().mean() * b.numel() ** 0.5 if recipe.norm == "linf" else b.norm()
        assert d.norm().item() == pytest.approx(0.4 * level * size.item(), rel=1e-9, abs=1e-12)


def test_directions():
    down, up = (perturbed(recipe=lap.Recipe(direction=k))[1] for k in ("official", "ascent"))
    assert all(torch.equal(a, -b) for a, b in zip(down, up, strict=True))
    one, two = (perturbed(recipe=lap.Recipe(direction="random"), seed=s)[1] for s in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))  # of the generator, not of the batch
    assert abs(F.cosine_similarity(one[0].flatten(), down[0].flatten(), dim=0)) < 0.5
    signs = perturbed(recipe=lap.Recipe(norm="linf"))[1][0]
    assert torch.equal(signs.sign(), down[0].sign()) and signs.abs().std() < 1e-12


def test_official_goes_downhill_and_contains_weight_decay_and_momentum():
    before, found, _, state, *_, net = perturbed()
    group, k = state["param_groups"][0], [n for n, _ in net.named_parameters()].index("stem.weight")
    gradient = net.stem.weight.grad / 8
    v = group["momentum"] * state["state"][k]["momentum_buffer"] + gradient + group["weight_decay"] * before[0]
    torch.testing.assert_close(found[0], -0.5 * before[0].norm() * v / v.norm(), rtol=1e-9, atol=1e-12)
    bare = perturbed(recipe=lap.Recipe(bare=True))[1][0]
    torch.testing.assert_close(bare, -0.5 * before[0].norm() * gradient / gradient.norm(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", list(lap.RECIPES))
def test_rate_zero_moves_nothing(variant):
    before, found, after, *_ = perturbed(recipe=lap.RECIPES[variant], lr=0.0)
    assert all(d.abs().max() == 0 for d in found)
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_without_buffers_the_gradient_and_decay_alone_count():
    before, found, *_, net = perturbed(steps=0)
    v = net.stem.weight.grad / 8 + 5e-4 * before[0]
    torch.testing.assert_close(found[0], -0.5 * before[0].norm() * v / v.norm(), rtol=1e-9, atol=1e-12)


SGD = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.7, "dampening": 0.4},
    "maximize": {"momentum": 0.9, "maximize": True},
    "foreach": {"momentum": 0.9, "foreach": True},
    "fused": {"momentum": 0.9, "nesterov": True, "fused": True},
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", SGD)
def test_any_sgd_and_any_groups_equal_the_trial_step(kind, steps):
    """Three groups with rates and decays of their own, the first with rate 0, in another order than the layers."""
    net = setup()[0]
    parts = [
        {"params": [net.linear.weight, net.norm.weight], "lr": 0.0},
        {"params": [net.conv.weight, net.token], "lr": 0.3, "weight_decay": 0.1},
        {"params": [net.stem.weight, net.linear.bias, net.conv.bias, net.norm.bias, net.scale_weight], "lr": 0.02},
    ]
    optimizer = torch.optim.SGD(parts, lr=0.1, weight_decay=5e-4, **SGD[kind])
    for x, y in batches(steps, 5):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    x, y = batches(1, 7)[0]
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    weights = list(lap.layers(net).values())
    before, state = [w.detach().clone() for w in weights], copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    steps_made = [w.detach() - b for w, b in zip(weights, before, strict=True)]
    with torch.no_grad():
        torch._foreach_copy_(weights, before)
    optimizer.load_state_dict(state)
    sizes = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    found = lap.perturb_(weights, [w.grad for w in weights], optimizer, sizes)
    for b, d, step, size in zip(before, found, steps_made, sizes, strict=True):
        torch.testing.assert_close(d, size * b.norm() * step / (step.norm() + 1e-20), rtol=1e-9, atol=1e-12)
    assert [bool(d.abs().max() > 0) for d in found] == [True, True, False]


def test_a_layer_that_was_not_used_stays():
    net = setup()[0]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    weights = list(lap.layers(net).values())
    before = [w.detach().clone() for w in weights]
    gradients = [torch.ones_like(weights[0]), None, torch.ones_like(weights[2])]
    found = lap.perturb_(weights, gradients, optimizer, torch.ones(3, dtype=torch.float64))
    assert [bool(d.abs().max() > 0) for d in found] == [True, False, True]
    assert torch.equal(weights[1], before[1])


@pytest.mark.parametrize("kind", ["AdamW", "RMSprop", "Adam"])
def test_an_optimiser_whose_next_step_is_not_known_is_refused(kind):
    net = setup()[0]
    weights = list(lap.layers(net).values())
    optimizer = getattr(torch.optim, kind)(net.parameters())
    with pytest.raises(TypeError, match=f"does not know that of {kind}: train with SGD"):
        lap.perturb_(weights, [torch.ones_like(w) for w in weights], optimizer, torch.ones(3))


def test_weights_and_sizes_that_do_not_belong_together_are_refused():
    net = setup()[0]
    weights = list(lap.layers(net).values())
    gradients, sizes = [torch.ones_like(w) for w in weights], torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weight 2 of shape \[3, 4\] is not in the optimiser"):
        lap.perturb_(weights, gradients, torch.optim.SGD(weights[:2], 0.1), sizes)
    with pytest.raises(ValueError, match=r"2 sizes for 3 weights"):
        lap.perturb_(weights, gradients, torch.optim.SGD(weights, 0.1), sizes[:2])


def test_levels_of_the_controls():
    schedule = lap.schedule(21, 0.3)
    mean = lap.levels_of("mean", 21, 0.3)
    assert mean == [pytest.approx(2.8948 / 21, abs=1e-5)] * 21 and sum(mean) == pytest.approx(sum(schedule))
    assert lap.levels_of("reversed", 21, 0.3) == schedule[::-1] and schedule[0] == 1 and schedule[-1] == 0
    assert lap.levels_of("ones", 3, 0.3) == [1.0] * 3 and lap.levels_of("schedule", 21, 0.3) == schedule
    kinds = {k: r.levels for k, r in lap.RECIPES.items() if r.levels != "schedule"}
    assert kinds == {"awp": "ones", "modified-awp": "ones", "lap-uniform": "mean", "lap-reversed": "reversed"}
    assert [k for k, r in lap.RECIPES.items() if not r.accumulated] == ["awp", "lap-undone"]


def test_a_layer_without_gradient_or_without_weight_stays_finite():
    zero, one = torch.zeros(3, 2), torch.ones(3, 2)
    for w, v in ((zero, one), (one, zero), (zero, zero)):
        moved = lap.moves([w.clone()], [v.clone()], torch.tensor([0.5]), 0.1)[0]
        assert moved.abs().max() == 0
    assert lap.moves([one.clone()], [zero.clone()], torch.tensor([0.5]), 0.1, "linf")[0].abs().max() == 0


# -------------------------------------------------------------------------------------------------------- the schedule


def test_published_schedule_of_21_layers():
    want = [1.0, 0.3585, 0.2635, 0.2102, 0.1741, 0.1470, 0.1257, 0.1081, 0.0932, 0.0804, 0.0691, 0.0591, 0.0501, 0.0420]
    want += [0.0345, 0.0277, 0.0213, 0.0155, 0.0100, 0.0048, 0.0]
    assert lap.schedule(21, 0.3) == pytest.approx(want, abs=5e-5)
    assert sum(lap.schedule(21, 0.3)) == pytest.approx(2.8948, abs=1e-4)
    assert sum(lap.schedule(21, 1.0)) == pytest.approx(6.0945, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 200), gamma=st.floats(0.01, 50))
def test_schedule_falls_from_one_to_zero(n, gamma):
    levels = lap.schedule(n, gamma)
    assert len(levels) == n and levels[0] == 1 and levels[-1] == 0
    assert all(a >= b >= 0 for a, b in zip(levels, levels[1:], strict=False))


def test_limits_of_gamma():
    assert lap.schedule(21, 0.0) == [1.0] + [0.0] * 20
    assert lap.schedule(21, 1e-6)[1] < 1e-4 and lap.schedule(21, 1e-6)[0] == 1
    assert lap.schedule(21, 1e6) == [1.0] * 20 + [0.0] and lap.schedule(21, float("inf")) == [1.0] * 20 + [0.0]
    assert lap.schedule(1, 0.3) == [1.0] and lap.schedule(2, 0.3) == [1.0, 0.0]
    for wrong in ((0, 0.3), (5, -1.0), (5, float("nan"))):
        with pytest.raises(ValueError):
            lap.schedule(*wrong)


@pytest.mark.parametrize(
    ("name", "size", "n", "first", "last"),
    [
        ("preact18", 32, 21, "1.stem.weight", "1.linear.weight"),
        ("preact18-act", 64, 21, "1.stem.weight", "1.linear.weight"),
        ("wrn-34-10", 32, 35, "1.stem.weight", "1.linear.weight"),
        ("vit-small", 32, 50, "1.patch_embed.proj.weight", "1.head.weight"),
        ("preact-small", 16, 10, "1.stem.weight", "1.linear.weight"),
    ],
)
def test_layers_of_the_networks(name, size, n, first, last):
    with torch.device("meta"):
        found = lap.layers(vit.build(name, 10, 3, size, (0.5,) * 3, (0.25,) * 3))
    names = list(found)
    assert (len(names), names[0], names[-1]) == (n, first, last)
    assert all(p.ndim >= 2 for p in found.values()) and not any(
        "norm" in k or "token" in k or "pos" in k for k in names
    )


def test_a_projection_comes_after_the_two_kernels_of_its_block():
    names = list(lap.layers(models.build("preact18", 10, 3, 32, (0.5,) * 3, (0.25,) * 3)))
    k = next(i for i, name in enumerate(names) if "shortcut" in name)
    block = names[k].rsplit(".", 2)[0]
    assert names[k - 2 : k + 1] == [f"{block}.{p}.weight" for p in ("conv1", "conv2", "shortcut")]


def test_class_tokens_and_positions_are_left_alone():
    net = vit.build("vit-tiny", 10, 3, 16, (0.5,) * 3, (0.25,) * 3)
    rest = {k for k, p in net.named_parameters() if p.ndim >= 2} - set(lap.layers(net))
    assert rest == {"1.cls_token", "1.pos_embed"}
    assert net(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_vision_transformer_of_the_paper():
    with torch.device("meta"):
        net = vit.build("vit-small", 10, 3, 32, (0.5,) * 3, (0.25,) * 3)[1]
    assert net.pos_embed.shape == (1, 65, 384) and len(net.blocks) == 12 and net.blocks[0].attn.num_heads == 6
    assert net.blocks[0].norm1.eps == 1e-6 and net.blocks[0].attn.qkv.bias is not None
    assert net.blocks[0].mlp.fc1.out_features == 1536


# ------------------------------------------------------------------------------------------------------------- beta


def test_published_beta_and_the_fallback():
    assert lap.published_beta("v", 8 / 255) == (0.03, True) and lap.published_beta("n", 32 / 255) == (0.75, True)
    assert lap.published_beta("r", 16 / 255) == (0.05, True)
    assert lap.published_beta("r", 10 / 255) == (0.002, False)  # nearest, the smaller of a tie
    assert lap.published_beta("v", 40 / 255) == (0.48, False)
    assert all(sorted(t) == [8, 12, 16, 32] for t in lap.PUBLISHED.values())


def test_geometry_of_the_starts():
    found = {k: (g.noise, g.step, g.clamp) for k, g in lap.GEOMETRY.items()}
    assert found == {"v": (0.0, 1.0, True), "r": (1.0, 1.25, True), "n": (2.0, 1.0, False)}
