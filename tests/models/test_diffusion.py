"""The diffusion decoder: equal to diffusers' pipelines for one picture, and to itself for any batch."""

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from tests.helpers import tiny_diffusion_parts as tiny
from vlgpt.errors import UserError
from vlgpt.models.conditions import Unconditional, with_pooled
from vlgpt.models.diffusion import DiffusionDecoder, load_scheduler

SCHEDULERS = {
    "DDIMScheduler": diffusers.DDIMScheduler(),
    "PNDMScheduler": diffusers.PNDMScheduler(skip_prk_steps=True),
    "DPMSolverMultistepScheduler": diffusers.DPMSolverMultistepScheduler(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder, an adapter file and the constants of both readings of e_v."""
    root = tmp_path_factory.mktemp("decoder")
    tiny.write_pipeline(root / "sd")
    tiny.write_pipeline(
        root / "sdxl", is_sdxl=True, scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1)
    )
    tiny.write_adapter(root / "adapter.safetensors", tiny.adapter())
    tiny.write_adapter(root / "adapter.bin", tiny.adapter())
    for reading in ("tokens", "features"):
        tiny.constants(reading=reading).save(root / f"{reading}.safetensors")
    tiny.constants(text_tokens=tiny.TEXT_TOKENS + 1).save(root / "sdxl.safetensors")
    return root


def load(folder, *, model="sd", reading="tokens", num_steps=4, **options) -> DiffusionDecoder:
    constants = "sdxl" if model == "sdxl" else reading
    return DiffusionDecoder.load(
        folder / model,
        adapter=options.pop("adapter", folder / "adapter.safetensors"),
        unconditional=folder / f"{constants}.safetensors",
        reading=reading,
        num_steps=num_steps,
        **options,
    )


def conditions(count, *, reading="tokens", text_tokens=tiny.TEXT_TOKENS):
    shape = (tiny.IMAGE_TOKENS, tiny.WIDTH) if reading == "tokens" else (tiny.FEATURES, tiny.FEATURE_WIDTH)
    return tiny.normals(count, *shape, seed=11), tiny.normals(count, text_tokens, tiny.WIDTH, seed=12)


def pipeline(folder, scheduler, *, image_scale):
    pipe = StableDiffusionPipeline(
        vae=tiny.vae(),
        text_encoder=None,
        tokenizer=None,
        unet=tiny.unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    return prepared(pipe, image_scale=image_scale)


def prepared(pipe, *, image_scale):
    weights = tiny.adapter()
    state = {"image_proj": dict(weights.image_proj), "ip_adapter": dict(weights.ip_adapter)}
    pipe.load_ip_adapter(state, subfolder="", weight_name="x", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(image_scale)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_one_picture_equals_the_pipeline_of_diffusers(folder, tmp_path, name, guidance):
    tiny.write_pipeline(tmp_path, scheduler=SCHEDULERS[name])
    decoder = DiffusionDecoder.load(
        tmp_path,
        adapter=folder / "adapter.bin",
        unconditional=folder / "features.safetensors",
        reading="features",
        num_steps=4,
    )
    image, text = conditions(1, reading="features")
    found = decoder.decode(image, text, generators=tiny.generators(5), guidance=guidance, image_scale=0.7)
    empty = tiny.constants(reading="features")
    embeds = image[:, None]
    if guidance > 1:
        embeds = torch.cat([empty.image[None, None], embeds])
    wanted = pipeline(folder, SCHEDULERS[name], image_scale=0.7)(
        prompt_embeds=text,
        negative_prompt_embeds=empty.text[None],
        ip_adapter_image_embeds=[embeds],
        generator=tiny.generators(5)[0],
        guidance_scale=guidance,
        num_inference_steps=4,
        height=16,
        width=16,
        output_type="pt",
    ).images
    torch.testing.assert_close(found / 2 + 0.5, wanted, atol=1e-5, rtol=0)
    assert found.std() > 0.05


@pytest.mark.parametrize(
    "name", [*SCHEDULERS, "DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"]
)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_batch_equals_single_pictures(folder, name, guidance):
    decoder = load(folder, scheduler=name)
    image, text = conditions(4)
    batch = decoder.decode(image, text, generators=tiny.generators(1, 2, 3, 4), guidance=guidance)
    singles = [
        decoder.decode(
            image[i : i + 1], text[i : i + 1], generators=tiny.generators(i + 1), guidance=guidance
        )
        for i in range(4)
    ]
    torch.testing.assert_close(batch, torch.cat(singles), atol=1e-4, rtol=0)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_tokens_equal_features_that_went_through_the_resampler(folder):
    by_features, by_tokens = load(folder, reading="features"), load(folder)
    features, text = conditions(2, reading="features")
    tokens = by_features.resampler(features)
    by_tokens.absent_image.copy_(by_features.resampler(by_features.absent_image[None])[0])
    drawn = [
        decoder.decode(image, text, generators=tiny.generators(1, 2), guidance=3.0)
        for decoder, image in ((by_features, features), (by_tokens, tokens))
    ]
    torch.testing.assert_close(*drawn, atol=1e-5, rtol=0)


def test_an_absent_condition_has_no_influence_and_a_present_one_has(folder):
    decoder = load(folder)
    image, text = conditions(2)

    def draw(*given, **options):
        return decoder.decode(*given, generators=tiny.generators(1, 2), guidance=2.0, **options)

    both = draw(image, text)
    absent_text = decoder.absent_text.expand(2, -1, -1)
    assert torch.equal(draw(image, None), draw(image, absent_text))
    assert torch.equal(draw(None, text), draw(image, text, image_scale=0.0))
    for other in (draw(image, None), draw(None, text), draw(image, text, image_scale=0.5)):
        assert (both - other).abs().max() > 1e-2
    with pytest.raises(ValueError, match="none of them"):
        decoder.decode(None, None)


def test_a_decoder_keeps_no_state_between_pictures(folder):
    decoder = load(folder, scheduler="PNDMScheduler")
    image, text = conditions(2)
    first = decoder.decode(image, text, guidance=2.0)
    decoder.decode(None, text, image_scale=0.3)
    assert torch.equal(first, decoder.decode(image, text, guidance=2.0))
    assert decoder.scheduler.num_inference_steps is None  # a copy was used
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_another_scheduler_class_keeps_the_patches_of_the_pipeline(tmp_path):
    diffusers.PNDMScheduler(skip_prk_steps=True, beta_start=0.00085).save_pretrained(tmp_path / "scheduler")
    scheduler = load_scheduler(tmp_path, class_name="DDIMScheduler")
    assert scheduler.config.clip_sample is False and scheduler.config.steps_offset == 1
    assert scheduler.config.beta_start == 0.00085
    assert load_scheduler(tmp_path, steps_offset=None).config.steps_offset == 0
    with pytest.raises(UserError, match="no scheduler 'Euler'"):
        load_scheduler(tmp_path, class_name="Euler")


def test_sdxl_equals_its_pipeline_and_single_pictures(folder):
    decoder = load(folder, model="sdxl")
    image, states = conditions(2)
    pooled = tiny.normals(2, tiny.POOLED, seed=13)
    text = with_pooled(states, pooled)
    drawn = decoder.decode(image, text, generators=tiny.generators(1, 2), guidance=3.0)
    single = decoder.decode(image[1:], text[1:], generators=tiny.generators(2), guidance=3.0)
    torch.testing.assert_close(drawn[1:], single, atol=1e-4, rtol=0)

    pipe = StableDiffusionXLPipeline(
        vae=tiny.vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=tiny.unet(is_sdxl=True),
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )
    pipe = prepared(pipe, image_scale=1.0)
    pipe.unet.encoder_hid_proj.image_projection_layers[0] = torch.nn.Identity()
    empty = decoder.absent_text
    wanted = pipe(
        prompt_embeds=states[:1],
        negative_prompt_embeds=empty[None, :-1],
        pooled_prompt_embeds=pooled[:1],
        negative_pooled_prompt_embeds=empty[None, -1, : tiny.POOLED],
        ip_adapter_image_embeds=[torch.stack([decoder.absent_image, image[0]])[:, None]],
        generator=tiny.generators(1)[0],
        guidance_scale=3.0,
        num_inference_steps=4,
        height=16,
        width=16,
        output_type="pt",
    ).images
    torch.testing.assert_close(drawn[:1] / 2 + 0.5, wanted, atol=1e-5, rtol=0)


def test_half_precision_draws_nearly_the_same_picture(folder):
    image, text = conditions(2)
    exact = load(folder).decode(image, text, guidance=2.0)
    coarse = load(folder, dtype=torch.bfloat16).decode(image, text, guidance=2.0)
    assert coarse.dtype == torch.float32
    assert (exact - coarse).abs().mean() < 0.03


def test_wrong_input_is_named(folder, tmp_path):
    decoder = load(folder)
    image, text = conditions(2)
    with pytest.raises(
        ValueError, match=r"image_condition has shape \(2, 3, 32\), this decoder takes \(B, 4, 32\)"
    ):
        decoder.decode(image[:, :3], text)
    with pytest.raises(ValueError, match=r"found 1 generators on \['cpu'\] for 2 pictures"):
        decoder.decode(image, text, generators=tiny.generators(1))
    with pytest.raises(ValueError, match=r"batch sizes \[1, 2\]"):
        decoder.decode(image[:1], text)
    with pytest.raises(UserError, match=r"constants .*absent\.safetensors are missing"):
        Unconditional.from_file(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="unconditional image constant has width 48, this decoder takes 32"):
        DiffusionDecoder.load(
            folder / "sd", adapter=folder / "adapter.bin", unconditional=folder / "features.safetensors"
        )
    with pytest.raises(UserError, match=r"no UNet2DConditionModel could be loaded from .*nowhere/unet"):
        DiffusionDecoder.load(
            tmp_path / "nowhere", adapter=folder / "adapter.bin", unconditional=folder / "tokens.safetensors"
        )
