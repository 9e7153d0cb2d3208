"""Runs: every stage is done once, what stopped goes on, and nothing half-written is left."""

import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from graphwright.graph.errors import ArtifactError, GraphwrightError
from graphwright.graph.serialize import load_program
from graphwright.tools import artifacts
from graphwright.tools.calibration import context_of
from graphwright.tools.recipe import read_recipe
from graphwright.tools.recipe_schema import Factory, Recipe
from graphwright.tools.report import write_report
from graphwright.tools.run import Outcome, Runner, seeded
from graphwright.tools.run_calls import batch_names
from graphwright.tools.run_dir import RunDirectory, RunError, hash_of

Write = Callable[..., str]

RECIPE = """
model: {model}
passes:
  - remove-channels: {{ratio: 0.5, criterion: {criterion}}}
  - fold-batch-norm
calibration: {calibration}
export: {{onnx: {onnx}, torchscript: {torchscript}}}
measure: {measure}
"""


def recipe(model: str, name: str = "tiny", **values: Any) -> Recipe:
    defaults = {"criterion": "magnitude-l2", "calibration": "null", "onnx": "false", "torchscript": "true"}
    return read_recipe(RECIPE.format(model=model, **{"measure": "false", **defaults, **values}), name)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file but the lock."""
    return {
        str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def fresh(outcome: Outcome) -> list[str]:
    """Return the stages that were not taken over from an earlier run."""
    return [stage.name for stage in outcome.stages if not stage.reused]


@pytest.fixture(scope="module")
def whole(tiny: Write, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run with everything in it."""
    full = recipe(tiny(), onnx="true", measure="{runs: 3}")
    return Runner(full, tmp_path_factory.mktemp("whole") / "run")()


def test_a_run_removes_exports_and_compares(whole: Outcome) -> None:
    assert whole.ok
    names = ["capture", "pass-1-remove-channels", "pass-2-fold-batch-norm", "onnx-original", "onnx", "torchscript"]
    assert [stage.name for stage in whole.stages] == [*names, "latency"]
    widths = {w["group"]: (w["before"], w["after"]) for w in whole["pass-1-remove-channels"].result["widths"]}
    assert widths == {"first:channel": (12, 6), "second:channel": (16, 8)}
    assert whole["pass-2-fold-batch-norm"].result["stats"]["batch_norms_folded"] == 1
    # 6*3*9 + 6 folded bias, 8*6*9 + 8, 5*8 + 5
    assert whole["pass-2-fold-batch-norm"].result["cost"]["parameters"] == 168 + 440 + 45
    assert set(whole["latency"].result["times"]) == {
        f"{which}, {runtime}" for which in ("original", "result") for runtime in ("PyTorch", "ONNX Runtime")
    }


def test_the_exported_file_computes_what_the_saved_program_does(whole: Outcome) -> None:
    program = load_program(whole.directory / "pass-2-fold-batch-norm" / "program")
    image = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = program(image).numpy()
    session = onnxruntime.InferenceSession(whole.directory / "onnx" / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    assert np.abs(expected).max() > 0.05
    # float32, sums of at most 54 products each
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-5)


