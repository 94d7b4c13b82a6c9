"""The run's settings: strict, frozen pydantic models. A YAML file plus `a.b=c` overrides becomes one `RunSettings`.

Names are nouns with units and one meaning. Paper values are the defaults where the paper gives one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base: unknown keys and wrong types are errors; values never change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=False)


# ---------------------------------------------------------------------------------------------------------------- data


class SourceSettings(Settings):
    """One data set of the mixture: a folder of shards (or of foreign webdataset tars)."""

    name: str
    path: str
    weight: Annotated[float, Field(ge=0.0)] | Literal["size"] = "size"  # "size": proportional to its samples
    image_first: Fraction = 1.0  # probability that an image stays before the text part that follows it; else swapped
    max_images: Positive = 5  # later images of a sequence are dropped (paper: 5)
    keep_single_image: Fraction = 1.0  # probability to keep a window with exactly one image (OBELICS: 0.2)
    start: Literal["beginning", "random"] = "beginning"  # where a window of a too long document begins
    ramp: tuple[Fraction, Fraction] = (0.0, 0.0)  # shares of the run between which the weight grows from 0 to full


class DataSettings(Settings):
    """The mixture and how it becomes batches."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    mixing: Literal["weights", "temperature"] = "weights"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0  # with mixing=temperature: share ~ size ** (1 / temperature)
    sequence_length: Positive = 512  # positions of a packed row (language stages)
    packing: Literal["best_fit", "none"] = "best_fit"
    features: tuple[Literal["patches", "image_condition", "text_condition", "visual"], ...] = ()  # read, not computed
    pixels: bool = False  # decode images (online encoders, CLIP and picture decoder training)
    image_size_px: Positive = 224
    decoder: Literal["pillow", "fast"] = "pillow"
    num_workers: Annotated[int, Field(ge=0)] = 2
    prefetch_batches: Positive = 4
    seed: int = 0
    max_bad_fraction: Fraction = 0.01  # per source, over windows of 10,000 samples
    allow_data_change: bool = False
    watchdog_s: Annotated[float, Field(gt=0)] = 300.0
