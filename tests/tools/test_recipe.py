"""Recipes: what is right is read with every default, what is wrong is named with its file and line."""

import re
from pathlib import Path

import pytest
import yaml

from graphwright.passes.eliminate_dead_code import EliminateDeadCode
from graphwright.passes.remove_channels import RemoveChannels
from graphwright.tools.recipe import from_data, load_recipe, read_recipe, shipped
from graphwright.tools.recipe_schema import Factory, OnnxExport, RecipeError, TorchscriptExport
from graphwright.tools.yaml_lines import YamlError, read_yaml

TEXT = """\
version: 1
model: builtin:digits-ddpm
dtype: float32
calibration:
  factory: graphwright.tools.digits:calibration
  options: {count: 4}
passes:
  - remove-channels:
      ratio: 0.3
      criterion: taylor
  - eliminate-dead-code
  - remove-channels{ratio=0.1, scope=global}
export:
  onnx: {opset: 20}
  torchscript: true
check: {tolerance: 1e-4, second_shape: {batch: 5}}
dynamic: {sample: {0: batch}}
samples: {factory: "my.pictures:draw", options: {count: 300}}
measure: false
"""


def test_a_recipe_is_read_whole() -> None:
    recipe = read_recipe(TEXT)
    assert recipe.model == "builtin:digits-ddpm"
    assert recipe.passes == (
        RemoveChannels(ratio=0.3, criterion="taylor"),
        EliminateDeadCode(),
        RemoveChannels(ratio=0.1, scope="global"),
    )
    assert recipe.calibration == Factory(factory="graphwright.tools.digits:calibration", options={"count": 4})
    assert recipe.export.onnx == OnnxExport(opset=20)
    assert recipe.export.torchscript == TorchscriptExport()
    assert recipe.check.tolerance == 1e-4
    assert recipe.check.second_shape == {"batch": 5}
    assert recipe.dynamic == {"sample": {0: "batch"}}
    assert recipe.samples == Factory(factory="my.pictures:draw", options={"count": 300})
    assert recipe.measure is None


def test_defaults_are_written_back_and_read_again() -> None:
    recipe = read_recipe(TEXT)
    resolved = recipe.to_yaml()
    assert read_recipe(resolved) == recipe
    data = yaml.safe_load(resolved)
    assert next(iter(data)) == "version"
    assert data["passes"][0]["remove-channels"]["normaliser"] == RemoveChannels().normaliser
    assert data["export"]["torchscript"] == {}
    assert data["measure"] is False


def test_the_smallest_recipe_is_a_model() -> None:
    recipe = read_recipe("model: builtin:digits-ddpm")
    assert recipe.passes == ()
    assert recipe.export.onnx is None
    assert recipe.measure is not None
    assert read_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model:", "modle:", "r.yaml:2: a recipe has no key 'modle'; did you mean 'model'?"),
        ("version: 1", "version: 2", "r.yaml:1: a recipe: version must be 1"),
        ("dtype: float32", "dtype: float31", "r.yaml:3: dtype must be"),
        ("factory: graphwright.tools.digits:calibration", "factory: 3", "r.yaml:5: factory must be text, got 3"),
        ("ratio: 0.3", "ratio: 3", "r.yaml:9: remove-channels: ratio must be in [0, 1), got 3.0"),
        ("ratio: 0.3", "ratoi: 3", "r.yaml:9: remove-channels has no option 'ratoi'; did you mean 'ratio'?"),
        ("taylor", "tailor", "r.yaml:10: remove-channels: criterion must be one of"),
        ("- eliminate-dead-code", "- eliminate-ded-code", "r.yaml:11: unknown pass 'eliminate-ded-code'"),
        ("scope=global}", "scope=global", "r.yaml:12: expected ',' or '}'"),
        ("onnx: {opset: 20}", "onnx:", "r.yaml:14: onnx must be true, false or a mapping of options"),
        ("opset: 20", "opset: 9", "r.yaml:14: onnx: opset must be at least 18, got 9"),
        ("opset: 20", "opste: 20", "r.yaml:14: onnx has no option 'opste'; did you mean 'opset'?"),
        ("1e-4", "small", "r.yaml:16: tolerance must be a number or null, got the text 'small'"),
        ("1e-4", "3", "r.yaml:16: check: tolerance must be in (0, 1), got 3.0"),
        ("batch: 5", "batch: five", "r.yaml:16: second_shape.batch must be a whole number"),
        ("0: batch", "zero: batch", "r.yaml:17: a key of dynamic.sample must be a whole number"),
        ("options: {count: 300}", "count: 300", "r.yaml:18: samples has no option 'count'"),
        ("passes:", "passes: remove-dropout\nx:", "r.yaml:7: passes must be a list"),
        ("- eliminate-dead-code", "- {a: {}, b: {}}", "r.yaml:11: a pass is its name, or one 'name: {options}'"),
        ("version: 1\n", "", "r.yaml:1: "),
    ],
)
def test_what_is_wrong_is_named_with_its_line(old: str, new: str, message: str) -> None:
    if not new:  # a missing version is its default, so this one is about the model
        old, new, message = "model: builtin:digits-ddpm\n", "", "r.yaml:1: a recipe needs the key 'model'"
    assert old in TEXT
    with pytest.raises(RecipeError) as caught:
        read_recipe(TEXT.replace(old, new, 1), "r.yaml")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: [1, 2", 2, "expected"),
        ("a: 1\na: 2", 2, "the key 'a' is repeated"),
        ("a: 1\n---\nb: 2", 2, "expected a single document"),
        ("a: 1\nb: !!python/name:os.system x", 2, "tags such as"),
        ("a: 1\nb: !secret x", 2, "tags such as"),
        ("a: &x\n  b: *x", 1, "an alias refers to what contains it"),
        ("a: 1\n? [b]\n: 2", 2, "a key must be text"),
        ("a: 1\n\tb: 2", 2, "found character"),
    ],
)
def test_malformed_yaml_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        read_yaml(text)
    assert caught.value.line == line