def test_a_second_run_does_no_work(whole: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(whole.directory)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a finished stage was done again")

    for owner, name in ((torch.export, "export"), (artifacts, "export_onnx"), (artifacts, "export_torchscript")):
        monkeypatch.setattr(owner, name, never)
    again = Runner(whole.recipe, whole.directory)()
    assert fresh(again) == []
    assert snapshot(whole.directory) == before
    assert [stage.result for stage in again.stages] == [stage.result for stage in whole.stages]


def test_a_killed_run_goes_on_where_it_was(tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(program: Any, directory: Path, check: Any) -> Any:
        (directory / "half").write_text("half")
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifacts, "export_torchscript", killed)
        Runner(recipe(tiny()), out)()
    assert not (out / "torchscript").exists()
    assert not list(out.glob(".partial*"))
    # What a process that could not clean up leaves behind.
    (out / ".partial-1-torchscript").mkdir()
    (out / ".partial-1-torchscript" / "half").write_text("half")
    (out / "state" / ".partial-1-torchscript.json").write_text("{")
    outcome = Runner(recipe(tiny()), out)()
    assert fresh(outcome) == ["torchscript"]
    assert (out / "torchscript" / "model.torchscript.pt").is_file()
    assert not list(out.rglob(".partial*"))


@pytest.mark.parametrize("where", ["program", "state"])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    where: str, tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graphwright.tools.run as run_module

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    Runner(read_recipe(f"model: {tiny()}\nmeasure: false", "tiny"), out)()
    with monkeypatch.context() as patch, pytest.raises(RunError, match="the disk is full") as caught:
        if where == "program":
            patch.setattr(run_module, "save_output", full)
        else:
            # The files of the stage are in place when the disk runs full; without its state they do not count.
            patch.setattr(os, "replace", lambda a, b: full() if str(b).endswith(".json") else os.rename(a, b))
        Runner(recipe(tiny()), out)()
    assert len(str(caught.value).splitlines()) == 1
    assert not list(out.rglob(".partial*"))
    assert sorted(file.name for file in (out / "state").iterdir()) == ["capture.json"]
    outcome = Runner(recipe(tiny()), out)()
    assert fresh(outcome) == ["pass-1-remove-channels", "pass-2-fold-batch-norm", "torchscript"]


def test_only_what_depends_on_a_change_is_done_again(tiny: Write, tmp_path: Path) -> None:
    out = tmp_path / "run"
    Runner(recipe(tiny(), torchscript="false"), out)()
    assert fresh(Runner(recipe(tiny()), out)()) == ["torchscript"]
    changed = Runner(recipe(tiny(), criterion="magnitude-l1"), out)()
    assert fresh(changed) == ["pass-1-remove-channels", "pass-2-fold-batch-norm", "torchscript"]
    without = read_recipe(f"model: {tiny()}\nmeasure: false\npasses: [fold-batch-norm]", "tiny")
    assert fresh(Runner(without, out)()) == ["pass-1-fold-batch-norm"]
    # The stages of passes that are gone from the recipe are gone from the directory.
    assert not (out / "pass-1-remove-channels").exists()
    assert not (out / "pass-2-fold-batch-norm").exists()


def test_other_weights_or_other_code_make_another_model(tiny: Write, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = read_recipe(f"model: {tiny()}\nmeasure: false", "tiny")
    Runner(made, out)()
    assert fresh(Runner(made, out)()) == []
    tiny(seed=1)
    assert fresh(Runner(made, out)()) == ["capture"]
    tiny(seed=1, old=".mean((2, 3))", new=".amax((2, 3))")
    assert fresh(Runner(made, out)()) == ["capture"]
    tiny()


HELPED = """
import threading
import torch
from graphwright_helper import scaled

class Helped(torch.nn.Module):
    def __init__(self, lock=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.lock = lock

    def forward(self, x):
        return scaled(x) * self.weight

def make():
    return Helped(), (torch.ones(2, 3),), {}

def unstable():
    return Helped(threading.Lock()), (torch.ones(2, 3),), {}

def draws(letter="a"):
    from graphwright.tools.samples import Drawn, Sample

    def draw(program, models, folder, progress):
        for i, label in enumerate(models):
            (folder / f"{i}.png").write_bytes(letter.encode())
        return Drawn({label: Sample(f"{i}.png", float(i)) for i, label in enumerate(models)}, "letters", "Drawn & done.")

    return draw

def not_drawing():
    return lambda program, models, folder, progress: None
"""


@pytest.fixture
def helped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Write models whose forward calls a function of another module; return what writes that function."""
    folder = tmp_path / "code"
    folder.mkdir()

    def write(body: str) -> None:
        (folder / "graphwright_helper.py").write_text(f"def scaled(x):\n    return {body}\n")
        for name in ("graphwright_helper", "graphwright_helped"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        for cached in folder.glob("__pycache__/*"):
            cached.unlink()

    (folder / "graphwright_helped.py").write_text(HELPED)
    monkeypatch.syspath_prepend(folder)
    write("2 * x")
    yield write
    for name in ("graphwright_helper", "graphwright_helped"):
        sys.modules.pop(name, None)


def test_a_function_that_forward_calls_is_part_of_the_model(helped: Callable[[str], None], tmp_path: Path) -> None:
    made = read_recipe("model: graphwright_helped:make\nmeasure: false", "helped")
    out = tmp_path / "run"
    Runner(made, out)()
    assert fresh(Runner(made, out)()) == []
    helped("3 * x")
    assert fresh(Runner(made, out)()) == ["capture"]
    (result,) = load_program(out / "capture" / "program")(torch.ones(2, 3)).unique().tolist()
    assert result == 3


def test_a_model_that_has_no_stable_description_is_captured_anew(helped: Callable[[str], None], tmp_path: Path) -> None:
    made = read_recipe("model: graphwright_helped:unstable\nmeasure: false\npasses: [remove-dropout]", "helped")
    for _ in range(2):
        assert fresh(Runner(made, tmp_path / "run")()) == ["capture", "pass-1-remove-dropout"]


def test_the_batch_is_dimension_0_whatever_its_name(helped: Callable[[str], None], tmp_path: Path) -> None:
    text = "model: graphwright_helped:make\nmeasure: {runs: 1, batch: 7}\ndynamic: {x: {0: n}}"
    outcome = Runner(read_recipe(text, "helped"), tmp_path / "run")()
    assert outcome.ok, outcome.failures
    assert outcome["latency"].result["batch"] == 7
    program = load_program(tmp_path / "run" / "capture" / "program")
    assert program.inputs[0].shape == ("n", 3) and batch_names(program) == ["n"]
    fixed = Runner(read_recipe(text.replace("{x: {0: n}}", "{}"), "helped"), tmp_path / "run")()
    assert "whose dimension 0 varies, and all are fixed" in fixed.failures["latency"]


def test_samples_come_from_a_factory(helped: Callable[[str], None], tmp_path: Path) -> None:
    text = (
        "model: graphwright_helped:make\nmeasure: false\npasses: [remove-dropout]\n"
        "samples: {factory: 'graphwright_helped:draws', options: {letter: b}}"
    )
    outcome = Runner(read_recipe(text, "helped"), tmp_path / "run")()
    assert outcome["samples"].result == {
        "models": {"result, PyTorch": {"file": "0.png", "score": 0.0}},
        "score": "letters",
        "note": "Drawn & done.",
    }
    assert (tmp_path / "run" / "samples" / "0.png").read_bytes() == b"b"
    assert fresh(Runner(read_recipe(text, "helped"), tmp_path / "run")()) == []
    assert fresh(Runner(read_recipe(text.replace("b}", "c}"), "helped"), tmp_path / "run")()) == ["samples"]
    page = (write_report(outcome), (tmp_path / "run" / "report.html").read_text(encoding="utf-8"))[1]
    assert "letters 0.00" in page and "Drawn &amp; done." in page
    wrong = Runner(
        read_recipe(text.replace("draws", "not_drawing").replace("{letter: b}", "{}"), "helped"), tmp_path / "w"
    )()
    assert "draw must return a graphwright.tools.samples.Drawn, got NoneType" in wrong.failures["samples"]


def test_the_directory_of_a_run_is_a_model(tiny: Write, tmp_path: Path) -> None:
    first = Runner(recipe(tiny()), tmp_path / "first")()
    text = f"model: {tmp_path / 'first'}\nmeasure: false\npasses: [remove-channels: {{ratio: 0.5}}]"
    second = Runner(read_recipe(text, "second"), tmp_path / "second")()
    widths = [(w["before"], w["after"]) for w in second["pass-1-remove-channels"].result["widths"]]
    assert widths == [(6, 3), (8, 4)]
    assert second["capture"].result["cost"] == first["pass-2-fold-batch-norm"].result["cost"]
    assert fresh(Runner(read_recipe(text, "second"), tmp_path / "second")()) == []
    other = Runner(read_recipe(text + "\ndynamic: {}", "second"), tmp_path / "second")()
    assert other["capture"].result["inputs"][0]["shape"] == [2, 3, 8, 8]
    Runner(recipe(tiny(), criterion="magnitude-l1"), tmp_path / "first")()
    assert "capture" in fresh(Runner(read_recipe(text, "second"), tmp_path / "second")())


def test_a_lost_capture_does_not_become_what_the_run_has_come_to(tiny: Write, tmp_path: Path) -> None:
    Runner(recipe(tiny()), tmp_path / "run")()
    state = tmp_path / "run" / "state" / "capture.json"
    later = state.stat().st_mtime_ns + 10**12
    os.utime(state, ns=(later, later))
    assert RunDirectory.existing(tmp_path / "run").holders()[-1] == "pass-2-fold-batch-norm"


def test_a_stage_whose_files_are_gone_is_done_again(tiny: Write, tmp_path: Path) -> None:
    out = tmp_path / "run"
    Runner(recipe(tiny()), out)()
    (out / "torchscript" / "model.torchscript.pt").unlink()
    (out / "state" / "pass-2-fold-batch-norm.json").write_text("{")
    assert fresh(Runner(recipe(tiny()), out)()) == ["pass-2-fold-batch-norm", "torchscript"]


def test_a_failed_export_fails_the_run_and_is_tried_again(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(program: Any, directory: Path, check: Any) -> Any:
        (directory / "half").write_text("half")
        raise GraphwrightError("it computes something else")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "export_torchscript", refuse)
        failed = Runner(recipe(tiny(), measure="{runs: 2}"), out)()
    assert not failed.ok
    assert failed.failures == {"torchscript": "it computes something else"}
    assert not (out / "torchscript").exists()
    assert "latency" in failed  # what does not need the export was done
    again = Runner(recipe(tiny(), measure="{runs: 2}"), out)()
    assert again.ok
    assert "torchscript" in fresh(again)


def test_calibration_reaches_the_passes(tiny: Write, tmp_path: Path) -> None:
    module = tiny().partition(":")[0]
    made = recipe(
        tiny(), criterion="taylor", calibration=f"{{factory: '{module}:calibration', options: {{batches: 3}}}}"
    )
    widths = Runner(made, tmp_path / "run")()["pass-1-remove-channels"].result["widths"]
    assert [w["after"] for w in widths] == [6, 8]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("graphwright_tiny:absent", "has no 'absent'"),
        ("absent_module:make", "no module absent_module"),
        ("graphwright_tiny:not_a_calibration", r"must return \(loss, batches\)"),
        ("digits", "calibration must be package.module:factory, got 'digits'"),
        ("{factory: 'graphwright_tiny:calibration', options: {bathces: 3}}", "refuses its options"),
    ],
)
def test_a_wrong_calibration_is_refused(factory: str, message: str, tiny: Write, tmp_path: Path) -> None:
    made = recipe(tiny(), criterion="taylor", calibration=factory)
    with pytest.raises(GraphwrightError, match=message):
        Runner(made, tmp_path / "run")()


def test_the_digits_calibration_takes_its_batches_apart() -> None:
    context = context_of(
        Recipe(
            model="builtin:digits-ddpm",
            calibration=Factory(factory="graphwright.tools.digits:calibration", options={"count": 2, "batch": 3}),
        )
    )
    assert context.split is not None and len(context.batches) == 2
    samples = context.split(context.batches[0])
    assert len(samples) == 3
    for part, whole in zip(zip(*samples, strict=True), context.batches[0], strict=True):
        assert torch.equal(torch.cat(part), whole)


def test_a_recipe_describes_example_inputs(tiny: Write, tmp_path: Path) -> None:
    text = f"model: {tiny()}\nmeasure: false\ninputs: {{image: {{shape: [4, 3, 16, 12]}}}}"
    outcome = Runner(read_recipe(text, "tiny"), tmp_path / "run")()
    (image,) = outcome["capture"].result["inputs"]
    assert image == {"name": "image", "dtype": "float32", "shape": ["batch", 3, 16, 12]}
    first = load_program(tmp_path / "run" / "capture" / "program").example[0]
    assert first.shape == (4, 3, 16, 12) and 0.8 < first.std() < 1.2
    again = read_recipe(text.replace("[4,", "[5,"), "tiny")
    assert fresh(Runner(again, tmp_path / "run")()) == ["capture"]
    wrong = read_recipe(text.replace("image", "picture"), "tiny")
    with pytest.raises(GraphwrightError, match="missing a required argument: 'image'"):
        Runner(wrong, tmp_path / "run")()


def test_a_recipe_changes_the_dtype(tiny: Write, tmp_path: Path) -> None:
    text = f"model: {tiny()}\nmeasure: false\ndtype: bfloat16\nexport: {{torchscript: true}}"
    outcome = Runner(read_recipe(text, "tiny"), tmp_path / "run")()
    assert outcome.ok
    program = load_program(tmp_path / "run" / "capture" / "program")
    assert {p.dtype for p in program.parameters().values()} == {torch.bfloat16}
    assert outcome["capture"].result["inputs"][0]["dtype"] == "bfloat16"


def test_foreign_directories_are_refused(tiny: Write, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for name, message in (("foreign", "not empty and no earlier run made it"), ("file", "is a file")):
        with pytest.raises(RunError, match=message):
            Runner(recipe(tiny()), tmp_path / name)()
    assert [f.name for f in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]
    RunDirectory.open(tmp_path / "other", "other")
    with pytest.raises(RunError, match="a run of the recipe 'other'"):
        Runner(recipe(tiny()), tmp_path / "other")()
    with pytest.raises(ArtifactError, match="not the directory of a run"):
        RunDirectory.existing(tmp_path / "foreign")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fcntl")
def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    first, second = (RunDirectory.open(tmp_path / "run", "x") for _ in range(2))
    with first.locked(), pytest.raises(RunError, match="another run is at work"), second.locked():
        pass
    with second.locked():
        pass


def test_hashes_follow_content_not_order() -> None:
    assert hash_of({"a": 1, "b": [1.5, None]}) == hash_of({"b": [1.5, None], "a": 1})
    assert hash_of({"a": 1}) != hash_of({"a": "1"})


def test_a_stage_result_that_json_cannot_hold_is_still_valid_json(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run", "x")
    stage = run.do("s", {}, lambda folder: {"worst": float("inf"), "list": (1, float("nan"))})
    assert stage.result == {"worst": None, "list": [1, None]}
    again = run.do("s", {}, lambda folder: None)
    assert (again.reused, again.result) == (True, stage.result)


def test_the_global_random_state_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(11):
        first = torch.rand(2)
    with seeded(11):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.rand(2), expected)
