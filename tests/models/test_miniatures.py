"""A miniature of every component goes through the whole life: load, train, export, reload, generate, draw."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPImageProcessor

from tests.helpers import miniatures as mini
from tests.helpers import tiny_diffusion_parts as tiny
from tests.helpers.batches import pack, random_document
from vlgpt import hf  # noqa: F401 - registers our classes
from vlgpt import settings as s
from vlgpt.batch import ConditionBatch, ImageInput
from vlgpt.decoding.api import DecodeSettings, Prompt
from vlgpt.decoding.generator import Generator
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.export import export_model
from vlgpt.models.conditions import load_conditioner
from vlgpt.models.diffusion import DiffusionDecoder
from vlgpt.models.encoders import OpenClipEncoder, TransformersClipEncoder, load_clip
from vlgpt.models.language_models import load_language_model
from vlgpt.stages.base import parameter_groups
from vlgpt.stages.language import LanguageStage
from vlgpt.stages.tokenizer import ImageTokenizerStage

NUM_VISUAL, VISUAL_WIDTH, NUM_STEPS = 4, 32, 20
ENCODERS = {
    "clip": ("transformers", mini.write_clip),
    "clip tower": ("transformers", lambda folder: mini.write_clip(folder, is_tower=True)),
    "siglip": ("transformers", mini.write_siglip),
    "open_clip": ("open_clip", lambda folder: mini.write_open_clip(folder, mini.OPEN_CLIP)),
    "open_clip siglip": ("open_clip", lambda folder: mini.write_open_clip(folder, mini.OPEN_SIGLIP)),
}
DECODERS = {
    "sd15 bin": {},
    "sd15 safetensors, 257x1280": {"suffix": ".safetensors", "reading": "features"},
    "sdxl": {"is_sdxl": True, "suffix": ".safetensors"},
}
LIVES = [  # image encoder, decoder, language model, what is trained
    ("clip", "sd15 bin", "llama-1", {"trained": "lora"}),
    ("open_clip", "sd15 safetensors, 257x1280", "llama-2", {"trained": "lora", "frozen": ("token_rows",)}),
    ("siglip", "sdxl", "llama-3", {"trained": "lora"}),
    ("clip tower", "sd15 bin", "qwen-2.5", {"trained": "all", "frozen": ("embeddings",)}),
    ("open_clip siglip", "sd15 bin", "mistral", {"trained": "lora"}),
    ("clip", "sdxl", "qwen-2.5-7b", {"trained": "all"}),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Folders of all miniatures, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("shelf")

    def place(kind: str, name: str):
        folder = root / f"{kind} {name}"
        if not folder.exists():
            if kind == "encoder":
                ENCODERS[name][1](folder)
            elif kind == "decoder":
                mini.write_diffusion(folder, **DECODERS[name])
            else:
                mini.write_language_model(folder, name)
        return folder

    return place


def encoder_settings(shelf, name):
    return s.EncoderSettings(path=str(shelf("encoder", name)), library=ENCODERS[name][0])


def pixels(count, seed=0, size=mini.SIZE_PX):
    return tiny.normals(count, 3, size, size, seed=seed).clamp(-1, 1)


def train(stage, batch, *, num_steps=NUM_STEPS, lr=5e-3):
    """A plain loop; returns the losses."""
    optimizer = torch.optim.AdamW(parameter_groups(stage.train(), 0.0), lr=lr)
    losses = []
    for _ in range(num_steps):
        terms, counts = stage(batch), stage.count_targets(batch)
        loss = sum(terms[name].total / counts[name] for name in stage.terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train_image_parts(shelf, encoder_name, decoder_name, folder, **options):
    """Stage 1 on pixels and captions: targets come from the decoder's own encoders."""
    conditioner = s.EncoderSettings(
        path=str(shelf("decoder", decoder_name) / "diffusion.json"), library="ip_adapter"
    )
    encoder = encoder_settings(shelf, encoder_name)
    loaded = load_clip(encoder.path, library=encoder.library)
    targets = load_conditioner(conditioner.path, library=conditioner.library)
    with torch.no_grad():
        num_patches, patch_width = loaded.patches(pixels(1)).shape[1:]
        (image_tokens, image_width), (text_tokens, text_width) = (
            targets.image_condition(pixels(1)).shape[1:],
            targets.text_condition(["a"]).shape[1:],
        )
    shapes = s.ConditionShapes(
        num_patches=num_patches, patch_width=patch_width, image_tokens=image_tokens,
        image_width=image_width, text_tokens=text_tokens, text_width=text_width,
    )  # fmt: skip
    part = s.TransformerSettings(width=32, depth=2, num_heads=4, init_std=1.0)
    settings = s.TokenizerStageSettings(
        kind="image_tokenizer", shapes=shapes, num_visual=NUM_VISUAL, visual_width=VISUAL_WIDTH,
        tokenizer=part, detokenizer=part, encoder=encoder, conditioner=conditioner, **options,
    )  # fmt: skip
    torch.manual_seed(5)
    stage = ImageTokenizerStage.build(settings, num_sources=1)
    count = 6
    batch = ConditionBatch(
        documents=tuple("abcdef"),
        source_ids=torch.zeros(count, dtype=torch.int16),
        is_valid=torch.ones(count, dtype=torch.bool),
        has_text=torch.ones(count, dtype=torch.bool),
        captions=("a cat", "a dog", "", "a fox in a hat", "two", "x"),
        pixels=pixels(count),
    )
    stage.prepare([batch], lambda x: x)
    losses = train(stage, batch)
    stage.finish([batch], lambda x: x)
    stage.save(folder)
    return stage, losses


