"""ONNX Runtime: which distribution is installed, which execution providers work, and sessions that use them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..graph.errors import ArtifactError, ProviderError
from ..graph.versions import version_of, versions_of
from .artifacts import summary

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
ORDER = (TENSORRT, CUDA, CPU)
SHORT_NAMES = {"tensorrt": TENSORRT, "cuda": CUDA, "cpu": CPU}
# Fusions of the CPU provider whose kernel takes several times as long as the operators that it stands for.
_SLOWER = ["SkipLayerNormFusion"]
INSTALL = "pip install 'graphwright[cpu]', or 'graphwright[gpu]' (CUDA 13) or 'graphwright[gpu-cu12]' for NVIDIA GPUs"


def installed_runtimes() -> dict[str, str]:
    """Return name and version of every installed distribution that provides the package ``onnxruntime``.

    More than one is a damaged environment: they install over each other, see `runtime_conflict`.
    """
    return versions_of(_distributions())


@functools.cache
def _distributions() -> tuple[str, ...]:
    # Reads the records of every installed distribution: a fifth of a second that no session should pay again.
    return tuple(sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", []))))


def runtime_conflict(runtimes: Mapping[str, str]) -> str | None:
    """Return how to repair an environment with several ONNX Runtimes, None when there is at most one."""
    if len(runtimes) < 2:
        return None
    found = " and ".join(f"{name} {version}" for name, version in runtimes.items())
    return (
        f"{found} are installed over each other, which loses execution providers without an error; repair it with: "
        f"pip uninstall -y {' '.join(runtimes)}, then {INSTALL}"
    )


def import_onnxruntime() -> Any:
    """Import and return ``onnxruntime``.

    Raises:
        ProviderError: It is not installed, or several distributions of it are.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ProviderError(f"ONNX Runtime is not installed; {INSTALL}")
    conflict = runtime_conflict(installed_runtimes())
    if conflict:
        raise ProviderError(conflict)
    import onnxruntime

    return onnxruntime


def choose_providers(requested: Sequence[str] | None, available: Sequence[str]) -> list[str]:
    """Return full provider names to ask a session for, in order of preference.

    Args:
        requested: Full names, or ``"tensorrt"``, ``"cuda"``, ``"cpu"``. None takes TensorRT, CUDA and CPU, as far as
            they are available.
        available: What the installed ONNX Runtime was built with.

    Raises:
        ProviderError: A requested provider is not among the available ones.
    """
    if requested is None:
        return [name for name in ORDER if name in available]
    names = [SHORT_NAMES.get(name.lower(), name) for name in requested]
    absent = [name for name in names if name not in available]
    if absent or not names:
        raise ProviderError(
            f"the installed ONNX Runtime has no {', '.join(absent) or 'provider named'}; it has "
            f"{', '.join(available)}; for another build: {INSTALL}"
        )
    return names


def open_session(
    model: str | os.PathLike[str],
    providers: Sequence[str] | None = None,
    *,
    allow_fallback: bool = False,
    provider_options: Mapping[str, Mapping[str, Any]] | None = None,
    threads: int | None = None,
) -> Any:
    """Open a model file and check which providers the session really has.

    ONNX Runtime goes on without a provider whose libraries are missing, with a warning at most. Here that is an
    error for a provider that was asked for by name.

    Args:
        model: Path of the ``.onnx`` file; its external data lie beside it.
        providers: See `choose_providers`. CPU is always the last resort for single operators.
        allow_fallback: Accept a session without some requested provider.
        provider_options: Options by provider name, full or short, such as ``{"cuda": {"device_id": 1}}``.
        threads: For the operators of the CPU provider; None leaves it to ONNX Runtime.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        ProviderError: See above, or options are given for a provider that is not used.
        ArtifactError: ONNX Runtime does not load the file.
    """
    ort = import_onnxruntime()
    names = choose_providers(providers, ort.get_available_providers())
    options = {SHORT_NAMES.get(name.lower(), name): dict(value) for name, value in (provider_options or {}).items()}
    unused = [name for name in options if name not in names]
    if unused:
        raise ProviderError(f"provider_options names {', '.join(unused)}; the session asks for {', '.join(names)}")
    if (TENSORRT in names or CUDA in names) and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # the CUDA and cuDNN libraries that pip installed for torch
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # errors are raised, and a lost provider is found below
    if threads is not None:
        settings.intra_op_num_threads = threads
    choices = [options.get(name, {}) for name in names]
    try:
        session = ort.InferenceSession(
            os.fspath(model),
            settings,
            providers=names,
            provider_options=choices,
            disabled_optimizers=_SLOWER if names == [CPU] else None,
        )
    # ONNX Runtime's errors have no base class of their own; whatever it is, this file does not load.
    except Exception as err:
        raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot load '{model}': {summary(err)}") from err
    lost = [name for name in names if name not in session.get_providers()]
    if lost and providers is not None and not allow_fallback:
        raise ProviderError(
            f"{', '.join(lost)} was requested but is not active in the session, which has "
            f"{', '.join(session.get_providers())}; install its libraries (`graphwright doctor` says what is found), "
            "or pass allow_fallback=True"
        )
    return session


