"""`make demo-lm`: steps that build on the demo's, chats split by topic, a text measure with a fixed point."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny_unified import NUM_VISUAL, new_document_tokenizer, new_model

from evaluation import text_nll
from vlgpt.config import load_run
from vlgpt.errors import UserError
from vlgpt.models.multimodal_lm import LoraSettings
from vlgpt.shards import ShardSet
from vlgpt.tokens import DocumentTokenizer

ROOT = Path(__file__).parents[1]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture
def launchers(monkeypatch):
    """launchers/demo_lm.py and launchers/demo_chats.py as modules."""
    monkeypatch.syspath_prepend(str(ROOT / "launchers"))
    for name in ("demo", "demo_lm", "demo_chats"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import demo
    import demo_chats
    import demo_lm

    monkeypatch.setattr(demo, "emoji", lambda code_points: "picture.png")
    yield demo_lm, demo_chats
    for name in ("demo", "demo_lm", "demo_chats"):
        sys.modules.pop(name, None)


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


def chats(launchers, folder, *, reply="The quick brown fox"):
    asked = ["What is in the picture?", "An image of three elephants"]
    launchers[1].write(folder, asked, [reply, None], tokenizer=None)
    return folder


def test_every_step_comes_after_what_it_needs_and_writes_beside_the_demo_only(launchers):
    steps = launchers[0].steps()
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
def test_the_runs_use_what_the_steps_make(launchers, name):
    run = load_run(ROOT / launchers[0].CONFIGS / f"{name}.yaml")
    made = {str(path) for step in launchers[0].steps() for path in step.outputs}
    needed = [source.path for source in run.data.sources]
    needed += [run.stage.language_model, run.output_dir, str(Path(run.stage.image_tokenizer).parent)]
    assert set(needed) <= made
    assert run.stage.lora.rank == 32 and run.stage.trained == "lora"


def test_a_topic_is_trained_or_held_out(launchers):
    prompts = launchers[1].prompts()
    topics = launchers[1].TOPICS
    assert len(set(topics)) == len(topics)
    for topic in topics:
        found = {
            split
            for split, asked in prompts.items()
            for q in launchers[1].QUESTIONS
            if q.format(topic) in asked
        }
        assert len(found) == 1, topic
    assert not set(prompts["train"]) & set(prompts["held-out"])
    assert len(prompts["held-out"]) >= 2 * launchers[1].NUM_HELD_OUT


def test_chats_are_the_models_own_replies_that_end_in_time(launchers, base, monkeypatch):
    folder, _, tokenizer = base
    monkeypatch.setattr(launchers[1], "TOPICS", launchers[1].TOPICS[:8])
    monkeypatch.setattr(launchers[1], "NUM_HELD_OUT", 5)
    arguments = ["--model", str(folder / "base"), "--output", str(folder / "data")]
    assert launchers[1].main([*arguments, "--max-new-tokens", "8"]) == 0
    asked = launchers[1].prompts()
    for split in ("train", "held-out"):
        shards = ShardSet.open(folder / "data" / f"chats-{split}")
        assert shards.num_samples >= 5 and shards.num_images == 0
        for document in text_nll.read_chats(folder / "data" / f"chats-{split}"):
            prompt, reply = document.parts
            assert prompt.text in asked[split] and (prompt.role, reply.role) == ("user", "assistant")
            assert reply.text
        assert shards.index(0).tokenizer == tokenizer.fingerprint
    assert ShardSet.open(folder / "data" / "chats-held-out").num_samples == 5


def test_too_few_held_out_replies_are_an_error_that_says_how_many(launchers, base, monkeypatch):
    monkeypatch.setattr(launchers[1], "TOPICS", launchers[1].TOPICS[:4])
    arguments = ["--model", str(base[0] / "base"), "--output", str(base[0] / "data")]
    with pytest.raises(UserError, match="only 0 held-out replies end in time, wanted 100"):
        launchers[1].main([*arguments, "--max-new-tokens", "1"])


def test_an_untouched_adapter_leaves_the_nll_of_text_as_it_was_and_a_touched_one_does_not(launchers, base):
    from vlgpt.export import export_model

    folder, model, tokenizer = base
    data = chats(launchers, folder / "chats")
    metrics = text_nll.compare(folder / "export", folder / "base", data, template="own")
    assert metrics["text/nll_ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert metrics["text/nll_ratio"]["n"] == 1
    rendered = tokenizer.spans(text_nll.read_chats(data)[0])
    assert metrics["text/nll"]["n"] == sum(sum(span.is_target) for span in rendered)
    for name, parameter in model.lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    export_model(model, folder / "export", tokenizer=tokenizer)
    assert (
        text_nll.main(
            [
                str(folder / "export"),
                "--base",
                str(folder / "base"),
                "--data",
                str(data),
                "--output",
                str(folder / "text.json"),
            ]
        )
        == 0
    )
    assert abs(json.loads((folder / "text.json").read_text())["text/nll_ratio"]["value"] - 1) > 0.01


def test_another_language_models_chats_are_refused(launchers, base):
    folder, _, _ = base
    other = new_document_tokenizer(vocabulary_size=382)
    other.save(folder / "base")
    with pytest.raises(UserError, match="another language model"):
        text_nll.compare(
            folder / "export", folder / "base", chats(launchers, folder / "chats"), template="short"
        )
