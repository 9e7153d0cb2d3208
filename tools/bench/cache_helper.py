"""The package DeepCache, put on and taken off a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from ...graph.errors import PreconditionError


def new_helper(pipe: Any) -> Any:
    """Return a helper of the package, not yet enabled.

    Raises:
        PreconditionError: The package is not installed.
    """
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as err:
        raise PreconditionError(
            "the peer of this benchmark is not installed: run `pip install DeepCache==0.1.1`"
        ) from err
    return DeepCacheSDHelper(pipe=pipe)


@contextmanager
def package(pipe: Any, interval: int, branch: int) -> Iterator[Any]:
    """Let a pipeline run with the package's cache inside the block; yields the helper."""
    helper = new_helper(pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield helper
    finally:
        helper.disable()


def kept_bytes(helper: Any) -> int:
    """Return the bytes of all that a helper keeps; tensors that share memory count once."""
    leaves = [leaf for leaf in pytree.tree_leaves(helper.cached_output) if isinstance(leaf, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in (leaf.untyped_storage() for leaf in leaves)}.values())
