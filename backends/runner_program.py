"""An export that is called like the program it was made from, and plans of such exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.fx import Node

from ..graph.encoding import decode, encode
from ..graph.errors import ArtifactError
from ..graph.interface import Evaluable, Interface
from ..graph.plan import Stage, Staged
from ..graph.program import Program
from ..graph.schedules import REFRESH
from ..graph.schedules import decode as decode_schedule
from .flat import FlatProgram


class Runner(Protocol):
    """What opened an export."""

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run on tensors that fit the export's inputs, in order; return its outputs."""
        ...


class RunnerProgram(Evaluable):
    """Calls an export with the inputs of the captured module, and returns what that returns.

    Args:
        runner: Takes and returns the tensors among the flat inputs and outputs.
        facts: What the manifest says of the export, with what `call_facts` adds.
    """

    def __init__(self, runner: Runner, facts: Mapping[str, Any]) -> None:
        if "interface" not in facts:
            raise ArtifactError(
                f"the export of {facts.get('name')} does not say how it is called; call its runner with tensors by name, or "
                "export it again with this version"
            )
        form = Interface.decode(facts["interface"])
        self.name, self.inputs, self.guards, self.signature = form.name, form.inputs, form.guards, form.signature
        self.in_spec, self.out_spec = form.in_spec, form.out_spec
        self.runner = runner
        self._constants = [None if entry is None else (decode(entry["constant"]),) for entry in facts["results"]]

    def evaluate(self, leaves: Sequence[Any]) -> Any:
        """Run on inputs as `flatten` returns them; see `Evaluable`."""
        given = [leaf for leaf, spec in zip(leaves, self.inputs, strict=True) if spec.is_tensor]
        tensors = iter(self.runner.run(given))
        return self.unflatten([next(tensors) if known is None else known[0] for known in self._constants])

    def module(self, flat: bool = False) -> nn.Module:
        """Return an ``nn.Module`` with the original's call signature; it has no parameters. For ``flat`` see `Evaluable`."""
        return _FlatModule(self) if flat else _RunnerModule(self)


class _RunnerModule(nn.Module):
    def __init__(self, program: RunnerProgram) -> None:
        super().__init__()
        self.__dict__["program"] = program
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["program"](*args, **kwargs)


class _FlatModule(_RunnerModule):
    """Takes what `RunnerProgram.flatten` returned, and checks nothing."""

    def forward(self, *leaves: Any) -> Any:
        return self.__dict__["program"].evaluate(leaves)


def call_facts(program: Program, flat: FlatProgram) -> dict[str, Any]:
    """Return what `RunnerProgram` needs to know, as plain data.

    Returns:
        ``interface`` and ``results``, which has None for an output that is a tensor; empty if an input, an output or a
        class of these is no plain data.
    """
    values: Any = program.graph_module.graph.output_node().args[0]
    results: list[Any] = [None] * len(values)
    try:
        for i in set(range(len(values))) - set(flat.output_positions):
            if isinstance(values[i], Node):
                return {}  # a size that varies
            results[i] = {"constant": encode(values[i])}
        return {"interface": Interface.of(program).encode(), "results": results}
    except ArtifactError:
        return {}


def staged(
    manifest: Mapping[str, Any], open_runner: Callable[[str, Mapping[str, Any]], Runner]
) -> Staged[RunnerProgram]:
    """Return the plan that a manifest of `plan_facts` describes.

    Args:
        manifest: Of the exported plan.
        open_runner: Makes the runner of a stage from its name and facts.
    """
    stages = {
        name: Stage(RunnerProgram(open_runner(name, facts), facts), tuple(facts["reads"]), tuple(facts["writes"]))
        for name, facts in manifest["stages"].items()
    }
    inputs = stages[REFRESH].program.inputs[: manifest["inputs"]]
    schedule = decode_schedule(manifest["schedule"])
    notes, order = tuple(manifest["notes"]), int(manifest["extrapolation"])
    return Staged(stages, schedule, inputs, manifest["timestep"], manifest["name"], notes, order)


def plan_facts(plan: Staged[Program], stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a manifest says of a plan, from what it says of its stages."""
    return {
        "name": plan.name,
        "inputs": len(plan.inputs),
        "timestep": plan.timestep,
        "schedule": plan.schedule.encode(),
        "extrapolation": plan.extrapolation,
        "notes": list(plan.notes),
        "registers": {
            name: {"dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
            for name, spec in plan.registers.items()
        },
        "stages": {
            name: {**facts, "reads": list(plan.stages[name].reads), "writes": list(plan.stages[name].writes)}
            for name, facts in stages.items()
        },
    }
