"""A graph of the reader's own: torch_geometric's `Data`, a saved one, or arrays, as the Graph that is used here.

from_pyg(data, positive=2)                       # class 2 is positive; half of its nodes are labelled, by seed
from_pyg(data, labelled="train_mask")            # nodes known to be positive; nothing is known of the others
from_pyg(data, positive=2, labelled=[4, 17])     # these are labelled, and F1 can be computed on the rest
"""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.runs import UserError

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from data import Graph, undirected


def from_pyg(
    data: Data, positive: int | None = None, labelled: str | Tensor | Sequence[int] | None = None, name: str = "own"
) -> Graph:
    """Data with x [N, F], edge_index [2, E'] (any direction, loops and repeats allowed) -> Graph.

    positive: the class of data.y [N] that counts as positive; None: the labels of U are not known, and nothing is
    scored. labelled: the nodes known to be positive, as a mask [N], as node ids, or as the name of such an attribute
    of `data`; None: train.py draws them from the positives (--r-p). Features enter as they are. UserError for what
    cannot be right.
    """
    x, edge_index = data.x, data.edge_index
    if x is None or edge_index is None:
        raise UserError(f"graph {name} needs x [N, F] and edge_index [2, E]")
    x = torch.as_tensor(x).detach().cpu()
    x = (x.to_dense() if x.layout != torch.strided else x).float()
    edge_index = torch.as_tensor(edge_index).detach().cpu().long()
    if x.ndim != 2 or not x.numel() or edge_index.ndim != 2 or len(edge_index) != 2:
        shapes = f"{tuple(x.shape)} and {tuple(edge_index.shape)}"
        raise UserError(f"graph {name} needs x [N, F] and edge_index [2, E], not {shapes}")
    n = len(x)
    if not torch.isfinite(x).all():
        raise UserError(f"graph {name}: features hold NaN or infinity")
    if edge_index.numel() and (edge_index.min() < 0 or edge_index.max() >= n):
        raise UserError(f"graph {name}: an edge ends at node {int(edge_index.max())}, but there are {n} nodes")
    edge = undirected(edge_index, n).contiguous()
    if not edge.shape[1]:
        raise UserError(f"graph {name} has no edge between two nodes")
    known = None if labelled is None else _mask(data, labelled, n, name)
    if positive is None:
        if known is None:
            raise UserError(f"graph {name}: say which class is positive, or which nodes are labelled (or both)")
        classes = known.long()
    else:
        y = data.y
        if y is None or torch.as_tensor(y).numel() != n:
            raise UserError(f"graph {name}: a positive class needs y with one class a node")
        classes = torch.as_tensor(y).detach().cpu().reshape(-1).long()
        if not 0 < int((classes == positive).sum()) < n:
            found = ", ".join(map(str, classes.unique().tolist()[:10]))
            raise UserError(f"graph {name}: class {positive} is no class among others; there are {found}")
        if known is not None and (classes[known] != positive).any():
            raise UserError(
                f"graph {name}: some labelled nodes are not of class {positive}; only positives are labelled"
            )
    y = known.long() if positive is None else (classes == positive).long()
    h = (classes[edge[0]] != classes[edge[1]]).double().mean().item() if positive is not None else 0.0
    digest = hashlib.sha256()
    for part in (x, edge, classes, torch.zeros(0) if known is None else known):
        digest.update(part.numpy().tobytes())
    return Graph(name, x, y, classes, edge, h, digest.hexdigest(), known, positive is not None)


def _mask(data: Data, labelled, n: int, name: str) -> Tensor:
    """[N] bool of the labelled positives."""
    if isinstance(labelled, str):
        if labelled not in data:
            raise UserError(f"graph {name} has no '{labelled}'; it has {', '.join(sorted(data.keys()))}")
        labelled = data[labelled]
    found = torch.as_tensor(labelled).detach().cpu().reshape(-1)
    if found.dtype != torch.bool:
        if len(found) and (found.min() < 0 or found.max() >= n):
            raise UserError(f"graph {name}: labelled node {int(found.max())}, but there are {n} nodes")
        found = torch.zeros(n, dtype=torch.bool).index_fill_(0, found.long(), True)
    if len(found) != n or not 1 < int(found.sum()) < n:
        raise UserError(f"graph {name}: a mask of {n} nodes with two labelled ones at least, and not all, is needed")
    return found


def read(path: str | Path, positive: int | None = None, labelled: str = "") -> Graph:
    """A graph out of a file: .pt with a Data or a dict of tensors, or .npz, with x, edge_index, and y or labelled.

    `labelled` names the array of the labelled positives (default: `labelled`, where the file has it).
    """
    path = Path(path)
    if path.suffix not in (".pt", ".npz"):
        raise UserError(f"--graph {path} is neither .pt nor .npz")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                content = {k: torch.from_numpy(arrays[k]) for k in arrays.files}
        else:
            with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--graph {path}: no such file") from None
    except pickle.UnpicklingError:  # the library's own words are a page on switching its check off
        raise UserError(
            f"--graph {path} is damaged, or holds more than tensors: "
            "save a dict by torch.save(dict(x=x, edge_index=e, y=y), path)"
        ) from None
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, KeyError) as error:
        raise UserError(f"--graph {path} cannot be read ({str(error).splitlines()[0]})") from None
    if isinstance(content, Mapping):
        content = Data(**{str(k): v for k, v in content.items()})
    if not isinstance(content, Data):
        raise UserError(f"--graph {path} holds a {type(content).__name__}; a Data or a dict of tensors is needed")
    return from_pyg(content, positive, labelled or ("labelled" if "labelled" in content else None), path.stem)
