"""Which classes are those of the model libraries, found by name, so that nothing has to be imported."""

from __future__ import annotations

from collections.abc import Mapping

# The base class of every model of a library.
MODEL_CLASSES: Mapping[str, str] = {"transformers": "PreTrainedModel", "diffusers": "ModelMixin"}


def derives_from(kind: type, library: str, base: str | None = None) -> bool:
    """Whether ``kind``, or a class that it derives from, is of ``library`` (and called ``base``, where one is given)."""
    return any(c.__module__.partition(".")[0] == library and base in (None, c.__name__) for c in kind.__mro__)


def is_library_model(kind: type) -> bool:
    """Whether ``kind`` is a model class of transformers or diffusers itself, not one that a user derived."""
    library = kind.__module__.partition(".")[0]
    return library in MODEL_CLASSES and derives_from(kind, library, MODEL_CLASSES[library])
