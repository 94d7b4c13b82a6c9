"""IP-Adapter Plus files: both layouts, the Resampler against diffusers, one clear error per wrong file."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.helpers import tiny_diffusion_parts as tiny
from vlgpt.errors import UserError
from vlgpt.models.diffusion import install_image_attention
from vlgpt.models.ip_adapter import Resampler, load_resampler, read_ip_adapter


def test_the_resampler_equals_the_one_of_diffusers():
    weights = tiny.adapter()
    unet: UNet2DConditionModel = tiny.unet()
    unet._load_ip_adapter_weights(
        [{"image_proj": dict(weights.image_proj), "ip_adapter": dict(weights.ip_adapter)}]
    )
    reference = unet.encoder_hid_proj.image_projection_layers[0]
    features = tiny.normals(3, tiny.FEATURES, tiny.FEATURE_WIDTH, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(load_resampler(weights)(features), reference(features), atol=1e-5, rtol=0)


def test_published_sizes_give_the_published_tensors():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Resampler().state_dict().items()}
        sdxl = Resampler(width=1280, output_width=2048, num_heads=20).state_dict()
    assert len(shapes) == 7 + 4 * 11
    assert shapes["latents"] == (1, 16, 768) and shapes["proj_in.weight"] == (768, 1280)
    assert shapes["layers.3.0.to_kv.weight"] == (1536, 768) and shapes["layers.0.0.norm2.bias"] == (768,)
    assert shapes["layers.2.1.1.weight"] == (3072, 768) and shapes["layers.2.1.3.weight"] == (768, 3072)
    assert sdxl["proj_out.weight"].shape == (2048, 1280) and sdxl["layers.0.0.to_q.weight"].shape == (
        1280,
        1280,
    )


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_both_file_layouts_hold_the_same_tensors(tmp_path, suffix):
    weights = tiny.adapter()
    found = read_ip_adapter(tiny.write_adapter(tmp_path / f"adapter{suffix}", weights))
    for group in ("image_proj", "ip_adapter"):
        wanted, read = getattr(weights, group), getattr(found, group)
        assert wanted.keys() == read.keys()
        assert all(torch.equal(wanted[name], read[name]) for name in wanted)


def test_a_bin_file_with_code_in_it_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    torch.save({"image_proj": Payload(), "ip_adapter": {}}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match=r"evil\.bin could not be read"):
        read_ip_adapter(tmp_path / "evil.bin")
    assert not canary.exists()


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def wrong_adapters():
    good = tiny.adapter()
    image, attention = dict(good.image_proj), dict(good.ip_adapter)
    fewer = without(attention, "7.to_k_ip.weight", "7.to_v_ip.weight")
    return {
        "base adapter": (
            replace(good, image_proj={"proj.weight": torch.zeros(128, 48)}),
            "is a base IP-Adapter",
        ),
        "face adapter": (
            replace(good, image_proj={"perceiver_resampler.proj_in.weight": torch.zeros(2, 2)}),
            "is an IP-Adapter FaceID Plus",
        ),
        "no latents": (replace(good, image_proj=without(image, "latents")), r"lacks image_proj\.latents"),
        "missing norm": (
            replace(good, image_proj=without(image, "layers.2.0.norm1.bias")),
            r"missing image_proj\.layers\.2\.0\.norm1\.bias",
        ),
        "odd tensor": (
            replace(good, image_proj=image | {"extra": torch.zeros(1)}),
            r"unexpected image_proj\.extra",
        ),
        "wrong width": (
            replace(good, image_proj=image | {"layers.1.1.3.weight": torch.zeros(64, 99)}),
            r"layers\.1\.1\.3\.weight has shape \(64, 99\), wanted \(64, 256\)",
        ),
        "other base model": (
            replace(
                good,
                image_proj=image
                | {"proj_out.weight": torch.zeros(40, 64)}
                | {
                    f"{name}": torch.zeros(40)
                    for name in ("proj_out.bias", "norm_out.weight", "norm_out.bias")
                },
            ),
            r"tokens of width 40, but this U-Net attends to width 32",
        ),
        "too few": (replace(good, ip_adapter=fewer), r"has 3 to_k_ip projections, this U-Net has 4"),
        "wrong order": (
            replace(
                good,
                ip_adapter=fewer | {f"9.{k}.weight": torch.zeros(32, 32) for k in ("to_k_ip", "to_v_ip")},
            ),
            r"missing ip_adapter\.7\.to_k_ip\.weight",
        ),
        "wrong block": (
            replace(good, ip_adapter=attention | {"7.to_v_ip.weight": torch.zeros(16, 32)}),
            r"ip_adapter\.7\.to_v_ip\.weight has shape \(16, 32\), wanted \(32, 32\)",
        ),
    }


@pytest.mark.parametrize("fault", list(wrong_adapters()))
def test_a_wrong_adapter_gives_one_error_that_names_the_difference(fault):
    weights, message = wrong_adapters()[fault]
    with pytest.raises(UserError, match=message) as error:
        resampler = load_resampler(weights)
        install_image_attention(tiny.unet(), weights, num_tokens=resampler.num_tokens)
    assert "ip-adapter-plus_tiny" in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_adapter_are_named(tmp_path):
    torch.save({"unet": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(UserError, match="holds no image_proj and no ip_adapter tensors \\(found: unet\\)"):
        read_ip_adapter(tmp_path / "other.bin")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match=r"cut\.safetensors could not be read"):
        read_ip_adapter(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="is missing"):
        read_ip_adapter(tmp_path / "absent.bin")