def test_plain_scalars_are_those_of_yaml_1_2() -> None:
    data, lines = read_yaml(
        "a: 1e-4\nb: 1.5\nc: on\nd: 'true'\ne: true\nf:\ng: 0o17\nh: 2026-01-01\ni: -3\nj: 1_000\nk: .5"
    )
    expected = [1e-4, 1.5, "on", "true", True, None, "0o17", "2026-01-01", -3, "1_000", 0.5]
    assert list(data.values()) == expected
    assert lines["g",] == 7


def test_aliases_and_comments_are_fine() -> None:
    data, _ = read_yaml("a: &x {b: 1}  # once\nc: *x")
    assert data == {"a": {"b": 1}, "c": {"b": 1}}


def test_settings_replace_single_values() -> None:
    recipe = read_recipe(
        TEXT,
        "r.yaml",
        ["passes.remove-channels.ratio=0.5", "passes.2.ratio=0.2", "export.onnx.fp16=true", "measure.runs=3", "seed=7"],
    )
    first, _, last = recipe.passes
    assert (first.ratio, first.criterion) == (0.5, "taylor")
    assert recipe.export.onnx == OnnxExport(opset=20, fp16=True)
    assert recipe.measure is not None and recipe.measure.runs == 3
    assert recipe.seed == 7
    assert last.ratio == 0.2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", "--set takes key=value"),
        ("seed=x", "--set seed=x: seed must be a whole number"),
        ("sede=1", "--set sede=1: a recipe has no key 'sede'; did you mean 'seed'?"),
        ("passes.remove-channels.ratio=2", "--set passes.remove-channels.ratio=2: remove-channels: ratio must be"),
        ("passes.remove-chanels.ratio=0.1", "the recipe has no pass 'remove-chanels'; did you mean 'remove-channels'?"),
        ("passes.7.ratio=0.1", "passes has 3 entries, counted from 0"),
        ("model.name=x", "model is no section"),
        ("check.tolerance=[", "--set check.tolerance=["),
    ],
)
def test_a_wrong_setting_is_named_instead_of_a_line(setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(TEXT, "r.yaml", [setting])
    assert message in str(caught.value)


def test_recipes_are_found_by_path_and_by_short_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(TEXT, encoding="utf-8")
    assert load_recipe(str(file)).name == "mine"
    assert load_recipe("demo").name == "demo"
    with pytest.raises(RecipeError, match="no recipe is called 'demmo'; did you mean 'demo'"):
        load_recipe("demmo")
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*absent.yaml"):
        load_recipe(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_reads(name: str) -> None:
    recipe = load_recipe(name)
    assert read_recipe(recipe.to_yaml()) == recipe


def test_passes_given_as_text_make_a_recipe() -> None:
    recipe = from_data({"model": "m:f", "passes": ["remove-channels{ratio=0.2}"]}, "f")
    assert recipe.passes == (RemoveChannels(ratio=0.2),)
    with pytest.raises(RecipeError, match="^f: remove-channels has no option 'x'"):
        from_data({"model": "m:f", "passes": ["remove-channels{x=0.2}"]}, "f")


def test_every_shipped_recipe_is_in_the_documents() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    short = [name.rpartition("/")[2] for name in shipped()]
    assert len(short) > 10 and not [name for name in short if not re.search(rf"[`/]{re.escape(name)}`", text)]
