"""The checkout, the installed package and the built wheel hold the same modules and the same data."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONFIG = PROJECT["tool"]["setuptools"]
FACADE = ROOT / CONFIG["package-dir"]["graphwright"]
FOLDERS = {name: ROOT / folder for name, folder in CONFIG["package-dir"].items() if name != "graphwright"}
BARE = {name.split(".")[1] for name in FOLDERS}

MODEL_LIBRARIES = {"accelerate", "diffusers", "onnx", "onnxruntime", "onnxscript", "peft", "transformers"}


def run_python(code: str, cwd: Path) -> str:
    """Run ``code`` in a fresh interpreter and return its standard output."""
    command = [sys.executable, "-c", dedent(code)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def package_folder(package: str) -> Path:
    """Return the folder that holds ``package``, by the longest mapped prefix."""
    parts, rest = package.split("."), list[str]()
    while ".".join(parts) not in CONFIG["package-dir"]:
        rest.insert(0, parts.pop())
    return ROOT.joinpath(CONFIG["package-dir"][".".join(parts)], *rest)


def source_files(folder: Path) -> list[Path]:
    """Return every file below ``folder`` but bytecode, hidden files and notes for readers of the folder."""
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    return [
        folder / file
        for file in files
        if file.suffix != ".pyc" and file.name != "README.md" and not any(p.startswith(".") for p in file.parts)
    ]


def test_every_package_is_shipped() -> None:
    found = {"graphwright"}
    for name, folder in FOLDERS.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join((name, *init.parent.relative_to(folder).parts)))
    assert found == set(CONFIG["packages"]), "list it in pyproject.toml under [tool.setuptools] packages"


def test_every_module_lies_in_a_package() -> None:
    for folder in FOLDERS.values():
        for module in folder.rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), f"no __init__.py beside {module}"


def test_every_data_file_is_shipped() -> None:
    data = {file for folder in FOLDERS.values() for file in source_files(folder) if file.suffix != ".py"}
    shipped = set[Path]()
    for package, patterns in CONFIG["package-data"].items():
        for pattern in patterns:
            shipped |= set(package_folder(package).glob(pattern))
    assert not data - shipped, "name it in pyproject.toml under [tool.setuptools.package-data]"


def test_links_mirror_the_mapping() -> None:
    for name, folder in FOLDERS.items():
        link = FACADE / name.split(".")[1]
        assert link.is_symlink(), f"{link} is no link: was this checked out with core.symlinks=false?"
        assert not os.path.isabs(os.readlink(link)), f"{link} has to be relative"
        assert link.resolve() == folder.resolve()
    links = {entry.name for entry in FACADE.iterdir() if entry.is_symlink()}
    assert links == BARE, "a link without a line under [tool.setuptools.package-dir] is not installed"


def test_checkers_know_every_folder() -> None:
    pyright, ruff = PROJECT["tool"]["pyright"], PROJECT["tool"]["ruff"]["lint"]
    assert BARE <= set(pyright["include"]), "pyright does not check what only a link leads to"
    assert {f"src/graphwright/{name}" for name in BARE} <= set(pyright["exclude"]), "it would check files twice"
    assert set(ruff["flake8-tidy-imports"]["banned-api"]) == BARE
    assert {f"{{{','.join(f.name for f in FOLDERS.values())}}}/**"} == set(ruff["per-file-ignores"])


def test_no_generic_top_level_module() -> None:
    # From the root on purpose: there the folders could be imported under their bare names.
    run_python(
        f"""
        import importlib, sys
        for package in {CONFIG["packages"]!r}:
            importlib.import_module(package)
        leaked = {BARE!r} & set(sys.modules)
        assert not leaked, f"imported under a bare name: {{leaked}}"
        """,
        ROOT,
    )


@pytest.mark.parametrize("package", ["graphwright", "graphwright.graph", "graphwright.passes"])
def test_import_loads_no_model_library(package: str, tmp_path: Path) -> None:
    run_python(
        f"""
        import sys
        import {package}
        loaded = {MODEL_LIBRARIES!r} & set(sys.modules)
        assert not loaded, f"importing {package} imports {{loaded}}"
        """,
        tmp_path,
    )


def test_public_names_resolve(tmp_path: Path) -> None:
    run_python(
        """
        import graphwright
        missing = [name for name in graphwright.__all__ if not hasattr(graphwright, name)]
        assert not missing, f"in __all__ but not there: {missing}"
        """,
        tmp_path,
    )


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    out = run_python(
        f"""
        import sys
        from graphwright.tools.cli import main
        sys.argv = ["graphwright", "--help"]
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, stop.code
        slow = {MODEL_LIBRARIES | {"torch", "scipy", "sklearn"}!r} & set(sys.modules)
        assert not slow, f"`graphwright --help` imports {{slow}}"
        """,
        tmp_path,
    )
    assert "run" in out


def test_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="graphwright")
    assert command.value == PROJECT["project"]["scripts"]["graphwright"]


def test_wheel_holds_every_file_and_nothing_else(tmp_path: Path) -> None:
    """Build from a copy without the links, as a checkout on a system without symbolic links would be."""
    expected = set[str]()
    for name, folder in FOLDERS.items():
        for file in source_files(folder):
            expected.add("/".join((*name.split("."), *file.relative_to(folder).parts)))
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    for file in [*FACADE.glob("*.py"), FACADE / "py.typed", ROOT / "LICENSE", ROOT / "pyproject.toml"]:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        if file.parent == FACADE:
            expected.add(f"graphwright/{file.name}")
    run_python("from setuptools import build_meta; build_meta.build_wheel('dist')", tmp_path)

    (wheel,) = (tmp_path / "dist").glob("*.whl")
    built = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert built == expected
