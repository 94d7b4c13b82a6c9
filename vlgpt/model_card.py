"""The README.md of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlgpt.models.unified import UnifiedConfig, UnifiedModel

USAGE = """```python
from vlgpt.decoding.api import DecodeSettings, Prompt
from vlgpt.decoding.generator import Generator
from vlgpt.document import Document, TextPart

generator = Generator.load("PATH")
prompt = Prompt(Document("question", "user", (TextPart("What is an elephant?", "user"),)))
print(generator.generate([prompt], DecodeSettings())[0].text)
```

With transformers (`import vlgpt.hf` registers the classes): `AutoModel.from_pretrained("PATH")`,
`AutoProcessor.from_pretrained("PATH")`."""


def write_card(path: Path, *, model: UnifiedModel, config: UnifiedConfig, card: Mapping[str, Any]) -> None:
    """Write the model card.

    `card` may hold `name`, `summary`, `licence`, `sources` (list of str), `steps`, `global_batch`, `checkpoint`,
    `results` (name -> value) and `attribution` (sentences, such as the licences of the data).
    """
    header = {"library_name": "vlgpt", "pipeline_tag": "any-to-any", "tags": ["vl-gpt", "multimodal"]}
    if "licence" in card:
        header["license"] = card["licence"]
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {card.get('name', 'VL-GPT')}",
        str(
            card.get(
                "summary",
                "A unified model for text and images: reads and writes both in any order. Trained with vlgpt, an open "
                "implementation of VL-GPT (arXiv 2312.09251).",
            )
        ),
        "## Use\n\n" + USAGE.replace("PATH", "path/to/this/folder"),
        "## Parts\n\n" + _parts(model, config),
    ]
    if training := _training(card):
        sections.append("## Training\n\n" + training)
    if results := card.get("results"):
        rows = "\n".join(f"| {name} | {value} |" for name, value in results.items())
        sections.append(f"## Results\n\n| benchmark | value |\n|---|---|\n{rows}")
    if lines := dict.fromkeys(card.get("attribution", ())):
        sections.append("## Attribution\n\n" + "\n".join(f"- {line}" for line in lines))
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _parts(model: UnifiedModel, config: UnifiedConfig) -> str:
    """A table of what is inside, and what is only named."""
    rows = ["| part | parameters |", "|---|---|"]
    for name, module in (
        (f"language model ({config.text_config['model_type']})", model.lm.language_model),
        (f"regression head ({config.head})", model.lm.regression_head),
        ("image tokenizer", model.image_tokenizer),
        ("image detokenizer", model.image_detokenizer),
    ):
        rows.append(f"| {name} | {sum(p.numel() for p in module.parameters()):,} |")
    encoder, decoder = config.image_encoder, config.picture_decoder
    named = [
        f"\nImages: {model.image_tokenizer.num_visual} embeddings of width {model.image_tokenizer.visual_width}.",
        f"Image encoder: `{encoder['path'] if encoder else 'none'}`.",
        f"Picture decoder: `{decoder.get('path', decoder.get('pipeline')) if decoder else 'none'}`.",
        f"Chat template: `{config.template}`.",
    ]
    return "\n".join([*rows, *named])


def _training(card: Mapping[str, Any]) -> str:
    lines = [f"- data: {source}" for source in card.get("sources", ())]
    for name in ("steps", "global_batch", "checkpoint"):
        if name in card:
            lines.append(f"- {name.replace('_', ' ')}: {card[name]}")
    return "\n".join(lines)
