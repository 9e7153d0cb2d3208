"""Models of transformers and diffusers, from directories, GGUF files and the hub.

Which class a configuration means is read from ``config.json``: ``_class_name`` for diffusers, ``architectures`` (or
``model_type`` alone) for transformers. Only classes of the installed libraries are made.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..graph.errors import LoadError
from .artifact_record import RECORD_FILE

logger = logging.getLogger(__name__)

CONFIG, PIPELINE, ADAPTER = "config.json", "model_index.json", "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "diffusion_pytorch_model*.bin")
_SHOWN = 8  # names of a directory in a message


@dataclass(frozen=True)
class Options:
    """How to load: see `load_model`."""

    dtype: torch.dtype | None = None
    random_weights: bool = False
    seed: int = 0


Loaded = tuple[nn.Module, tuple[str, ...]]


def load_directory(path: Path, part: str | None, options: Options) -> Loaded:
    """Load a directory of transformers, diffusers or GGUF files; ``part`` is what followed the ``#``.

    Raises:
        LoadError: The directory holds no model or several, or what it holds cannot be loaded.
    """
    if part is not None and part.endswith(".gguf"):
        return load_gguf(path / part, options)
    if (path / PIPELINE).is_file() or part is not None:
        return load_directory(_component(path, part), None, options)
    if (path / CONFIG).is_file():
        return _configured(path, _read_json(path / CONFIG), options)
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) == 1:
        return load_gguf(path / files[0], options)
    if files:
        raise LoadError(f"{path} has several GGUF files; choose one: " + ", ".join(f"{path}#{f}" for f in files))
    if (path / ADAPTER).is_file():
        raise LoadError(f"{path} holds an adapter of peft, not a model; merge it into its base model and save that")
    names = sorted(file.name for file in path.iterdir())
    found = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") if names else "nothing"
    raise LoadError(
        f"{path} holds no model: expected {CONFIG}, {PIPELINE}, {RECORD_FILE} or a .gguf file, found {found}"
    )


def load_gguf(file: Path, options: Options) -> Loaded:
    """Load a GGUF file as a causal language model of transformers; the weights are dequantised.

    Raises:
        LoadError: The file or a package is missing, or transformers does not read this architecture from GGUF.
    """
    if not file.is_file():
        raise LoadError(f"there is no file {file}")
    transformers = _library("transformers")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise LoadError(f"reading {file.name} needs the package {package}: pip install {package}")
    cls = transformers.AutoModelForCausalLM
    return _from_pretrained(cls, str(file.parent), options, {"gguf_file": file.name}, str(file))


def load_hub(name: str, part: str | None, options: Options) -> Loaded:
    """Load ``org/name`` through the libraries' own ``from_pretrained``, from their cache or the network.

    Raises:
        LoadError: The name is unknown, the hub cannot be reached, or it is a pipeline and ``part`` names no component.
    """
    transformers = _library("transformers")
    extra = {"subfolder": part} if part else {}
    with _in_one_sentence(name):
        config, _ = transformers.PretrainedConfig.get_config_dict(name, **extra)
    if not config:
        raise LoadError(
            f"{name} has no {CONFIG}{f' in {part}' if part else ''}; if it is a diffusers pipeline, name a component, "
            f"such as {name}#unet"
        )
    cls = _class_of(f"{name}{f'#{part}' if part else ''}", config)
    if options.random_weights:
        return _random(cls, config, options), ()
    return _from_pretrained(cls, name, options, extra, name)


def _component(path: Path, part: str | None) -> Path:
    known = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
    listed = ", ".join(f"{path}#{name}" for name in known) or "none"
    if part is None:
        raise LoadError(f"{path} is a diffusers pipeline; choose one of its models: {listed}")
    if part not in known:
        raise LoadError(f"{path} has no model {part!r}; its models are: {listed}")
    return path / part


def _configured(path: Path, config: dict[str, Any], options: Options) -> Loaded:
    cls = _class_of(str(path), config)
    if any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        variant = _variant(path)
        return _from_pretrained(cls, str(path), options, {"variant": variant} if variant else {}, str(path))
    if not options.random_weights:
        raise LoadError(
            f"{path} has a configuration of {cls.__name__} and no weights (expected *.safetensors); add them, or ask for "
            "random weights: random_weights=True"
        )
    return _random(cls, config, options), (f"{path} has no weights: they are random, of seed {options.seed}",)


def _class_of(what: str, config: dict[str, Any]) -> Any:
    """Return the model class of the installed libraries that a configuration names."""
    if "_class_name" in config:
        diffusers, name = _library("diffusers"), str(config["_class_name"])
        cls = getattr(diffusers, name, None)
        if cls is None:
            raise LoadError(
                f"{what} is a {name} of diffusers {config.get('_diffusers_version', 'unknown')}, which the installed "
                f"diffusers {diffusers.__version__} does not have"
            )
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise LoadError(f"{what} is a {name}, which is no model")
        return cls
    architectures = config.get("architectures") or []
    if not architectures and "model_type" not in config:
        raise LoadError(f"{what}: the configuration names neither `architectures`, `model_type` nor `_class_name`")
    transformers = _library("transformers")
    if not architectures:
        return transformers.AutoModel
    cls = getattr(transformers, str(architectures[0]), None)
    if cls is None or not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        code = "; its own code is not run" if "auto_map" in config else ""
        raise LoadError(
            f"{what} is a {architectures[0]}, which the installed transformers {transformers.__version__} does not "
            f"have{code}; build it in a factory and name that: package.module:factory"
        )
    return cls


def _from_pretrained(cls: Any, name: str, options: Options, extra: dict[str, Any], what: str) -> Loaded:
    kwargs = {**extra, "output_loading_info": True}
    if options.dtype is not None:
        kwargs["dtype" if cls.__module__.startswith("transformers") else "torch_dtype"] = options.dtype
    # Parameters that a checkpoint lacks are drawn at random.
    with torch.random.fork_rng(devices=[]), _in_one_sentence(what):
        torch.manual_seed(options.seed)
        model, info = cls.from_pretrained(name, **kwargs)
    missing = sorted(info.get("missing_keys", ()))
    if not missing:
        return model.eval(), ()
    shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    note = f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, which are random: {shown}"
    logger.warning("%s: %s", what, note)
    return model.eval(), (note,)


def _random(cls: Any, config: dict[str, Any], options: Options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if "_class_name" in config:
            model = cls.from_config(config)
        elif cls.__name__ == "AutoModel":
            model = cls.from_config(_library("transformers").AutoConfig.for_model(**config))
        else:
            model = cls(cls.config_class.from_dict(config))
    return model.eval()


def _variant(path: Path) -> str | None:
    """Return ``fp16`` where a directory of diffusers has ``diffusion_pytorch_model.fp16.safetensors`` alone."""
    stem = "diffusion_pytorch_model"
    names = [file.name for file in path.glob(f"{stem}*.safetensors")]
    if not names or any(name == f"{stem}.safetensors" or name.startswith(f"{stem}-") for name in names):
        return None
    return names[0].removeprefix(f"{stem}.").removesuffix(".safetensors").partition("-")[0]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as err:
        raise LoadError(f"{file} is no JSON: {err}") from err
    if not isinstance(data, dict):
        raise LoadError(f"{file} must hold a JSON object, it holds a {type(data).__name__}")
    return data


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as err:
        raise LoadError(
            f"this model needs {name}, which cannot be imported ({err}): pip install graphwright[hf]"
        ) from err


@contextmanager
def _in_one_sentence(what: str) -> Iterator[None]:
    """Turn what the libraries raise when a model cannot be found, fetched or read into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as err:
        # The hub's own errors, and those of the HTTP library below it, differ between versions.
        remote = type(err).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "httpcore", "requests")
        if not remote and not isinstance(err, (OSError, ValueError, RuntimeError, ImportError, SafetensorError)):
            raise
        raise LoadError(f"{what} cannot be loaded: {' '.join(str(err).split()) or type(err).__name__}") from err
