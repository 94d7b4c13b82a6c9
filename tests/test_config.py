"""Configuration: every mistake is one line with the key, the value and the valid choices."""

import pytest

from tests.helpers.processes import ROOT
from vlgpt.config import apply_override, dump, load_run, parse_yaml, validate
from vlgpt.errors import UserError
from vlgpt.settings import RunSettings

CONFIGS = sorted((ROOT / "launchers" / "configs").rglob("*.yaml"))
BASE = """
name: x
output_dir: r
stage: {kind: language, language_model: a}
data: {sources: [{name: a, path: b}]}
steps: 10
global_batch: 4
micro_batch: 2
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_yaml_loads_and_survives_a_round_trip(path, tmp_path):
    settings = load_run(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(settings))
    assert load_run(copy) == settings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage.langage_model=3", ["stage.langage_model", "3", "language_model"]),
        ("steps=abc", ["steps", "integer", "abc"]),
        ("steps=true", ["steps", "integer", "True"]),
        ("steps=2.5", ["steps", "2.5"]),
        ("stage.kind=foo", ["stage", "foo", "image_tokenizer"]),
        ("data.sources.0.pth=3", ["data.sources.0.pth", "path"]),
        ("precision=fp16", ["precision", "bf16", "fp32", "fp16"]),
        ("stage.lora.rnk=2", ["stage.lora.rnk", "rank"]),
        ("foo.bar=1", ["foo", "valid keys"]),
        ("data.sources.7.path=x", ["7", "list of 1"]),
        ("nonsense", ["nonsense", "key.key=value"]),
        ("name.deep=1", ["deep", "plain value"]),
    ],
)
def test_a_mistake_is_one_line_naming_key_value_and_choices(override, words):
    values = parse_yaml(BASE)
    with pytest.raises(UserError) as error:
        apply_override(values, override)
        validate(RunSettings, values, where="file")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_numbers_in_scientific_notation_are_numbers():
    values = parse_yaml(BASE)
    apply_override(values, "optimizer.lr=1e-4")
    assert validate(RunSettings, values, where="f").optimizer.lr == 1e-4
    assert parse_yaml("[1e-4, 5, -.5, 1_000.5, 1e5, abc]") == [1e-4, 5, -0.5, 1000.5, 1e5, "abc"]


def test_yaml_cannot_run_code_and_keys_stand_once():
    with pytest.raises(UserError):
        parse_yaml("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="stands twice"):
        parse_yaml("a: 1\na: 2")


def test_a_global_batch_that_cannot_be_divided_is_refused():
    settings = validate(RunSettings, parse_yaml(BASE), where="f")
    assert settings.accumulation(1) == 2
    with pytest.raises(ValueError, match="not a multiple of micro_batch 2 x 3 processes"):
        settings.accumulation(3)
