"""Write-back: the caller's own class, smaller.

A removal on a Program is done on the module it was captured from: parameters and buffers become the program's, the
attributes that forward reads are set to the sizes that are left, and the result is accepted only when its outputs are
the program's. What stays is an ordinary module of its class: ``generate``, adapters and training code go on working.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.dataflow import dataflow
from ..graph.depgraph import depgraph
from ..graph.errors import ArtifactError, PreconditionError, WriteBackError, first_line
from ..graph.program import Program
from ..graph.resize import RemovalRecord
from .attribute_search import Settler
from .attributes import Value, get_size, set_size
from .capture import capture
from .libraries import derives_from
from .multihead import ResizedMultiheadAttention
from .named_tensors import named_tensors
from .self_check import NotDescribable, describe
from .sizes import SizeChanges

RECORD = "graphwright_record"

# Classes that write-back puts in the place of torch's, by name. A saved model names one of these and nothing else.
# Each derives from the class that it takes the place of.
SUBSTITUTES: Mapping[str, type[ResizedMultiheadAttention]] = {"ResizedMultiheadAttention": ResizedMultiheadAttention}


@dataclass(frozen=True)
class WriteBackRecord:
    """How a module differs from the one its configuration builds.

    Attributes:
        removal: Kept indices by tensor name.
        attributes: Module path to attribute name to the value it was set to.
        classes: Module path to ``(name in SUBSTITUTES, scale of the scores)``.
        extra: What else was done: ``scaled``, tensor name to the factor it was multiplied by.
        config: The configuration as it was, as JSON text; None for a module without one.
        inputs: The capture's inputs as plain data; None with the reason in ``inputs_note``.
        inputs_note: Why ``inputs`` is None.
        passes: The passes that led here, one text each.
    """

    removal: RemovalRecord
    attributes: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    config: str | None = None
    inputs: Any = None
    inputs_note: str = ""
    passes: tuple[str, ...] = ()

    def after(self, earlier: WriteBackRecord) -> WriteBackRecord:
        """Return the record of ``earlier`` followed by this one."""
        attributes = {path: dict(values) for path, values in earlier.attributes.items()}
        for path, values in self.attributes.items():
            attributes.setdefault(path, {}).update(values)
        return dataclasses.replace(
            self,
            removal=earlier.removal.then(self.removal),
            attributes=attributes,
            classes={**earlier.classes, **self.classes},
            extra=_joined(earlier.extra, self.extra),
            config=earlier.config,
            passes=(*earlier.passes, *self.passes),
        )


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    scaled = dict(first.get("scaled", {}))
    for name, factor in second.get("scaled", {}).items():
        scaled[name] = scaled.get(name, 1.0) * factor
    return {**first, **second, **({"scaled": scaled} if scaled else {})}


def write_back(
    model: nn.Module, result: Any, record: RemovalRecord | None = None, *, inplace: bool = False
) -> nn.Module:
    """Do the removal that was done on a Program on the module it was captured from.

    Args:
        model: The module that was captured. Its sizes are those before the removal.
        result: What a pipeline returned (``output`` and ``removal`` are taken from it), or the shrunk Program.
        record: What was removed, where ``result`` is a Program.
        inplace: Change ``model`` itself, once the result is accepted. By default ``model`` is not changed, and the copy
            shares no memory with it.

    Returns:
        The smaller module, in the mode (training or evaluation) of ``model``, with a `WriteBackRecord` as its attribute
        ``graphwright_record``. It shares no memory with the program.

    Raises:
        PreconditionError: Program, record and module do not belong together, or the weights are on ``meta``.
        WriteBackError: No choice of attributes makes the module compute what the program computes, or the program lacks
            layers that the module's ``forward`` would still compute.
    """
    program, removal, passes = _parts(result, record)
    if any(t.is_meta for t in model.parameters()):
        raise PreconditionError("write_back compares outputs, so the module needs weights; load it off the meta device")
    work = _smaller_copy(model, program, removal)
    args, kwargs = program.example_inputs()
    dynamic = {
        spec.name: {d: size for d, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in program.inputs
        if spec.is_tensor
    }
    original = capture(model, args, kwargs, {name: dims for name, dims in dynamic.items() if dims})
    _require_all_layers(original, program)
    graph = depgraph(original)
    settled = Settler(model, work, program, graph, SizeChanges(graph, removal), removal).settle()
    inputs, note = _inputs(args, kwargs)
    written = WriteBackRecord(
        removal,
        settled.attributes,
        settled.classes,
        {"scaled": settled.scaled} if settled.scaled else {},
        config_text(model),
        inputs,
        note,
        passes,
    )
    earlier = vars(model).get(RECORD)
    done = _transplant(work, model, written) if inplace else work
    setattr(done, RECORD, written if earlier is None else written.after(earlier))
    return done


def apply_record(model: nn.Module, record: WriteBackRecord) -> None:
    """Set the classes and attributes of ``record`` on ``model``. Tensors are left as they are.

    Raises:
        ArtifactError: The record names a module, class or attribute that the model does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, (name, scale) in record.classes.items():
        substitute, module = SUBSTITUTES.get(name), modules.get(path)
        if substitute is None or not isinstance(module, substitute.__bases__):
            raise ArtifactError(f"the record gives '{path}' the class {name!r}, which it cannot have")
        substitute.adopt(module, scale)  # type: ignore[arg-type] (`__bases__` says of what class it is)
    for path, values in record.attributes.items():
        module = modules.get(path)
        if module is None:
            raise ArtifactError(f"{type(model).__name__} has no module '{path}', whose attributes the record sets")
        for name, value in values.items():
            old = get_size(module, name)
            if old is None or isinstance(old, int) != (type(value) is int):
                raise ArtifactError(f"the record sets '{path}.{name}' to {value!r}, which is no size attribute there")
            set_size(module, name, value if isinstance(value, int) else type(old)(value))  # type: ignore[arg-type]


