"""The command line: ``graphwright VERB``. Each verb reads its options and calls the library; nothing is computed here.

Exit codes: 0 done, 1 a check or a stage failed, 2 wrong usage or a wrong recipe. Results go to standard output,
progress and errors to standard error. Everything heavy is imported inside the verbs: ``--help`` needs no torch.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

BENCHMARKS = {
    "depgraph": ("graphwright.tools.bench.depgraph:main", "from a module to a pruned one, beside Torch-Pruning"),
    "scale": (
        "graphwright.tools.bench.scale:main",
        "the analysis up to 50,000 nodes, and a Llama of 70 billion parameters",
    ),
    "cache": (
        "graphwright.tools.bench.cache:main",
        "caches of diffusion models, beside published counts, the package DeepCache and the hooks of diffusers",
    ),
    "pruning": (
        "graphwright.tools.bench.pruning:main",
        "quality against multiply-accumulates of pruned networks, for every criterion and scope",
    ),
    "pruners": (
        "graphwright.tools.bench.pruning_peer:main",
        "the same criteria and ratios by graphwright and by Torch-Pruning",
    ),
    "diff-pruning": (
        "graphwright.tools.bench.diffusion_pruning:main",
        "criteria for the channels of a diffusion model, before and after fine-tuning",
    ),
    "published-counts": (
        "graphwright.tools.bench.published_counts:main",
        "parameters and multiply-accumulates of published pruned networks, from their configurations",
    ),
    "recipes": (
        "graphwright.tools.bench.recipes:main",
        "latency in ONNX Runtime beside multiply-accumulates, of what recipes leave",
    ),
    "learned-routers": (
        "graphwright.tools.bench.learned_routers:main",
        "a router that learned on the digit transformer, beside others of its size",
    ),
    "routers": (
        "graphwright.tools.bench.routers:main",
        "what routers of Learning-to-Cache remove, and what that saves",
    ),
}
EVERYWHERE = ("--quiet", "-q", "--verbose", "-v")


class Verbs(TyperGroup):
    """The group of verbs: errors become one sentence and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # The switches that concern every verb may be written before or after it; `bench` hands on what follows it.
        if "bench" not in args:
            args = [*(a for a in args if a in EVERYWHERE), *(a for a in args if a not in EVERYWHERE)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        from .errors import explain

        try:
            return super().invoke(ctx)
        except Exception as err:
            code, sentence = explain(err)
            if sentence is None or ctx.params.get("verbose"):
                raise
            from .render import print_error

            print_error(sentence)
            raise typer.Exit(code) from err


@dataclass(frozen=True)
class Shared:
    """The switches that every verb knows."""

    quiet: bool
    verbose: bool


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress and accelerate PyTorch models on one graph.",
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="builtin:NAME, a transformers or diffusers directory, a .gguf file, a hub name, package.module:factory, "
        "or the directory of a run.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: passes.remove-channels.ratio=0.5. Repeatable."),
]
CacheOption = Annotated[
    bool,
    typer.Option(
        "--no-cache", envvar="GRAPHWRIGHT_NO_CACHE", help="Capture anew, and do not keep the graph for other runs."
    ),
]


def _cache_dir(no_cache: bool) -> Path | None:
    """Return where captured graphs are kept, None where they are not to be."""
    if no_cache:
        return None
    from ..frontends.cache import default_cache_dir

    return default_cache_dir()


def _version(show: bool) -> None:
    if show:
        typer.echo(f"graphwright {import_module('graphwright').__version__}")
        raise typer.Exit()


@app.callback()
def shared(
    ctx: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log, and show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress and accelerate PyTorch models on one graph."""
    ctx.obj = Shared(quiet, verbose)
    logger = logging.getLogger("graphwright")
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    # Without a handler Python prints warnings by itself, and nothing below them.
    logger.handlers = [logging.StreamHandler()] if verbose else []


@app.command()
def run(
    ctx: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A YAML file, the name of a shipped recipe, or with --pass a model."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the run; runs/RECIPE if left out.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what the passes would do; write nothing.")] = False,
    as_json: JsonOption = False,
    settings: SetOption = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", metavar="PASS", help="Apply this to a model: 'remove-channels{ratio=0.3}'. Repeatable."),
    ] = None,
    no_cache: CacheOption = False,
) -> None:
    """Capture, apply passes, export, check and report; a run that stopped goes on where it was."""
    from . import verbs

    made = verbs.recipe_of(recipe, passes or (), settings or ())
    if dry_run:
        verbs.dry_run(made, as_json, ctx.obj.quiet, _cache_dir(no_cache))
        return
    out = out or Path("runs") / (made.name or "run")
    if not verbs.run(made, out, as_json, ctx.obj.quiet, _cache_dir(no_cache)):
        raise typer.Exit(1)


@app.command()
def groups(
    ctx: typer.Context,
    model: ModelArgument,
    as_json: JsonOption = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="List what cannot be removed as well, and why.")] = False,
    members: Annotated[bool, typer.Option("--members", help="List the tensors of every group.")] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build from the configuration of a directory without weights.")
    ] = False,
    no_cache: CacheOption = False,
) -> None:
    """List which dimensions of a model must change together."""
    from . import verbs

    verbs.groups(model, as_json, frozen, members, random_weights, ctx.obj.quiet, _cache_dir(no_cache))


@app.command()
def check(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Of a run, an export, or a saved program.")],
    as_json: JsonOption = False,
) -> None:
    """Check what is in a directory: hashes, loading, and exports against the program."""
    from . import verbs

    if not verbs.check(directory, as_json, ctx.obj.quiet):
        raise typer.Exit(1)


@app.command()
def export(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="DIR_OR_MODEL", help="The directory of a run, or a model.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write.")],
    kind: Annotated[str, typer.Option("--to", help="onnx or torchscript.")] = "onnx",
    opset: Annotated[int | None, typer.Option(help="ONNX operator set.")] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision (ONNX).")] = False,
    as_json: JsonOption = False,
    no_cache: CacheOption = False,
) -> None:
    """Export the result of a run, or a model as it is."""
    from . import verbs

    verbs.export(source, out, kind, opset, fp16, as_json, ctx.obj.quiet, _cache_dir(no_cache))


@app.command()
def passes(as_json: JsonOption = False) -> None:
    """List the passes with their options."""
    from . import verbs

    verbs.passes(as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    ctx: typer.Context, name: Annotated[str | None, typer.Argument(help="Which; without it they are listed.")] = None
) -> None:
    """Run a benchmark; what follows its name is handed to it."""
    if name is None or name in ("--help", "-h"):
        for known, (_, what) in BENCHMARKS.items():
            typer.echo(f"{known}  {what}")
        return
    if name not in BENCHMARKS:
        raise typer.BadParameter(f"there is no benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    module, _, function = BENCHMARKS[name][0].partition(":")
    sys.argv = [f"graphwright bench {name}", *ctx.args]
    code = getattr(import_module(module), function)()
    if code:
        raise typer.Exit(int(code))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, and what of it does not work."""
    from . import verbs

    if not verbs.doctor(as_json):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    if not sys.stderr.isatty() or {"-q", "--quiet"} & set(sys.argv):
        # Bars of the model libraries; tqdm reads this when it is imported, and this process is ours.
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()
