"""The noise generators: rates, order of draws against plain loops, files."""

import hashlib

from lab.runs import UserError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import truncnorm

import classes
import noise


def images(n=4000, c=10, seed=0, size=6):
    rng = np.random.RandomState(seed)
    return rng.randint(0, 256, (n, size, size, 3)).astype(np.uint8), rng.randint(0, c, n)


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5])
def test_class_conditional_noise_hits_its_matrix(kind, rho):
    _, y = images(20000)
    t = noise.transition(kind, rho, 10)
    out = noise.class_conditional(y, t, 1)
    assert abs((out != y).mean() - rho) < 0.01
    seen = np.array([[((y == i) & (out == j)).sum() / (y == i).sum() for j in range(10)] for i in range(10)])
    assert np.abs(seen - t).max() < 0.04
    assert (noise.class_conditional(y, t, 1) == out).all()
    assert rho == 0 or (noise.class_conditional(y, t, 2) != out).any()


def test_pair_noise_flips_to_the_next_class():
    t = noise.transition("pair", 0.3, 3)
    assert np.allclose(t, [[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]])


def test_class_conditional_is_one_multinomial_a_sample_in_order():
    _, y = images(50)
    t = noise.transition("symmetric", 0.4, 10)
    rng = np.random.RandomState(3)
    expected = [np.flatnonzero(rng.multinomial(1, t[k]))[0] for k in y]
    assert noise.class_conditional(y, t, 3).tolist() == expected


def test_symmetric_noise_never_draws_the_true_class_as_a_flip():
    t = noise.transition("symmetric", 0.5, 4)
    assert t[0].tolist() == pytest.approx([0.5, 0.5 / 3, 0.5 / 3, 0.5 / 3])


def test_asymmetric_mappings():
    t = noise.transition("asymmetric", 0.4, 10, "cifar10")
    flips = {(i, j) for i in range(10) for j in range(10) if i != j and t[i, j] > 0}
    assert flips == {(9, 1), (2, 0), (4, 7), (3, 5), (5, 3)} and np.allclose(t.sum(1), 1)
    t = noise.transition("asymmetric", 0.4, 100, "cifar100")
    assert np.allclose(t.diagonal(), 0.6) and np.allclose(t.sum(1), 1)
    step = classes.next_in_superclass()
    at = classes.CIFAR100.index("beaver")
    assert [classes.CIFAR100[step[at]], len(set(step))] == ["dolphin", 100]
    assert classes.CIFAR100[step[classes.CIFAR100.index("whale")]] == "beaver"
    with pytest.raises(UserError, match="not for mnist"):
        noise.transition("asymmetric", 0.4, 10, "mnist")


def reference(x, y, rho, c, seed, scale):
    """The published generator as it is described: everything drawn at once, one choice a sample."""
    np.random.seed(seed)
    q = truncnorm((0 - rho) / 0.1, (1 - rho) / 0.1, loc=rho, scale=0.1).rvs(len(y))
    flat = x.transpose(0, 3, 1, 2).reshape(len(y), -1).astype(np.float32) / np.float32(scale)
    w = np.random.randn(c, flat.shape[1], c).astype(np.float32)
    out = []
    p = []
    for i in range(len(y)):
        a = flat[i : i + 1] @ w[y[i]]
        a = a[0]
        a[y[i]] = -np.inf
        e = np.exp((a - a.max()).astype(np.float64))
        row = q[i] * e / e.sum()
        row[y[i]] += 1 - q[i]
        p.append(row / row.sum())
    for row in p:
        out.append(np.random.choice(c, p=row))
    return np.array(out)


@pytest.mark.parametrize(("c", "scale", "name"), [(10, 255, "unit"), (10, 1, "raw"), (100, 255, "unit")])
def test_instance_noise_is_the_published_generator(c, scale, name):
    x, y = images(300, c)
    ours = noise.instance_dependent(x, y, 0.5, c, 7, scale=name)
    assert (ours != reference(x, y, 0.5, c, 7, scale)).mean() < 0.01  # rounding may move one draw


