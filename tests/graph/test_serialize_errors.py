"""Damaged, foreign and newer files are refused with a sentence; nothing half-written stays; no file runs code."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph import document_files
from graphwright.graph.encoding import decode, decode_target, encode, encode_target
from graphwright.graph.errors import ArtifactError
from graphwright.graph.program import Program, set_tensor
from graphwright.graph.serialize import load_program, save_program
from graphwright.graph.symbols import SymbolTable, encode_expression


class Pair(NamedTuple):
    """An output of two tensors."""

    first: Tensor
    second: Tensor


class Two(nn.Module):
    """Two products of one input, as a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor) -> Pair:
        return Pair(self.one(x), self.two(x).reshape(-1, 2))


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Two(), (torch.ones(2, 3),))


@pytest.fixture
def folder(program: Program, tmp_path: Path) -> Path:
    save_program(program, tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], sign: bool = True) -> None:
    """Change the document and, as a forger would, the digests that tie the files together."""
    from safetensors.torch import load_file, save_file

    data = json.loads((folder / "program.json").read_text())
    change(data["program"])
    if sign:
        data["sha256"] = hashlib.sha256(json.dumps(data["program"], separators=(",", ":")).encode()).hexdigest()
        for name in ("model", "example"):
            file = folder / f"{name}.safetensors"
            save_file(load_file(file), file, metadata={"program": data["sha256"]})
    (folder / "program.json").write_text(json.dumps(data))


def node(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in document["graph"]["nodes"] if entry["name"] == name)


def test_named_tuple_of_an_imported_module_comes_back(folder: Path, program: Program) -> None:
    loaded = load_program(folder)
    x = torch.randn(5, 3)
    assert isinstance(loaded(x), Pair)
    assert torch.equal(loaded(x).first, program(x).first) and torch.equal(loaded(x).second, program(x).second)


def test_missing_directory_or_file_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no saved program"):
        load_program(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="is no directory"):
        load_program(folder / "program.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="model.safetensors is missing"):
        load_program(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("\xff\xfe", "is no JSON"),
        ("[]", "not written by graphwright"),
        ('{"model_type": "llama"}', "not written by graphwright"),
        ('{"format": "graphwright program", "format_version": 2}', "format version 2.*reads up to 1; upgrade"),
        ('{"format": "graphwright program", "format_version": "1"}', "upgrade"),
        ('{"format": "graphwright program", "format_version": 1}', "damaged"),
    ],
)
def test_foreign_or_newer_json_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "program.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=message):
        load_program(folder)


def test_changed_contents_do_not_match_the_digest(folder: Path) -> None:
    edit(folder, lambda document: document.update(name="Other"), sign=False)
    with pytest.raises(ArtifactError, match="do not match its own digest"):
        load_program(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "example.safetensors"])
def test_truncated_tensors_are_refused(folder: Path, name: str) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        load_program(folder)
    file.write_bytes(b"not tensors")
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        load_program(folder)


def test_weights_of_another_save_are_refused(folder: Path, tmp_path: Path) -> None:
    save_program(capture(nn.Linear(3, 4), (torch.ones(2, 3),)), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ArtifactError, match="does not belong to the document beside it"):
        load_program(folder)