def config_text(model: nn.Module) -> str | None:
    """Return a transformers or diffusers model's configuration as JSON text; None for any other module."""
    if derives_from(type(model), "transformers", "PreTrainedModel"):
        return model.config.to_json_string(use_diff=False)  # type: ignore[union-attr]
    if derives_from(type(model), "diffusers", "ConfigMixin"):
        # diffusers writes into the configuration while making the text.
        twin = copy.copy(model)
        object.__setattr__(twin, "__dict__", {**vars(model), "_internal_dict": copy.deepcopy(model._internal_dict)})
        return twin.to_json_string()  # type: ignore[operator]
    return None


def _parts(result: Any, record: RemovalRecord | None) -> tuple[Program, RemovalRecord, tuple[str, ...]]:
    program = result if isinstance(result, Program) else getattr(result, "output", None)
    if not isinstance(program, Program):
        raise PreconditionError(
            f"write_back takes a Program or the result of a pipeline that ends in one, got "
            f"{type(program or result).__name__}; what caches or splits a program has no place in the original class"
        )
    removal = record if record is not None else getattr(result, "removal", None)
    if not isinstance(removal, RemovalRecord):
        raise PreconditionError("write_back needs the removal record: pass what resize returned as the third argument")
    passes = tuple(str(getattr(r, "text", r)) for r in getattr(result, "records", ()))
    return program, removal, passes


def _require_all_layers(original: Program, program: Program) -> None:
    """Raise unless the program still reads every parameter that results of the module depend on."""
    live = {str(node.target) for node in dataflow(original).live() if node.op == "get_attr"}
    if gone := sorted(live & set(original.parameters()) - set(program.tensors())):
        others = f" and {len(gone) - 1} other parameters" if len(gone) > 1 else ""
        raise WriteBackError(
            f"{original.name} computes with '{gone[0]}'{others}, which the program does without: a pass took layers away "
            "or merged them (remove-blocks, fold-batch-norm), and forward would still call them; use program.module(), "
            "or write back what the passes before it left"
        )


def _inputs(args: Any, kwargs: Any) -> tuple[Any, str]:
    try:
        return describe({"args": args, "kwargs": kwargs}), ""
    except NotDescribable as err:
        return None, str(err)


# ---------------------------------------------------------------------- tensors


def _smaller_copy(model: nn.Module, program: Program, removal: RemovalRecord) -> nn.Module:
    """Return a copy of ``model`` with the program's tensors; its attributes are still the old ones."""
    owned = named_tensors(model)
    replaced: dict[int, Tensor] = {}
    for name, tensor in program.tensors().items():
        old = owned.get(name)
        if old is None:
            if name in removal.tensors and "." in name:
                raise PreconditionError(
                    f"{type(model).__name__} has no tensor '{name}'; write back to the captured module"
                )
            continue  # a constant of the capture, which forward makes for itself
        _check(name, old, tensor, removal)
        known = replaced.get(id(old))
        if known is None:
            replaced[id(old)] = _own(tensor, old)
        elif known.shape != tensor.shape or not torch.equal(known, tensor.detach()):
            raise PreconditionError(
                f"'{name}' is tied in {type(model).__name__} but has a value of its own in the program"
            )
    try:
        return copy.deepcopy(model, dict(replaced))
    except (TypeError, RuntimeError, AttributeError) as err:
        raise WriteBackError(
            f"{type(model).__name__} cannot be copied ({first_line(err)}); remove what cannot, "
            "such as a hook's lock or a cached activation"
        ) from err


def _own(tensor: Tensor, like: Tensor) -> Tensor:
    fresh = tensor.detach().clone()
    return nn.Parameter(fresh, like.requires_grad) if isinstance(like, nn.Parameter) else fresh


def _check(name: str, old: Tensor, new: Tensor, removal: RemovalRecord) -> None:
    cuts = removal.tensors.get(name, {})
    want = list(old.shape)
    for dim, cut in cuts.items():
        if old.shape[dim] != cut.of:
            raise PreconditionError(
                f"'{name}' has size {old.shape[dim]} in dimension {dim}, the record was made for {cut.of}; "
                "write back to the module that was captured"
            )
        want[dim] = len(cut.kept)
    if list(new.shape) != want:
        raise PreconditionError(
            f"'{name}' is {list(new.shape)} in the program, the record says {want}; "
            "the program was changed by something that is no removal, or the record is of another run"
        )


def _transplant(work: nn.Module, model: nn.Module, record: WriteBackRecord) -> nn.Module:
    """Give ``model`` the tensors, classes and attributes of its accepted copy."""
    twins = dict(work.named_modules())
    for path, module in model.named_modules():
        for registry, theirs in (
            (module._parameters, twins[path]._parameters),
            (module._buffers, twins[path]._buffers),
        ):
            for name, tensor in registry.items():
                if tensor is not None:
                    setattr(module, name, theirs[name])
    apply_record(model, record)
    return model