@pytest.mark.parametrize(
    "encoder, decoder, language, policy", LIVES, ids=[f"{e}-{d}-{m}" for e, d, m, _ in LIVES]
)
def test_a_miniature_lives_from_loading_to_drawing(shelf, tmp_path, encoder, decoder, language, policy):
    _, losses = train_image_parts(shelf, encoder, decoder, tmp_path / "stage1")
    assert losses[-1] < 0.9 * losses[0]
    settings = s.LanguageStageSettings(
        kind="language", language_model=str(shelf("language", language)), template="short",
        image_tokenizer=str(tmp_path / "stage1"), encoder=encoder_settings(shelf, encoder),
        lora=s.LoraSettings(rank=4, alpha=8.0, dropout=0.0), **policy,
    )  # fmt: skip
    torch.manual_seed(6)
    stage = LanguageStage.build(settings, num_sources=2)
    tokenizer = stage.document_tokenizer
    batch = pack([[random_document(n, num_images=2) for n in (row, row + 3)] for row in range(2)], tokenizer)
    batch = dataclasses.replace(batch, images=ImageInput("pixels", pixels(len(batch.images))))
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    losses = train(stage, batch)
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, tensor in stage.state_dict().items() if not torch.equal(tensor, before[name])}
    named = stage.named_parameters(remove_duplicate=False)
    assert moved and moved == {name for name, p in named if p.requires_grad}
    words = {"token_rows": "trainable_tokens", "embeddings": "embed_tokens.weight"}
    for part in words:
        is_moved = any(words[part] in name for name in moved)
        is_meant = part == ("token_rows" if policy["trained"] == "lora" else "embeddings")
        assert is_moved == (is_meant and part not in policy.get("frozen", ()))

    export_model(
        stage.model, tmp_path / "export", tokenizer=tokenizer, merge_lora=False,
        encoder=settings.encoder.model_dump(), picture_decoder=shelf("decoder", decoder),
    )  # fmt: skip
    stage.eval()
    prompt = Prompt(Document("p", "", (TextPart("red fox"), ImagePart(0))), (picture(),))
    generator = Generator.load(tmp_path / "export")
    with torch.no_grad():
        wanted = stage.model.lm.logits(stage.model.lm.hidden_states(batch, stage.visual_of(batch.images)))
        visual = generator.model.image_tokenizer.encode(generator.encoder.patches(batch.images.values))
        found = generator.model.lm.logits(generator.model.lm.hidden_states(batch, visual))
    assert torch.equal(found, wanted), "logits after export and reload"
    (reply,) = generator.generate([prompt], DecodeSettings(max_new_tokens=4, images="force"))
    (drawn,) = generator.draw(reply.visual[0][None], seeds=[(0, "x")], guidance=3.0)
    assert reply.visual[0].shape == (NUM_VISUAL, VISUAL_WIDTH) and drawn.size == (16, 16)
    assert generator.reconstruct([picture()], use="image")[0].size == (16, 16)
    reloaded = AutoModel.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(tensor, stage.model.state_dict()[name]) for name, tensor in reloaded.items())


