"""Compression and acceleration of PyTorch models on one captured graph.

    program = graphwright.capture(model, (x,))
    result = graphwright.Pipeline([graphwright.RemoveChannels(ratio=0.3)])(program)
    graphwright.export_onnx(result.output, "out/")

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "ArtifactError": "graph.errors",
    "CaptureError": "graph.errors",
    "Context": "passes.base",
    "CouplingGroup": "graph.groups",
    "DepGraph": "graph.depgraph",
    "EliminateDeadCode": "passes.eliminate_dead_code",
    "ExportError": "graph.errors",
    "FoldBatchNorm": "passes.fold_batch_norm",
    "GraphwrightError": "graph.errors",
    "InputError": "graph.errors",
    "InsertFeatureCache": "passes.insert_feature_cache",
    "InsertLayerCache": "passes.insert_layer_cache",
    "LayerRouter": "passes.layer_router",
    "LearnLayerCache": "passes.learn_layer_cache",
    "LoadError": "graph.errors",
    "OnnxRunner": "backends.onnx_runner",
    "Pass": "passes.base",
    "PassResult": "passes.base",
    "Pipeline": "passes.base",
    "PipelineResult": "passes.base",
    "Plan": "graph.plan",
    "PreconditionError": "graph.errors",
    "Program": "graph.program",
    "ProviderError": "graph.errors",
    "RemovalRecord": "graph.resize",
    "RemoveBlocks": "passes.remove_blocks",
    "RemoveChannels": "passes.remove_channels",
    "RemoveDropout": "passes.remove_dropout",
    "Scoring": "passes.criteria",
    "Skipped": "passes.base",
    "TrainWeights": "passes.train_weights",
    "Training": "passes.training",
    "VerificationError": "graph.errors",
    "WriteBackError": "graph.errors",
    "alternate": "passes.alternate",
    "apply_deepcache": "tools.pipelines",
    "apply_layer_cache": "tools.pipelines",
    "apply_plan": "tools.pipelines",
    "capture": "frontends.capture",
    "centred": "graph.schedules",
    "cost": "graph.cost",
    "depgraph": "graph.depgraph",
    "export_onnx": "backends.onnx_export",
    "export_torchscript": "backends.torchscript",
    "fisher_calibration": "passes.fisher",
    "group_lasso_gradients": "passes.sparse_training",
    "import_router": "passes.router_files",
    "layer_groups": "graph.layers",
    "load": "frontends.artifact",
    "load_onnx_plan": "backends.onnx_export",
    "load_plan": "graph.serialize",
    "load_program": "graph.serialize",
    "masked": "graph.schedules",
    "picture_weights": "passes.picture_weights",
    "register_rule": "graph.rules",
    "residual_blocks": "graph.blocks",
    "residual_joins": "graph.joins",
    "resize": "graph.resize",
    "save": "frontends.artifact",
    "save_plan": "graph.serialize",
    "save_program": "graph.serialize",
    "skip_joins": "graph.joins",
    "step_mask": "graph.schedules",
    "train": "passes.trainer",
    "train_layer_router": "passes.train_layer_router",
    "unregister_rule": "graph.rules",
    "verify": "graph.verify",
    "warmed_up": "graph.schedules",
    "write_back": "frontends.write_back",
}

__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .backends.onnx_export import export_onnx as export_onnx
    from .backends.onnx_export import load_onnx_plan as load_onnx_plan
    from .backends.onnx_runner import OnnxRunner as OnnxRunner
    from .backends.torchscript import export_torchscript as export_torchscript
    from .frontends.artifact import load as load
    from .frontends.artifact import save as save
    from .frontends.capture import capture as capture
    from .frontends.write_back import write_back as write_back
    from .graph.blocks import residual_blocks as residual_blocks
    from .graph.cost import cost as cost
    from .graph.depgraph import DepGraph as DepGraph
    from .graph.depgraph import depgraph as depgraph
    from .graph.errors import ArtifactError as ArtifactError
    from .graph.errors import CaptureError as CaptureError
    from .graph.errors import ExportError as ExportError
    from .graph.errors import GraphwrightError as GraphwrightError
    from .graph.errors import InputError as InputError
    from .graph.errors import LoadError as LoadError
    from .graph.errors import PreconditionError as PreconditionError
    from .graph.errors import ProviderError as ProviderError
    from .graph.errors import VerificationError as VerificationError
    from .graph.errors import WriteBackError as WriteBackError
    from .graph.groups import CouplingGroup as CouplingGroup
    from .graph.joins import residual_joins as residual_joins
    from .graph.joins import skip_joins as skip_joins
    from .graph.layers import layer_groups as layer_groups
    from .graph.plan import Plan as Plan
    from .graph.program import Program as Program
    from .graph.resize import RemovalRecord as RemovalRecord
    from .graph.resize import resize as resize
    from .graph.rules import register_rule as register_rule
    from .graph.rules import unregister_rule as unregister_rule
    from .graph.schedules import centred as centred
    from .graph.schedules import masked as masked
    from .graph.schedules import step_mask as step_mask
    from .graph.schedules import warmed_up as warmed_up
    from .graph.serialize import load_plan as load_plan
    from .graph.serialize import load_program as load_program
    from .graph.serialize import save_plan as save_plan
    from .graph.serialize import save_program as save_program
    from .graph.verify import verify as verify
    from .passes.alternate import alternate as alternate
    from .passes.base import Context as Context
    from .passes.base import Pass as Pass
    from .passes.base import PassResult as PassResult
    from .passes.base import Pipeline as Pipeline
    from .passes.base import PipelineResult as PipelineResult
    from .passes.base import Skipped as Skipped
    from .passes.criteria import Scoring as Scoring
    from .passes.eliminate_dead_code import EliminateDeadCode as EliminateDeadCode
    from .passes.fisher import fisher_calibration as fisher_calibration
    from .passes.fold_batch_norm import FoldBatchNorm as FoldBatchNorm
    from .passes.insert_feature_cache import InsertFeatureCache as InsertFeatureCache
    from .passes.insert_layer_cache import InsertLayerCache as InsertLayerCache
    from .passes.layer_router import LayerRouter as LayerRouter
    from .passes.learn_layer_cache import LearnLayerCache as LearnLayerCache
    from .passes.picture_weights import picture_weights as picture_weights
    from .passes.remove_blocks import RemoveBlocks as RemoveBlocks
    from .passes.remove_channels import RemoveChannels as RemoveChannels
    from .passes.remove_dropout import RemoveDropout as RemoveDropout
    from .passes.router_files import import_router as import_router
    from .passes.sparse_training import group_lasso_gradients as group_lasso_gradients
    from .passes.train_layer_router import train_layer_router as train_layer_router
    from .passes.train_weights import TrainWeights as TrainWeights
    from .passes.trainer import train as train
    from .passes.training import Training as Training
    from .tools.pipelines import apply_deepcache as apply_deepcache
    from .tools.pipelines import apply_layer_cache as apply_layer_cache
    from .tools.pipelines import apply_plan as apply_plan


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'graphwright' has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
