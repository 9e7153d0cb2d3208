"""The command line: results on stdout, the rest on stderr, one sentence for an error, exit codes 0, 1 and 2."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from graphwright.graph.serialize import load_program
from graphwright.tools import artifacts, cli, verbs
from graphwright.tools.errors import explain

Write = Callable[..., str]

RECIPE = """\
model: {model}
passes:
  - remove-channels: {{ratio: 0.5}}
export: {{torchscript: true}}
measure: false
"""


def invoke(*args: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(args), env={"COLUMNS": "100", **(env or {})})


@pytest.fixture
def recipe(tiny: Write, tmp_path: Path) -> str:
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.format(model=tiny()), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def finished(tiny: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(RECIPE.format(model=tiny()), encoding="utf-8")
    result = invoke("run", str(folder / "tiny.yaml"), "--out", str(folder / "run"))
    assert result.exit_code == 0, result.output
    return folder / "run"


# ---------------------------------------------------------------------- the thin road, on models of a library


@pytest.mark.parametrize(
    ("name", "group"), [("resnet", "resnet.embedder.embedder.convolution:channel"), ("llama", "mlp.gate_proj:hidden")]
)
def test_shipped_recipes_run_from_capture_to_a_compared_onnx_file(name: str, group: str, tmp_path: Path) -> None:
    out = tmp_path / name
    settings = ["--set", "export.onnx.original=false", "--set", "measure=false"]
    result = invoke("run", name, "--out", str(out), "--json", *settings)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["ok"]
    widths = [(g["before"], g["after"]) for g in data["groups"] if group in g["name"]]
    assert widths and all(after == round(0.7 * before) for before, after in widths)
    assert data["cost"]["after"]["parameters"] < 0.7 * data["cost"]["before"]["parameters"]
    checks = data["exports"]["onnx"]["checks"]
    assert any("second shape" in check["inputs"] for check in checks)
    assert 0 < max(check["max_difference"] for check in checks) < 1e-4
    assert (out / "onnx" / "model.onnx").is_file() and (out / "report.html").is_file()


# ---------------------------------------------------------------------- run


def test_progress_goes_to_stderr_and_figures_to_stdout(recipe: str, tmp_path: Path) -> None:
    result = invoke("run", recipe, "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "capture the model" in result.stderr and "capture the model" not in result.stdout
    assert "parameters" in result.stdout and "report.html" in result.stdout
    assert "\x1b" not in result.output  # no colours and no progress bars where there is no terminal
    again = invoke("run", recipe, "--out", str(tmp_path / "run"))
    assert again.stdout == result.stdout
    assert again.stderr.count("done before") == 3
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.resolved.yaml").read_text(encoding="utf-8"))
    assert resolved["passes"][0]["remove-channels"]["criterion"] == "magnitude-l2"


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_means_no_progress(place: str, recipe: str, tmp_path: Path) -> None:
    words = ["run", recipe, "--out", str(tmp_path / "run")]
    result = invoke("--quiet", *words) if place == "before" else invoke(*words, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "report.html" in result.stdout


def test_a_dry_run_shows_the_plan_and_writes_nothing(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke("run", recipe, "--dry-run", "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [(g["name"], g["before"], g["after"]) for g in data["groups"]] == [
        ("first:channel", 12, 6),
        ("second:channel", 16, 8),
    ]
    # 6*3*9, 6 gains and 6 offsets, 8*6*9 + 8, 5*8 + 5
    assert data["cost"]["after"]["parameters"] == 162 + 12 + 440 + 45
    assert not out.exists()
    text = invoke("run", recipe, "--dry-run")
    assert "first:channel" in text.stdout and "planned" in text.stdout
    assert not list(tmp_path.glob("runs*"))


def test_a_model_runs_with_passes_given_as_text(tiny: Write, tmp_path: Path) -> None:
    result = invoke(
        "run", tiny(), "--pass", "remove-channels{ratio=0.25}", "--pass", "fold-batch-norm", "--dry-run", "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["passes"] == ["remove-channels{ratio=0.25}", "fold-batch-norm"]
    assert [g["after"] for g in data["groups"]] == [9, 12]


def test_a_failed_export_exits_with_1_after_the_report(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphwright.graph.errors import GraphwrightError

    def refuse(*args: object) -> None:
        raise GraphwrightError("it computes something else")

    monkeypatch.setattr(artifacts, "export_torchscript", refuse)
    result = invoke("run", recipe, "--out", str(tmp_path / "run"), "--json")
    assert result.exit_code == 1
    assert "error: torchscript: it computes something else" in result.stderr
    assert json.loads(result.stdout)["failures"] == {"torchscript": "it computes something else"}


# ---------------------------------------------------------------------- the cache of captured graphs


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Count what torch.export captures, with a cache of the test's own."""
    import torch

    done: list[str] = []
    export = torch.export.export

    def counted(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        done.append(type(model).__name__)
        return export(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return done


def test_groups_come_from_the_cache_the_second_time(tiny: Write, exports: list[str], tmp_path: Path) -> None:
    first, second = (invoke("groups", tiny(), "--json", "--frozen") for _ in range(2))
    assert exports == ["Tiny"] and list((tmp_path / "cache" / "graphwright").glob("*/*/program.json"))
    data = [json.loads(r.stdout) for r in (first, second)]
    assert [d.pop("from_cache") for d in data] == [False, True]
    assert data[0] == data[1] and len(data[0]["groups"]) == 2
    assert "from the cache" in second.stderr and first.stderr == ""
    assert invoke("--quiet", "groups", tiny()).stderr == ""


def test_a_run_from_the_cache_gives_the_same_result(recipe: str, exports: list[str], tmp_path: Path) -> None:
    runs = [invoke("run", recipe, "--out", str(tmp_path / name), "--json") for name in ("a", "b")]
    assert exports == ["Tiny"], [r.output for r in runs]
    data = [json.loads(r.stdout) for r in runs]
    assert [d["model"].pop("from_cache") for d in data] == [False, True]
    assert [d["ok"] for d in data] == [True, True]
    assert "from the cache" in runs[1].stderr and "from the cache" not in runs[0].stderr
    for key in ("model", "cost", "groups", "frozen"):
        assert data[0][key] == data[1][key] != {}
    states = [load_program(tmp_path / name / "pass-1-remove-channels" / "program").tensors() for name in ("a", "b")]
    assert states[0].keys() == states[1].keys() and states[0]["first.weight"].shape[0] == 6
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


def test_export_and_dry_run_use_the_cache(recipe: str, tiny: Write, exports: list[str], tmp_path: Path) -> None:
    words = ["export", tiny(), "--to", "torchscript", "--json", "--out"]
    made = [json.loads(invoke(*words, str(tmp_path / name)).stdout) for name in ("a", "b")]
    assert exports == ["Tiny"] and [m["from_cache"] for m in made] == [False, True]
    assert json.loads(invoke("run", recipe, "--dry-run", "--json").stdout)["from_cache"]
    assert exports == ["Tiny"]


@pytest.mark.parametrize(("option", "env"), [("--no-cache", {}), ("--json", {"GRAPHWRIGHT_NO_CACHE": "1"})])
def test_no_cache_captures_anew_and_keeps_nothing(
    option: str, env: dict[str, str], tiny: Write, exports: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        assert invoke("groups", tiny(), option, env=env).exit_code == 0
    assert exports == ["Tiny", "Tiny"] and not (tmp_path / "cache").exists()


def test_other_code_is_not_taken_from_the_cache(tiny: Write, exports: list[str]) -> None:
    try:
        invoke("groups", tiny(), "--json")
        changed = tiny(old=".mean((2, 3))", new=".amax((2, 3))")
        assert not json.loads(invoke("groups", changed, "--json").stdout)["from_cache"]
        assert len(exports) == 2
    finally:
        tiny()


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("old", "new", "code", "message"),
    [
        ("remove-channels", "remove-chanels", 2, "tiny.yaml:3: unknown pass 'remove-chanels'; did you mean"),
        ("ratio: 0.5", "ratoi: 0.5", 2, "tiny.yaml:3: remove-channels has no option 'ratoi'; did you mean 'ratio'?"),
        ("measure", "mesure", 2, "tiny.yaml:5: a recipe has no key 'mesure'; did you mean 'measure'?"),
        ("ratio: 0.5", "criterion: taylor", 1, "calibration"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_sentence(
    old: str, new: str, code: int, message: str, recipe: str, tmp_path: Path
) -> None:
    text = Path(recipe).read_text(encoding="utf-8")
    assert old in text
    Path(recipe).write_text(text.replace(old, new), encoding="utf-8")
    result = invoke("--quiet", "run", recipe, "--out", str(tmp_path / "run"))
    assert result.exit_code == code
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output and result.stdout == ""


def test_a_foreign_directory_is_refused_and_left_alone(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    result = invoke("run", recipe, "--out", str(tmp_path / "mine"))
    assert result.exit_code == 1
    assert "is not empty and no earlier run made it" in result.stderr
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["run", "demo", "--nonsense"],
        ["nonsense"],
        ["bench", "nonsense"],
        ["export", "x", "--out", "y", "--to", "z"],
    ],
)
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_an_unknown_recipe_exits_with_2_and_the_nearest_name() -> None:
    result = invoke("run", "demmo")
    assert result.exit_code == 2
    assert "did you mean 'demo'?" in result.stderr


def test_verbose_keeps_the_exception(tmp_path: Path) -> None:
    result = invoke("--verbose", "run", str(tmp_path / "absent.yaml"))
    assert type(result.exception).__name__ == "RecipeError"


def test_a_bug_is_called_one() -> None:
    code, sentence = explain(KeyError("x"))
    assert code == 1
    assert sentence is not None and "unexpected KeyError: 'x'" in sentence and "--verbose" in sentence


# ---------------------------------------------------------------------- the other verbs


def test_groups_lists_what_belongs_together(tiny: Write) -> None:
    result = invoke("groups", tiny(), "--json", "--frozen")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    first = next(g for g in data["groups"] if g["name"] == "first:channel")
    assert (first["kind"], first["size"]) == ("channel", 12)
    trained = {(m["name"], m["dim"]) for m in first["members"] if m["trainable"]}
    assert trained == {("first.weight", 0), ("norm.weight", 0), ("norm.bias", 0), ("second.weight", 1)}
    assert {
        "reason": "program output",
        "members": [{"name": "head.weight", "dim": 0}, {"name": "head.bias", "dim": 0}],
    }.items() <= next(f for f in data["frozen"] if f["reason"] == "program output").items()
    text = invoke("groups", tiny(), "--members", "--frozen").stdout
    for word in ("2 coupling groups", "first:channel", "second.weight dim 1", "program output"):
        assert word in text


def test_groups_of_a_run_are_those_of_its_result(finished: Path) -> None:
    data = json.loads(invoke("groups", str(finished), "--json").stdout)
    assert {g["name"]: g["size"] for g in data["groups"]} == {"first:channel": 6, "second:channel": 8}


def test_check_finds_what_was_changed(finished: Path) -> None:
    result = invoke("check", str(finished), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["ok"] and len(data["findings"]) >= 5
    assert any("compared with the program" in f["what"] for f in data["findings"])
    assert invoke("check", str(finished / "capture" / "program")).exit_code == 0
    assert invoke("check", str(finished / "torchscript")).exit_code == 0
    assert invoke("check", str(finished.parent)).exit_code == 1
    weights = finished / "pass-1-remove-channels" / "program" / "model.safetensors"
    original = weights.read_bytes()
    try:
        weights.write_bytes(original[:-4] + b"\0\0\0\0")
        broken = invoke("check", str(finished))
        assert broken.exit_code == 1
        assert "BAD pass-1-remove-channels: files" in broken.stdout
        assert "BAD torchscript: compared with the program" in broken.stdout
    finally:
        weights.write_bytes(original)


def test_export_takes_the_result_of_a_run(finished: Path, tmp_path: Path) -> None:
    result = invoke("export", str(finished), "--to", "torchscript", "--out", str(tmp_path / "ts"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "ts" / "model.torchscript.pt").is_file()
    assert float(result.stdout.split(" by ")[1].split()[0]) < 1e-6


def test_a_run_is_a_model_for_every_verb(finished: Path, tmp_path: Path) -> None:
    groups = json.loads(invoke("groups", str(finished), "--json").stdout)["groups"]
    assert [g["size"] for g in groups] == [6, 8]
    result = invoke("run", str(finished), "--pass", "remove-channels{ratio=0.5}", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert [(g["before"], g["after"]) for g in json.loads(result.stdout)["groups"]] == [(6, 3), (8, 4)]


def test_passes_lists_every_pass_with_its_options() -> None:
    data = json.loads(invoke("passes", "--json").stdout)
    assert {"remove-channels", "fold-batch-norm", "remove-dropout"} <= set(data)
    ratio = next(o for o in data["remove-channels"]["options"] if o["name"] == "ratio")
    assert (ratio["type"], ratio["default"]) == ("a number", "0.5")
    assert ratio["about"].startswith("Fraction of the indices")
    text = invoke("passes").stdout
    assert all(name in text and entry["about"] in text for name, entry in data.items())


def test_bench_lists_and_hands_on_what_follows_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "depgraph" in invoke("bench").stdout
    (tmp_path / "graphwright_bench.py").write_text("import sys\ndef main():\n    print(sys.argv[1:])\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "BENCHMARKS", {"mine": ("graphwright_bench:main", "what it does")})
    monkeypatch.setattr(sys, "argv", ["pytest"])
    result = invoke("bench", "mine", "--size", "3", "--verbose")
    assert result.exit_code == 1
    assert result.stdout.strip() == "['--size', '3', '--verbose']"


def test_doctor_reports_what_is_installed() -> None:
    result = invoke("doctor", "--json")
    data = json.loads(result.stdout)
    assert data["distributions"]
    assert "transformers 5" in data["extras"]["hf"] and data["extras"]["digits"].startswith("scikit-learn ")


def test_doctor_says_how_to_install_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "EXTRAS", {"digits": ("no-such-package",)})
    assert json.loads(invoke("doctor", "--json").stdout)["extras"] == {
        "digits": "without no-such-package: pip install 'graphwright[digits]'"
    }


def test_doctor_exits_with_1_where_there_is_a_problem() -> None:
    result = invoke("doctor", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == (1 if data["problems"] else 0)


def test_version_and_help() -> None:
    import graphwright

    assert invoke("--version").stdout.strip() == f"graphwright {graphwright.__version__}"
    text = invoke("--help").stdout
    for verb in ("run", "groups", "check", "export", "passes", "bench", "doctor"):
        assert verb in text


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_honoured_in_a_terminal(no_color: bool) -> None:
    code = (
        "import pty, os, sys\n"
        f"os.environ.update({{'TERM': 'xterm-256color'}} | ({{'NO_COLOR': '1'}} if {no_color} else {{}}))\n"
        "pty.spawn([sys.executable, '-m', 'graphwright', 'run', 'demmo'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "did you mean 'demo'?" in done.stdout
    assert ("\x1b[1;31m" in done.stdout) is not no_color
