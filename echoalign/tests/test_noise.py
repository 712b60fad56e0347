"""The noise generators: rates, order of draws against plain loops, files."""

import hashlib

from lab.runs import UserError, data_dir

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import truncnorm
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import noise
import readers


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
    step = readers.next_in_superclass()
    at = readers.CIFAR100.index("beaver")
    assert [readers.CIFAR100[step[at]], len(set(step))] == ["dolphin", 100]
    assert readers.CIFAR100[step[readers.CIFAR100.index("whale")]] == "beaver"
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


def test_human_labels_follow_a_part_and_the_order_of_the_jpeg_copy(tmp_path):
    """The k-th image of a class in the copy is the k-th place of that class in the labels' own order."""
    rng = np.random.RandomState(4)
    clean, noisy = rng.randint(0, 10, 200), rng.randint(0, 10, 200)
    human_file(tmp_path, clean, noisy)
    told = {"kind": "worse", "dataset": "cifar10", "classes": 10, "folder": tmp_path, "cache": tmp_path}
    told |= {"rho": 0.4, "seed": 0, "x": np.zeros((200, 4, 4, 3), np.uint8)}
    own = [int(i) for c in range(10) for i in range(200) if clean[i] == c]  # copy's place -> labels' place
    for variant, place in (("paper", list(range(200))), (readers.JPEG, own)):
        for index in (np.arange(200), np.array([3, 150, 7, 7])):
            wanted = [int(noisy[place[j]]) for j in index]
            y = np.array([clean[place[j]] for j in index])
            assert noise.make(**told, variant=variant, y=y, index=index).y.tolist() == wanted
    with pytest.raises(UserError, match="are not those of the 4 images"):
        noise.make(**told, variant=readers.JPEG, y=(y + 1) % 10, index=index)
    with pytest.raises(UserError, match="are not those of the 1 images"):
        noise.make(**told, variant=readers.JPEG, y=y[:1], index=np.array([200]))


@pytest.mark.realdata
@pytest.mark.parametrize(("kind", "rate"), [("aggre", 0.0901), ("random1", 0.1723), ("worse", 0.4021)])
def test_human_noise_rates_on_whatever_copy_is_here(kind, rate, tmp_path):
    folder = data_dir("")
    if not (folder / "cifar-n" / "CIFAR-10_human.npz").is_file() or not (folder / "cifar10").is_dir():
        pytest.skip(f"CIFAR-10 and its human labels are not in {folder}")
    d = readers.load("cifar10", folder)
    where = {"folder": folder, "cache": tmp_path, "dataset": "cifar10", "variant": d.variant, "classes": 10}
    every = noise.make(kind=kind, rho=0.4, seed=0, x=d.train.x.numpy(), y=d.train.y.numpy(),
                       index=d.train.index.numpy(), **where)  # fmt: skip
    assert every.rate == pytest.approx(rate, abs=5e-5)
    part = readers.load("cifar10", folder, seed=5, pretrain=1000, train_limit=2000).train
    some = noise.make(kind=kind, rho=0.4, seed=0, x=part.x.numpy(), y=part.y.numpy(), index=part.index.numpy(), **where)
    assert (some.y == every.y[part.index.numpy()]).all() and abs(some.rate - rate) < 0.03


@pytest.mark.realdata
def test_the_human_labels_lie_with_the_pictures_of_the_copy():
    """A picture's wrong label is likelier by what the picture looks like than a wrong label of another picture of its
    class: the order within the classes is right."""
    folder = data_dir("")
    if not (folder / "cifar-n" / "CIFAR-10_human.npz").is_file() or not (folder / "cifar10").is_dir():
        pytest.skip(f"CIFAR-10 and its human labels are not in {folder}")
    part = readers.load("cifar10", folder, train_limit=12000).train
    y = part.y.numpy()
    noisy = noise.human("worse", "cifar10", readers.JPEG, y, part.index.numpy(), folder)
    flat = torch.nn.functional.avg_pool2d(part.x.permute(0, 3, 1, 2).float(), 4).flatten(1).numpy() / 255
    model = make_pipeline(StandardScaler(), LogisticRegression(tol=0.05)).fit(flat, y)
    log = model.predict_log_proba(flat)
    wrong = np.flatnonzero(noisy != y)
    rng, shuffled = np.random.RandomState(0), []
    for _ in range(20):
        moved = noisy.copy()
        for k in range(10):
            mine = wrong[y[wrong] == k]
            moved[mine] = noisy[rng.permutation(mine)]
        shuffled.append(log[wrong, moved[wrong]].mean())
    assert log[wrong, noisy[wrong]].mean() > np.mean(shuffled) + 4 * np.std(shuffled)
