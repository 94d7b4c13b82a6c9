"""`make demo-lm`: steps that build on the demo's, chats split by topic, a text measure with a fixed point."""

import json
import re
import shlex
from pathlib import Path

import pytest

from demo import chats, run, run_lm
from evaluation import text_nll
from tests.helpers.processes import ROOT
from tests.helpers.tiny_unified import NUM_VISUAL, new_document_tokenizer, new_model
from vlgpt.config import load_run
from vlgpt.errors import UserError
from vlgpt.settings import LoraSettings
from vlgpt.shards import ShardSet
from vlgpt.tokens import DocumentTokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """The steps name a picture of a package that need not be installed."""
    monkeypatch.setattr(run, "emoji", lambda code_points: "picture.png")


@pytest.fixture
def base(tmp_path):
    """A tiny chat model as a transformers folder, and the same under an untouched adapter as an export."""
    from vlgpt.export import export_model

    text = new_document_tokenizer().text_tokenizer
    text.chat_template = CHAT_TEMPLATE
    tokenizer = DocumentTokenizer(text, num_visual=NUM_VISUAL, template="own")
    model = new_model(tokenizer, end_wish=3.0)
    model.lm.language_model.save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    model.lm.add_lora(LoraSettings(rank=4), [tokenizer.begin_image_id, tokenizer.end_image_id])
    export_model(model, tmp_path / "export", tokenizer=tokenizer)
    return tmp_path, model, tokenizer


def write_chats(folder, *, reply="The quick brown fox"):
    asked = ["What is in the picture?", "An image of three elephants"]
    chats.write(folder, asked, [reply, None], tokenizer=None)
    return folder


def test_every_step_comes_after_what_it_needs_and_writes_beside_the_demo_only():
    steps = run_lm.steps()
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    ports = re.findall(r"--master_port (\d+)", " ".join(step.command for step in steps))
    assert len(set(ports)) == len(ports)
    for number, step in enumerate(steps):
        if not step.name.startswith("lm-"):
            continue
        assert set(step.after) <= set(names[:number]), step.name
        assert all(path.is_relative_to("runs/demo-lm") for path in step.outputs)
        for word in shlex.split(step.command):
            if word.startswith(("launchers/", "ds_configs/")):
                assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_runs_use_what_the_steps_make(name):
    run = load_run(ROOT / run_lm.CONFIGS / f"{name}.yaml")
    made = {str(path) for step in run_lm.steps() for path in step.outputs}
    needed = [source.path for source in run.data.sources]
    needed += [run.stage.language_model, run.output_dir, str(Path(run.stage.image_tokenizer).parent)]
    assert set(needed) <= made
    assert run.stage.lora.rank == 32 and run.stage.trained == "lora"


def test_a_topic_is_trained_or_held_out():
    prompts = chats.prompts()
    topics = chats.TOPICS
    assert len(set(topics)) == len(topics)
    for topic in topics:
        found = {
            split for split, asked in prompts.items() for q in chats.QUESTIONS if q.format(topic) in asked
        }
        assert len(found) == 1, topic
    assert not set(prompts["train"]) & set(prompts["held-out"])
    assert len(prompts["held-out"]) >= 2 * chats.NUM_HELD_OUT


def test_chats_are_the_models_own_replies_that_end_in_time(base, monkeypatch):
    folder, _, tokenizer = base
    monkeypatch.setattr(chats, "TOPICS", chats.TOPICS[:8])
    monkeypatch.setattr(chats, "NUM_HELD_OUT", 5)
    arguments = ["--model", str(folder / "base"), "--output", str(folder / "data")]
    assert chats.main([*arguments, "--max-new-tokens", "8"]) == 0
    asked = chats.prompts()
    for split in ("train", "held-out"):
        shards = ShardSet.open(folder / "data" / f"chats-{split}")
        assert shards.num_samples >= 5 and shards.num_images == 0
        for document in text_nll.read_chats(folder / "data" / f"chats-{split}"):
            prompt, reply = document.parts
            assert prompt.text in asked[split] and (prompt.role, reply.role) == ("user", "assistant")
            assert reply.text
        assert shards.index(0).tokenizer == tokenizer.fingerprint
    assert ShardSet.open(folder / "data" / "chats-held-out").num_samples == 5


def test_too_few_held_out_replies_are_an_error_that_says_how_many(base, monkeypatch):
    monkeypatch.setattr(chats, "TOPICS", chats.TOPICS[:4])
    arguments = ["--model", str(base[0] / "base"), "--output", str(base[0] / "data")]
    with pytest.raises(UserError, match="only 0 held-out replies end in time, wanted 100"):
        chats.main([*arguments, "--max-new-tokens", "1"])


def test_an_untouched_adapter_leaves_the_nll_of_text_as_it_was_and_a_touched_one_does_not(base):
    from vlgpt.export import export_model

    folder, model, tokenizer = base
    data = write_chats(folder / "chats")
    metrics = text_nll.compare(folder / "export", folder / "base", data, template="own")
    assert metrics["text/nll_ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert metrics["text/nll_ratio"]["n"] == 1
    rendered = tokenizer.spans(text_nll.read_chats(data)[0])
    assert metrics["text/nll"]["n"] == sum(sum(span.is_target) for span in rendered)
    for name, parameter in model.lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    export_model(model, folder / "export", tokenizer=tokenizer)
    places = ("--base", folder / "base", "--data", data, "--output", folder / "text.json")
    assert text_nll.main([str(folder / "export"), *map(str, places)]) == 0
    assert abs(json.loads((folder / "text.json").read_text())["text/nll_ratio"]["value"] - 1) > 0.01


def test_another_language_models_chats_are_refused(base):
    folder, _, _ = base
    other = new_document_tokenizer(vocabulary_size=382)
    other.save(folder / "base")
    with pytest.raises(UserError, match="another language model"):
        text_nll.compare(folder / "export", folder / "base", write_chats(folder / "chats"), template="short")
