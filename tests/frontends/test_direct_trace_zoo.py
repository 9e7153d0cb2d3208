"""Traces without torch.export of every architecture of transformers and diffusers in the zoo: those of torch.export."""

from __future__ import annotations

from typing import Any

import pytest

from graphwright.tools.zoo import entries, missing

from .two_traces import same

pytestmark = pytest.mark.slow

# It reads the numbers of its image tokens, which is left to torch.export.
READS_VALUES = {"llava"}
# Calls one activation under two names; torch.export says under which.
TWO_NAMES = {"vae_tiny"}
ENTRIES = [e for e in entries(["transformers", "diffusers"]) if not missing(e) and e.name not in READS_VALUES]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_program_is_that_of_torch_export(entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = entry.build()
    same(monkeypatch, case.model, case.args, case.kwargs, origins=entry.name not in TWO_NAMES)
