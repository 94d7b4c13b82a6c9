"""Stages of real weights beside the same ones on the meta device, for tests of the plan."""

import copy

import torch
from transformers import LlamaConfig

from tests.helpers.batches import pack, random_document
from tests.helpers.tiny_unified import CONDITION_SHAPES, NUM_PATCHES, PATCH_WIDTH, new_document_tokenizer
from vlgpt.batch import to_device
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.language_models import from_configuration
from vlgpt.models.losses import count_targets
from vlgpt.models.multimodal_lm import MultimodalLM
from vlgpt.models.unified import UnifiedModel
from vlgpt.planning.costs import Work, costs_of
from vlgpt.planning.meta import meta_language_model
from vlgpt.settings import LoraSettings
from vlgpt.stages.language import LanguageStage

LENGTH = 128
# Three sizes: (LM width, MLP, depth, heads, key-value heads, image parts' width, depth)
SIZES = {
    "tiny": (64, 96, 2, 4, 4, 32, 2),
    "grouped": (128, 320, 3, 8, 2, 48, 3),
    "small": (256, 688, 4, 8, 8, 96, 4),
}


def image_arguments(width, depth, visual_width, num_visual=4):
    part = {"width": width, "depth": depth, "num_heads": 4, "mlp_ratio": 4.0, "init_std": 1.0}
    shapes = {**CONDITION_SHAPES, "num_patches": NUM_PATCHES, "patch_width": PATCH_WIDTH}
    return {
        **shapes,
        "num_visual": num_visual,
        "visual_width": visual_width,
        "tokenizer": part,
        "detokenizer": part,
    }


def image_parts(values, **options):
    shared = {
        "num_visual": values["num_visual"],
        "visual_width": values["visual_width"],
        **values["tokenizer"],
    }
    tokenizer = ImageTokenizer(
        num_patches=values["num_patches"], patch_width=values["patch_width"], **shared, **options
    )
    names = ("image_tokens", "image_width", "text_tokens", "text_width")
    return tokenizer, ImageDetokenizer(**{name: values[name] for name in names}, **shared, **options)


class Case:
    """A language stage of real weights, and the same one on the meta device, side by side."""

    def __init__(self, size, trained, *, attention="sdpa", config=None, dtype=torch.float32, **options):
        width, mlp, depth, heads, kv, *_ = SIZES[size]
        self.tokenizer = new_document_tokenizer()
        self.config = config or LlamaConfig(
            hidden_size=width, intermediate_size=mlp, num_hidden_layers=depth, num_attention_heads=heads,
            num_key_value_heads=kv, tie_word_embeddings=False, max_position_embeddings=LENGTH,
        )  # fmt: skip
        self.config.vocab_size = self.tokenizer.vocabulary_size
        torch.manual_seed(0)
        arguments = (size, trained, self.tokenizer)
        self.stage = new_stage(from_configuration(self.config, attention), *arguments, **options).to(dtype)
        with torch.device("meta"):
            model = meta_language_model(copy.deepcopy(self.config))
            self.planned = new_stage(model, *arguments, **options).to(dtype)
        rows = [[random_document(10 * r + k, num_images=2) for k in range(3)] for r in range(4)]
        self.batch = to_dtype(pack(rows, self.tokenizer, length=LENGTH), dtype)
        targets = count_targets(self.batch)
        self.work = Work(4, len(self.batch.images), targets["text"], targets["visual"])

    @property
    def cost(self):
        return costs_of(self.planned, length=LENGTH).of(self.work)

    def loss(self):
        terms = self.stage.train()(self.batch)
        return terms["text"].total + terms["visual"].total

    def scores_of_the_future(self, num_passes=3):
        """What eager attention computes of later words, and the plan does not count: half of whole rows."""
        config = self.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = head * config.num_attention_heads
        return num_passes * 2 * self.work.rows * LENGTH**2 * width * config.num_hidden_layers


def new_stage(
    language_model, size, trained, tokenizer, *, dropout=0.0, visual_width=None, head="linear", frozen=()
):
    width, *_, image_width, image_depth = SIZES[size]
    values = image_arguments(image_width, image_depth, visual_width or width)
    lm = MultimodalLM(
        language_model,
        num_tokens=tokenizer.num_tokens,
        num_visual=4,
        visual_width=values["visual_width"],
        head=head,
    )
    if trained == "lora":
        tokens = [tokenizer.begin_image_id, tokenizer.end_image_id]
        lm.add_lora(LoraSettings(rank=8, alpha=8.0, dropout=dropout), tokens)
    lm.freeze_parts(frozen)
    if trained == "head":
        lm.language_model.requires_grad_(False)
    image_tokenizer, detokenizer = image_parts(values)
    model = UnifiedModel(lm=lm, image_tokenizer=image_tokenizer, image_detokenizer=detokenizer)
    return LanguageStage(model=model, num_sources=2)


def to_dtype(batch, dtype):
    return to_device(batch, "cpu", dtype)