EDITS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("no graph", lambda d: d.pop("graph"), "damaged: KeyError"),
    ("unknown operator", lambda d: node(d, "linear").update(target="aten::nosuch.default"), "nosuch.*not registered"),
    ("no operator", lambda d: node(d, "linear").update(target="os.system"), "os.system"),
    ("file operator", lambda d: node(d, "linear").update(target="aten::from_file.default"), "does not load"),
    ("higher order", lambda d: node(d, "linear").update(target="higher_order::call_torchbind"), "does not load"),
    ("module call", lambda d: node(d, "linear").update(op="call_module", target="one"), "call_module"),
    ("later node", lambda d: node(d, "linear").update(args=[{"node": "reshape"}]), "before it is defined"),
    ("no such kind", lambda d: node(d, "linear").update(args=[{"code": "1"}]), "no code"),
    ("no such dtype", lambda d: node(d, "x").update(val={"tensor": {"shape": [2, 3], "dtype": "load", "device": "cpu"}}),
     "no dtype 'load'"),
    ("code as name", lambda d: node(d, "linear").update(name="a; import os"), "no identifier"),
    ("code as input", lambda d: node(d, "x").update(target="x=print(1)"), "no identifier"),
    ("code as keyword", lambda d: node(d, "linear").update(kwargs={"bias=print(1), x": None}), "no identifier"),
    ("code as attribute", lambda d: node(d, "one_weight").update(target='one.w"+print(1)+"'), "no qualified name"),
    ("keyword as name", lambda d: node(d, "x").update(target="class"), "no identifier"),
    ("taken name", lambda d: d["tensors"].update(forward=d["tensors"]["one.bias"])
     or node(d, "one_bias").update(target="forward"), "'forward'"),
    ("no tensor", lambda d: node(d, "one_bias").update(target="one.nosuch"), "'one.nosuch', which is no tensor"),
    ("missing tensor", lambda d: d["tensors"].update(extra={**d["tensors"]["one.bias"]}), "'extra' is missing"),
    ("other shape", lambda d: d["tensors"]["one.bias"].update(shape=[5]), r"'one.bias' should be \[5\]"),
    ("other dtype", lambda d: d["tensors"]["one.bias"].update(dtype="float64"), "'one.bias' should be"),
    ("no such device", lambda d: d["tensors"]["one.bias"].update(device="warp:1"), "no device 'warp:1'"),
    ("tied to nothing", lambda d: d["tensors"]["one.bias"].update(alias="later"), "tied to 'later'"),
    ("unknown symbol", lambda d: node(d, "x")["val"]["tensor"].update(shape=["s0", 3]), "'s0' is none of"),
    ("wrong shape", lambda d: node(d, "linear")["val"]["tensor"]["shape"].reverse(), "does not verify"),
    ("wrong symbolic size", lambda d: node(d, "reshape")["val"]["tensor"].update(
        shape=[["Mul", 3, node(d, "reshape")["val"]["tensor"]["shape"][0][2]], 2]), "does not verify"),
    ("wrong literal", lambda d: node(d, "reshape").update(args=[{"node": "linear_1"}, [-1, 3]]), "does not verify"),
    ("untrusted class", lambda d: d.update(out_spec=["antigravity:Joke", [], None, None]), "import antigravity before"),
    ("no class", lambda d: d.update(out_spec=["torch.nn:nosuch", [], None, None]), "no class nosuch"),
    ("no container", lambda d: d.update(out_spec=["torch.nn:Linear", [], None, None]), "not registered"),
    ("other structure", lambda d: d.update(out_spec=["list", None, None]), "does not verify"),
    ("input too many", lambda d: d["inputs"].append(d["inputs"][0]), "2 are described"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [e[1:] for e in EDITS], ids=[e[0] for e in EDITS])
def test_forged_document_is_refused(folder: Path, change: Any, message: str, capsys: Any) -> None:
    edit(folder, lambda document: None)
    load_program(folder)  # what follows is the edit's doing
    edit(folder, change)
    with pytest.raises(ArtifactError, match=message):
        load_program(folder)
    assert capsys.readouterr().out == ""


def test_replaced_program_leaves_no_other_files(folder: Path) -> None:
    save_program(capture(nn.Linear(2, 2), (torch.ones(2, 2),)), folder)
    assert load_program(folder).name == "Linear"
    assert sorted(f.name for f in folder.iterdir()) == ["example.safetensors", "model.safetensors", "program.json"]


def test_a_file_is_no_directory_to_save_in(tmp_path: Path, program: Program) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ArtifactError, match="is a file; a saved program is a directory"):
        save_program(program, file)
    assert file.read_text() == "mine"


def test_failed_save_leaves_the_old_program(folder: Path, program: Program) -> None:
    bad = capture(nn.Linear(3, 4), (torch.ones(2, 3),))
    set_tensor(bad.graph_module, "weight", nn.Parameter(torch.ones(4, 3, dtype=torch.complex128)))
    with pytest.raises(ArtifactError, match="complex128.*weight"):
        save_program(bad, folder)
    with pytest.raises(ArtifactError, match="complex128"):
        save_program(bad, folder / "new")
    assert sorted(f.name for f in folder.iterdir()) == ["example.safetensors", "model.safetensors", "program.json"]
    x = torch.randn(2, 3)
    assert torch.equal(load_program(folder)(x).first, program(x).first)


