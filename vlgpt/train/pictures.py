"""Stage 1 in images: held-out images through tokenizer, detokenizer and image decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlgpt import seeds
from vlgpt.batch import ConditionBatch, to_device
from vlgpt.decoding.load import describe_decoder, load_decoder
from vlgpt.errors import UserError
from vlgpt.log import MetricsSink, get_logger
from vlgpt.models.decoders import ImageDecoder
from vlgpt.models.encoders import load_clip
from vlgpt.settings import PictureCheckSettings
from vlgpt.train.engine import Engine


class ReconstructionCheck:
    """CLIP similarity of reconstructions (paper, table 1), and a contact sheet of the same images every time.

    Raises UserError for a stage without image tokenizer, or when decoder or judge cannot be loaded.
    """

    def __init__(self, settings: PictureCheckSettings, *, engine: Engine):
        if not hasattr(engine.stage, "reconstruct"):
            raise UserError(
                "validation.pictures is for stages that reconstruct images: remove it from this run"
            )
        self.settings, self.engine = settings, engine
        self.decoder = open_decoder(settings.picture_decoder, engine)
        drawing = (settings.picture_decoder, self.decoder.guidance, self.decoder.image_scale)
        get_logger().info("validation images: decoder %s, guidance %g, image scale %g", *drawing)
        self.judge = None
        if settings.judge is not None:
            self.judge = load_clip(**settings.judge.model_dump()).to(engine.device)

    @torch.no_grad()
    def __call__(self, batches: Iterator[Any], *, step: int, log: MetricsSink) -> dict[str, float]:
        """Collective; every rank draws its share. Writes the sheet of rank 0's first images to `log`."""
        sums = torch.zeros(2, dtype=torch.float64)
        originals: list[Tensor] = []
        drawn: list[Tensor] = []
        share = -(-self.settings.num_pictures // self.engine.world_size)
        num_seen = 0
        for batch in batches:
            if num_seen >= share:
                break
            num_seen += len(batch.documents)
            pictures = self.draw(batch)
            original = to_device(batch, "cpu").require("pixels")[batch.is_valid]
            pictures = pictures[batch.is_valid].float().cpu()
            if self.judge is not None and len(pictures):
                sums += torch.tensor(
                    [self._similarity(original, pictures), len(pictures)], dtype=torch.float64
                )
            if sum(map(len, originals)) < self.settings.num_on_sheet:
                originals.append(original)
                drawn.append(pictures)
        total, count = self.engine.all_sum(sums).tolist()
        if self.engine.rank == 0 and originals:
            log.image(step, "reconstructions", self._sheet(torch.cat(originals), torch.cat(drawn)))
        return {"validation/clip_similarity": total / count} if count else {}

    def draw(self, batch: ConditionBatch) -> Tensor:
        """Reconstructions: -> (B, 3, H, W) in [-1, 1]; noise is addressed by document, so only weights change them."""
        stage: Any = self.engine.stage
        image, text = stage.reconstruct(self.engine.place(batch))
        generators = [seeds.torch_generator("contact sheet", name) for name in batch.documents]
        return self.decoder.decode(image.float(), text.float(), generators=generators)

    def _similarity(self, original: Tensor, drawn: Tensor) -> float:
        """Sum over images of 100 x cosine: 2 x (B, 3, H, W) in [-1, 1] -> scalar."""
        assert self.judge is not None
        first, second = (
            F.normalize(self.judge.embed_images(pictures.to(self.engine.device)).double(), dim=-1)
            for pictures in (original, drawn)
        )
        return float(100 * (first * second).sum())

    def _sheet(self, originals: Tensor, drawn: Tensor) -> Tensor:
        """Originals above, reconstructions below: -> (3, 2 * H, n * W) in [0, 1]."""
        count, size = self.settings.num_on_sheet, drawn.shape[-2:]
        originals = F.interpolate(originals[:count], size=size, mode="bilinear", antialias=True)
        rows = [torch.cat([*pictures], dim=2) for pictures in (originals, drawn[:count])]
        return torch.cat(rows, dim=1).clamp(-1, 1) * 0.5 + 0.5


def open_decoder(path: str, engine: Engine) -> ImageDecoder:
    """An image decoder as `vlgpt export` takes it: a saved component, a diffusion.json or a folder with one."""
    record = describe_decoder(path, key="validation.pictures.picture_decoder")
    decoder = load_decoder(Path(), record, dtype=engine.dtype)
    assert decoder is not None
    if isinstance(decoder, nn.Module):
        decoder.to(engine.device).eval()
    return decoder
