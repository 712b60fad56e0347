"""Graphs, positive-unlabelled splits and batches of seeds.

A data set is read through its torch_geometric class once and kept as a safetensors file named by the hash of
its raw files, so a changed raw file is never mistaken for the old one and two runs never write the same file.
"""

import contextlib
import hashlib
import io
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from lab.runs import UserError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# CSR products are what makes everything here fast; that the layout is called beta needs no line in every log.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
torch.sparse.check_sparse_tensor_invariants.disable()  # the library warns while this is left unsaid

PLANETOID = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
OUT1 = ("out1_node_feature_label.txt", "out1_graph_edges.txt")
SPLITS = tuple(range(10))


@dataclass(frozen=True)
class Source:
    """Where a data set's raw files lie below `<data-dir>/graphs` and who published them."""

    title: str
    raw: str  # folder of the raw files
    files: tuple[str, ...]
    origin: str
    h: float | None  # edge heterophily of the raw multi-class labels as measured on the raw files


def _planetoid(title: str, raw: str, key: str, h: float) -> Source:
    return Source(
        title, f"{raw}/raw", tuple(f"ind.{key}.{p}" for p in PLANETOID), "github.com/kimiyoung/planetoid (data/)", h
    )


def _geom(title: str, raw: str, split: str, h: float) -> Source:
    files = OUT1 + tuple(f"{split}_split_0.6_0.2_{i}.npz" for i in SPLITS)
    return Source(title, raw, files, "github.com/graphdml-uiuc-jlu/geom-gcn (new_data/, splits/)", h)


def _platonov(title: str, file: str, h: float) -> Source:
    return Source(title, "extra_platonov", (file,), "github.com/yandex-research/heterophilous-graphs (data/)", h)


# In the paper's order: growing (multi-class) heterophily.
SOURCES: dict[str, Source] = {
    "cora": _planetoid("Cora", "Cora", "cora", 0.1900),
    "pubmed": _planetoid("PubMed", "PubMed", "pubmed", 0.1976),
    "citeseer": _planetoid("CiteSeer", "CiteSeer", "citeseer", 0.2645),
    "wikics": Source("Wiki-CS", "wikics/raw", ("data.json",), "github.com/pmernyei/wiki-cs-dataset (dataset/)", None),
    "cornell": _geom("Cornell", "cornell/raw", "cornell", 0.6946),
    "chameleon": _geom("Chameleon", "chameleon/geom_gcn/raw", "chameleon", 0.7650),
    "squirrel": _geom("Squirrel", "squirrel/geom_gcn/raw", "squirrel", 0.7761),
    "actor": _geom("Actor", "actor/raw", "film", 0.7812),
    "wisconsin": _geom("Wisconsin", "wisconsin/raw", "wisconsin", 0.8039),
    "texas": _geom("Texas", "texas/raw", "texas", 0.8923),
    # Not in the paper: duplicates removed, and the Cornell graph with its own features (sensitivity rows).
    "cornell-own": _platonov("Cornell (own features)", "cornell.npz", 0.8773),
    "chameleon-filtered": _platonov("Chameleon (filtered)", "chameleon_filtered.npz", 0.7639),
    "squirrel-filtered": _platonov("Squirrel (filtered)", "squirrel_filtered.npz", 0.7928),
}
# The paper's ten; the rest of SOURCES are sensitivity variants.
PAPER_SETS = tuple(SOURCES)[:10]
GENERATED = ("synthetic", "karate")
DATASETS = (*SOURCES, *GENERATED)


