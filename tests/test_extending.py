"""docs/extending.md is true: its files, and nothing else, make a whole chain run through the real entry points.

The source builds data, the stage trains the decoder on it, stage 2 trains with the head, the chat template and that
decoder, its export draws, and the benchmark asks it. All in miniature.
"""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.miniatures import SIZE_PX, write_clip
from tests.helpers.official_files import save_picture, write_json
from tests.helpers.processes import ROOT
from tests.helpers.small_data import write_feature
from tests.helpers.tiny_unified import CONDITION_SHAPES, new_document_tokenizer, new_model
from vlgpt.config import load_run
from vlgpt.decoding.load import load_component_decoder
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.log import read_metrics
from vlgpt.models.component import Component
from vlgpt.shards import ShardSet
from vlgpt.tokens import DocumentTokenizer, flatten

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"\*\*`([\w/.]+)`\*\*\n\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL))
MAX_LINES = 100
NUM_IMAGES, NUM_PATCHES = 6, (SIZE_PX // 7) ** 2 + 1
DEEPSPEED = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000},
    "zero_force_ds_cpu_optimizer": False,
}
TRAIN = ("--deepspeed", "zero2.json", "--config")
SMALL = (
    "steps=1",
    "global_batch=4",
    "micro_batch=4",
    "precision=fp32",
    "data.num_workers=0",
    "log_interval_steps=1",
)
PRETRAIN = {
    "name": "pretrain",
    "output_dir": "runs/pretrain",
    "stage": {
        "kind": "language",
        "language_model": "llm",
        "image_tokenizer": "stage1",
        "template": "own",
        "head": "mylab.heads:SwiGluHead",
        "picture_decoder": "runs/decoder/result",
        "encoder": {"path": "clip", "library": "transformers"},
        "lora": {"rank": 2, "alpha": 2.0},
    },
    "data": {
        "sources": [{"name": "flickr30k", "path": "data/flickr30k"}],
        "sequence_length": 64,
        "pixels": True,
        "image_size_px": SIZE_PX,
    },
    "steps": 1,
    "global_batch": 4,
    "micro_batch": 4,
}