def picture():
    values = torch.randint(0, 255, (40, 30, 3), generator=torch.Generator().manual_seed(1))
    return Image.fromarray(values.to(torch.uint8).numpy())


def test_the_same_tower_gives_the_same_patches_with_and_without_its_text_tower(shelf, tmp_path):
    whole = TransformersClipEncoder(shelf("encoder", "clip"), layer=-2)
    whole.model.vision_model.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    alone = TransformersClipEncoder(tmp_path, layer=2)
    assert torch.equal(whole.patches(pixels(2)), alone.patches(pixels(2)))
    with pytest.raises(UserError, match="image tower alone"):
        alone.text_states(["a"])


def test_layers_count_alike_in_both_libraries(shelf):
    for name, (library, _) in ENCODERS.items():
        folder = shelf("encoder", name)
        clips = {n: load_clip(folder, library=library, layer=n) for n in (-2, -1)}
        depth = {"open_clip siglip": 6}.get(name, 3)
        last = load_clip(folder, library=library, layer=depth, has_cls=False)
        found = {n: clip.patches(pixels(1)) for n, clip in clips.items()}
        without = last.patches(pixels(1))
        assert torch.equal(found[-1][:, -without.shape[1] :], without)
        assert not torch.allclose(found[-1], found[-2])
        for wrong in (0, depth + 1, -depth - 1):
            with pytest.raises(UserError, match=f"layer {wrong} of .* has {depth} layers"):
                load_clip(folder, library=library, layer=wrong)


def test_constants_are_made_once_and_read_by_the_decoder(shelf):
    folder = shelf("decoder", "sd15 bin")
    conditioner = load_conditioner(folder / "diffusion.json", library="ip_adapter")
    file = folder / "unconditional.safetensors"
    decoder = DiffusionDecoder.load(
        folder / "pipeline", adapter=folder / "adapter.bin", unconditional=file, num_steps=2
    )
    assert torch.allclose(decoder.absent_image, conditioner.image.unconditional(), atol=1e-6)
    assert torch.allclose(decoder.absent_text, conditioner.text_condition([""])[0], atol=1e-6)
    written = file.stat().st_mtime_ns
    load_conditioner(folder / "diffusion.json", library="ip_adapter")
    assert file.stat().st_mtime_ns == written


# ----------------------------------------------------------------------------------------------------- wrong layouts