@pytest.mark.parametrize("rho", [0.3, 0.5])
def test_instance_noise_hits_its_rate_and_concentrates(rho):
    x, y = images(6000, size=16)
    out = noise.instance_dependent(x, y, rho, 10, 1)
    assert abs((out != y).mean() - rho) < 0.02
    for k in range(10):
        mine = out[y == k]
        assert abs((mine == k).mean() - (1 - rho)) < 0.06
        share = np.sort(np.bincount(mine[mine != k], minlength=10))[::-1] / (mine != k).sum()
        assert share[:3].sum() > 0.7  # a few targets take nearly all
    assert (noise.instance_dependent(x, y, rho, 10, 1) == out).all()
    assert (noise.instance_dependent(x, y, rho, 10, 2) != out).any()


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 10**6))
def test_draw_is_choice_after_choice(n, c, seed):
    rng = np.random.RandomState(seed)
    p = rng.dirichlet(np.ones(c), n)
    one, two = np.random.RandomState(seed + 1), np.random.RandomState(seed + 1)
    assert noise.draw(p, one).tolist() == [two.choice(c, p=row) for row in p]
    assert one.random_sample() == two.random_sample()  # the state after it too


def ask(cache, **changed):
    x, y = images(200)
    told = {"kind": "instance", "rho": 0.3, "seed": 1, "dataset": "mnist5k", "variant": "wheel", "x": x, "y": y}
    return noise.make(**{**told, "classes": 10, "folder": cache, "cache": cache, **changed})


def test_labels_are_kept_with_their_hash(tmp_path):
    one = ask(tmp_path)
    assert one.sha256 == hashlib.sha256(one.y.tobytes()).hexdigest() and one.path.is_file()
    stamp = one.path.stat().st_mtime_ns
    two = ask(tmp_path)
    assert (two.y == one.y).all() and two.path.stat().st_mtime_ns == stamp and not list(tmp_path.rglob("*.tmp"))
    assert ask(tmp_path, rho=0.5).path != one.path and ask(tmp_path, scale="raw").path != one.path
    one.path.write_bytes(one.path.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged"):
        ask(tmp_path)
    np.savez(one.path, noisy=one.y + 1, sha256=np.array(one.sha256))
    with pytest.raises(UserError, match="does not match its own hash"):
        ask(tmp_path)


def test_none_and_wrong_kinds(tmp_path):
    assert ask(tmp_path, kind="none").rate == 0
    with pytest.raises(UserError, match="is unknown"):
        ask(tmp_path, kind="odd")
    with pytest.raises(UserError, match="--rate"):
        ask(tmp_path, rho=1.0)
    with pytest.raises(UserError, match="two or more classes"):
        ask(tmp_path, classes=1)


def human_file(folder, clean, noisy):
    path = folder / "cifar-n" / "CIFAR-10_human.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, clean_label=clean.astype(np.int16), worse_label=noisy.astype(np.int16))


def test_human_labels_must_belong_to_the_images(tmp_path):
    _, y = images(200)
    noisy = (y + (np.arange(200) % 5 == 0)) % 10
    more = {"kind": "worse", "dataset": "cifar10", "variant": "paper"}
    with pytest.raises(UserError, match="human labels are missing"):
        ask(tmp_path, **more)
    human_file(tmp_path, y, noisy)
    assert (ask(tmp_path, **more).y == noisy).all() and ask(tmp_path, **more).rate == pytest.approx(0.2)
    human_file(tmp_path, y[::-1].copy(), noisy)
    with pytest.raises(UserError, match="are not those of the 200 images"):
        ask(tmp_path, seed=9, **more)
    with pytest.raises(UserError, match="belongs to cifar10"):
        ask(tmp_path, **{**more, "dataset": "cifar100"})


@pytest.mark.realdata
@pytest.mark.parametrize(("kind", "rate"), [("aggre", 0.0901), ("random1", 0.17234), ("worse", 0.40208)])
def test_human_noise_rates(kind, rate, tmp_path):
    from lab.runs import data_dir

    path = data_dir("") / "cifar-n" / "CIFAR-10_human.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with np.load(path, allow_pickle=False) as found:
        clean = found["clean_label"].astype(np.int64)
    got = noise.human(kind, "cifar10", "paper", clean, data_dir(""))
    assert (got != clean).mean() == pytest.approx(rate, abs=1e-6)