def doctor() -> dict[str, Any]:
    """Collect what matters for running ONNX exports here; nothing raises, problems are listed.

    Returns:
        ``distributions`` (name to version), ``conflict`` (how to repair it, or None), ``available_providers`` (of the
        build), ``active_providers`` (of a session with one node that was run), ``torch``, ``torch_cuda`` (CUDA
        version of the torch build, or None), ``cuda_devices``, ``onnxruntime_cuda``, ``packages`` (versions of what
        the export needs) and ``problems``.
    """
    facts: dict[str, Any] = {
        "distributions": installed_runtimes(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: version_of(name) for name in ("onnx", "onnxscript", "onnx-ir")},
        "available_providers": [],
        "active_providers": [],
        "onnxruntime_cuda": None,
    }
    facts["conflict"] = runtime_conflict(facts["distributions"])
    problems = [f"{name} is not installed; {INSTALL}" for name, found in facts["packages"].items() if not found]
    if facts["conflict"]:
        problems.append(facts["conflict"])
    elif importlib.util.find_spec("onnxruntime") is None:
        problems.append(f"ONNX Runtime is not installed; {INSTALL}")
    elif not facts["packages"]["onnx"]:
        pass  # without it no model can be made for the session
    else:
        problems += _check_session(facts)
    facts["problems"] = problems
    return facts


def _check_session(facts: dict[str, Any]) -> list[str]:
    ort = import_onnxruntime()
    facts["available_providers"] = list(ort.get_available_providers())
    facts["onnxruntime_cuda"] = getattr(ort, "cuda_version", "") or None
    problems = []
    torch_cuda, ort_cuda = facts["torch_cuda"], facts["onnxruntime_cuda"]
    if torch_cuda and ort_cuda and torch_cuda.split(".")[0] != ort_cuda.split(".")[0]:
        problems.append(
            f"torch is built for CUDA {torch_cuda} and ONNX Runtime for CUDA {ort_cuda}; "
            "install builds of one major version"
        )
    if facts["cuda_devices"] and CUDA not in facts["available_providers"]:
        problems.append(f"torch sees a GPU but this ONNX Runtime has no CUDA provider; {INSTALL}")
    active, failure = _run_one_node(ort)
    facts["active_providers"] = active
    if failure:
        problems.append(failure)
    wanted = choose_providers(None, facts["available_providers"])
    lost = [name for name in wanted if name not in active]
    if active and lost and facts["cuda_devices"]:
        problems.append(f"{', '.join(lost)} is built in but does not start: a library that it needs is missing")
    return problems


def _run_one_node(ort: Any) -> tuple[list[str], str | None]:
    import numpy as np
    import onnx

    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "doctor", [value], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    names = choose_providers(None, ort.get_available_providers())
    if CUDA in names and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), settings, providers=names)
        (got,) = session.run(None, {"x": np.array([1.0, 2.0], np.float32)})
    # ONNX Runtime's errors have no common base of their own, and each of them is what the doctor looks for.
    except Exception as err:
        return [], f"ONNX Runtime cannot run a model of one node: {summary(err)}"
    if got.tolist() != [2.0, 4.0]:
        return list(session.get_providers()), f"ONNX Runtime adds [1, 2] to itself and gets {got.tolist()}"
    return list(session.get_providers()), None
