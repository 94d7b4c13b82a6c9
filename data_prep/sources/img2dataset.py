"""What img2dataset downloaded: CC3M, LAION-Aesthetics, LAION-COCO and any other list of URLs and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from data_prep.sources.base import BadRecord, Columns, ConvertingSource, Info, Record, number, numbers, text
from data_prep.sources.img2dataset_shards import FILTER_COLUMNS, DownloadedImage, open_shards
from data_prep.sources.records import Concatenation
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.shards.samples import CAPTION_NAMES


class Img2datasetSource(ConvertingSource[DownloadedImage]):
    """Output of img2dataset (`--output_format webdataset` or `parquet`) and plain webdataset tars: pairs of
    image and caption. A row whose download failed counts as dropped. Scores become filter values:
    similarity, aesthetic (AESTHETIC_SCORE), watermark (pwatermark), nsfw (punsafe).
    """

    licence = "pictures and captions belong to their sites; the list of URLs: see docs/datasets.md"

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        caption_column: Annotated[
            str | None, "column with the caption; else top_caption (LAION-COCO), then caption"
        ] = None,
        require_caption: Annotated[bool, "drop images without one (stage 1 can do without)"] = True,
    ):
        self._captions = (caption_column,) if caption_column else CAPTION_NAMES
        self._require_caption = require_caption
        self.records = Concatenation(open_shards(inputs, self._captions))

    def make(self, raw: DownloadedImage) -> Record:
        """A pair of image and caption."""
        parts: tuple[Part, ...] = (ImagePart(0),)
        try:
            parts = (*parts, TextPart(text(raw.value, *self._captions, word="caption")))
        except BadRecord as error:
            if self._require_caption or error.reason == "bad_caption":
                raise
        document = Document(raw.key, "img2dataset", parts, self._info(raw.value))
        return Record(document, (raw.image,))

    def _info(self, value: Columns) -> Info:
        info: Info = numbers(value, FILTER_COLUMNS)
        if isinstance(value.get("url"), str):
            info["url"] = value["url"]
        if isinstance(value.get("sha256"), str):
            info["original_sha256"] = value["sha256"]
        size = number(value, "original_width"), number(value, "original_height")
        if None not in size:
            info["original_size"] = list(size)
        column = next((name for name in self._captions if isinstance(value.get(name), str)), None)
        if column == "top_caption":
            info.pop("similarity", None)  # that of the page's own text
        if column is not None:
            info |= _own_similarity(value, value[column])
        return info


def _own_similarity(value: Columns, caption: str) -> Info:
    """The similarity of one of LAION-COCO's captions, from its lists (img2dataset may have renamed the column)."""
    captions, similarities = value.get("all_captions"), value.get("all_similarities")
    if not isinstance(captions, list) or not isinstance(similarities, list):
        return {}
    scores = dict(zip(captions, similarities))
    return numbers({"similarity": scores.get(caption)}, {"similarity": ("similarity",)})
