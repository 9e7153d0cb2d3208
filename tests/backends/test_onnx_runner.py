"""Running an export: inputs by order and name, memory that is not copied, clear refusals."""

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.onnx_export import export_onnx
from graphwright.backends.onnx_runner import ELEMENT_TYPES, OnnxRunner
from graphwright.frontends.capture import capture
from graphwright.graph.errors import ArtifactError, InputError, ProviderError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Net(nn.Module):
    """Has every kind of dtype that programs hand over, and a dotted input name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, ids: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.table(ids) + cond["bias"]
        return x * cond["keep"].unsqueeze(-1), x > 0, x.argmax(-1), x.half()


def inputs(batch: int = 2, tokens: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (batch, tokens), generator=generator)
    return ids, torch.randn(batch, tokens, 4, generator=generator), ids % 3 != 0


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def directory(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids, bias, keep = inputs()
    dims = {0: "batch", 1: "tokens"}
    program = capture(
        model,
        (ids, {"bias": bias, "keep": keep}),
        dynamic={"ids": dims, "cond.bias": dims, "cond.keep": dims},
    )
    return export_onnx(program, tmp_path_factory.mktemp("runner")).directory


@pytest.fixture(scope="module")
def runner(directory: Path) -> OnnxRunner:
    return OnnxRunner(directory, ["cpu"])


def expected(model: nn.Module, ids: Tensor, bias: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(ids, {"bias": bias, "keep": keep})


@pytest.mark.parametrize("io_binding", [True, False])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 3), (1, 1), (5, 7)])
def test_outputs_are_the_models(model: nn.Module, directory: Path, io_binding: bool, batch: int, tokens: int) -> None:
    values = inputs(batch, tokens, seed=1)
    got = OnnxRunner(directory, ["cpu"], io_binding)(*values)
    want = expected(model, *values)
    for g, w in zip(got, want, strict=True):
        assert g.dtype is w.dtype
        # One addition and one multiplication in float32: the same roundings.
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)
    assert want[0].abs().max() > 0.1 and want[1].any() and not want[1].all()


def test_arrays_names_and_strided_tensors_are_taken(model: nn.Module, runner: OnnxRunner) -> None:
    ids, bias, keep = inputs(3, 5, seed=2)
    strided = bias.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    want = expected(model, ids, bias, keep)
    for got in (
        runner(ids.numpy(), bias.numpy(), keep.numpy()),
        runner(ids, **{"cond.keep": keep, "cond.bias": strided}),
        runner(ids, strided.clone().requires_grad_(), keep),
    ):
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("io_binding", [True, False])
def test_a_view_whose_memory_holds_other_values_is_read_right(model, directory: Path, io_binding: bool) -> None:
    ids, bias, keep = inputs()
    negated = torch.complex(bias, bias).conj().imag
    assert negated.is_neg()
    got = OnnxRunner(directory, ["cpu"], io_binding)(ids, negated, keep)
    for mine, theirs in zip(got, expected(model, ids, -bias, keep), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("io_binding", [True, False])
def test_outputs_live_on_after_other_calls_and_the_session(directory: Path, io_binding: bool) -> None:
    runner = OnnxRunner(directory, ["cpu"], io_binding)
    values = inputs()
    first = runner(*values)
    kept = [tensor.clone() for tensor in first]
    for seed in range(3):
        runner(*inputs(seed=seed + 5))
    del runner
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    first[0].add_(1)  # memory of its own, that may be written
    assert torch.equal(first[0], kept[0] + 1)


@pytest.mark.parametrize("io_binding", [True, False])
def test_inputs_are_read_in_place(directory: Path, io_binding: bool) -> None:
    """The address that the session gets is that of the caller's tensor."""
    seen: dict[str, int] = {}
    runner = OnnxRunner(directory, ["cpu"], io_binding)
    session = runner.session

    class Spy:
        def __init__(self) -> None:
            self.binding = session.io_binding()

        def __getattr__(self, name: str):
            return getattr(self.binding, name)

        def bind_input(self, name: str, *rest: object) -> None:
            seen[name] = rest[-1]  # type: ignore[assignment]
            self.binding.bind_input(name, *rest)

    class Session:
        def io_binding(self) -> Spy:
            return Spy()

        def run_with_iobinding(self, spy: Spy) -> None:
            session.run_with_iobinding(spy.binding)

        def run(self, names: Sequence[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            seen.update((name, array.ctypes.data) for name, array in feed.items())
            return session.run(names, feed)

    ids, bias, keep = inputs()
    runner.session = Session()
    runner(ids, bias, keep)
    assert seen == {"ids": ids.data_ptr(), "cond.bias": bias.data_ptr(), "cond.keep": keep.data_ptr()}


def test_bfloat16_is_bound_as_arrays_have_no_such_type(tmp_path: Path) -> None:
    kind = onnx.TensorProto.BFLOAT16
    ends = [onnx.helper.make_tensor_value_info(name, kind, [2]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "same", ends[:1], ends[1:])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, tmp_path / "same.onnx")
    entry = {"dtype": "bfloat16", "shape": [2]}
    facts = {"inputs": [{"name": "x", **entry}], "outputs": [{"name": "y", **entry}]}
    value = torch.tensor([1.5, -3.0], dtype=torch.bfloat16)
    (got,) = OnnxRunner.of_file(tmp_path / "same.onnx", facts, ["cpu"])(value)
    assert got.dtype is torch.bfloat16 and torch.equal(got, value)
    with pytest.raises(InputError, match="NumPy has no bfloat16; open this export with io_binding=True"):
        OnnxRunner.of_file(tmp_path / "same.onnx", facts, ["cpu"], io_binding=False)


def test_empty_batch_runs(runner: OnnxRunner) -> None:
    got = runner(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, 4), torch.zeros(0, 3, dtype=torch.bool))
    assert [tuple(tensor.shape) for tensor in got] == [(0, 3, 4), (0, 3, 4), (0, 3), (0, 3, 4)]


def wrong_calls() -> list[tuple]:
    ids, bias, keep = inputs()
    return [
        ((ids, bias), {}, r"missing: \['cond.keep'\]"),
        ((ids, bias, keep, keep), {}, "takes 3 tensors .* got 4"),
        ((ids, bias), {"keep": keep}, r"unknown or given twice: \['keep'\]"),
        ((ids, bias, keep), {"ids": ids}, r"given twice: \['ids'\]"),
        ((ids.int(), bias, keep), {}, "'ids' must have dtype torch.int64, got torch.int32"),
        ((ids, bias, [True]), {}, "'cond.keep' must be a tensor or an array, got list"),
        ((ids, bias[..., :3], keep), {}, r"'cond.bias' must have shape \[batch, tokens, 4\], got \[2, 3, 3\]"),
        ((ids[0], bias, keep), {}, r"'ids' must have shape \[batch, tokens\], got \[3\]"),
        ((ids, bias, keep[:1]), {}, "dimension 'batch' is 2 in input 'ids' and 1 in input 'cond.keep'"),
        ((ids.to("meta"), bias, keep), {}, "'ids' is on meta, this session runs on cpu"),
    ]


@pytest.mark.parametrize(("args", "kwargs", "message"), wrong_calls())
def test_wrong_call_is_refused(runner: OnnxRunner, args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner(*args, **kwargs)


def test_missing_or_foreign_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no manifest\.json; give the directory that the onnx export wrote"):
        OnnxRunner(tmp_path)
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data' must have \d+ bytes, it is missing"):
        OnnxRunner(copy)


def test_file_that_does_not_load_is_refused(directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "model.onnx").write_bytes(b"\xff" * (directory / "model.onnx").stat().st_size)
    with pytest.raises(ArtifactError, match=r"ONNX Runtime .* cannot load .*model\.onnx"):
        OnnxRunner(copy)


def test_provider_that_is_not_there_is_refused(directory: Path) -> None:
    with pytest.raises(ProviderError, match="has no NoSuchProvider; it has .*CPUExecutionProvider"):
        OnnxRunner(directory, ["NoSuchProvider", "cpu"])
    with pytest.raises(ProviderError, match="provider_options names CUDAExecutionProvider"):
        OnnxRunner(directory, ["cpu"], provider_options={"cuda": {"device_id": 0}})


def test_runner_says_where_it_runs(runner: OnnxRunner) -> None:
    assert runner.providers == ("CPUExecutionProvider",)
    assert runner.device == torch.device("cpu")
    assert runner.input_names == ("ids", "cond.bias", "cond.keep")
    assert runner.output_names == ("output_0", "output_1", "output_2", "output_3")


def test_element_types_are_onnx_numbers() -> None:
    names = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
    names |= {torch.complex64: "COMPLEX64", torch.complex128: "COMPLEX128"}
    for dtype, number in ELEMENT_TYPES.items():
        name = names.get(dtype, str(dtype).removeprefix("torch.").upper())
        assert onnx.TensorProto.DataType.Value(name) == number


def test_array_of_another_dtype_is_refused(runner: OnnxRunner) -> None:
    ids, bias, keep = inputs()
    with pytest.raises(InputError, match="'cond.bias' must have dtype torch.float32, got torch.float64"):
        runner(ids, bias.numpy().astype(np.float64), keep)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_outputs_stay_on_the_gpu(model: nn.Module, directory: Path) -> None:
    runner = OnnxRunner(directory, ["cuda", "cpu"])
    values = inputs()
    got = runner(*(value.cuda() for value in values))
    assert all(tensor.is_cuda for tensor in got)
    torch.testing.assert_close(got[0].cpu(), expected(model, *values)[0], rtol=1e-5, atol=1e-5)
