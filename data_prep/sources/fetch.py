"""The commands that fetch images for data sets that hold URLs only. Nothing is downloaded here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

PYTHON = "python3.12"
"""img2dataset 1.47 needs `imghdr`, which Python 3.13 no longer has."""


def fetch_commands(
    urls: Path,
    *,
    input_format: str,
    url_column: str,
    caption_column: str | None = None,
    more_columns: Sequence[str] = (),
    output: str = "pictures",
    size_px: int = 512,
) -> str:
    """Shell lines: img2dataset in an environment of its own, because it pins `webdataset<0.3`.

    Images keep their side ratio, small ones their size; only successes and failures of the network are
    decided there, every filter is left to the build.
    """
    options = {
        "url_list": quote(str(urls)),
        "input_format": input_format,
        "url_col": url_column,
        "caption_col": caption_column,
        "save_additional_columns": _list(more_columns),
        "output_folder": output,
        "output_format": "webdataset",
        "image_size": str(size_px),
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": "True",
        "encode_quality": "95",
        "retries": "2",
        "processes_count": "16",
        "thread_count": "64",
        "enable_wandb": "False",
    }
    flags = " \\\n    ".join(f"--{name} {value}" for name, value in options.items() if value)
    return (
        f"{PYTHON} -m venv img2dataset-env && img2dataset-env/bin/pip install img2dataset==1.47.0\n"
        f"img2dataset-env/bin/img2dataset \\\n    {flags}"
    )


def _list(columns: Sequence[str]) -> str:
    listed = ",".join(f'"{column}"' for column in columns)
    return f"'[{listed}]'" if columns else ""


def fetch_help(source: str, inputs: Sequence[Path], num_searched: int) -> str:
    """What to do when images are known by URL and none is at hand."""
    urls = Path(f"{source}-urls")
    shown = " ".join(quote(str(path)) for path in inputs[:3]) + (" ..." if len(inputs) > 3 else "")
    found = (
        f"no picture of the first {num_searched} documents was found"
        if num_searched
        else "pictures are needed"
    )
    return (
        f"source {source}: {found}. Its files hold URLs only: list them, download the pictures, then build "
        f"with --images pictures:\npython -m data_prep.urls {source} --input {shown} --output {urls}\n"
        + fetch_commands(urls, input_format="parquet", url_column="url")
    )
