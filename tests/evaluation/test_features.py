"""Feature extractors: CLIP's own preparation of pictures, the FID Inception's graph, refusal of other weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.features import ClipFeatures, crop_and_resize
from tests.helpers.official_files import picture
from vlgpt.errors import UserError


def test_clip_features_do_not_depend_on_the_batch(clip_folder):
    clip = ClipFeatures(clip_folder)
    images = [picture(i, size=(40 + i, 32)) for i in range(5)]
    together = clip.images(images)
    alone = np.concatenate([clip.images([image]) for image in images])
    assert together.shape == (5, 16) and together.dtype == np.float64
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(clip.images(iter(images)), together, atol=1e-5)
    assert clip.texts(["a red dog", "a chair"]).shape == (2, 16)


def test_the_identity_names_library_weights_and_preparation(clip_folder):
    identity = ClipFeatures(clip_folder).identity
    assert identity["library"] == "open_clip" and len(identity["weights_hash"]) == 24
    assert identity["resize"] == "PIL bicubic, centre crop 32"
    with pytest.raises(UserError, match="CLIP folder"):
        ClipFeatures(clip_folder / "nothing")


def test_pictures_are_cropped_in_the_middle():
    image = Image.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))
    cropped = np.asarray(crop_and_resize(image, 20))
    assert cropped.shape == (20, 20, 3) and cropped.min() == 255
    assert crop_and_resize(Image.new("RGB", (13, 7)), 256).size == (256, 256)


def test_a_transformers_clip_is_read_like_its_own_processor(tmp_path):
    """Same embedding as transformers' CLIPModel with its image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from demo.tiny import train_text_tokenizer

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = train_text_tokenizer(["a red dog"], vocabulary_size=300)
    config = CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        text_config={**vision, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    images = [picture(0, size=(90, 50)), picture(1, size=(48, 77))]
    with torch.no_grad():
        found = model.get_image_features(**processor(images, return_tensors="pt"))
    wanted = found if isinstance(found, torch.Tensor) else found.pooler_output
    ours = ClipFeatures(tmp_path).images(images)
    cosine = (
        (ours * wanted.double().numpy()).sum(1)
        / np.linalg.norm(ours, axis=1)
        / np.linalg.norm(wanted, axis=1)
    )
    assert cosine.min() > 0.9999


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    from evaluation.inception import new_inception

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(new_inception().state_dict(), path)
    return path


def test_the_inception_has_the_published_shape_and_pools_at_the_end(inception_file):
    from evaluation.inception import InceptionFeatures

    extractor = InceptionFeatures(inception_file)
    shapes = {name: tuple(value.shape) for name, value in extractor.net.state_dict().items()}
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert shapes["Mixed_6c.branch7x7_1.conv.weight"] == (160, 768, 1, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["fc.weight"] == (1008, 2048)
    assert sum(value.numel() for value in extractor.net.parameters()) == 23_850_960
    features = extractor.images([picture(0)])
    assert features.shape == (1, 2048) and np.isfinite(features).all()
    assert extractor.identity["resize"] == "pytorch_fid"


def test_padding_is_left_out_of_averages_and_the_last_block_pools_the_maximum():
    from evaluation.inception import BlockE, _pool

    assert _pool(torch.ones(1, 1, 3, 3)).eq(1).all()
    torch.manual_seed(0)
    block = BlockE(8, is_last=True).eval()
    other = BlockE(8, is_last=False).eval()
    other.load_state_dict(block.state_dict())
    x = torch.randn(1, 8, 5, 5)
    same = [torch.equal(a, b) for a, b in zip(block(x).split([1856, 192], 1), other(x).split([1856, 192], 1))]
    assert same == [True, False]
    maximum = torch.nn.functional.max_pool2d(x, kernel_size=3, stride=1, padding=1)
    assert torch.equal(block(x)[:, 1856:], block.branch_pool(maximum))


def test_the_resize_mode_changes_features_and_other_weights_are_refused(inception_file, tmp_path):
    from evaluation.inception import InceptionFeatures

    image = [picture(3, size=(300, 200))]
    a = InceptionFeatures(inception_file, resize_mode="clean_fid").images(image)
    b = InceptionFeatures(inception_file, resize_mode="torch_fidelity").images(image)
    assert np.abs(a - b).max() > 0
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the FID Inception"):
        InceptionFeatures(tmp_path / "other.pth")
    with pytest.raises(UserError, match="not found"):
        InceptionFeatures(tmp_path / "none.pth")


def test_reference_statistics_are_read_without_pickle(tmp_path):
    from evaluation.benchmarks.coco_generation import _read_stats

    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    mean, covariance = _read_stats(tmp_path / "stats.npz")
    assert mean.shape == (3,) and covariance.shape == (3, 3)
    np.savez(tmp_path / "bad.npz", mu=np.array([object()], dtype=object), sigma=np.eye(3))
    with pytest.raises(ValueError, match="allow_pickle"):
        _read_stats(tmp_path / "bad.npz")
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    with pytest.raises(UserError, match="has no sigma"):
        _read_stats(tmp_path / "half.npz")


def test_java_metrics_say_what_is_missing(monkeypatch):
    from evaluation.metrics import java

    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="METEOR needs Java"):
        java.java_scores({"1": "a dog"}, {"1": ["a dog"]})


@pytest.mark.slow
def test_meteor_runs_where_java_and_pycocoevalcap_are_installed():
    """Java reads a 62 MB table first."""
    from evaluation.metrics import java

    if java.shutil.which("java") is None:
        pytest.skip("no Java")
    same = {"1": "a dog sits on a chair", "2": "a red bus"}
    references = {id: [text, text] for id, text in same.items()}
    assert java.java_scores(same, references)["METEOR"] > 0.9
    assert java.java_scores(same, {"1": ["x y"], "2": ["z"]})["METEOR"] < 0.1


@pytest.mark.slow
def test_meteor_of_real_captions_equals_the_official_run():
    from evaluation.metrics import java
    from tests.helpers import metric_golden

    if java.shutil.which("java") is None:
        pytest.skip("needs java")
    golden = metric_golden.load("captions_coco80")
    ids = [str(id) for id in golden["inputs"]["image_ids"]]
    captions = dict(zip(ids, golden["inputs"]["hypotheses"]))
    references = dict(zip(ids, golden["inputs"]["references"]))
    expected = golden["expected"]["scores"]["METEOR"]["corpus"]
    assert java.java_scores(captions, references)["METEOR"] == pytest.approx(expected, abs=1e-9)
