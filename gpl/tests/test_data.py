"""Graphs, splits, batches; real files when they are there."""

import os
import shutil
from pathlib import Path

from lab.runs import UserError, data_dir

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.utils import homophily

import data
from data import GraphBatch

# N, undirected edges, features, classes, h, positives, |P| at r_p = 0.5, measured on the raw files.
FACTS = {
    "cora": (2708, 5278, 1433, 7, 0.1900, 818, 409),
    "citeseer": (3327, 4552, 3703, 6, 0.2645, 701, 350),
    "cornell": (183, 277, 1703, 5, 0.6946, 101, 50),
    "chameleon": (2277, 31371, 2325, 5, 0.7650, 521, 260),
    "squirrel": (5201, 198353, 2089, 5, 0.7761, 1042, 521),
    "actor": (7600, 26659, 932, 5, 0.7812, 1965, 982),
    "wisconsin": (251, 450, 1703, 5, 0.8039, 118, 59),
    "texas": (183, 279, 1703, 5, 0.8923, 101, 50),
    "cornell-own": (183, 277, 1703, 5, 0.8773, 82, 41),
    "chameleon-filtered": (890, 8854, 2325, 5, 0.7639, 242, 121),
    "squirrel-filtered": (2223, 46998, 2089, 5, 0.7928, 756, 378),
}
REAL = Path(os.environ.get("REPRO_DATA", "/nonexistent"))
realdata = pytest.mark.skipif(not (REAL / "graphs").is_dir(), reason="REPRO_DATA has no graphs/")


@pytest.mark.realdata
@realdata
@pytest.mark.parametrize("name", FACTS)
def test_real_graphs_have_the_measured_statistics(name, tmp_path):
    g = data.load_graph(name, REAL, tmp_path)
    n, e, f, classes, h, positives, p = FACTS[name]
    assert (len(g.y), g.edge.shape[1], g.x.shape[1], int(g.classes.max()) + 1) == (n, e, f, classes)
    assert g.h == pytest.approx(h, abs=5e-5) and int(g.y.sum()) == positives
    assert int(data.pu_split(g.y, 0.5, 0, 0, 0).labelled.sum()) == p
    sums = g.x.sum(1)
    assert ((sums - 1).abs() < 1e-4).logical_or(sums == 0).all()  # rows sum to one, empty rows stay empty
    again = data.load_graph(name, REAL, tmp_path)  # now out of the cache
    assert torch.equal(again.x, g.x) and torch.equal(again.edge, g.edge) and again.sha256 == g.sha256


@pytest.mark.realdata
@realdata
def test_cornell_carries_the_features_of_texas_but_not_its_edges(tmp_path):
    cornell, texas = (data.load_graph(n, REAL, tmp_path) for n in ("cornell", "texas"))
    assert torch.equal(cornell.x, texas.x) and torch.equal(cornell.y, texas.y)
    assert cornell.edge.shape != texas.edge.shape


@pytest.mark.realdata
@realdata
def test_a_truncated_raw_file_is_told_and_leaves_no_cache(tmp_path):
    folder = tmp_path / "graphs" / "texas" / "raw"
    shutil.copytree(REAL / "graphs" / "texas" / "raw", folder)
    os.chmod(folder, 0o755)
    path = folder / "out1_node_feature_label.txt"
    os.chmod(path, 0o644)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot read"):
        data.load_graph("texas", tmp_path, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


@pytest.mark.realdata
@realdata
def test_missing_edges_and_a_damaged_cache_are_noticed(tmp_path):
    folder = tmp_path / "graphs" / "texas" / "raw"
    shutil.copytree(REAL / "graphs" / "texas" / "raw", folder)
    os.chmod(folder, 0o755)
    g = data.load_graph("texas", tmp_path, tmp_path / "cache")
    (cached,) = (tmp_path / "cache").glob("*")
    cached.write_bytes(cached.read_bytes()[:1000])
    assert torch.equal(data.load_graph("texas", tmp_path, tmp_path / "cache").edge, g.edge)
    path = folder / "out1_graph_edges.txt"
    os.chmod(path, 0o644)
    path.write_text("\n".join(path.read_text().splitlines()[:150]) + "\n")
    with pytest.raises(UserError, match="heterophily"):
        data.load_graph("texas", tmp_path, tmp_path / "cache")


def test_missing_files_are_named_with_source_and_place(tmp_path):
    for name in ("pubmed", "wikics", "texas", "cornell-own"):
        with pytest.raises(UserError) as error:
            data.load_graph(name, tmp_path, tmp_path)
        text = str(error.value)
        assert str(tmp_path / "graphs") in text and "github.com" in text and "--data-dir" in text and "\n" not in text


def test_missing_names_the_one_file_that_lacks(tmp_path):
    folder = tmp_path / "graphs" / "PubMed" / "raw"
    folder.mkdir(parents=True)
    for name in data.SOURCES["pubmed"].files:
        if not name.endswith("allx"):
            (folder / name).touch()
    with pytest.raises(UserError, match="ind.pubmed.allx is missing;"):
        data.load_graph("pubmed", tmp_path, tmp_path)


def test_a_graph_of_one_class_is_told(tmp_path, monkeypatch):
    (tmp_path / "graphs" / "wikics" / "raw").mkdir(parents=True)
    (tmp_path / "graphs" / "wikics" / "raw" / "data.json").write_text("{}")
    same = data._tensors(torch.eye(3), torch.ones(3, dtype=torch.long), torch.tensor([[0, 1], [1, 2]]))
    monkeypatch.setattr(data, "_process", lambda *_: same)
    with pytest.raises(UserError, match="all nodes are of one class"):
        data.load_graph("wikics", tmp_path, tmp_path / "cache")


def test_undirected_drops_loops_and_duplicates():
    edge = data.undirected(torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 1, 0, 0, 3]]), 4)
    assert edge.tolist() == [[0, 0, 0], [1, 2, 3]]


