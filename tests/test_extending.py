"""docs/extending.md is true: its files and commands, and nothing else, make a whole chain run, in the page's order.

`python -m demo.tiny` brings the models and the images; the source builds data, stage 2 trains with the head on it, the
benchmarks ask the result, the stage trains the decoder, a new export draws with it, the chat template is trained.
"""

import ast
import json
import re
import shlex

import pytest
import torch

from demo.tiny import NUM_PATCHES, SIZE_PX, TEXT_LENGTH
from tests.helpers.processes import ROOT
from vlgpt.config import load_run
from vlgpt.decoding.load import load_component_decoder
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.log import read_metrics
from vlgpt.models.component import Component
from vlgpt.shards import ShardSet
from vlgpt.tokens import DocumentTokenizer, flatten

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:\*\*`([\w/.]+)`\*\*\n\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall(PAGE)
FILES = {name: text for name, _, text in BLOCKS if name}
MAX_LINES = 100
NUM_IMAGES = 6


def commands(text):
    """The argument lists of a block of shell lines, as a process without a shell takes them."""
    for line in text.replace("\\\n", " ").splitlines():
        program, *rest = shlex.split(line.replace("$VLGPT", str(ROOT)))
        assert program in ("python", "vlgpt"), line
        yield rest if program == "python" else ["-m", "vlgpt", *rest]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, forks):
    """A lab's folder in which the page was followed from top to bottom; -> folder, [(command, output)]."""
    folder = tmp_path_factory.mktemp("lab")
    done = []

    def run(command):
        log = folder / f"{len(done)}.log"
        assert forks.run(command, folder=folder, log=log) == [0], (command, log.read_text()[-6000:])
        done.append((command, log.read_text()))

    for name, kind, text in BLOCKS:
        if name:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        elif kind == "sh":
            for command in commands(text):
                run(command)
        elif kind == "python":
            (folder / "snippet.py").write_text(text)
            run(["snippet.py"])
    return folder, done


def output_of(done, word):
    """What the only command with this word wrote."""
    (output,) = [output for command, output in done if word in command]
    return output


def test_every_extension_is_one_short_file_and_the_page_shows_all_six():
    assert list(FILES) == [
        *("mylab/flickr30k.py", "mylab/heads.py", "pretrain.yaml", "mylab/counting.py"),
        *("mylab/letters.py", "mylab/prompts.yaml", "mylab/jobs.yaml"),
        *("mylab/decoder.py", "mylab/stage.py", "mylab/decoder.yaml", "llm/chat_template.jinja"),
    ]
    assert all(len(text.splitlines()) < MAX_LINES for text in FILES.values())


def test_every_name_of_the_lab_on_the_page_is_in_its_files():
    found = set(re.findall(r"(mylab)\.(\w+):(\w+)", PAGE))
    assert len(found) >= 5
    for package, module, name in found:
        classes = [
            node for node in ast.parse(FILES[f"{package}/{module}.py"]).body if isinstance(node, ast.ClassDef)
        ]
        assert name in [node.name for node in classes]


def test_the_miniatures_are_what_the_page_says(lab):
    folder, done = lab
    shown = next(text for _, kind, text in BLOCKS if not kind and "llm, stage1" in text)
    assert shown.strip() in output_of(done, "demo.tiny")
    assert {"llm", "stage1", "clip", "flickr30k", "data"} <= {path.name for path in folder.iterdir()}


def test_the_source_builds_shards(lab):
    folder, done = lab
    shards = ShardSet.open(folder / "data/flickr30k")
    samples = [shards.read(0, number) for number in range(shards.num_samples)]
    assert len(samples) == 2 * NUM_IMAGES, "two captions of each image, without the empty one"
    assert samples[0].document.parts == (ImagePart(0), TextPart("There are 0 dots ."))
    shown = next(text for _, kind, text in BLOCKS if not kind and "documents with" in text)
    assert shown.strip() in output_of(done, "data_prep.build")


def test_the_head_trains_with_its_options_and_its_name_is_in_the_export(lab):
    folder, _ = lab
    records = [r for r in read_metrics(folder / "runs/pretrain/metrics.jsonl") if "loss/visual" in r]
    assert len(records) == 2 and all(record["loss/visual"] > 0 for record in records)
    config = json.loads((folder / "runs/pretrain/result/config.json").read_text())
    assert config["head"] == "mylab.heads:SwiGluHead" and config["head_options"] == {"dropout": 0.1}


