"""Registration by name: short for our own classes, `package.module:Class` for others, one line for every mistake."""

import sys

import pytest

from data_prep.sources import source_class
from evaluation import benchmarks
from vlgpt.config import parse_yaml, validate
from vlgpt.decoding.load import load_component_decoder
from vlgpt.errors import UserError
from vlgpt.models.component import Component
from vlgpt.models.heads import LinearHead, RegressionHead, new_head
from vlgpt.registry import is_dotted, load_class
from vlgpt.settings import RunSettings, SourceSettings, StageSettings
from vlgpt.shards import ShardWriter, write_manifest
from vlgpt.stages.language import licences_of

RUN = """
name: x
output_dir: r
stage: {kind: "tests.test_registry:OwnStage", width: 3}
data: {sources: [{name: a, path: b}]}
steps: 1
global_batch: 1
micro_batch: 1
"""


class OwnHead(RegressionHead):
    """A head of another package."""

    is_deterministic = False


class OwnStageSettings(StageSettings):
    width: int = 2


class OwnStage:
    settings_class = OwnStageSettings


class OwnComponent(Component):
    """No decoder."""


def test_a_short_name_and_a_dotted_one_find_their_class():
    assert type(new_head("linear", hidden_width=2, visual_width=2)) is LinearHead
    assert type(new_head("tests.test_registry:OwnHead", hidden_width=2, visual_width=2)) is OwnHead
    wide = new_head("mlp", hidden_width=4, visual_width=3, options={"ratio": 5})
    assert [tuple(p.shape) for p in wide.parameters()] == [(20, 4), (20,), (3, 20), (3,)]
    with pytest.raises(UserError, match=r"head_options \{'ratio': 5\} do not fit head 'linear'.*ratio"):
        new_head("linear", hidden_width=4, visual_width=3, options={"ratio": 5})
    assert benchmarks.benchmark_class("demo.benchmarks.text:EmojiVqa").__name__ == "EmojiVqa"


def test_a_module_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "own_sources_of_mine.py").write_text(
        "class Mine:\n def __len__(self): ...\n def read(self, a, b): ...\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    assert source_class("own_sources_of_mine:Mine").__name__ == "Mine"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", ["head 'nothing'", "linear", "mlp", "package.module:Class"]),
        (
            "no.such.module:Head",
            ["no.such.module:Head", "cannot be imported", "start in the folder", "PYTHONPATH"],
        ),
        ("tests.test_registry:NoSuchHead", ["cannot be imported", "NoSuchHead"]),
        ("tests.test_registry:RUN", ["is no class"]),
        ("tests.test_registry:OwnStage", ["base class RegressionHead"]),
    ],
)
def test_a_wrong_name_is_one_line_with_key_value_and_what_is_valid(name, words):
    with pytest.raises(UserError) as error:
        new_head(name, hidden_width=2, visual_width=2)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_class_that_lacks_a_method_of_the_interface_is_refused():
    with pytest.raises(UserError, match=r"has no .*read\(\)"):
        source_class("tests.test_registry:OwnStage")


def test_a_stage_of_another_package_brings_its_own_settings():
    settings = validate(RunSettings, parse_yaml(RUN), where="f")
    assert settings.stage == OwnStageSettings(kind="tests.test_registry:OwnStage", width=3)
    assert settings.model_dump()["stage"]["width"] == 3
    for old, new, words in (
        ("width: 3", "widht: 3", ["stage.widht", "did you mean 'width'"]),
        ("width: 3", "width: a", ["stage.width", "integer", "'a'"]),
        ("OwnStage", "OwnHead", ["stage.kind", "settings_class"]),
        ("tests.test_registry:OwnStage", "demo_clip", ["demo.stages:ClipStage"]),
    ):
        with pytest.raises(UserError) as error:
            validate(RunSettings, parse_yaml(RUN.replace(old, new)), where="f")
        assert all(word in str(error.value) for word in words), error.value


def test_a_saved_component_that_is_no_decoder_is_refused(tmp_path):
    OwnComponent().save(tmp_path)
    with pytest.raises(UserError, match=r"tests.test_registry:OwnComponent.*decode\(\)"):
        load_component_decoder(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("tests.test_registry:OwnComponent", "OwnComponent"))
    with pytest.raises(UserError, match=r"'OwnComponent' is no package\.module:Class"):
        load_component_decoder(tmp_path)


def test_only_module_and_class_are_a_dotted_name():
    assert is_dotted("a.b:C") and is_dotted("a:C")
    assert not any(map(is_dotted, ("vqav2", "s3://a/b", "/a/b:c", "a.b:", ":C", "C:\\x")))
    assert load_class("tests.test_registry:OwnHead", RegressionHead, key="x", known={}) is OwnHead


def test_the_card_of_a_run_gives_the_licence_of_its_data_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ShardWriter(tmp_path / name, 0).close()
        write_manifest(tmp_path / name, name=name, licence="CC-BY 4.0", versions={}, build={}, num_shards=1)
    sources = [SourceSettings(name=name, path=str(tmp_path / name)) for name in ("a", "b", "missing")]
    assert licences_of(sources) == ["CC-BY 4.0"]
