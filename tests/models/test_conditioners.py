"""The frozen encoders of the decoder make what IP-Adapter's and Stable Diffusion's own code would make."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.helpers import miniatures as mini
from tests.helpers import tiny_diffusion_parts as tiny
from vlgpt.errors import UserError
from vlgpt.files import write_once
from vlgpt.models import conditions
from vlgpt.models.conditions import (
    IpAdapterImageConditioner,
    SdxlTextConditioner,
    TextConditioner,
    Unconditional,
    load_conditioner,
)
from vlgpt.models.ip_adapter import load_resampler

LENGTH = mini.TEXT_LENGTH
CAPTIONS = ["a cat", "", "a cat and a very long dog in a hat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text encoder of SD 1.5's layout, both of SDXL's, and an image encoder with its adapter."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    kinds = {"tokenizer": (CLIPTextModel, "text_encoder", 16)}
    kinds["tokenizer_2"] = (CLIPTextModelWithProjection, "text_encoder_2", 24)
    for tokenizer, (kind, name, width) in kinds.items():
        size = mini.write_clip_tokenizer(root / tokenizer)
        config = CLIPTextConfig(
            **mini.clip_text(size, hidden_size=width, num_hidden_layers=3), projection_dim=12
        )
        kind(config).save_pretrained(root / name)
    vision = CLIPVisionConfig(**{**mini.VISION, "hidden_size": tiny.FEATURE_WIDTH}, projection_dim=8)
    CLIPVisionModelWithProjection(vision).half().save_pretrained(root / "image_encoder")
    tiny.write_adapter(root / "adapter.bin", tiny.adapter())
    return root


def load_image(folder, *, is_resampled=True):
    adapter = folder / "adapter.bin" if is_resampled else None
    return IpAdapterImageConditioner.load(folder / "image_encoder", adapter=adapter)


def test_image_features_are_the_penultimate_states_of_normalised_pixels(folder):
    pixels = tiny.normals(2, 3, 28, 28, seed=0).clamp(-1, 1)
    vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").float()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (conditions.CLIP_MEAN, conditions.CLIP_STD))
    embeddings = vision.vision_model.embeddings((pixels / 2 + 0.5 - mean) / std)
    hidden = vision.vision_model.pre_layrnorm(embeddings)
    for layer in vision.vision_model.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    features = load_image(folder, is_resampled=False).condition(pixels)
    assert features.shape == (2, tiny.FEATURES, tiny.FEATURE_WIDTH)
    torch.testing.assert_close(features, hidden, atol=1e-5, rtol=0)
    tokens = load_image(folder).condition(pixels)
    torch.testing.assert_close(tokens, load_resampler(tiny.adapter())(hidden), atol=1e-5, rtol=0)


def test_the_unconditional_image_is_the_one_of_grey_pixels(folder):
    conditioner = load_image(folder)
    mean = torch.tensor(conditions.CLIP_MEAN).view(1, 3, 1, 1)
    grey = (mean * 2 - 1).expand(1, 3, 28, 28)
    torch.testing.assert_close(conditioner.unconditional(), conditioner.condition(grey)[0], atol=1e-5, rtol=0)
    assert conditioner.unconditional().abs().mean() > 0.1


def test_text_conditions_equal_those_of_the_pipeline(folder):
    conditioner = TextConditioner.load(folder)
    pipe = StableDiffusionPipeline(
        vae=tiny.vae(),
        text_encoder=conditioner.text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=tiny.unet(),
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    positive, negative = pipe.encode_prompt(CAPTIONS, "cpu", 1, True)
    torch.testing.assert_close(conditioner.condition(CAPTIONS), positive, atol=1e-5, rtol=0)
    torch.testing.assert_close(conditioner.unconditional(), negative[0], atol=1e-5, rtol=0)
    assert conditioner.shape == positive.shape[1:] == (LENGTH, 16)


def test_sdxl_conditions_equal_those_of_the_pipeline(folder):
    conditioner = SdxlTextConditioner.load(folder)
    pipe = StableDiffusionXLPipeline(
        vae=tiny.vae(),
        text_encoder=conditioner.encoders[0],
        text_encoder_2=conditioner.encoders[1],
        tokenizer=conditioner.tokenizers[0],
        tokenizer_2=conditioner.tokenizers[1],
        unet=tiny.unet(is_sdxl=True),
        scheduler=None,
        add_watermarker=False,
    )
    states, empty, pooled, _ = pipe.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=True)
    found = conditioner.condition(CAPTIONS)
    torch.testing.assert_close(found[:, :-1], states, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, -1, :12], pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(conditioner.unconditional()[:-1], empty[0], atol=1e-5, rtol=0)
    assert conditioner.shape == found.shape[1:] == (LENGTH + 1, 40)


def test_constants_survive_a_round_trip(folder, tmp_path):
    made = conditions.unconditional(load_image(folder), TextConditioner.load(folder))
    made.save(tmp_path / "constants.safetensors")
    read = Unconditional.from_file(tmp_path / "constants.safetensors")
    assert torch.equal(made.image, read.image) and torch.equal(made.text, read.text)


def test_the_first_task_writes_the_constants_and_all_others_read_them(folder, tmp_path, monkeypatch):
    description = mini.write_diffusion(tmp_path)
    file = tmp_path / "unconditional.safetensors"
    first = tiny.constants()

    make = conditions.unconditional

    def slower(image, text):  # another task of the array was quicker
        first.save(file)
        return make(image, text)

    monkeypatch.setattr(conditions, "unconditional", slower)
    load_conditioner(description, library="ip_adapter")
    assert torch.equal(Unconditional.from_file(file).image, first.image)
    assert not list(tmp_path.glob(".unconditional*"))


def test_of_many_writers_of_one_file_the_first_wins_and_readers_see_it_whole(tmp_path):
    barrier = threading.Barrier(8)

    def write(number: int) -> bool:
        barrier.wait()
        return write_once(tmp_path / "file", bytes([number]) * 100_000)

    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(write, range(8)))
    assert sum(wrote) == 1
    assert (tmp_path / "file").read_bytes() == bytes([wrote.index(True)]) * 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_encoder_that_does_not_fit_the_adapter_is_named(folder, tmp_path):
    config = CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(UserError, match="reads features of width 48, the image encoder other makes width 32"):
        IpAdapterImageConditioner(
            CLIPVisionModelWithProjection(config), resampler=load_resampler(tiny.adapter()), name="other"
        )
    with pytest.raises(UserError, match="no CLIPVisionModelWithProjection could be loaded"):
        IpAdapterImageConditioner.load(tmp_path, adapter=None)
    with pytest.raises(UserError, match="no CLIPTextModel could be loaded"):
        TextConditioner.load(tmp_path)
