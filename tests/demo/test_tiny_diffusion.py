"""The demo's diffusion decoder: it learns, draws through the same loop, and survives a round trip to disk."""

import pytest
import torch

from demo.decoder import ConvDecoder
from demo.diffusion import PixelShuffleCodec, TinyDiffusionDecoder
from tests.helpers import tiny_diffusion_parts as tiny

SHAPES = {"image_tokens": 4, "image_width": 16, "text_tokens": 3, "text_width": 24}


def new_decoder(**arguments) -> TinyDiffusionDecoder:
    torch.manual_seed(0)
    coarse = ConvDecoder(
        **SHAPES, size_px=16, width=24, depth=1, num_heads=2, grid=4, channels=16, num_blocks=1
    )
    torch.nn.init.constant_(coarse.to_pixels[2].bias, 0.5)  # a coarse picture that must be corrected
    small = {"width": 24, "channels": [16, 24]}
    return TinyDiffusionDecoder.on(coarse, **{**small, **arguments}).eval()


def samples(count, *, seed=1):
    """Pictures of one colour in each half, and conditions from which the colours can be read."""
    colours = tiny.normals(count, 2, 3, seed=seed).tanh()
    pixels = (
        colours.repeat_interleave(8, dim=1).transpose(1, 2)[..., None].expand(-1, -1, -1, 16).contiguous()
    )
    image, text = tiny.normals(count, 4, 16, seed=seed + 1), tiny.normals(count, 3, 24, seed=seed + 2)
    image[:, 0, :3], image[:, 1, :3] = colours[:, 0] * 3, colours[:, 1] * 3
    return image, text, pixels


def test_pixel_shuffle_is_undone():
    codec = PixelShuffleCodec(4, scaling_factor=5.0)
    pixels = tiny.normals(2, 3, 16, 16, seed=0)
    assert codec.encode(pixels).shape == (2, 48, 4, 4)
    torch.testing.assert_close(codec.decode(codec.encode(pixels)), pixels)


def test_it_is_trained_at_the_steps_it_samples_with():
    assert new_decoder().scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert new_decoder().scheduler.alphas_cumprod[999] == 0


def test_training_brings_pictures_nearer_to_the_truth():
    decoder = new_decoder(image_drop=0.0, text_drop=0.0, scaling_factor=1.5)
    held_out = samples(32, seed=100)
    before = (decoder.decode(*held_out[:2]) - held_out[2]).square().mean()
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], 3e-3)
    frozen = [parameter.clone() for parameter in decoder.coarse.parameters()]
    generator = torch.Generator().manual_seed(0)
    image, text, pixels = samples(512)
    decoder.train()
    for _ in range(80):
        rows = torch.randint(512, (16,), generator=generator)
        losses = decoder.training_loss(image[rows], text[rows], pixels[rows], None, generator)
        assert losses.shape == (16,)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    decoder.eval()
    after = (decoder.decode(*held_out[:2]) - held_out[2]).square().mean()
    shuffled = (decoder.decode(*held_out[:2]) - held_out[2].roll(1, 0)).square().mean()
    assert after < 0.6 * before and after < 0.6 * shuffled
    assert all(map(torch.equal, frozen, decoder.coarse.parameters()))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_equals_single_pictures(guidance):
    decoder = new_decoder()
    image, text, _ = samples(4)
    batch = decoder.decode(image, text, generators=tiny.generators(1, 2, 3, 4), guidance=guidance)
    for i in range(4):
        one = slice(i, i + 1)
        single = decoder.decode(image[one], text[one], generators=tiny.generators(i + 1), guidance=guidance)
        torch.testing.assert_close(batch[one], single, atol=1e-5, rtol=0)
    other = decoder.decode(image, text, generators=tiny.generators(5, 6, 7, 8), guidance=guidance)
    assert (batch - other).abs().max() > 1e-3
    still = new_decoder(noise_scale=0.0)
    drawn = [
        still.decode(image, text, generators=tiny.generators(*seeds))
        for seeds in ((1, 2, 3, 4), (5, 6, 7, 8))
    ]
    assert torch.equal(*drawn)


def test_an_absent_condition_means_the_learned_one():
    decoder = new_decoder()
    image, text, _ = samples(2)
    assert torch.equal(decoder.decode(image, None), decoder.decode(image, None))
    assert not torch.equal(decoder.decode(image, None), decoder.decode(image, text))
    assert not torch.equal(decoder.decode(None, text), decoder.decode(image, text))


def test_the_loss_of_a_sample_depends_on_neither_batch_nor_given_coarse_pictures():
    decoder = new_decoder()
    image, text, pixels = samples(3)
    generator = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    alone = decoder.training_loss(image, text, pixels, None, generator())
    given = decoder.training_loss(image, text, pixels, decoder.coarse.decode(image, text), generator())
    torch.testing.assert_close(alone, given)
    changed = pixels.clone()
    changed[2] = 0
    torch.testing.assert_close(alone[:2], decoder.training_loss(image, text, changed, None, generator())[:2])
    dropped = new_decoder(image_drop=1.0).train()
    assert torch.equal(
        dropped.training_loss(image, text, pixels, None, generator()),
        dropped.training_loss(image + 1, text, pixels, None, generator()),
    )


def test_it_reloads_from_its_folder_bit_by_bit(tmp_path):
    decoder = new_decoder()
    decoder.save(tmp_path)
    image, text, _ = samples(2)
    assert torch.equal(
        TinyDiffusionDecoder.from_folder(tmp_path).eval().decode(image, text), decoder.decode(image, text)
    )
