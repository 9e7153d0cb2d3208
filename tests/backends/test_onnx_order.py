"""ONNX Runtime computes the longest chain first, so that little waits in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphwright.backends import onnx_convert, onnx_half
from graphwright.backends.onnx_export import export_onnx
from graphwright.backends.onnx_order import order_for_runtime
from graphwright.frontends.capture import capture
from graphwright.graph.program import Program

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

KEPT = 6


class GatedSum(nn.Module):
    """What is left of a transformer of which every branch is kept: ``x`` plus each branch times a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([nn.Linear(8, 8) for _ in range(KEPT)])

    def forward(self, x: Tensor, time: Tensor, kept: list[Tensor]) -> Tensor:
        for gate, branch in zip(self.gates, kept, strict=True):
            x = x + gate(torch.nn.functional.silu(time)).unsqueeze(1) * branch
        return x


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    kept = [torch.randn(2, 4, 8) for _ in range(KEPT)]
    return capture(GatedSum(), (torch.randn(2, 4, 8), torch.randn(2, 8), kept))


def run_order(file: Path, folder: Path) -> list[str]:
    """Return the operators that ONNX Runtime runs, in order."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    shapes = {i.name: [size if isinstance(size, int) else 2 for size in i.shape] for i in session.get_inputs()}
    session.run(None, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return [event["args"]["op_name"] for event in sorted(nodes, key=lambda event: event["ts"])]


def most_waiting(operators: list[str]) -> int:
    """Return how many products waited to be added at once, at most."""
    waiting = most = 0
    for operator in operators:
        waiting += (operator == "Mul") - (operator == "Add")
        most = max(most, waiting)
    return most


@pytest.mark.parametrize("fp16", [False, True])
def test_product_is_added_before_the_next_one(
    program: Program, fp16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(program, tmp_path / "ordered", fp16=fp16, providers=["cpu"])
    for module in (onnx_convert, onnx_half):
        monkeypatch.setattr(module, "order_for_runtime", lambda model: None)
    export_onnx(program, tmp_path / "plain", fp16=fp16, providers=["cpu"])
    found = {name: run_order(tmp_path / name / "model.onnx", tmp_path) for name in ("ordered", "plain")}
    assert sorted(found["ordered"]) == sorted(found["plain"])
    assert found["ordered"].count("Mul") == found["ordered"].count("Add") == KEPT
    assert most_waiting(found["ordered"]) == 1
    assert most_waiting(found["plain"]) == KEPT  # else ONNX Runtime has another order, and ours is in vain


def names(model: Any) -> list[str]:
    return [node.name for node in model.graph]


def parsed(text: str) -> Any:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> {text}')


# A graph, and the order of its nodes afterwards.
ORDERS = {
    "the operand of fewer nodes first": (
        "(float[2] x) => (float[2] y) { [a] a = Neg(x) [b] b = Abs(a) [c] c = Exp(x) [y] y = Add(c, b) }",
        "c a b y",
    ),
    "operands of equal size as they stood": (
        "(float[2] x) => (float[2] y) { [d] d = Neg(x) [a] a = Neg(x) [b] b = Abs(x) [c] c = Add(b, a) [y] y = Add(c, d) }",
        "d a b c y",
    ),
    "a result that is read again, and one of no node": (
        "(float[2] x) => (float[2] a, float[2] x, float[2] c) { [a] a = Neg(x) [b] b = Abs(a) [d] d = Exp(x) [c] c = Add(d, b) }",
        "d a b c",
    ),
}


@pytest.mark.parametrize("case", ORDERS)
def test_nodes_stand_in_this_order(case: str) -> None:
    text, order = ORDERS[case]
    model = parsed(f"g {text}")
    order_for_runtime(model)
    assert names(model) == order.split()


NESTED = """r = If(c) <
    then_branch = g3 () => (float[2] t) { t = Identity(b) },
    else_branch = g4 () => (float[2] u) { u = Exp(b) }
>"""


@pytest.mark.parametrize("inner", ["r = Identity(b)", NESTED])
def test_graph_inside_of_a_node_reads_what_was_computed_outside(inner: str) -> None:
    model = parsed(
        f"""g (bool c, float[2] x) => (float[2] y, float[2] z) {{
            [a] a = Neg(x)
            [b] b = Abs(a)
            [y] y = If(c) <
                then_branch = g1 () => (float[2] r) {{ {inner} }},
                else_branch = g2 () => (float[2] e) {{ e = Exp(x) }}
            >
            [z] z = Sqrt(x)
        }}"""
    )
    want = list(evaluated(model, c=np.array(True)))
    order_for_runtime(model)
    assert names(model) == ["z", "a", "b", "y"]
    assert want[0].any() and all(map(np.array_equal, evaluated(model, c=np.array(True)), want))


def test_results_that_take_more_nodes_stand_last() -> None:
    model = parsed(
        """g (float[2] x, float most) => (float[2] b, float[2] c) {
            [a] a = Neg(x)
            [b] b = Abs(a)
            [c] c = Clip(x, , most)
        }"""
    )
    assert None in model.graph[-1].inputs
    order_for_runtime(model)
    assert names(model) == ["c", "a", "b"]


def random_model(draw: random.Random) -> Any:
    lines, values = [], ["x", "y"]
    for i in range(draw.randrange(1, 40)):
        read = ", ".join(draw.choices(values, k=2))
        lines.append(f"[n{i}] v{i} = {draw.choice(['Add', 'Mul', 'Sub', 'Max'])}({read})")
        values.append(f"v{i}")
    results = {f"v{i}" for i in draw.choices(range(len(lines)), k=3)} | {values[-1]}
    outputs = ", ".join(f"float[2] {name}" for name in sorted(results))
    return parsed(f"g (float[2] x, float[2] y) => ({outputs}) {{ {' '.join(lines)} }}")


def evaluated(model: Any, **inputs: np.ndarray) -> Iterator[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    yield from session.run(None, {"x": np.array([0.5, 0.25], np.float32), **inputs})


def test_any_graph_stays_sorted_and_computes_the_same() -> None:
    moved = computed = 0
    for seed in range(40):
        model = random_model(random.Random(seed))
        y = np.array([0.75, -0.5], np.float32)
        want, before = list(evaluated(model, y=y)), names(model)
        order_for_runtime(model)
        assert sorted(names(model)) == sorted(before)
        moved += names(model) != before
        computed += any(value.any() for value in want)
        for got, expected in zip(evaluated(model, y=y), want, strict=True):
            np.testing.assert_array_equal(got, expected)
    assert min(moved, computed) > 20


def test_thousands_of_nodes_take_no_recursion() -> None:
    lines = " ".join(f"[n{i}] v{i} = Neg({f'v{i - 1}' if i else 'x'})" for i in range(3000))
    model = parsed(f"g (float[2] x) => (float[2] v2999) {{ {lines} }}")
    order_for_runtime(model)
    assert names(model) == [f"n{i}" for i in range(3000)]
