from pathlib import Path

import pytest
from imagenet_runs import draw


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw(tmp_path / "data" / "train", 12)
    draw(tmp_path / "data" / "val", 6)
    return tmp_path / "data"
