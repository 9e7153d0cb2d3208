"""The zoo: every entry builds the same case twice, and its output is one in which a mistake could be seen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from graphwright.tools.zoo import ZOO, Case, Entry, entries, missing, seeded_init, tensors
from graphwright.tools.zoo.inventory import INVENTORY

# what the families held when this test was written; they may grow
LEAST = {"torch": 45, "transformers": 85, "diffusers": 25, "timm": 62, "torchvision": 97, "odd": 165}
# timm brings a torchvision that is built for another torch; the models of both are run by the coverage sweep
HERE = [entry for entry in ZOO.values() if not {"timm", "torchvision"} & {entry.family, *entry.requires}]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny models: a second thread costs more than it brings."""
    torch.set_num_threads(1)


def _floats(value: object) -> list[torch.Tensor]:
    """The floating-point tensors of an output."""
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def _built(entry: Entry) -> Case:
    """Build, or skip with the modules that are not installed."""
    if lacking := missing(entry):
        pytest.skip(f"needs {', '.join(lacking)}")
    return entry.build()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", HERE, ids=lambda entry: entry.name)
def test_entry_runs(entry: Entry) -> None:
    """Finite, not near zero, equal at every build, and accepted at a second batch size."""
    case = _built(entry)
    assert not case.model.training
    assert all(p.dtype == torch.float32 for p in case.model.parameters() if p.is_floating_point())
    out = _floats(case.run())
    assert out
    for tensor in out:
        assert torch.isfinite(tensor).all()
        assert tensor.abs().mean() > 1e-3
    again = _floats(entry.build().run())
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    assert case.second is not None
    args, kwargs = case.second
    with torch.no_grad():
        other = _floats(case.model(*args, **kwargs))
    assert [t.ndim for t in other] == [t.ndim for t in out]
    assert all(torch.isfinite(tensor).all() for tensor in other)


def test_every_family_has_its_entries() -> None:
    """No entry gets lost."""
    found = Counter(entry.family for entry in ZOO.values())
    assert found.keys() == LEAST.keys()
    assert all(found[family] >= least for family, least in LEAST.items()), found
    assert [entry.name for entry in entries(["diffusers"])] == [e.name for e in ZOO.values() if e.family == "diffusers"]


def test_the_rows_of_the_edge_cases_have_prefixes() -> None:
    """Odd cases say in their names what happens to them elsewhere."""
    prefixes = {entry.name.split("/")[0] for entry in entries(["odd"])}
    assert prefixes == {"works", "wrong", "raises", "hangs"}


def test_import_brings_no_model_library() -> None:
    """Only building an entry may import the library that it comes from."""
    code = (
        "import sys; import graphwright.tools.zoo.inventory; "
        "print([m for m in ('transformers', 'diffusers', 'timm', 'torchvision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert out.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    """The environment of a child that imports what this process imports."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_inventories_name_entries_and_count_axes() -> None:
    """Every inventory belongs to an entry and speaks the vocabulary."""
    assert not INVENTORY.keys() - ZOO.keys()
    kinds = {"channel", "hidden", "head", "head group", "head dim", "value dim"}
    for name, make in INVENTORY.items():
        axes = make()
        assert make() == axes, name
        for (kind, size), count in axes.items():
            assert kind in kinds and size > 1 and count > 0, (name, kind, size, count)


def test_inventory_of_a_known_model() -> None:
    """Llama with 6 query and 2 key/value heads of 8, width 42, feed-forward 56, two layers."""
    assert INVENTORY["llama_gqa"]() == {
        ("hidden", 42): 1,
        ("hidden", 56): 2,
        ("head", 2): 2,
        ("head group", 3): 2,
        ("head dim", 4): 1,
        ("value dim", 8): 2,
    }


def test_initialisation_leaves_nothing_degenerate() -> None:
    """Zeros and near-zeros become values; shared parameters stay shared."""
    first, last, norm = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
    last.weight = first.weight
    net = torch.nn.Sequential(first, torch.nn.LayerNorm(4), norm, last)
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 1e-12)
    seeded_init(net, 3)
    assert last.weight is first.weight
    for parameter in net.parameters():
        assert parameter.abs().mean() > 0.05
        assert parameter.std() > 0
    assert norm.running_mean is not None and norm.running_mean.abs().min() > 0
