"""The GIMP manual: pages keep their reading order, figures become edits, nothing outside is touched."""

import shutil
import subprocess

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.source_files import ASSETS, open_source, picture, read_all, shown

SCRIPT = ROOT / "data_prep" / "fetch_gimp_help.sh"


@pytest.fixture
def manual(tmp_path):
    folder = tmp_path / "a" / "en"
    (folder / "images").mkdir(parents=True)
    shutil.copy(ASSETS / "manual_page.html", folder / "pixelize.html")
    (folder / "text.html").write_text("<html><body><p>Only text.")
    for number, name in enumerate(["before", "after", "again", "note", "prev"]):
        (folder / "images" / f"{name}.png").write_bytes(picture(number, file_format="PNG"))
    (tmp_path / "secret.png").write_bytes(picture(9))
    return folder


def test_pages_are_texts_and_pictures_in_reading_order(manual):
    page, text = read_all(open_source("gimp_help", manual))
    assert [part for _, part in shown(page)] == [
        "3.7. Pixelize",
        "\n\nFigure 1. Example",
        0,
        "Original image",
        1,
        "Filter “Pixelize” applied",
        2,
        "Filter applied twice",
        "\n\nLarge color blocks & squares.",
        "\n\nOne",
        "\n\nTwo",
        1,
    ]
    assert page.lost == ("path_outside_folder", "missing_file")
    assert text.reason == "filtered:no_image"


def test_figures_with_an_original_become_edits_named_by_their_filter(manual):
    items = read_all(open_source("gimp_help", manual, kind="edits"))
    reply = "Here is the edited image:"
    assert [[part for _, part in shown(item)] for item in items] == [
        [0, "Apply the filter Pixelize.", reply, 1],
        [0, "Apply the filter Pixelize.", reply, 2],
    ]
    assert len({item.document.id for item in items}) == 2


def test_the_fetching_script_is_skipped_with_a_line_where_there_is_no_apt(tmp_path):
    command = ["/bin/sh", str(SCRIPT), str(tmp_path / "manual")]
    result = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stderr.startswith("skipped:")
    assert not list(tmp_path.iterdir())