def test_largest_class_is_positive_and_the_first_wins_a_tie():
    assert data.binarise(torch.tensor([2, 2, 1, 1, 0])).tolist() == [0, 0, 1, 1, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.floats(0.2, 1.0), st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 10**6))
def test_split_sizes_and_sides(positives, r_p, hold_p, hold_u, seed):
    y = torch.cat([torch.ones(positives, dtype=torch.long), torch.zeros(40, dtype=torch.long)])
    if int(r_p * positives) < 1:
        with pytest.raises(UserError):
            data.pu_split(y, r_p, hold_p, hold_u, seed)
        return
    s = data.pu_split(y, r_p, hold_p, hold_u, seed)
    assert int(s.labelled.sum()) == int(r_p * positives)
    assert not (s.labelled & (y == 0)).any()
    assert not (s.held_p & ~s.labelled).any() and not (s.held_u & s.labelled).any()
    assert (s.labelled & ~s.held_p).any()  # something is left to train on
    again = data.pu_split(y, r_p, 0.0, 0.0, seed)
    assert torch.equal(again.labelled, s.labelled)  # P does not depend on what is held out


@pytest.mark.parametrize("h", [0.1, 0.3, 0.5, 0.7])
def test_generator_draws_the_heterophily_it_is_asked_for(h):
    g = data.synthetic(3, h)
    assert g.h == g.h_binary == pytest.approx(h) and g.edge.shape == (2, 2400) and int(g.y.sum()) == 240
    assert homophily(g.edge, g.y, method="edge") == pytest.approx(1 - h)
    assert len({tuple(e) for e in g.edge.t().tolist()}) == 2400 and (g.edge[0] < g.edge[1]).all()
    degree = torch.bincount(g.edge.reshape(-1), minlength=600).float()
    assert degree[g.y == 1].mean().item() == pytest.approx(degree[g.y == 0].mean().item(), rel=0.01)
    assert data.synthetic(3, h).sha256 == g.sha256 != data.synthetic(4, h).sha256


def test_generator_refuses_the_impossible():
    with pytest.raises(UserError, match="not possible"):
        data.synthetic(0, 0.95)


def test_batch_matmul_equals_dense_for_graphs_of_their_own():
    graphs = [data.synthetic(s, 0.3, n=60) for s in range(3)]
    batch = GraphBatch(graphs, 3, "cpu")
    weight, h = torch.rand(3, batch.E), torch.randn(3, 60, 4)
    out = batch.matmul(batch.values(weight), h)
    for s, g in enumerate(graphs):
        a = torch.zeros(60, 60)
        a[g.edge[0], g.edge[1]] = weight[s]
        torch.testing.assert_close(out[s], (a + a.t()) @ h[s], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        batch.degree(batch.values(weight)), batch.matmul(batch.values(weight), torch.ones(3, 60, 1)).squeeze(-1)
    )


def test_batch_refuses_mixed_sizes():
    with pytest.raises(ValueError):
        GraphBatch([data.synthetic(0, 0.3, n=60), data.synthetic(0, 0.3, n=80)], 2, "cpu")
    with pytest.raises(ValueError):
        GraphBatch([data.synthetic(0, 0.3, n=60)] * 2, 3, "cpu")


def test_memory_grows_with_edges_not_with_nodes_squared():
    """A PubMed-sized graph: nothing the batch holds comes near N x N."""
    g = data.synthetic(0, 0.2, n=19717, degree=9)
    batch = GraphBatch([g], 1, "cpu")
    held = sum(t.numel() for t in vars(batch).values() if isinstance(t, torch.Tensor))
    assert held < 40 * (batch.E + batch.N) < batch.N**2 / 20


def test_data_folder_default():
    assert data_dir("") == Path(os.environ.get("REPRO_DATA") or Path(data.__file__).parent / "data")
    assert np.isfinite(data.karate().x.numpy()).all()
