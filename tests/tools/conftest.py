"""A model that captures and exports in a moment, importable by name as users' own models are."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TINY = '''
"""Two convolutions and a classifier."""

import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, image):
        x = torch.relu(self.norm(self.first(image)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def make():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed({seed})
        model = Tiny().eval()
        nn.init.uniform_(model.norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    return model, (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),), {{}}


def calibration(batches=2):
    generator = torch.Generator().manual_seed(1)
    return lambda program, image: program(image).square().mean(), [
        torch.randn(2, 3, 8, 8, generator=generator) for _ in range(batches)
    ]


def not_a_calibration():
    return 3
'''

Write = Callable[..., str]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what the command line caches away from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("GRAPHWRIGHT_NO_CACHE", raising=False)
        yield folder / "graphwright"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Write]:
    """Write the model's module, with another seed or other code if asked, and return its factory's name."""
    folder = tmp_path_factory.mktemp("models")
    file: Path = folder / "graphwright_tiny.py"

    def write(seed: int = 0, old: str = "", new: str = "") -> str:
        sys.modules.pop(file.stem, None)
        text = TINY.format(seed=seed)
        assert old in text
        file.write_text(text.replace(old, new) if old else text, encoding="utf-8")
        # Two writes within a second may have the same time stamp, by which Python takes old bytecode for current.
        importlib.invalidate_caches()
        for cached in folder.glob("__pycache__/*"):
            cached.unlink()
        return f"{file.stem}:make"

    sys.path.insert(0, str(folder))
    write()
    yield write
    sys.path.remove(str(folder))
    sys.modules.pop(file.stem, None)
