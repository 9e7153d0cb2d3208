"""The ONNX sweep on one model of each family, what it calls refused and wrong, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends import onnx_file
from graphwright.tools import sweep_onnx
from graphwright.tools.sweep_onnx import OnnxRow, sweep, sweep_entry
from graphwright.tools.zoo import ZOO, missing
from graphwright.tools.zoo.entry import Case, Entry

pytest.importorskip("onnxruntime")


class Body(nn.Module):
    """A hidden layer of 8, then whatever is asked for."""

    def __init__(self, tail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.tail = nn.Linear(4, 8), nn.Linear(8, 4), tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.second(self.first(x).relu()))


def entry(name: str, tail: Callable[[Tensor], Tensor], dynamic: dict | None = None) -> Entry:
    return Entry(name, "test", lambda: Case(Body(tail).eval(), (torch.randn(2, 3, 4),), {}, dynamic))


@pytest.mark.parametrize("name", ["super_resolution", "distilbert", "works/residual_add", "timm/resnet18"])
def test_smaller_model_computes_the_same_at_two_shapes(name: str) -> None:
    if missing(ZOO[name]):
        pytest.skip(f"needs {missing(ZOO[name])}")
    row = sweep_entry(ZOO[name])
    assert (row.status, row.reason, row.batch) == ("ok", "", "dynamic")
    assert 0 < row.groups and 0 < row.parameters_after < 0.8 * row.parameters_before
    # No difference at all would be as suspicious as a large one: two runtimes sum in another order.
    assert 0 < (row.error or 0) <= 1e-4 and 0 < (row.error_second or 0) <= 1e-4
    assert row.opset >= 18


@pytest.mark.slow
def test_smaller_diffusion_model_computes_the_same_at_two_shapes() -> None:
    test_smaller_model_computes_the_same_at_two_shapes("unet2d")


def test_static_capture_is_compared_with_other_values() -> None:
    row = sweep_entry(entry("static", torch.tanh, dynamic={}))
    assert (row.status, row.batch) == ("ok", "static")
    assert 0 < (row.error_second or 0) <= 1e-4


def test_operator_without_onnx_form_is_refused_with_the_reason() -> None:
    row = sweep_entry(entry("spectrum", lambda x: torch.linalg.eigvalsh(x.mT @ x)))
    assert row.status == "refused"
    assert row.reason.startswith("torch.onnx has no ONNX form for aten._linalg_eigh.default at %_linalg_eigh")
    assert row.opset == 0 and row.parameters_after < row.parameters_before


@pytest.fixture
def shift(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Move what a module takes for the program's outputs by a thousandth."""

    def patch(module: ModuleType) -> None:
        run = module.run_program
        monkeypatch.setattr(module, "run_program", lambda program, flat: tuple(v + 1e-3 for v in run(program, flat)))

    return patch


def test_file_that_computes_something_else_is_wrong(shift: Callable[[ModuleType], None]) -> None:
    shift(onnx_file)
    shift(sweep_onnx)
    row = sweep_entry(entry("shifted", torch.tanh))
    assert row.status == "wrong" and row.reason.startswith("a relative difference of")
    assert 1e-4 < (row.error or 0) < 1e-2 and 1e-4 < (row.error_second or 0) < 1e-2


def test_program_that_is_imprecise_itself_is_compared_in_float64(shift: Callable[[ModuleType], None]) -> None:
    shift(onnx_file)  # stands for a model that amplifies rounding
    for dynamic, batch in ((None, "dynamic"), ({}, "static")):
        row = sweep_entry(entry("imprecise", torch.tanh, dynamic))
        assert (row.status, row.batch) == ("ok", batch) and row.reason.startswith("compared with float64")
        assert 0 < (row.error or 0) < 1e-5 and 0 < (row.error_second or 0) < 1e-5


def test_output_near_zero_is_wrong() -> None:
    row = sweep_entry(entry("zero", lambda x: x * 1e-12))
    assert row.status == "wrong" and "near zero" in row.reason


def test_second_call_runs_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fake(entry: Entry, seed: int) -> OnnxRow:
        ran.append(entry.name)
        if entry.name == "stops":
            raise KeyboardInterrupt
        return OnnxRow(entry.name, entry.family, "ok")

    monkeypatch.setattr(sweep_onnx, "sweep_entry", fake)
    a, b, stops = (entry(name, torch.tanh) for name in ("a", "b", "stops"))
    file, told = tmp_path / "rows.json", list[str]()
    with pytest.raises(KeyboardInterrupt):
        sweep([a, stops, b], file, tell=told.append)
    assert ran == ["a", "stops"] and len(told) == 1
    rows = sweep([a, b], file, tell=told.append)
    assert ran == ["a", "stops", "b"] and [row.name for row in rows] == ["a", "b"]
    assert sweep([a, b], file) == rows and len(ran) == 3
    sweep([a], file, again=True)
    assert ran[3:] == ["a"]
    assert [row["name"] for row in json.loads(file.read_text())] == ["a", "b"]
    assert list(tmp_path.iterdir()) == [file]


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"name": 1}')
    with pytest.raises(ValueError, match="must hold rows that this sweep wrote"):
        sweep([], file)


def test_missing_package_skips_with_its_name() -> None:
    row = sweep_entry(Entry("x", "test", lambda: pytest.fail("must not build"), ("no_such_package",)))
    assert (row.status, row.reason) == ("skipped", "needs no_such_package")


def test_command_prints_a_table_and_fails_on_wrong_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(entry: Entry, seed: int) -> OnnxRow:
        return OnnxRow(entry.name, entry.family, "wrong" if entry.name == "vgg" else "ok", batch="dynamic")

    monkeypatch.setattr(sweep_onnx, "sweep_entry", fake)
    assert sweep_onnx.main(["super_resolution"]) == 0
    assert "torch: 1 ok, 0 refused, 0 wrong, 0 raised" in capsys.readouterr().out
    assert sweep_onnx.main(["vgg", "super_resolution", "--json", str(tmp_path / "rows.json")]) == 1
    out, err = capsys.readouterr()
    assert "torch: 1 ok, 0 refused, 1 wrong, 0 raised" in out
    assert err.startswith("[1/2] vgg")
