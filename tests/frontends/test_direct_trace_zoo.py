"""Traces without torch.export of every architecture of the zoo but those of timm: the programs of torch.export."""

from __future__ import annotations

from typing import Any

import pytest

from graphwright.tools.zoo import entries, missing

from .two_traces import same

pytestmark = pytest.mark.slow

# The first reads the numbers of its image tokens, hooks of the others set attributes: left to torch.export.
LEFT = {"llava", "raises/weight_norm_old", "raises/spectral_norm_old"}
FAMILIES = ["torch", "odd", "transformers", "diffusers"]
# Calls one activation under two names; torch.export says under which.
TWO_NAMES = {"vae_tiny"}
ENTRIES = [entry for entry in entries(FAMILIES) if not missing(entry) and entry.name not in LEFT]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_program_is_that_of_torch_export(entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = entry.build()
    same(monkeypatch, case.model, case.args, case.kwargs, origins=entry.name not in TWO_NAMES)
