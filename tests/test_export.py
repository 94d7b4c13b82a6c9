"""Laws of exports: what is loaded is what was trained, bit by bit, by us and by transformers alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, LogitsProcessor, LogitsProcessorList, StoppingCriteria

from demo.decoder import ConvDecoder
from demo.tiny import save_language_model, train_text_tokenizer
from tests.helpers.chat_parts import save_parts
from tests.helpers.tiny_unified import NUM_VISUAL, TEXTS, VISUAL_WIDTH, new_document_tokenizer, new_model
from vlgpt import commits, hf
from vlgpt.config import dump
from vlgpt.decoding.api import DecodeSettings, Prompt
from vlgpt.decoding.generator import Generator
from vlgpt.decoding.load import cast_parameters
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.export import export_model
from vlgpt.models.encoders import load_clip
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.unified import UnifiedModel, is_export
from vlgpt.models.weights import tensors_of, write_weights
from vlgpt.settings import LanguageStageSettings, LoraSettings, RunSettings
from vlgpt.stages.language import LanguageStage, dtype_of, export_run

CHAT = Document("c", "test", (ImagePart(0, "user"), TextPart("what is in the picture", "user")))
PLAIN = Document("d", "test", (TextPart("an image of three elephants."),))


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A CLIP of 5 tokens (CLS and 4 patches) and a picture decoder that fit `trained`."""
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    return folder


def trained(tokenizer, *, tied: bool = False, has_lora: bool = False, seed: int = 0) -> UnifiedModel:
    model = new_model(tokenizer, seed=seed, num_patches=5, tied=tied, image_wish=3.0)
    if has_lora:
        model.lm.add_lora(LoraSettings(rank=4, alpha=8.0), [tokenizer.begin_image_id, tokenizer.end_image_id])
        with torch.no_grad():
            for name, parameter in model.lm.named_parameters():
                if "lora_" in name or "trainable_tokens" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def outputs(model: UnifiedModel | hf.VLGPTForConditionalGeneration) -> list[torch.Tensor]:
    ids = torch.arange(40).reshape(2, 20)
    is_visual = torch.zeros(2, 20, dtype=torch.bool)
    is_visual[0, 3 : 3 + NUM_VISUAL] = True
    patches = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(3))
    visual = model.image_tokenizer.encode(patches)
    lm = model.lm
    hidden = lm.backbone(inputs_embeds=lm.embed(ids, is_visual, visual), use_cache=False).last_hidden_state
    return [lm.logits(hidden), lm.regression_head(hidden), *model.conditions_of(visual)]


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", ["none", "kept"])
def test_an_export_gives_the_same_logits_bit_by_bit(tied, lora, tmp_path):
    tokenizer = new_document_tokenizer(template="chatml")
    model = trained(tokenizer, tied=tied, has_lora=lora == "kept")
    wanted = outputs(model)
    export_model(model, tmp_path, tokenizer=tokenizer, merge_lora=False)
    assert is_export(tmp_path)
    assert_equal(outputs(UnifiedModel.from_folder(tmp_path)), wanted)
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path)), wanted)
    generator = Generator.load(tmp_path)
    assert generator.tokenizer.template_name == "chatml"
    assert generator.tokenizer.fingerprint == tokenizer.fingerprint
    assert generator.tokenizer.begin_image_id == tokenizer.begin_image_id


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", [hf.CACHE, "past_key_values"])
def test_the_cache_of_transformers_goes_in_and_comes_out_under_its_name(tmp_path, name):
    tokenizer = new_document_tokenizer()
    export_model(trained(tokenizer), tmp_path, tokenizer=tokenizer)
    model = AutoModel.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer.encode_text("the quick brown fox jumps")])
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :3], use_cache=True)
    later = model(input_ids=ids[:, 3:], **{name: first[hf.CACHE]})
    torch.testing.assert_close(later.logits, whole[:, 3:])


