"""The paper's three runs as configuration: every number that the paper gives, pinned."""

import pytest

from tests.helpers.processes import ROOT
from vlgpt.config import load_run
from vlgpt.turns import TEMPLATES

CONFIGS = ROOT / "launchers" / "configs"
# stage: (batch, steps, lr, GPUs, warm-up: 3 % to 5 %)
PAPER = {
    "tokenizer": (1024, 10_000, 2e-4, 8, 500),
    "pretrain": (4096, 20_000, 2e-4, 32, 600),
    "finetune": (512, 10_000, 5e-5, 4, 300),
}


def load(stage, name="vlgpt_7b"):
    return load_run(CONFIGS / stage / f"{name}.yaml")


def shares(run, names):
    return sum(source.weight for source in run.data.sources if source.name in names)


@pytest.mark.parametrize("stage", PAPER)
def test_batch_steps_and_learning_rate_are_the_papers(stage):
    run = load(stage)
    batch, steps, lr, num_gpus, warmup = PAPER[stage]
    assert (run.global_batch, run.steps, run.optimizer.lr) == (batch, steps, lr)
    assert run.optimizer.warmup_steps == warmup
    assert run.accumulation(num_gpus) >= 1
    assert run.precision == "bf16"
    assert (run.optimizer.betas, run.optimizer.eps, run.optimizer.weight_decay) == ((0.9, 0.98), 1e-6, 0.05)


def test_stage_one_has_32_embeddings_of_4096_and_two_transformers_of_12_blocks():
    stage = load("tokenizer").stage
    assert (stage.num_visual, stage.visual_width) == (32, 4096)
    assert stage.tokenizer.depth == stage.detokenizer.depth == 12
    assert stage.image_weight == stage.text_weight == 1.0
    assert (stage.shapes.image_tokens, stage.shapes.text_tokens) == (16, 77)
    assert {source.weight for source in load("tokenizer").data.sources} == {"size"}
    assert {source.name for source in load("tokenizer").data.sources} == {
        "cc3m",
        "laion-aesthetics",
        "laion-coco",
    }


def test_stage_two_mixes_pairs_and_pages_one_to_one_and_mmc4_and_obelics_one_to_one():
    run = load("pretrain")
    pairs = {"cc3m", "laion-aesthetics", "laion-coco"}
    assert shares(run, pairs) == pytest.approx(shares(run, {"mmc4", "obelics"}))
    assert shares(run, {"mmc4"}) == shares(run, {"obelics"})
    sizes = {
        "cc3m": 3.3,
        "laion-aesthetics": 5.0,
        "laion-coco": 5.0,
    }  # millions; the two LAION sets make 10 together
    for name, size in sizes.items():
        wanted = shares(run, pairs) * size / sum(sizes.values())
        assert shares(run, {name}) == pytest.approx(wanted, abs=1e-3)
    by_name = {source.name: source for source in run.data.sources}
    assert all(by_name[name].image_first == 0.5 for name in pairs)
    obelics, mmc4 = by_name["obelics"], by_name["mmc4"]
    assert (obelics.start, obelics.keep_single_image, obelics.image_first) == ("random", 0.2, 1.0)
    assert (mmc4.start, mmc4.keep_single_image, mmc4.image_first) == ("random", 1.0, 0.5)
    assert run.data.sequence_length == 512
    assert {source.max_images for source in run.data.sources} == {5}
    assert load("pretrain", "vlgpt_13b").data == run.data
    text = (CONFIGS / "pretrain" / "vlgpt_7b.yaml").read_text()
    assert "--min-pair-similarity 0.24" in text  # the filter of MMC4 is applied when its shards are built


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_language_stages_train_lora_of_rank_32_a_linear_head_and_nothing_else(stage):
    settings = load(stage).stage
    assert (settings.trained, settings.lora.rank, settings.head, settings.objective) == (
        "lora",
        32,
        "linear",
        "mse",
    )
    assert settings.text_weight == settings.visual_weight == settings.first_visual_weight == 1.0
    assert settings.visual_input_drop == settings.visual_input_noise == 0.0


def test_stage_three_continues_the_adapter_of_stage_two_on_the_same_parts():
    before, after = load("pretrain"), load("finetune")
    assert after.stage.init_from == before.output_dir
    for name in ("language_model", "image_tokenizer", "lora", "head", "encoder", "template"):
        assert getattr(after.stage, name) == getattr(before.stage, name)
    assert before.stage.image_tokenizer == f"{load('tokenizer').output_dir}/result"
    assert before.stage.encoder == load("tokenizer").stage.encoder
    assert {source.weight for source in after.data.sources} == {"size"}
    names = {"llava", "svit", "coco", "instructpix2pix", "magicbrush"}
    assert {source.name for source in after.data.sources} == names


def test_a_chat_begins_with_the_papers_system_message():
    """The prompts of Table 6 stand in tests/data_prep/test_sources_chats.py and test_sources_pairs.py."""
    wanted = "{bos}{space}You are a helpful, respectful and honest assistant."
    assert TEMPLATES["vlgpt"].first.startswith(wanted)


def test_every_configuration_opens_with_its_command_and_hardware():
    offenders = []
    for path in CONFIGS.glob("*/*.yaml"):
        command, hardware, *_ = path.read_text().splitlines()
        is_command = command.startswith("# deepspeed launchers/") and str(path.relative_to(ROOT)) in command
        offenders += [] if is_command and hardware.startswith("# Hardware: ") else [path]
    assert not offenders
