import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setenv("MOKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def realdata():
    folder = Path(os.environ.get("REPRO_DATA", ""))
    if not os.environ.get("REPRO_DATA") or not (folder / "omniglot").is_dir():
        pytest.skip("no Omniglot and MNIST under $REPRO_DATA")
    return folder