@pytest.mark.parametrize("tied", [False, True])
def test_merging_equals_peft_and_leaves_the_trained_model_as_it_was(tied, tmp_path):
    tokenizer = new_document_tokenizer()
    model = trained(tokenizer, tied=tied, has_lora=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apart = outputs(model)
    export_model(model, tmp_path, tokenizer=tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merged = outputs(UnifiedModel.from_folder(tmp_path))
    for found, wanted in zip(merged, apart):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    model.lm.language_model = model.lm.language_model.merge_and_unload()
    assert_equal(merged, outputs(model.eval()))
    assert not any(
        "lora" in name or "base_layer" in name for name in load_file(tmp_path / "model.safetensors")
    )


def test_adapters_are_merged_with_one_rounding():
    """A 16-bit weight and an fp32 adapter are added in fp32; rounding the adapter first loses half its last bits."""
    model = trained(new_document_tokenizer(), has_lora=True)
    layers = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16()
            layers[name.replace(".base_model.model", "", 1)] = layer
    merged = tensors_of(model, merge_lora=True)
    assert len(layers) > 10
    for name, layer in layers.items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        exact = layer.base_layer.weight.float() + layer.scaling["default"] * (up @ down)
        assert torch.equal(merged[f"{name}.weight"].make(), exact.bfloat16()), name


@pytest.mark.parametrize("tied", [False, True])
def test_shards_with_an_index_load_like_one_file(tied, tmp_path):
    tokenizer = new_document_tokenizer()
    model = trained(tokenizer, tied=tied)
    export_model(model, tmp_path, tokenizer=tokenizer)
    (tmp_path / "model.safetensors").unlink()
    tensors = tensors_of(model, merge_lora=True)
    write_weights(tensors, tmp_path, max_shard_bytes=100_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 130_000 for path in shards)
    assert_equal(outputs(UnifiedModel.from_folder(tmp_path)), outputs(model))
    assert_equal(outputs(AutoModel.from_pretrained(tmp_path)), outputs(model))
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        UnifiedModel.from_folder(tmp_path)


def test_an_export_carries_encoder_decoder_and_card(parts, tmp_path):
    tokenizer = new_document_tokenizer()
    model = trained(tokenizer)
    export_model(
        model,
        tmp_path / "export",
        tokenizer=tokenizer,
        encoder={"path": str(parts / "clip"), "library": "open_clip", "layer": -2, "has_cls": True},
        picture_decoder=parts / "decoder",
        card={
            "name": "tiny",
            "sources": ["emoji-pairs"],
            "attribution": ["A picture by somebody."],
            "results": {"x": 1.5},
        },
    )
    moved = tmp_path / "moved"
    (tmp_path / "export").rename(moved)
    here = Generator(
        model=model,
        tokenizer=tokenizer,
        encoder=load_clip(parts / "clip"),
        decoder=ConvDecoder.from_folder(parts / "decoder").eval(),
    )
    there = Generator.load(moved)
    prompt = Prompt(CHAT, (picture(1),))
    for settings in (DecodeSettings(max_new_tokens=12), DecodeSettings(images="force", visual_guidance=2.0)):
        a, b = here.generate([prompt], settings)[0], there.generate([prompt], settings)[0]
        assert a.token_ids == b.token_ids
        assert all(torch.equal(x, y) for x, y in zip(a.visual, b.visual))
    seeds = [("a", 1), ("b", 2)]
    visual = here.tokenize([picture(1), picture(2, (24, 24))])
    assert visual.shape == (2, NUM_VISUAL, VISUAL_WIDTH)
    for use in ("both", "image", "text"):
        drawn = [g.draw(visual, seeds=seeds, use=use) for g in (here, there)]
        assert [p.tobytes() for p in drawn[0]] == [p.tobytes() for p in drawn[1]]
        assert drawn[0][0].size == (24, 24)
    assert here.reconstruct([picture(1)])[0].tobytes() == there.draw(visual[:1], seeds=seeds[:1])[0].tobytes()
    card = (moved / "README.md").read_text()
    for words in ("A picture by somebody.", "| x | 1.5 |", "emoji-pairs"):
        assert words in card
    assert str(parts) not in (moved / "config.json").read_text()


def test_a_diffusion_decoder_is_carried_by_its_description(tmp_path):
    tokenizer = new_document_tokenizer()
    source = tmp_path / "sd"
    (source / "pipeline").mkdir(parents=True)
    (source / "pipeline" / "model_index.json").write_text("{}")
    (source / "adapter.safetensors").write_bytes(b"x")
    description = {
        "pipeline": "pipeline",
        "adapter": "adapter.safetensors",
        "unconditional": "hub/constants",
        "num_steps": 7,
    }
    (source / "diffusion.json").write_text(json.dumps(description))
    export_model(trained(tokenizer), tmp_path / "e", tokenizer=tokenizer, picture_decoder=source)
    record = json.loads((tmp_path / "e" / "config.json").read_text())["picture_decoder"]
    assert record == {
        "kind": "diffusion",
        "pipeline": "picture_decoder/pipeline",
        "adapter": "picture_decoder/adapter.safetensors",
        "unconditional": "hub/constants",
        "num_steps": 7,
        "guidance": 7.5,  # what the file does not say is written out: whoever loads the export draws alike
        "image_scale": 1.0,
    }
    assert (tmp_path / "e" / record["adapter"]).read_bytes() == b"x"
    with pytest.raises(UserError, match=r"diffusion\.json"):
        export_model(trained(tokenizer), tmp_path / "f", tokenizer=tokenizer, picture_decoder=tmp_path)
    assert not is_export(tmp_path / "f")


@pytest.fixture(scope="module")
def export(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tokenizer = new_document_tokenizer()
    export_model(
        trained(tokenizer),
        folder,
        tokenizer=tokenizer,
        encoder={"path": str(parts / "clip"), "library": "open_clip"},
    )
    return folder


def test_transformers_generate_gives_the_replies_of_the_generator(export):
    generator = Generator.load(export)
    model, processor = AutoModel.from_pretrained(export), AutoProcessor.from_pretrained(export)
    assert isinstance(model, hf.VLGPTForConditionalGeneration)
    assert isinstance(processor, hf.VLGPTProcessor)
    images = [picture(5)]
    inputs = processor([CHAT, PLAIN], images=images)
    assert inputs["pixel_values"].shape == (1, 3, 24, 24)
    prompts = [Prompt(CHAT, (images[0],)), Prompt(PLAIN)]
    cases = [
        ({}, DecodeSettings(max_new_tokens=12, max_images=1)),
        (
            {"max_images": 2, "visual_guidance": 2.0},
            DecodeSettings(max_new_tokens=12, max_images=2, visual_guidance=2.0),
        ),
        (
            {"num_beams": 3, "length_penalty": -1.0},
            DecodeSettings(max_new_tokens=12, num_beams=3, length_penalty=-1.0),
        ),
        ({"images": "force"}, DecodeSettings(images="force")),
        (
            {"images": "never", "min_new_tokens": 5},
            DecodeSettings(max_new_tokens=12, images="never", min_new_tokens=5),
        ),
    ]
    for arguments, settings in cases:
        found = model.generate(**inputs, max_new_tokens=12, **arguments)
        width = inputs["input_ids"].shape[1]
        for row, reply in enumerate(generator.generate(prompts, settings)):
            start = int(inputs["attention_mask"][row].sum())
            assert found.sequences[row, start : start + len(reply.token_ids)].tolist() == list(
                reply.token_ids
            )
            assert len(found.visual[row]) == len(reply.visual)
            for a, b in zip(found.visual[row], reply.visual):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
            kept = inputs["input_ids"][row, width - start :]
            assert torch.equal(found.sequences[row, :start], kept)
            assert processor.decode(reply.token_ids) == reply.text
    ids = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=False)
    assert isinstance(ids, torch.Tensor)


def test_transformers_processors_criteria_and_streamers_take_part(export):
    model, processor = AutoModel.from_pretrained(export), AutoProcessor.from_pretrained(export)
    inputs = processor([PLAIN])
    free = model.generate(**inputs, max_new_tokens=8, images="never").sequences[0].tolist()
    length = inputs["input_ids"].shape[1]

    class Favour(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert input_ids.shape[0] == scores.shape[0] == 1
            scores = scores.clone()
            scores[:, 7 + input_ids.shape[1] - length] += 100
            return scores

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] - length >= 4])

    class Collect:
        def __init__(self):
            self.tokens, self.is_ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.is_ended = True

    collect = Collect()
    pushed = model.generate(
        **inputs,
        max_new_tokens=8,
        images="never",
        logits_processor=LogitsProcessorList([Favour()]),
        stopping_criteria=[After()],
        streamer=collect,
    )
    assert pushed.sequences[0, length:].tolist() == [7, 8, 9, 10] == collect.tokens
    assert collect.is_ended
    banned = model.generate(**inputs, max_new_tokens=8, images="never", bad_words_ids=[[free[length]]])
    assert free[length] not in banned.sequences[0, length:].tolist()
    sampled = [
        model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=2.0, seed=seed).sequences
        for seed in (0, 0, 1)
    ]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