@dataclass(frozen=True)
class Graph:
    """One graph with binary labels.

    x: [N, F] float32, rows sum to 1 (bag of words) or raw (generated); y: [N] int64, 1 = positive;
    classes: [N] int64 original class ids; edge: [2, E] int64, every undirected edge once with edge[0] < edge[1];
    h: share of *directed* raw edges that join different original classes (the paper's heterophily ratio);
    labelled: [N] bool, P where the graph brings it itself; known: whether y holds the truth about U.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: Tensor
    edge: Tensor
    h: float
    sha256: str
    labelled: Tensor | None = None
    known: bool = True

    @property
    def h_binary(self) -> float:
        """Share of undirected edges that join a positive and a negative."""
        return (self.y[self.edge[0]] != self.y[self.edge[1]]).double().mean().item() if self.edge.shape[1] else 0.0


def binarise(classes: Tensor) -> Tensor:
    """Largest class -> 1, the rest -> 0; the smallest id wins a tie (Squirrel is close to one)."""
    return (classes == torch.bincount(classes).argmax()).long()


def undirected(edge_index: Tensor, num_nodes: int) -> Tensor:
    """[2, E'] directed, with loops and duplicates -> [2, E] undirected edges i < j, each once, sorted."""
    i, j = edge_index.min(0).values, edge_index.max(0).values
    key = torch.unique((i * num_nodes + j)[i != j])
    return torch.stack([key // num_nodes, key % num_nodes])


def _file_hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def missing_files(name: str, data_dir: str | Path) -> list[Path]:
    """Raw files of a data set that are not below `data_dir` (empty list: complete; generated sets need none)."""
    if name in GENERATED:
        return []
    source = SOURCES[name]
    folder = Path(data_dir) / "graphs" / source.raw
    return [folder / f for f in source.files if not (folder / f).is_file()]


def load_graph(name: str, data_dir: str | Path, cache_dir: str | Path, download: bool = False) -> Graph:
    """Read a published data set from `<data_dir>/graphs`; `download` lets torch_geometric fetch it there first.

    Raises UserError with the missing file, its official source and the expected place.
    """
    if name == "karate":
        return karate()
    source, root = SOURCES[name], Path(data_dir) / "graphs"
    missing = missing_files(name, data_dir)
    if missing and download and source.raw != "extra_platonov":
        try:
            _torch_geometric(name, root)
        except Exception as error:  # any network or parsing error of the library: keep its reason
            raise UserError(
                f"download of {name} failed ({type(error).__name__}: {error}); place {missing[0]}"
            ) from None
        missing = missing_files(name, data_dir)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"data set {name}: {missing[0]} is missing{more}; get it from {source.origin}, or pass --download, "
            f"or point --data-dir (or $REPRO_DATA) at a folder with graphs/{source.raw}/"
        )
    paths = [root / source.raw / f for f in source.files]
    sha = _file_hash(paths)
    cached = Path(cache_dir) / f"{name}-{sha[:16]}.safetensors"
    t = _read_cache(cached, name, root, source)
    if not torch.isfinite(t["x"]).all():
        raise UserError(f"data set {name}: features hold NaN or infinity; fetch it again from {source.origin}")
    if source.h is not None and abs(t["h"].item() - source.h) > 1e-4:
        raise UserError(
            f"data set {name}: heterophily {t['h'].item():.4f} instead of {source.h:.4f}, so a raw file is damaged or "
            f"changed; fetch it again from {source.origin}"
        )
    if (t["classes"] == t["classes"][0]).all():
        raise UserError(f"data set {name}: all nodes are of one class; fetch it again from {source.origin}")
    y = binarise(t["classes"])
    return Graph(name, t["x"], y, t["classes"], t["edge"], t["h"].item(), sha)


def _read_cache(cached: Path, name: str, root: Path, source: Source) -> dict[str, Tensor]:
    """Tensors of the cache file, made from the raw files when it is missing or damaged."""
    if cached.is_file():
        try:
            return load_file(cached)
        except SafetensorError:
            cached.unlink()
    try:
        # The library talks to stderr while it reads.
        with contextlib.redirect_stderr(io.StringIO()):
            platonov = source.raw == "extra_platonov"
            tensors = _platonov_arrays(root / source.raw / source.files[0]) if platonov else _process(name, root)
    except OSError:
        raise  # no space, no permission: nothing is wrong with the raw files
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise UserError(
            f"data set {name}: cannot read {root / source.raw} ({type(error).__name__}: {error}); "
            f"fetch it again from {source.origin}"
        ) from None
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary)
    os.replace(temporary, cached)
    return tensors


def _torch_geometric(name: str, root: Path):
    """The torch_geometric data set object for `name` below `root` (downloads when raw files are missing)."""
    from torch_geometric import datasets

    title = SOURCES[name].title
    if name in ("cora", "citeseer", "pubmed"):
        return datasets.Planetoid(str(root), title)
    if name in ("cornell", "texas", "wisconsin"):
        return datasets.WebKB(str(root), name)
    if name in ("chameleon", "squirrel"):
        return datasets.WikipediaNetwork(str(root), name, geom_gcn_preprocess=True)
    return {"actor": datasets.Actor, "wikics": datasets.WikiCS}[name](str(root / name))


def _process(name: str, root: Path) -> dict[str, Tensor]:
    """Run the torch_geometric reader in a scratch folder that links to the raw files (it writes beside them)."""
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / SOURCES[name].raw
        link.parent.mkdir(parents=True)
        link.symlink_to((root / SOURCES[name].raw).resolve(), target_is_directory=True)
        data = _torch_geometric(name, Path(scratch))[0]
    return _tensors(data.x, data.y, data.edge_index)


def _platonov_arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as z:
        x, y, edges = z["node_features"], z["node_labels"], z["edges"]
    return _tensors(torch.from_numpy(x).float(), torch.from_numpy(y).long(), torch.from_numpy(edges).long().t())


def _tensors(x: Tensor, y: Tensor, edge_index: Tensor) -> dict[str, Tensor]:
    if not len(y) or not edge_index.numel() or min(y.min(), edge_index.min()) < 0 or edge_index.max() >= len(y):
        raise ValueError("no edges, or a label or an edge end out of range")
    x = x.to_dense() if x.layout != torch.strided else x
    h = (y[edge_index[0]] != y[edge_index[1]]).double().mean()
    edge = undirected(edge_index, len(y)).contiguous()
    # Row-normalised bag of words; all-zero rows stay zero.
    return {"x": x / x.abs().sum(1, keepdim=True).clamp(min=1e-12), "classes": y.long(), "edge": edge, "h": h}


def karate() -> Graph:
    """Zachary's karate club out of networkx-free torch_geometric: 34 nodes, one-hot features (smoke test only)."""
    from torch_geometric.datasets import KarateClub

    data = KarateClub()[0]
    t = _tensors(data.x.float(), data.y, data.edge_index)
    digest = hashlib.sha256(t["edge"].numpy().tobytes() + t["classes"].numpy().tobytes()).hexdigest()
    return Graph("karate", t["x"], binarise(t["classes"]), t["classes"], t["edge"], t["h"].item(), digest)


def synthetic(seed: int, h: float, n: int = 600, prior: float = 0.4, degree: float = 8.0, mu: float = 0.73) -> Graph:
    """A random graph with exactly round(h * E) edges between positives and negatives, E = n * degree / 2.

    Features are N(+-mu * u, I) in R^16 with a random unit vector u; mu = 0.73 separates the two classes with an
    AUC of Phi(sqrt(2) mu) = 0.85. Degrees are free of the label: same-class edges are drawn in proportion to the
    share of ends each class has left, so that a node's degree says nothing about its class.
    Raises UserError when the requested heterophily cannot be drawn without repeated edges.
    """
    rng = np.random.default_rng([seed, 20919])
    y = np.zeros(n, dtype=np.int64)
    y[rng.permutation(n)[: round(prior * n)]] = 1
    pos, neg = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    total = round(n * degree / 2)
    between = round(h * total)
    within_pos = round(total * prior - between / 2)  # equal mean degree in both classes
    within_neg = total - between - within_pos
    if within_pos < 0 or within_neg < 0:
        raise UserError(f"--h {h} is not possible with a share of positives of {prior}: at most {2 * prior:.2f}")

    def draw(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
        keys = np.empty(0, dtype=np.int64)
        while len(keys) < count:
            i, j = rng.choice(a, 2 * count), rng.choice(b, 2 * count)
            lo, hi = np.minimum(i, j), np.maximum(i, j)
            fresh = (lo * n + hi)[lo != hi]
            both = np.concatenate([keys, fresh])
            keys = both[np.sort(np.unique(both, return_index=True)[1])]  # unique, first come first kept
        return keys[:count]

    keys = np.sort(np.concatenate([draw(pos, neg, between), draw(pos, pos, within_pos), draw(neg, neg, within_neg)]))
    edge = torch.from_numpy(np.stack([keys // n, keys % n]))
    u = rng.normal(size=16)
    u /= np.linalg.norm(u)
    x = torch.from_numpy(rng.normal(size=(n, 16)) + mu * np.outer(2 * y - 1, u)).float()
    labels = torch.from_numpy(y)
    digest = hashlib.sha256(edge.numpy().tobytes() + x.numpy().tobytes()).hexdigest()
    return Graph("synthetic", x, labels, labels.clone(), edge, between / total, digest)


@dataclass(frozen=True)
class Split:
    """Masks of one PU split, each [N] bool. labelled = P; held_p (inside P) and held_u (inside U) are kept out of
    every loss and serve the class-prior estimate only. Scores are always reported on all of U = ~labelled."""

    labelled: Tensor
    held_p: Tensor
    held_u: Tensor


def pu_split(
    y: Tensor, r_p: float, holdout_p: float, holdout_u: float, seed: int, labelled: Tensor | None = None
) -> Split:
    """P = floor(r_p * positives) positives drawn uniformly, or `labelled` [N]; the held-out shares are drawn from P and
    from U."""
    rng = np.random.default_rng([seed, 19919])
    pos = np.flatnonzero((y == 1 if labelled is None else labelled).numpy())
    take = int(r_p * len(pos)) if labelled is None else len(pos)
    if take < 1:
        raise UserError(f"--r-p {r_p} leaves no labelled positive out of {len(pos)}; raise it")
    order = rng.permutation(pos)
    p, u = order[:take], rng.permutation(np.setdiff1d(np.arange(len(y)), order[:take]))
    masks = [torch.zeros(len(y), dtype=torch.bool) for _ in range(3)]
    masks[0][p] = True
    # At least one labelled node must stay in the loss.
    masks[1][p[: min(round(holdout_p * take), take - 1)]] = True
    masks[2][u[: round(holdout_u * len(u))]] = True
    return Split(*masks)


class GraphBatch:
    """S graphs (or S copies of one) as one block-diagonal sparse structure on a device.

    All graphs have the same N and E. `edge_i`, `edge_j` [S, E] are node ids inside a graph with i < j. `crow`
    [S*N+1], `col` [S*2E] int32 are the CSR pattern of the symmetric block-diagonal adjacency without self loops;
    `slot` [S*2E] says which of the S*E undirected edges fills an entry, so one weight serves both directions.
    """

    def __init__(self, graphs: list[Graph], seeds: int, device: torch.device | str):
        if len(graphs) not in (1, seeds):
            raise ValueError("pass one graph for all seeds, or one a seed")
        if len({(len(g.y), g.edge.shape[1]) for g in graphs}) != 1:
            raise ValueError("graphs of a batch must agree in their number of nodes and edges")
        self.device, self.S, self.N, self.E = torch.device(device), seeds, len(graphs[0].y), graphs[0].edge.shape[1]
        rows, cols, slots = [], [], []
        for s in range(seeds):
            i, j = graphs[s % len(graphs)].edge
            ids = torch.arange(self.E)
            row, col = torch.cat([i, j]), torch.cat([j, i])
            order = torch.argsort(row * self.N + col)
            rows.append(row[order] + s * self.N)
            cols.append(col[order] + s * self.N)
            slots.append(torch.cat([ids, ids])[order] + s * self.E)
        counts = torch.bincount(torch.cat(rows), minlength=seeds * self.N)
        self.crow = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).int().to(device)
        self.col = torch.cat(cols).int().to(device)
        self.row = torch.cat(rows).to(device)
        self.slot = torch.cat(slots).to(device)
        # Entry (i, j) -> entry (j, i): the two entries of an edge stand side by side when sorted by slot.
        pair = torch.argsort(self.slot, stable=True).view(-1, 2)
        self.reverse = torch.empty_like(self.slot).scatter_(0, pair.reshape(-1), pair.flip(1).reshape(-1))
        pick = [graphs[s % len(graphs)] for s in range(seeds)]
        self.edge_i = torch.stack([g.edge[0] for g in pick]).to(device)
        self.edge_j = torch.stack([g.edge[1] for g in pick]).to(device)
        self.y = torch.stack([g.y for g in pick]).to(device)
        self.F = graphs[0].x.shape[1]
        if len(graphs) == 1 and (graphs[0].x != 0).float().mean() < 0.2:
            # Bags of words are about 1 % dense: keep X and its transpose as CSR for both directions of X @ W.
            x = graphs[0].x
            self.x, self.x_t = x.to_sparse_csr().to(device), x.t().contiguous().to_sparse_csr().to(device)
        else:
            x = torch.stack([g.x for g in graphs])
            self.x, self.x_t = x.expand(seeds, -1, -1).to(device), None

    def values(self, weight: Tensor) -> Tensor:
        """Weights of undirected edges [S, E] -> CSR values [S*2E], both directions equal."""
        return weight.reshape(-1).index_select(0, self.slot)

    def matmul(self, values: Tensor, h: Tensor) -> Tensor:
        """Block-diagonal product: values [S*2E] (or a prepared matrix), h [S, N, C] -> [S, N, C]. No autograd."""
        size = (self.S * self.N,) * 2
        matrix = torch.sparse_csr_tensor(self.crow, self.col, values, size, check_invariants=False)
        return (matrix @ h.reshape(self.S * self.N, -1)).view(self.S, self.N, -1)

    def degree(self, values: Tensor) -> Tensor:
        """Sum of a node's edge weights, [S, N]."""
        return self.matmul(values, values.new_ones(self.S, self.N, 1)).squeeze(-1)
