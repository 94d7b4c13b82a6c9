"""Command lines: mistakes give one line and exit code 2, before anything slow starts."""

import pytest

from demo.stages import DiffusionStageSettings
from vlgpt.cli import IMAGE_MARK, launch_training, main, read_prompt
from vlgpt.document import ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.settings import ConditionShapes
from vlgpt.train.facts import missing_inputs

ZERO2 = "ds_configs/zero2.json"
CONFIG = "demo/configs/pretrain.yaml"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimizer.larning_rate=1"], ["optimizer.larning_rate", "valid keys", "lr"]),
        (["steps=many"], ["steps", "integer", "many"]),
        (["nonsense"], ["nonsense", "key.key=value"]),
        (
            ["data.sources.0.path=runs/demo/nowhere/at/all"],
            ["data.sources.0.path", "does not exist", "make demo"],
        ),
        (["data.sources.0.path=/nowhere"], ["data.sources.0.path", "/nowhere", "does not exist"]),
        (["data.sources.0.path=nowhere"], ["data.sources.0.path", "nowhere", "does not exist"]),
        (["stage.encoder.path=/nowhere"], ["stage.encoder.path", "/nowhere", "does not exist"]),
        (
            ["validation.sources=[{name: v, path: /no}]"],
            ["validation.sources.0.path", "/no", "does not exist"],
        ),
        (["stage.picture_decoder=/no"], ["stage.picture_decoder", "/no", "does not exist"]),
        (
            ["stage.encoder.path=/no/such/encoder"],
            ["stage.encoder.path", "/no/such/encoder", "does not exist"],
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, capsys):
    code = launch_training(argv=["--deepspeed", ZERO2, "--config", CONFIG, *arguments])
    message = capsys.readouterr().err
    assert code == 2
    assert message.count("\n") == 1
    for word in words:
        assert word in message, message


def test_a_missing_configuration_or_deepspeed_file_is_named(capsys):
    assert launch_training(argv=["--deepspeed", ZERO2, "--config", "no.yaml"]) == 2
    assert "no.yaml" in capsys.readouterr().err
    assert launch_training(argv=["--deepspeed", "no.json", "--config", CONFIG]) == 2
    assert "no.json" in capsys.readouterr().err


def test_a_stage_of_another_package_marks_its_own_inputs():
    stage = DiffusionStageSettings(
        kind="demo.stages:DiffusionStage", shapes=ConditionShapes(), coarse="/no/where"
    )
    assert list(missing_inputs(stage, prefix="stage.")) == [("stage.coarse", "/no/where")]
    named = stage.model_copy(update={"coarse": "owner/name"})
    assert list(missing_inputs(named)) == []


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "reconstruct", "inspect"])
def test_a_command_names_what_it_reads(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command])
    needed = "--config" if command == "inspect" else "--model"
    assert needed in capsys.readouterr().err.splitlines()[-1]


def test_marks_say_where_images_stand_and_without_marks_they_come_first():
    first = read_prompt(f"{IMAGE_MARK} and {IMAGE_MARK} differ how?", 2, is_chat=True)
    assert [type(part) for part in first.parts] == [ImagePart, TextPart, ImagePart, TextPart]
    assert {part.role for part in first.parts} == {"user"}
    assert [type(part) for part in read_prompt("what?", 1, is_chat=False).parts] == [ImagePart, TextPart]
    with pytest.raises(UserError, match="1 <image> marks, 2 images"):
        read_prompt(f"{IMAGE_MARK} only one", 2, is_chat=True)
    with pytest.raises(UserError, match="empty"):
        read_prompt("  ", 0, is_chat=True)


def test_a_folder_that_is_no_export_is_refused_in_one_line(tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path), "--prompt", "hello"]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path) in message and message.count("\n") == 1


def test_a_missing_picture_is_named(tmp_path, capsys):
    assert (
        main(["generate", "--model", str(tmp_path), "--image", str(tmp_path / "no.png"), "--prompt", "x"])
        == 2
    )
    assert "no.png" in capsys.readouterr().err