def test_forward_with_images_equals_our_own_and_counts_them(export):
    model, processor = AutoModel.from_pretrained(export), AutoProcessor.from_pretrained(export)
    inputs = processor([CHAT], images=[picture(5)])
    generator = Generator.load(export)
    with torch.no_grad():
        found = model(**inputs)
        visual = generator.tokenize([picture(5)])
        lm = generator.model.lm
        is_visual = model.visual_positions(inputs["input_ids"])
        hidden = lm.backbone(inputs_embeds=lm.embed(inputs["input_ids"], is_visual, visual), use_cache=False)
        assert torch.equal(found.logits, lm.logits(hidden.last_hidden_state))
    with pytest.raises(UserError, match="2 images"):
        model(inputs["input_ids"], visual=torch.zeros(2, NUM_VISUAL, VISUAL_WIDTH))
    with pytest.raises(UserError, match="images"):
        processor([CHAT])


def test_a_wrong_folder_gives_one_clear_error(export, tmp_path):
    with pytest.raises(UserError, match="no export"):
        Generator.load(tmp_path)
    tokenizer = new_document_tokenizer()
    export_model(trained(tokenizer), tmp_path, tokenizer=tokenizer)
    state = load_file(tmp_path / "model.safetensors")
    name = "lm.regression_head.layers.weight"
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"missing {name}"):
        Generator.load(tmp_path)
    save_file({**state, name: state[name][:, :3].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="shape"):
        Generator.load(tmp_path)


def test_bfloat16_language_models_keep_their_image_parts_exact(export):
    generator = Generator.load(export, dtype=torch.bfloat16)
    exact = Generator.load(export)
    assert next(generator.model.lm.parameters()).dtype == torch.bfloat16
    assert torch.equal(generator.tokenize([picture(5)]), exact.tokenize([picture(5)]))
    reply = generator.generate([Prompt(CHAT, (picture(5),))], DecodeSettings(images="force"))[0]
    wanted = exact.generate([Prompt(CHAT, (picture(5),))], DecodeSettings(images="force"))[0]
    assert reply.visual[0].dtype == torch.float32
    torch.testing.assert_close(reply.visual[0], wanted.visual[0], atol=0.15, rtol=0.1)
    assert generator.rank(Prompt(PLAIN), TEXTS[0].split()).shape == (len(TEXTS[0].split()),)


def write_run(folder: Path, parts: Path, *, trained_parts: str = "lora") -> LanguageStage:
    """A language run with two commits, as the training loop leaves them; returns the stage of the newest one."""
    save_language_model(
        folder / "base", train_text_tokenizer(TEXTS * 4, vocabulary_size=400), width=64, depth=2
    )
    tokenizer = new_document_tokenizer()
    model = trained(tokenizer)
    model.image_tokenizer.save(folder / "stage1" / "image_tokenizer")
    model.image_detokenizer.save(folder / "stage1" / "image_detokenizer")
    settings = RunSettings.model_validate(
        {
            "name": "tiny run",
            "output_dir": str(folder / "run"),
            "stage": {
                "kind": "language",
                "language_model": str(folder / "base"),
                "image_tokenizer": str(folder / "stage1"),
                "template": "short",
                "trained": trained_parts,
                "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0},
                "encoder": {"path": str(parts / "clip")},
                "picture_decoder": str(parts / "decoder"),
            },
            "data": {"sources": ({"name": "noto pairs", "path": "somewhere"},)},
            "steps": 20,
            "global_batch": 2,
            "micro_batch": 2,
        }
    )
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump(settings))
    assert isinstance(settings.stage, LanguageStageSettings)
    torch.manual_seed(0)
    stage = LanguageStage.build(settings.stage, num_sources=1, dtype=dtype_of(settings))
    for step in (10, 20):
        checkpoint = run / "checkpoints" / commits.tag_of(step)
        checkpoint.mkdir(parents=True)
        with torch.no_grad():
            for _, parameter in stage.trainable():
                parameter.add_(0.1 * torch.randn_like(parameter))
        weights = {name: parameter.detach().clone() for name, parameter in stage.trainable()}
        buffers = {"model.lm.visual_scale": stage.model.lm.visual_scale.clone()}
        save_file({**weights, **buffers}, checkpoint / "trainable.safetensors")
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "frozen": stage.frozen_hashes()}))
        commits.write_manifest(
            checkpoint, 0, [checkpoint / "trainable.safetensors", checkpoint / "state.json"]
        )
        commits.commit(checkpoint, world_size=1, facts={"step": step})
    torn = run / "checkpoints" / commits.tag_of(30)
    torn.mkdir()
    (torn / "trainable.safetensors").write_bytes(b"torn")
    return stage.eval()


