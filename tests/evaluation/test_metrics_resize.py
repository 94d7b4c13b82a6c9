"""Every resize mode equals the implementation it is named after, within 0.02 grey levels."""

import numpy as np
import pytest

from evaluation.metrics.resize import resize
from tests.helpers.metric_golden import load

GOLDEN_NAMES = {
    "torch_fidelity": "torch_fidelity_tf1_bilinear",
    "torchmetrics": "torchmetrics_default_antialias",
    "pytorch_fid": "pytorch_fid_bilinear_no_antialias",
    "clean_fid": "clean_fid_pil_bicubic_float",
    "seed": "seed_pil_bilinear_uint8",
}
TOLERANCE = 0.02


def golden_image(height, width):
    """The picture that `formula` in the golden file describes."""
    y, x = np.mgrid[:height, :width]
    channels = [
        (7 * x + 3 * y) % 256,
        (x * y // 5) % 256,
        ((x - width // 2) ** 2 + (y - height // 2) ** 2) // 40 % 256,
    ]
    return np.stack(channels, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", ["256x256", "480x640"])
@pytest.mark.parametrize("mode", GOLDEN_NAMES)
def test_resized_pixels_equal_the_named_implementation(mode, size):
    golden = load("fid_resize")
    expected = golden["expected"][size][GOLDEN_NAMES[mode]]
    height, width = map(int, size.split("x"))
    image = golden_image(height, width)
    result = resize(image, mode)
    samples = [result[y, x, channel] for y, x, channel in golden["inputs"]["points_yxc"]]
    assert np.abs(np.array(samples) - expected["samples"]).max() < TOLERANCE
    assert result.mean() == pytest.approx(expected["mean"], abs=TOLERANCE)
    assert result.std() == pytest.approx(expected["std"], abs=TOLERANCE)
    difference = np.abs(result - resize(image, "torch_fidelity")).mean()
    assert difference == pytest.approx(expected["mean_abs_diff_vs_torch_fidelity"], abs=TOLERANCE)


def test_a_flat_image_stays_flat_in_every_mode():
    flat = np.full((50, 31, 3), 77, dtype=np.uint8)
    for mode in GOLDEN_NAMES:
        np.testing.assert_allclose(resize(flat, mode), 77.0, atol=1e-4)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        resize(np.zeros((4, 4, 3)), "seed")
    with pytest.raises(ValueError, match="lanczos"):
        resize(np.zeros((4, 4, 3), dtype=np.uint8), "lanczos")
