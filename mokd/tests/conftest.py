import os
from pathlib import Path

import pytest


@pytest.fixture
def realdata():
    folder = Path(os.environ.get("REPRO_DATA", ""))
    if not os.environ.get("REPRO_DATA") or not (folder / "omniglot").is_dir():
        pytest.skip("no Omniglot and MNIST under $REPRO_DATA")
    return folder