@pytest.mark.parametrize("trained_parts", ["lora", "all"])
def test_the_export_of_a_run_is_its_newest_commit(trained_parts, parts, tmp_path):
    stage = write_run(tmp_path, parts, trained_parts=trained_parts)
    cast_parameters(stage.model.lm, torch.bfloat16)  # as training held them: the run's own result is the same
    kept = tmp_path / "kept"
    export_run(tmp_path / "run", kept, merge_lora=False)
    assert_equal(outputs(UnifiedModel.from_folder(kept)), outputs(stage.model))
    export_run(tmp_path / "run", tmp_path / "merged")
    if stage.model.lm.has_lora:
        stage.model.lm.language_model = stage.model.lm.language_model.merge_and_unload()
    assert_equal(outputs(UnifiedModel.from_folder(tmp_path / "merged")), outputs(stage.model.eval()))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "tiny run" in card and "step_00000020" in card
    assert Generator.load(tmp_path / "merged").reconstruct([picture(1)])[0].size == (24, 24)
    export_run(tmp_path / "run", tmp_path / "merged")  # again, over the old one
    assert not list(tmp_path.glob(".*.partial"))


def test_the_export_of_a_run_refuses_what_would_be_wrong(parts, tmp_path, caplog):
    write_run(tmp_path, parts)
    newest = tmp_path / "run" / "checkpoints" / commits.tag_of(20) / "trainable.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with caplog.at_level("WARNING", "vlgpt"):
        export_run(tmp_path / "run", tmp_path / "export")
    assert "step_00000020 is passed over" in caplog.text
    assert "step_00000010" in (tmp_path / "export" / "README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no export"):
        export_run(tmp_path / "run", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    image_tokenizer = ImageTokenizer.from_folder(tmp_path / "stage1" / "image_tokenizer")
    with torch.no_grad():
        image_tokenizer.output.bias.add_(1)
    image_tokenizer.save(tmp_path / "stage1" / "image_tokenizer")
    with pytest.raises(UserError, match="image_tokenizer"):
        export_run(tmp_path / "run", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        export_run(tmp_path / "nothing", tmp_path / "other")


def test_a_run_in_fp32_takes_an_export_in_bf16_and_the_other_way_round(tmp_path):
    """The language model is held in the run's type, whatever its files hold."""
    tokenizer = new_document_tokenizer()
    for stored, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        model = trained(tokenizer)
        cast_parameters(model.lm, stored)
        export_model(model, tmp_path / str(stored), tokenizer=tokenizer)
        found = UnifiedModel.from_folder(tmp_path / str(stored), dtype=wanted)
        assert {parameter.dtype for parameter in found.lm.parameters()} == {wanted}
        for ours, theirs in zip(outputs(found)[:2], outputs(model)[:2]):
            assert ours.dtype == wanted
            torch.testing.assert_close(ours.float(), theirs.float(), atol=0.2, rtol=0.1)