def test_the_snippets_read_records_load_the_export_and_ask_somebody_else(lab):
    _, done = lab
    records, reloaded, three = (output for command, output in done if command == ["snippet.py"])
    assert "12 {'image': 'test/3.png'" in records
    assert "SwiGluHead" in reloaded
    assert "'accuracy': {'value': 25.0" in three


def test_nothing_that_was_run_is_deprecated(lab):
    _, done = lab
    found = {line for _, output in done for line in output.splitlines() if "past_key_values" in line}
    assert not found


def test_the_stage_trains_a_decoder_that_draws(lab, monkeypatch):
    folder, _ = lab
    monkeypatch.syspath_prepend(folder)
    decoder = load_component_decoder(folder / "runs/decoder/result")
    image, text = torch.randn(2, NUM_PATCHES, 24), torch.randn(2, TEXT_LENGTH, 16)
    for given in ((image, text), (image, None), (None, text)):
        pixels = decoder.decode(*given)
        assert pixels.shape == (2, 3, SIZE_PX, SIZE_PX) and pixels.abs().max() <= 1
    assert load_run(folder / "runs/decoder/config.yaml").stage.kind == "mylab.stage:DecoderStage"
    assert (folder / "reconstruction.png").is_file()


def test_a_decoder_without_an_attribute_is_refused_when_it_is_loaded(tmp_path):
    NoSize().save(tmp_path)
    with pytest.raises(UserError, match=r"test_extending:NoSize.*has no size_px, guidance"):
        load_component_decoder(tmp_path)


class NoSize(Component):
    """A decoder whose author forgot all attributes."""

    image_scale, is_deterministic = 1.0, True

    def decode(self, image_condition, text_condition, **options):
        """Nothing."""


def test_the_benchmark_reaches_its_maximum_with_the_oracle_and_asks_the_model(lab):
    folder, _ = lab
    oracle, model = (
        json.loads((folder / f"out/{who}/results.json").read_text()) for who in ("oracle", "model")
    )
    assert {name: entry["value"] for name, entry in oracle["metrics"].items()} == {
        "accuracy": 100,
        "mean_error": 0,
    }
    assert oracle["benchmark"] == "mylab.counting:Counting" and oracle["shots"] == "2" and oracle["n"] == 12
    assert model["scoring"]["options"]["worst_error"] == 20
    assert oracle["metrics"]["accuracy"]["chance"] == pytest.approx(100 * 2 / 11)
    assert model["n"] == 12 and model["metrics"]["accuracy"]["value"] < 100


def test_letters_have_their_own_rule_prompt_chance_and_mean_of_the_seeds(lab):
    folder, _ = lab
    summary = json.loads((folder / "out/all/results.json").read_text())
    result = summary["results"]["Letters"]
    assert result["metrics"]["accuracy"] == {"value": 100, "n": 12, "chance": 25}
    assert result["notes"]["cut"] == "mylab.letters:Letters.clean" and summary["skipped"] == {}
    assert result["run"]["prompt"]["id"] == "mylab/choice"
    assert summary["few_shot"] == {"mylab.letters:Letters 2": {"mean": 100, "std": 0, "num_seeds": 3}}


def test_the_chat_template_is_rendered_as_transformers_renders_it(lab):
    folder, _ = lab
    for place in ("llm", "runs/chat/result"):
        tokenizer = DocumentTokenizer.load(folder / place, num_visual=4, template="own")
        said = [("user", "What is in the picture?"), ("assistant", "An elephant.")]
        messages = [{"role": role, "content": text} for role, text in said]
        text = tokenizer.text_tokenizer
        document = Document("a", "b", tuple(TextPart(text, role) for role, text in said))
        found = flatten(tokenizer.spans(document)).token_ids.tolist()
        assert found == text.apply_chat_template(messages, tokenize=True, return_dict=False)
        whole = "<s>### Instruction:\nWhat is in the picture?\n\n### Response:\nAn elephant.</s>"
        assert text.apply_chat_template(messages, tokenize=False) == whole