def assert_one_line(action, *words):
    """The action fails with a UserError of one line that holds the words."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("how", ["drop", "reshape"])
@pytest.mark.parametrize("name", ["llama-1", "qwen-2.5"])
def test_a_language_model_that_lacks_a_tensor_is_refused(tmp_path, name, how):
    mini.write_language_model(tmp_path, name)
    changed = mini.change_tensor(sorted(tmp_path.glob("model-*"))[-1], **{how: "layers.1.mlp"})
    assert_one_line(lambda: load_language_model(tmp_path), "no language model could be loaded", changed)


def test_a_truncated_shard_is_refused(tmp_path):
    mini.write_language_model(tmp_path, "mistral")
    shard = sorted(tmp_path.glob("model-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert_one_line(lambda: load_language_model(tmp_path), "no language model could be loaded")


def test_the_tokenizer_of_another_model_is_refused(shelf, tmp_path):
    train_image_parts(shelf, "clip", "sd15 bin", tmp_path / "stage1")
    from tests.helpers.tiny_unified import train_text_tokenizer

    train_text_tokenizer(["many other words " * 9, "éàü"] * 3, vocabulary_size=300).save_pretrained(
        tmp_path / "few"
    )
    words = [f"w{i}" for i in range(200)]
    many = mini.PreTrainedTokenizerFast.from_pretrained(shelf("language", "mistral"))
    many.add_tokens(words)
    many.save_pretrained(tmp_path / "many")
    settings = s.LanguageStageSettings(
        kind="language", language_model=str(shelf("language", "mistral")), template="short",
        image_tokenizer=str(tmp_path / "stage1"), text_tokenizer=str(tmp_path / "many"),
    )  # fmt: skip
    assert_one_line(
        lambda: LanguageStage.build(settings, num_sources=1), "400 token rows", "do not belong together"
    )
    settings = settings.model_copy(update={"image_tokenizer": str(tmp_path / "nowhere")})
    assert_one_line(lambda: LanguageStage.build(settings, num_sources=1), "nowhere", "config.json")


@pytest.mark.parametrize(
    "name, file", [("clip", "model"), ("siglip", "model"), ("open_clip", "open_clip_model")]
)
@pytest.mark.parametrize("how", ["drop", "reshape"])
def test_an_encoder_that_lacks_a_tensor_is_refused(tmp_path, name, file, how):
    ENCODERS[name][1](tmp_path / "clip")
    changed = mini.change_tensor(tmp_path / "clip" / f"{file}.safetensors", **{how: "mlp"})
    assert_one_line(
        lambda: load_clip(tmp_path / "clip", library=ENCODERS[name][0]), "could not load", changed
    )


def test_an_open_clip_model_is_never_left_random(tmp_path):
    mini.write_open_clip(tmp_path / "clip", mini.OPEN_CLIP)
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    assert_one_line(lambda: OpenClipEncoder(tmp_path / "clip"), "could not load")
    assert_one_line(lambda: OpenClipEncoder("ViT-B-32"), "ViT-B-32", "`pretrained`")
    assert_one_line(lambda: OpenClipEncoder("ViT-B-32", pretrained="no_such_tag"), "no_such_tag")
    assert_one_line(lambda: OpenClipEncoder("ViT-Z-99", pretrained="x"), "ViT-Z-99")


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("how", ["drop", "reshape"])
def test_a_decoder_that_lacks_a_tensor_is_refused(tmp_path, part, how):
    mini.write_diffusion(tmp_path)
    file = tmp_path / "pipeline" / part / "diffusion_pytorch_model.safetensors"
    changed = mini.change_tensor(file, **{how: "conv1.weight"})
    load_conditioner(tmp_path / "diffusion.json", library="ip_adapter")
    parts = {"adapter": tmp_path / "adapter.bin", "unconditional": tmp_path / "unconditional.safetensors"}
    assert_one_line(
        lambda: DiffusionDecoder.load(tmp_path / "pipeline", **parts), f"pipeline/{part}", changed
    )


@pytest.mark.parametrize("part", ["pipeline/text_encoder", "image_encoder"])
def test_a_conditioner_that_lacks_a_tensor_is_refused(tmp_path, part):
    mini.write_diffusion(tmp_path)
    changed = mini.change_tensor(tmp_path / part / "model.safetensors", drop="mlp")
    assert_one_line(
        lambda: load_conditioner(tmp_path / "diffusion.json", library="ip_adapter"), part, changed
    )


def test_a_bad_description_of_a_decoder_is_refused(tmp_path):
    description = mini.write_diffusion(tmp_path)
    parts = json.loads(description.read_text())

    def load(**changes):
        description.write_text(json.dumps({k: v for k, v in {**parts, **changes}.items() if v is not None}))
        load_conditioner(description, library="ip_adapter")

    assert_one_line(lambda: load(adapter=None), "lacks 'adapter'")
    assert_one_line(lambda: load(image_encoder=None), "lacks 'image_encoder'")
    assert_one_line(lambda: load(vea="x"), "unknown key 'vea'")
    assert_one_line(lambda: load(adapter="nowhere.bin"), "nowhere.bin")
    description.write_text("{")
    assert_one_line(lambda: load_conditioner(description, library="ip_adapter"), "not valid JSON")


def test_a_start_of_another_size_is_refused_and_a_frozen_start_stays(shelf, tmp_path):
    train_image_parts(shelf, "clip", "sd15 bin", tmp_path / "a")
    start = {"tokenizer_from": str(tmp_path / "a")}
    assert_one_line(
        lambda: train_image_parts(shelf, "open_clip siglip", "sd15 bin", tmp_path / "b", **start),
        "does not fit ImageTokenizer", "context_positions",
    )  # fmt: skip
    start["frozen"] = ("tokenizer",)
    _, losses = train_image_parts(shelf, "clip", "sd15 bin", tmp_path / "c", **start)
    assert losses[-1] < losses[0]
    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / n / "image_tokenizer/model.safetensors") for n in ("a", "c"))
    assert all(torch.equal(first[name], second[name]) for name in first)
