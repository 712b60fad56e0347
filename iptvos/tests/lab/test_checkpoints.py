"""Checkpoints that fit and those that do not: the same tests in every folder of the workspace."""

import math

from lab import checkpoints
from lab.cli import UserError

import pytest
import torch
from torch import nn

PLACE = "state.safetensors"


def made(kind: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    options = {"sgd": {"momentum": 0.9}, "adamw": {"fused": True}, "adam": {"amsgrad": True}, "plain": {}}[kind]
    maker = {"sgd": torch.optim.SGD, "plain": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    groups = [{"params": model[0].parameters()}, {"params": [*model[1].parameters(), *model[2].parameters()]}]
    return model, maker[kind](groups, lr=0.1, **options)


def stepped(kind: str, steps: int = 2):
    model, optimizer = made(kind)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    torch.manual_seed(len(optimizer.state))
    optimizer.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adam", "plain"])
def test_a_run_goes_on_bitwise(kind):
    model, optimizer = stepped(kind)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in checkpoints.pack_optimizer(optimizer).items()}
    again, other = made(kind)
    checkpoints.restore_module(again, weights, PLACE)
    checkpoints.restore_optimizer(other, state, PLACE)
    for one in ((model, optimizer), (again, other)):
        step(*one)
    for k, v in model.state_dict().items():
        assert torch.equal(v, again.state_dict()[k])
    for k, v in checkpoints.pack_optimizer(optimizer).items():
        assert torch.equal(v, checkpoints.pack_optimizer(other)[k])


def test_each_state_tensor_lies_where_a_fused_optimiser_asks_for_it():
    """A fused AdamW on a GPU raises where its step counters lie on the CPU; `meta` stands for the GPU."""
    model, optimizer = stepped("adamw")
    state = checkpoints.pack_optimizer(optimizer)
    parameter = nn.Parameter(torch.empty(4, 3, device="meta"))
    far = torch.optim.AdamW([parameter], lr=0.1)
    far.param_groups[0]["fused"] = True
    values = {k: v for k, v in state.items() if k.startswith("0.")}
    far.load_state_dict(
        {"state": {0: {k[2:]: v for k, v in values.items()}}, "param_groups": far.state_dict()["param_groups"]}
    )
    assert {v.device.type for v in far.state[parameter].values()} == {"meta"}


DAMAGE = {
    "missing": lambda s: s.pop("0.exp_avg"),
    "unknown": lambda s: s.update({"0.more": torch.ones(1)}),
    "of nobody": lambda s: s.update({"99.exp_avg": torch.ones(1)}),
    "broadcasts": lambda s: s.update({"0.exp_avg": torch.ones(1, 1)}),
    "integer": lambda s: s.update({"0.exp_avg": s["0.exp_avg"].long()}),
    "nan": lambda s: s["1.exp_avg"].fill_(math.nan),
    "negative": lambda s: s["1.exp_avg_sq"].fill_(-1.0),
    "step": lambda s: s.update({"0.step": torch.tensor(-3.0)}),
    "a parameter without": lambda s: [s.pop(k) for k in list(s) if k.startswith("2.")],
    "all gone": lambda s: s.clear(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_an_optimiser_state_that_does_not_fit_is_refused(what):
    _, optimizer = stepped("adamw")
    state = {k: v.clone() for k, v in checkpoints.pack_optimizer(optimizer).items()}
    DAMAGE[what](state)
    _, other = made("adamw")
    with pytest.raises(UserError, match="state.safetensors does not fit this run .*; delete it"):
        checkpoints.restore_optimizer(other, state, PLACE)
    assert not checkpoints.pack_optimizer(other)  # nothing was put in


def test_before_the_first_step_there_is_no_state():
    _, optimizer = made("adamw")
    checkpoints.restore_optimizer(optimizer, {}, PLACE, began=False)
    with pytest.raises(UserError, match="parameter 0 is missing"):
        checkpoints.restore_optimizer(optimizer, {}, PLACE)


@pytest.mark.parametrize("what", ["missing", "more", "shape", "kind", "nan"])
def test_weights_that_do_not_fit_are_refused(what):
    model, _ = made("sgd")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in weights.items()}
    if what == "missing":
        del weights["0.bias"]
    elif what == "more":
        weights["more"] = torch.ones(1)
    elif what == "shape":
        weights["0.weight"] = torch.ones(1, 1)
    elif what == "kind":
        weights["1.num_batches_tracked"] = torch.tensor(1.0)
    else:
        weights["1.running_var"][0] = math.inf
    with pytest.raises(UserError, match="does not fit this run"):
        checkpoints.restore_module(model, weights, PLACE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("text", ["-5", "11", "999999999", "x", "1.5", "", None])
def test_a_position_outside_the_run_is_refused(text):
    meta = {} if text is None else {"epoch": text}
    with pytest.raises(UserError, match="epoch is"):
        checkpoints.position(meta, "epoch", 10, PLACE)
    assert checkpoints.position({"epoch": "10"}, "epoch", 10, PLACE) == 10


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "x", None])
def test_seconds_are_a_time(text):
    with pytest.raises(UserError, match="no time"):
        checkpoints.seconds({} if text is None else {"seconds": text}, PLACE)
    assert checkpoints.seconds({"seconds": "1.5"}, PLACE) == 1.5


def test_the_fingerprint_is_of_settings_and_data():
    one = checkpoints.fingerprint({"a": 1}, ["x"])
    assert one == checkpoints.fingerprint({"a": 1}, ["x"])
    assert len({one, checkpoints.fingerprint({"a": 2}, ["x"]), checkpoints.fingerprint({"a": 1}, ["y"])}) == 3
