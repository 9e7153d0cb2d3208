"""Scale: a Llama of 70 billion parameters is planned without its weights, and the work grows with the graph alone."""

from __future__ import annotations

import cProfile
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from graphwright.graph.depgraph import depgraph
from graphwright.graph.resize import resize
from graphwright.tools.bench.chains import chain

# In a process of its own, so that the peak of memory is that of this alone.
PLAN = """
import json, torch
torch.set_num_threads(1)
from graphwright.tools.bench.llama import Llama, plan
print(json.dumps(plan(Llama())))
"""
# Of Llama 3 70B, as published with it.
PARAMETERS = 70_553_706_496
LAYERS, VOCABULARY = 80, 128_256


def count(hidden: int, intermediate: int, kv_heads: int, group: int, qk: int, v: int) -> int:
    """Parameters of a Llama by its matrices, a layer at a time: q, k, v, o, gate, up, down, and its norms."""
    layer = [
        kv_heads * group * qk * hidden, kv_heads * qk * hidden, kv_heads * v * hidden, hidden * kv_heads * group * v,
        intermediate * hidden, intermediate * hidden, hidden * intermediate, hidden, hidden,
    ]  # fmt: skip
    embedding, norm, output = VOCABULARY * hidden, hidden, VOCABULARY * hidden
    return embedding + sum(sum(layer) for _ in range(LAYERS)) + norm + output


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PLAN],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_groups_of_70_billion_parameters(planned: dict[str, Any]) -> None:
    """One residual stream and one set of rotary pairs for all layers; everything else is a layer's own."""
    assert {(kind, size): n for kind, size, n in planned["groups"]} == {
        ("hidden", 8192): 1,
        ("hidden", 28_672): LAYERS,
        ("head", 8): LAYERS,
        ("head group", 8): LAYERS,
        ("head dim", 64): 1,
        ("value dim", 128): LAYERS,
    }


@pytest.mark.slow
def test_counts_of_70_billion_parameters_before_and_after(planned: dict[str, Any]) -> None:
    assert planned["parameters"] == planned["formula"] == count(8192, 28_672, 8, 8, 128, 128) == PARAMETERS
    plans = planned["plans"]
    # 0.8 * 8192 = 6553.6 and 0.8 * 28672 = 22937.6
    widths = count(6554, 22_938, 8, 8, 128, 128)
    assert plans["widths"]["parameters"] == plans["widths"]["formula"] == widths == 47_427_057_562
    # A quarter of the key-value heads, of the query heads of each, of the 64 rotary pairs, and of the 128 value dims.
    attention = count(6554, 22_938, 6, 6, 96, 96)
    found = plans["widths and attention"]
    assert found["parameters"] == found["formula"] == attention == 41_990_907_802


@pytest.mark.slow
def test_70_billion_parameters_take_less_than_2_gb(planned: dict[str, Any]) -> None:
    assert 0.1 < planned["peak_gb"] < 2


def calls(work: Callable[[], Any]) -> int:
    """Return how many calls of functions ``work`` makes."""
    profile = cProfile.Profile()
    profile.runcall(work)
    return sum(entry.callcount for entry in profile.getstats())


def test_the_work_a_node_does_not_grow_with_the_graph() -> None:
    """A count of calls, which no other process disturbs; seconds are what ``graphwright bench scale`` measures."""
    analysis, removal = [], []
    for nodes in (500, 2000):
        program = chain(nodes)
        size = len(program.graph_module.graph.nodes)
        assert nodes <= size < nodes + 50
        graph = depgraph(program)
        keep = {g.name: range(g.legal_keep(g.size // 2)) for g in graph.groups}
        assert len(keep) > size // 15 and sum(len(g.members) for g in graph.groups) > size // 3
        analysis.append(calls(lambda p=program: (depgraph(p).groups, depgraph(p).frozen)) / size)
        removal.append(calls(lambda p=program, k=keep, g=graph: resize(p, k, g)) / size)
    # Were either quadratic, the second number would be up to four times the first.
    assert analysis[1] < 1.15 * analysis[0]
    assert removal[1] < 1.15 * removal[0]
