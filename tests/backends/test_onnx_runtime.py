"""Providers are chosen from what there is, and a broken environment is named with its repair."""

import importlib.metadata
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from graphwright.backends import onnx_runtime
from graphwright.backends.onnx_runtime import (
    CPU,
    CUDA,
    TENSORRT,
    ProviderError,
    choose_providers,
    doctor,
    import_onnxruntime,
    installed_runtimes,
    open_session,
    runtime_conflict,
)

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


def test_default_is_the_best_that_is_built_in() -> None:
    assert choose_providers(None, ["AzureExecutionProvider", CPU]) == [CPU]
    assert choose_providers(None, [CPU, CUDA, TENSORRT]) == [TENSORRT, CUDA, CPU]


def test_requested_providers_keep_their_order() -> None:
    assert choose_providers(["cpu", "CUDA", TENSORRT], [TENSORRT, CUDA, CPU]) == [CPU, CUDA, TENSORRT]


@pytest.mark.parametrize("requested", [["cuda"], [], ["cpu", "nonsense"]])
def test_absent_provider_is_refused_with_what_there_is(requested: list[str]) -> None:
    with pytest.raises(ProviderError, match="it has CPUExecutionProvider; for another build: pip install"):
        choose_providers(requested, [CPU])


def test_installed_runtime_is_found_with_its_version() -> None:
    runtimes = installed_runtimes()
    assert len(runtimes) == 1
    ((name, version),) = runtimes.items()
    assert name.startswith("onnxruntime") and version == importlib.metadata.version(name)
    assert runtime_conflict(runtimes) is None


def test_two_runtimes_are_a_conflict_with_its_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(onnx_runtime, "installed_runtimes", lambda: both)
    with pytest.raises(
        ProviderError, match="repair it with: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install"
    ):
        import_onnxruntime()
    facts = doctor()
    assert facts["conflict"] in facts["problems"]
    assert facts["active_providers"] == []


def test_missing_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ProviderError, match="ONNX Runtime is not installed; pip install"):
        import_onnxruntime()
    assert any("ONNX Runtime is not installed" in problem for problem in doctor()["problems"])


def test_doctor_runs_a_node_and_finds_nothing_wrong_here() -> None:
    facts = doctor()
    assert facts["problems"] == []
    assert CPU in facts["active_providers"] and CPU in facts["available_providers"]
    assert facts["packages"]["onnx"] == onnx.__version__


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    value = onnx.helper.make_tensor_value_info("x", 1, [2])
    result = onnx.helper.make_tensor_value_info("y", 1, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "neg", [value], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "neg.onnx")
    return tmp_path / "neg.onnx"


@pytest.fixture
def lost_cuda(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """An ONNX Runtime that offers CUDA and silently gives a session without it, as one with missing libraries does."""
    calls: list[dict] = []

    def session(path: str, settings: object, providers: list[str], provider_options: list[dict], **rest: object):
        assert rest == {"disabled_optimizers": None}  # those of the CPU provider alone
        calls.append({"providers": providers, "options": provider_options})
        return ort.InferenceSession(path, settings, providers=[CPU])

    fake = types.SimpleNamespace(
        __version__="0",
        get_available_providers=lambda: [CUDA, CPU],
        preload_dlls=lambda: calls.append({"preloaded": True}),
        SessionOptions=ort.SessionOptions,
        InferenceSession=session,
    )
    monkeypatch.setattr(onnx_runtime, "import_onnxruntime", lambda: fake)
    return calls


def test_requested_provider_that_is_not_active_is_refused(model_file: Path, lost_cuda: list[dict]) -> None:
    with pytest.raises(ProviderError, match="CUDAExecutionProvider was requested but is not active"):
        open_session(model_file, ["cuda", "cpu"])
    assert lost_cuda[0] == {"preloaded": True}


def test_fallback_has_to_be_allowed(model_file: Path, lost_cuda: list[dict]) -> None:
    session = open_session(model_file, ["cuda", "cpu"], allow_fallback=True)
    assert session.get_providers() == [CPU]
    assert lost_cuda[1] == {"providers": [CUDA, CPU], "options": [{}, {}]}


def test_default_takes_what_works(model_file: Path, lost_cuda: list[dict]) -> None:
    assert open_session(model_file).get_providers() == [CPU]
    assert lost_cuda[1]["providers"] == [CUDA, CPU]


def test_options_reach_their_provider(model_file: Path, lost_cuda: list[dict]) -> None:
    open_session(model_file, ["cuda", "cpu"], allow_fallback=True, provider_options={"cuda": {"device_id": 1}})
    assert lost_cuda[1]["options"] == [{"device_id": 1}, {}]


def test_threads_are_set(model_file: Path) -> None:
    assert open_session(model_file, ["cpu"], threads=1).get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("ours", [True, False])
def test_the_cpu_computes_sums_and_norms_apart(ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ["n", 3, 8]
    terms = [onnx.helper.make_tensor_value_info(name, 1, shape) for name in "ab"]
    scale = onnx.helper.make_tensor("scale", 1, [8], [1.0] * 8)
    nodes = [
        onnx.helper.make_node("Add", ["a", "b"], ["sum"]),
        onnx.helper.make_node("LayerNormalization", ["sum", "scale"], ["y"], axis=-1),
    ]
    result = onnx.helper.make_tensor_value_info("y", 1, shape)
    graph = onnx.helper.make_graph(nodes, "sum_norm", terms, [result], [scale])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9),
        tmp_path / "m.onnx",
    )
    opened = ort.InferenceSession

    def session(path: str, settings: Any, **options: object) -> Any:
        settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        return opened(path, settings, **(options if ours else options | {"disabled_optimizers": None}))

    monkeypatch.setattr(ort, "InferenceSession", session)
    open_session(tmp_path / "m.onnx", ["cpu"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators == (["Add", "LayerNormalization"] if ours else ["SkipLayerNormalization"])


def test_importing_the_backends_imports_no_runtime() -> None:
    import subprocess

    code = (
        "import sys, graphwright.backends.onnx_export, graphwright.backends.torchscript\n"
        "assert not {'onnx', 'onnxruntime', 'onnxscript', 'onnx_ir'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
