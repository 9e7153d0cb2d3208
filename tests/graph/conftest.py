"""Shared by the tests of the graph: their helper modules, and one deterministic profile for property tests."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).parent))

OPTIONS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": (hypothesis.Phase.generate, hypothesis.Phase.shrink),
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("graph", max_examples=20, **OPTIONS)
# For work on a rule: pytest --hypothesis-profile=thorough
hypothesis.settings.register_profile("thorough", max_examples=500, **OPTIONS)
hypothesis.settings.load_profile("graph")
torch.set_num_threads(1)
