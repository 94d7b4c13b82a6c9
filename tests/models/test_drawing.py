"""Guidance and scale of `diffusion.json` reach every image that is drawn, whoever asks, and the numbers record them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from evaluation import benchmarks, manifest
from evaluation.responders import ModelResponder
from evaluation.run import run
from tests.helpers import miniatures as mini
from tests.helpers import tiny_diffusion_parts as tiny
from tests.helpers.chat_parts import new_chat_model, picture_bytes, save_parts
from tests.helpers.official_files import write_coco
from tests.helpers.tiny_unified import NUM_VISUAL, VISUAL_WIDTH, new_document_tokenizer
from vlgpt.chat.dialogue import Dialogue
from vlgpt.chat.reply import Finished, Request, answer
from vlgpt.cli import main
from vlgpt.decoding.api import DecodeSettings
from vlgpt.decoding.generator import Generator
from vlgpt.errors import UserError
from vlgpt.export import export_model
from vlgpt.models.conditions import load_conditioner, read_parts
from vlgpt.models.diffusion import DiffusionDecoder
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.server.protocol import ChatRequest
from vlgpt.train.pictures import open_decoder

SEEDS = [(7, "draw", 0)]
DRAWING = {"guidance": 2.5, "image_scale": 0.7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export whose picture decoder is a miniature of Stable Diffusion 1.5 with IP-Adapter Plus."""
    folder = tmp_path_factory.mktemp("drawing")
    save_parts(folder)
    description = mini.write_diffusion(folder / "sd", **DRAWING)
    targets = load_conditioner(description, library="ip_adapter")  # writes the constants
    tokenizer = new_document_tokenizer()
    model = new_chat_model(tokenizer)
    text_tokens, text_width = targets.text_condition(["a"]).shape[1:]
    model.image_detokenizer = ImageDetokenizer(
        num_visual=NUM_VISUAL, visual_width=VISUAL_WIDTH, image_tokens=tiny.IMAGE_TOKENS,
        image_width=tiny.WIDTH, text_tokens=text_tokens, text_width=text_width, width=32, depth=2, num_heads=4,
    ).eval()  # fmt: skip
    encoder = {"path": str(folder / "clip"), "library": "open_clip", "layer": -2, "has_cls": True}
    export_model(model, folder / "export", tokenizer=tokenizer, encoder=encoder, picture_decoder=description)
    return folder


@pytest.fixture(scope="module")
def generator(folder):
    return Generator.load(folder / "export")


def test_a_generator_draws_as_diffusion_json_says_unless_asked_otherwise(generator):
    visual = tiny.normals(1, NUM_VISUAL, VISUAL_WIDTH, seed=5)

    def drawn(**options):
        return generator.draw(visual, seeds=SEEDS, **options)[0].tobytes()

    assert drawn() == drawn(**DRAWING)
    assert len({drawn(), drawn(guidance=1.0), drawn(image_scale=1.0), drawn(use="image")}) == 4
    assert generator.reconstruct([picture_bytes(1)]) == generator.reconstruct([picture_bytes(1)], **DRAWING)


def test_without_the_keys_a_diffusion_decoder_is_guided(tmp_path):
    description = mini.write_diffusion(tmp_path)
    assert {key: read_parts(description)[key] for key in DRAWING} == {"guidance": 7.5, "image_scale": 1.0}
    load_conditioner(description, library="ip_adapter")
    parts = {"adapter": tmp_path / "adapter.bin", "unconditional": tmp_path / "unconditional.safetensors"}
    decoder = DiffusionDecoder.load(tmp_path / "pipeline", **parts, num_steps=2)
    assert (decoder.guidance, decoder.image_scale) == (7.5, 1.0)


@pytest.mark.parametrize("key", DRAWING)
@pytest.mark.parametrize("value", [-1, "7", True, None, float("inf")])
def test_a_guidance_or_scale_that_is_no_number_from_0_on_is_refused(tmp_path, key, value):
    description = tmp_path / "diffusion.json"
    description.write_text(json.dumps({"pipeline": "a", "adapter": "b", "unconditional": "c", key: value}))
    with pytest.raises(UserError, match=f"{key} is .*, wanted a number from 0 on"):
        read_parts(description)


def test_chat_and_server_draw_as_diffusion_json_says(generator):
    for settings in (
        DecodeSettings(images="force", seed=7),
        ChatRequest(messages=[{"role": "user", "content": "a"}], modalities=["image"], seed=7).settings(
            default_tokens=8, max_new_tokens=8, has_decoder=True
        ),
    ):
        events = []
        answer(generator, [Request(Dialogue().asking("a fox"), settings, events.append)])
        (picture,) = events[-1].turn.pictures if isinstance(events[-1], Finished) else [None]
        wanted = generator.draw(picture.visual[None], seeds=SEEDS, **DRAWING)[0]
        assert picture.image.tobytes() == wanted.tobytes()


def test_the_command_line_draws_as_diffusion_json_says(folder, generator, tmp_path):
    (tmp_path / "a.png").write_bytes(picture_bytes(3))
    command = ["reconstruct", str(tmp_path / "a.png"), "--model", str(folder / "export"), "--output"]

    def sheet(*more):
        assert main([*command, str(tmp_path / "sheet.png"), *more]) == 0
        return Image.open(tmp_path / "sheet.png").tobytes()

    assert sheet() == sheet("--decoder-guidance", "2.5", "--image-scale", "0.7")
    assert sheet() != sheet("--decoder-guidance", "1")


def test_evaluation_draws_as_diffusion_json_says_and_records_the_numbers(folder, generator, tmp_path):
    write_coco(tmp_path / "data")
    responder = ModelResponder.load(folder / "export")
    wanted = {"default": DRAWING, "asked": {"guidance": 1.0, "image_scale": 0.7}}
    for name in ("coco_reconstruction", "coco_generation"):
        benchmark = benchmarks.make(name)
        examples = benchmark.examples(tmp_path / "data")[:1]
        images = []
        for case, drawing in wanted.items():
            output = tmp_path / name / case
            decoding = replace(benchmark.decoding, **({} if case == "default" else {"guidance": 1.0}))
            run(benchmark, responder, examples=examples, output=output, decoding=decoding)
            recorded = manifest.read(output)["decoding"]
            assert {key: recorded[key] for key in DRAWING} == drawing
            images.append(next((output / "images").glob("*.png")).read_bytes())
        assert images[0] != images[1]
    prompts = [benchmarks.make("coco_reconstruction").examples(tmp_path / "data")[0].prompt]
    visual = generator.tokenize([Image.open(prompts[0].images[0])])
    wanted_image = generator.draw(visual, seeds=[("evaluation", 0, prompts[0].id)], **DRAWING)[0]
    assert responder.reconstruct(prompts, DecodeSettings())[0].tobytes() == wanted_image.tobytes()


def test_validation_images_are_drawn_as_diffusion_json_says(folder):
    place = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    decoder = open_decoder(str(folder / "sd"), place)  # a folder with diffusion.json, paths relative to it
    assert {"guidance": decoder.guidance, "image_scale": decoder.image_scale} == DRAWING
