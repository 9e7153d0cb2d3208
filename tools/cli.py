"""The command line: ``graphwright VERB``. Thin: each verb reads its options and calls the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Compress and accelerate PyTorch models on one graph.")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe: a YAML file or the short name of one that ships.")],
    out: Annotated[Path | None, typer.Option(help="Directory of the run.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value")] = None,
) -> None:
    """Run a recipe."""
    import json

    from .recipe import load_recipe
    from .run import Runner

    loaded = load_recipe(recipe, set_ or ())
    typer.echo(json.dumps(Runner(loaded, out or Path("runs") / loaded.name)(), indent=1))


@app.command()
def groups(model: Annotated[str, typer.Argument(help="builtin:NAME, a directory, or package.module:factory.")]) -> None:
    """List the coupling groups of a model."""
    from ..frontends.capture import capture
    from ..graph.depgraph import depgraph
    from .run import load

    loaded = load(model)
    for g in depgraph(capture(loaded.model, loaded.args, loaded.kwargs, loaded.dynamic)).groups:
        typer.echo(f"{g.name}  {g.kind}  {g.size}  {g.exactness}  {len(g.members)}")


def main() -> None:
    """Run the command line."""
    app()
