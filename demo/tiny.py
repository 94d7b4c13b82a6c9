"""python -m demo.tiny FOLDER: miniatures of everything that docs/extending.md works on, in seconds.

The parts have the classes and file formats of the real ones and random weights: a LLaMA with its tokenizer (`llm`), the
image tokenizer and detokenizer of stage 1 (`stage1`), a CLIP (`clip`). With them come a few images in the published
formats that the page reads (`flickr30k`, `data`). The demo and the tests use the same functions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from PIL import Image, ImageDraw
from pydantic import Field

from vlgpt.errors import run_command
from vlgpt.files import JsonObject
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.options import Argument, Options, parse
from vlgpt.tokens import DocumentTokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SIZE_PX, TEXT_LENGTH = 28, 9
CLIP_VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE_PX,
    "patch_size": 7,
}
CLIP_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TEXT_LENGTH,
}
NUM_PATCHES = (SIZE_PX // 7) ** 2 + 1
"""With the class token."""
NUM_DOTS = 4


def train_text_tokenizer(texts: Iterable[str], *, vocabulary_size: int = 1600) -> PreTrainedTokenizerFast:
    """A byte-level BPE as a transformers tokenizer, trained on the given texts; any text can be written with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", add_bos_token=True
    )


def new_language_model(
    *,
    vocabulary_size: int,
    width: int = 128,
    depth: int = 3,
    num_heads: int = 4,
    mlp_width: int = 352,
    max_positions: int = 512,
    embedding_std: float = 1.0,
) -> LlamaForCausalLM:
    """A LlamaForCausalLM with random weights. Embeddings start at std 1: they must match standardised visual inputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=embedding_std)
    return model


def save_language_model(folder: Path, tokenizer: object, **shape: Any) -> None:
    """Write a random LLaMA and its tokenizer as a transformers folder, as a user's LLaMA-7B folder would look."""
    document_tokenizer = DocumentTokenizer(tokenizer, num_visual=1, template="short")
    model = new_language_model(vocabulary_size=document_tokenizer.vocabulary_size, **shape)
    model.save_pretrained(folder)
    document_tokenizer.save(folder)


def save_clip_tokenizer(folder: Path) -> int:
    """CLIP's tokenizer files with letters for words: vocab.json, merges.txt; -> its size."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    CLIPTokenizer(**files, model_max_length=TEXT_LENGTH).save_pretrained(folder)
    return len(words)


def clip_text(size: int, **changes: Any) -> dict[str, Any]:
    """The settings of a text tower for a vocabulary of `size`."""
    marks = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    return {**CLIP_TEXT, "vocab_size": size, **marks, **changes}


def save_clip(folder: Path) -> None:
    """Both towers, processor and tokenizer, as `openai/clip-vit-large-patch14` has them."""
    from transformers import CLIPConfig, CLIPModel

    text = clip_text(save_clip_tokenizer(folder))
    CLIPModel(CLIPConfig(vision_config=CLIP_VISION, text_config=text, projection_dim=16)).save_pretrained(
        folder
    )
    save_clip_processor(folder)


def save_clip_processor(folder: Path) -> None:
    """How this CLIP prepares images."""
    from transformers import CLIPImageProcessor

    size = {"height": SIZE_PX, "width": SIZE_PX}
    CLIPImageProcessor(size={"shortest_edge": SIZE_PX}, crop_size=size).save_pretrained(folder)


def save_image_parts(folder: Path, *, num_visual: int = 4, visual_width: int = 48) -> None:
    """An image tokenizer and a detokenizer as stage 1 leaves them; both conditions are those of the tiny CLIP."""
    size: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 4}
    visual: dict[str, Any] = {"num_visual": num_visual, "visual_width": visual_width}
    ImageTokenizer(
        num_patches=NUM_PATCHES, patch_width=CLIP_VISION["hidden_size"], init_std=1.0, **visual, **size
    ).save(folder / "image_tokenizer")
    ImageDetokenizer(
        image_tokens=NUM_PATCHES,
        image_width=CLIP_VISION["hidden_size"],
        text_tokens=TEXT_LENGTH,
        text_width=CLIP_TEXT["hidden_size"],
        **visual,
        **size,
    ).save(folder / "image_detokenizer")


def save_image(path: Path, number: int) -> None:
    """`number` dots (0 to 4) on a ground that differs for every file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = 60 + 40 * (sum(path.name.encode()) % 4)
    image = Image.new("RGB", (64, 48), (shade, 90, 255 - shade))
    for place in range(number):
        ImageDraw.Draw(image).ellipse((4 + 15 * place, 16, 14 + 15 * place, 26), fill="white")
    image.save(path)


def save_flickr30k(folder: Path, *, num_images: int = 6) -> None:
    """Images and `results.token`: five captions each, and a last line without one, as real data may have."""
    lines = []
    for number in range(num_images):
        save_image(folder / f"images/{number}.jpg", number % NUM_DOTS)
        lines += [f"{number}.jpg#{caption}\tThere are {number % NUM_DOTS} dots ." for caption in range(5)]
    lines.append(f"{num_images}.jpg#0\t")
    (folder / "results.token").write_text("\n".join(lines), encoding="utf-8")


def save_questions(data: Path) -> None:
    """Two benchmarks on the same images: counting/{split}.json, and choices/{split}.json with four options."""
    question, options = "How many dots are there?", [str(number) for number in range(NUM_DOTS)]
    for split, num_images in (("test", 12), ("train", 6)):
        counting: list[JsonObject] = []
        choices: list[JsonObject] = []
        for number in range(num_images):
            count, image = number % NUM_DOTS, f"{split}/{number}.png"
            save_image(data / "counting" / image, count)
            counting.append({"image": image, "question": question, "count": count})
            shown = {"image": f"../counting/{image}", "question": question}
            choices.append({**shown, "options": options, "answer": count})
        for name, records in (("counting", counting), ("choices", choices)):
            (data / name).mkdir(exist_ok=True)
            (data / name / f"{split}.json").write_text(json.dumps(records), encoding="utf-8")


class TinyOptions(Options):
    """The command line."""

    folder: Annotated[Path, Argument(is_positional=True, metavar="FOLDER")] = Field(
        description="gets llm, stage1, clip, flickr30k and data"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    folder = parse(TinyOptions, argv, prog="python -m demo.tiny", description=__doc__).folder
    torch.manual_seed(0)
    save_flickr30k(folder / "flickr30k")
    save_questions(folder / "data")
    texts = (folder / "flickr30k/results.token").read_text(encoding="utf-8").splitlines()
    save_language_model(
        folder / "llm",
        train_text_tokenizer(texts, vocabulary_size=400),
        width=64,
        depth=2,
        mlp_width=96,
    )
    save_image_parts(folder / "stage1")
    save_clip(folder / "clip")
    print(f"{folder}: llm, stage1, clip (random weights), flickr30k, data")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