def test_interrupted_save_leaves_the_old_program(
    folder: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(document_files, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_program(program, folder)
    monkeypatch.undo()
    assert len(list(folder.iterdir())) == 3
    load_program(folder)


def test_operator_of_another_library_must_be_imported_first(tmp_path: Path) -> None:
    with torch.library._scoped_library("graphwright_test", "DEF") as library:
        library.define("triple(Tensor x) -> Tensor")
        library.impl("triple", lambda x: x * 3, "CompositeExplicitAutograd")
        library.impl("triple", lambda x: torch.empty_like(x), "Meta")

        class Triple(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.graphwright_test.triple(x)

        program = capture(Triple(), (torch.ones(2, 3),))
        save_program(program, tmp_path)
        x = torch.randn(4, 3)
        assert torch.equal(load_program(tmp_path)(x), x * 3)
    edit(tmp_path, lambda d: node(d, "triple").update(target="graphwright_test::quadruple.default"))
    with pytest.raises(ArtifactError, match="graphwright_test::quadruple.*import the library"):
        load_program(tmp_path)


def test_python_function_in_the_graph_cannot_be_saved(tmp_path: Path) -> None:
    program = capture(nn.Linear(3, 4), (torch.ones(2, 3),))
    linear = next(n for n in program.nodes if n.op == "call_function")
    linear.target = torch.nn.functional.linear
    with pytest.raises(ArtifactError, match=r"%linear.*the call of linear cannot be saved.*custom_op"):
        save_program(program, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_output_class_inside_a_function_cannot_be_saved(tmp_path: Path) -> None:
    class Local(NamedTuple):
        x: Tensor

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Local:
            return Local(x * 2)

    with pytest.raises(ArtifactError, match="Local is defined inside a function"):
        save_program(capture(Model(), (torch.ones(2, 3),)), tmp_path)


# ---------------------------------------------------------------------- values

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.complex_numbers(allow_nan=False)
    | st.sampled_from(
        [
            torch.float16,
            torch.int64,
            torch.strided,
            torch.channels_last,
            torch.device("cuda:1"),
            torch.device("cpu"),
            ...,
            slice(None, 3),
            slice(1, None, 2),
            range(2, 9, 3),
            torch.ops.aten.add.Tensor,
        ]
    ),  # fmt: skip
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_value_comes_back_from_text_with_its_type(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


def test_nan_comes_back() -> None:
    assert math.isnan(decode(json.loads(json.dumps(encode(float("nan")), allow_nan=False))))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", torch.ones(1), int, sympy.Integer(1)])
def test_value_without_a_saved_form_is_named(value: object) -> None:
    with pytest.raises(ArtifactError, match="cannot be saved"):
        encode(value)


@pytest.mark.parametrize(
    "target", [torch.ops.aten.add.Tensor, torch.ops.aten.conv2d.default, operator.getitem, torch.sym_max, math.ceil,
               torch.ops.higher_order.cond]
)  # fmt: skip
def test_operator_is_found_again_by_its_name(target: Any) -> None:
    assert decode_target(encode_target(target), {}) is target


def test_expressions_are_rebuilt_and_evaluated_at_the_example_sizes() -> None:
    table = SymbolTable({"s1": 6, "s2": 35, "u0": None}, {"s1": "batch", "s2": "batch"})
    a, b, u = (table.symbols[name] for name in ("s1", "s2", "u0"))
    assert len({a, b, u}) == 3
    from torch.utils._sympy.functions import FloorDiv, Max, Mod

    expressions = [a, 3 * a + b - 2, FloorDiv(3 * b, a), Mod(b, a), Max(a, b), sympy.Eq(a, b), a**2, 2 * u + a]
    names = {str(symbol): name for name, symbol in table.symbols.items()}

    def renamed(data: Any) -> Any:
        return [renamed(item) for item in data] if isinstance(data, list) else names.get(data, data)

    for expression in expressions:
        data = renamed(json.loads(json.dumps(encode_expression(expression))))
        assert table.expression(data) == expression
    examples = [table.example(expression) for expression in expressions if not isinstance(expression, sympy.Eq)]
    assert examples == [6, 51, 17, 5, 35, 36, None]
    assert isinstance(table.size(["Mul", 2, "s1"]), torch.SymInt) and table.size(7) == 7
    with pytest.raises(ArtifactError, match="no symbolic size"):
        table.expression(["Lambda", "s1"])
    with pytest.raises(ArtifactError, match="has no saved form"):
        encode_expression(sympy.sin(a))