def write_inputs(folder: Path) -> None:
    """What the files of the page work on: their published formats, and tiny models."""
    lines = []
    for number in range(NUM_IMAGES):
        save_picture(folder / f"flickr30k/images/{number}.jpg", number)
        lines += [f"{number}.jpg#{caption}\tA fox number {number} ." for caption in range(5)]
    lines.append(f"{NUM_IMAGES}.jpg#0\t")
    (folder / "flickr30k/results.token").write_text("\n".join(lines))
    for split, count in (("test", 12), ("train", 4)):
        records = []
        for number in range(count):
            image = f"{split}/{number}.png"
            save_picture(folder / "data/counting" / image, number)
            records.append({"image": image, "question": "How many dogs are there?", "count": number % 4})
        write_json(folder / f"data/counting/{split}.json", records)
    tokenizer = new_document_tokenizer()
    model = new_model(tokenizer, num_patches=NUM_PATCHES)
    model.lm.causal_lm.save_pretrained(folder / "llm")
    tokenizer.text_tokenizer.chat_template = None
    tokenizer.text_tokenizer.save_pretrained(folder / "llm")
    model.image_tokenizer.save(folder / "stage1/image_tokenizer")
    model.image_detokenizer.save(folder / "stage1/image_detokenizer")
    write_clip(folder / "clip")
    write_json(folder / "zero2.json", DEEPSPEED)
    write_json(folder / "pretrain.yaml", PRETRAIN)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, forks):
    """The folder of a lab with the files of the page, and all of its commands run; -> folder, {name: output}."""
    folder = tmp_path_factory.mktemp("lab")
    write_inputs(folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    outputs = {}

    def run(name: str, *command: str) -> None:
        log = folder / f"{name}.log"
        codes = forks.run([str(part) for part in command], folder=folder, log=log)
        assert codes == [0], log.read_text()[-6000:]
        outputs[name] = log.read_text()

    run(
        "build", "-m", "data_prep.build", "mylab.flickr30k:Flickr30kSource", "--input", "flickr30k/results.token",
        "--images", "flickr30k/images", "--num-captions", "2", "--output", "data/flickr30k",
        "--tokenizer", "llm", "--template", "own", "--max-bad-fraction", "0.5",
    )  # fmt: skip
    for kind in ("image", "text"):
        shape = (CONDITION_SHAPES[f"{kind}_tokens"], CONDITION_SHAPES[f"{kind}_width"])
        write_feature(folder / "data/flickr30k", f"{kind}_condition", shape=shape)
    sizes = [f"stage.shapes.{name}={value}" for name, value in CONDITION_SHAPES.items()]
    sizes += ["stage.size_px=32", "stage.patch_px=8", "stage.width=32", "data.image_size_px=32"]
    launcher = ROOT / "launchers/train_tokenizer.py"
    run("stage", launcher, *TRAIN, "mylab/decoder.yaml", *SMALL, *sizes)
    run("inspect", "-m", "vlgpt", "inspect", "--config", "pretrain.yaml", "data.num_workers=0")
    run("head", ROOT / "launchers/pretrain.py", *TRAIN, "pretrain.yaml", *SMALL)
    export = ["--model", "runs/pretrain/result"]
    run("reconstruct", "-m", "vlgpt", "reconstruct", "flickr30k/images/1.jpg", *export)
    asked = ["--data", "data", "--option", "worst_error=20"]
    for name, who in (("model", export), ("oracle", ["--responder", "oracle", "--shots", "2"])):
        run(name, "-m", "evaluation.run", "mylab.counting:Counting", *who, *asked, "--output", f"out/{name}")
    for name in ("model", "oracle"):
        run(
            f"score_{name}", "-m", "evaluation.score", "mylab.counting:Counting", "--data", "data",
            "--predictions", f"out/{name}", "--output", f"out/{name}.json",
        )  # fmt: skip
    return folder, outputs


def test_every_extension_is_one_short_file_and_the_page_shows_all_six():
    assert list(FILES) == [
        *("mylab/flickr30k.py", "mylab/counting.py", "mylab/heads.py", "mylab/decoder.py", "mylab/stage.py"),
        *("mylab/decoder.yaml", "llm/chat_template.jinja"),
    ]
    assert all(len(text.splitlines()) < MAX_LINES for text in FILES.values())


def test_every_name_of_the_lab_on_the_page_is_in_its_files():
    found = set(re.findall(r"(mylab)\.(\w+):(\w+)", PAGE))
    assert len(found) >= 4
    for package, module, name in found:
        classes = [
            node for node in ast.parse(FILES[f"{package}/{module}.py"]).body if isinstance(node, ast.ClassDef)
        ]
        assert name in [node.name for node in classes]


def test_the_source_builds_shards(lab):
    folder, _ = lab
    shards = ShardSet.open(folder / "data/flickr30k")
    samples = [shards.read(0, number) for number in range(shards.num_samples)]
    assert len(samples) == 2 * NUM_IMAGES, "two captions of each image, without the empty one"
    assert samples[0].document.parts == (ImagePart(0), TextPart("A fox number 0 ."))


def test_the_head_trains_and_its_name_is_in_the_export(lab):
    folder, _ = lab
    (record,) = [r for r in read_metrics(folder / "runs/pretrain/metrics.jsonl") if "loss/visual" in r]
    assert record["loss/visual"] > 0
    config = json.loads((folder / "runs/pretrain/result/config.json").read_text())
    assert config["head"] == "mylab.heads:SwiGluHead"


def test_the_stage_trains_a_decoder_that_draws(lab, monkeypatch):
    folder, _ = lab
    monkeypatch.syspath_prepend(folder)
    decoder = load_component_decoder(folder / "runs/decoder/result")
    image, text = torch.randn(2, 3, 16), torch.randn(2, 5, 12)
    for given in ((image, text), (image, None), (None, text)):
        pixels = decoder.decode(*given)
        assert pixels.shape == (2, 3, 32, 32) and pixels.abs().max() <= 1
    assert load_run(folder / "runs/decoder/config.yaml").stage.kind == "mylab.stage:DecoderStage"
    assert (folder / "reconstruction.png").is_file()


def test_a_decoder_without_an_attribute_is_refused_when_it_is_loaded(tmp_path):
    NoSize().save(tmp_path)
    with pytest.raises(UserError, match=r"tests.test_extending:NoSize.*has no size_px, guidance"):
        load_component_decoder(tmp_path)


class NoSize(Component):
    """A decoder whose author forgot all attributes."""

    image_scale, is_deterministic = 1.0, True

    def decode(self, image_condition, text_condition, **options):
        """Nothing."""


def test_the_benchmark_reaches_its_maximum_with_the_oracle_and_asks_the_model(lab):
    folder, _ = lab
    oracle, model = (json.loads((folder / f"out/{name}.json").read_text()) for name in ("oracle", "model"))
    assert {name: entry["value"] for name, entry in oracle["metrics"].items()} == {
        "accuracy": 100,
        "mean_error": 0,
    }
    assert oracle["benchmark"] == "mylab.counting:Counting" and oracle["shots"] == "2" and oracle["n"] == 12
    assert oracle["scoring"]["options"]["worst_error"] == 20
    assert oracle["metrics"]["accuracy"]["chance"] == pytest.approx(100 * 2 / 11)
    assert model["n"] == 12 and model["metrics"]["accuracy"]["value"] < 100


def test_the_chat_template_is_rendered_as_transformers_renders_it(lab):
    folder, _ = lab
    for place in ("llm", "runs/pretrain/result"):
        tokenizer = DocumentTokenizer.load(folder / place, num_visual=4, template="own")
        said = [("user", "What is in the picture?"), ("assistant", "An elephant.")]
        messages = [{"role": role, "content": text} for role, text in said]
        text = tokenizer.text_tokenizer
        document = Document("a", "b", tuple(TextPart(text, role) for role, text in said))
        found = flatten(tokenizer.spans(document)).token_ids.tolist()
        assert found == text.apply_chat_template(messages, tokenize=True, return_dict=False)
        whole = "<s>### Instruction:\nWhat is in the picture?\n\n### Response:\nAn elephant.</s>"
        assert text.apply_chat_template(messages, tokenize=False) == whole
