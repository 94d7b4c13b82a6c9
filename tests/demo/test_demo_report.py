"""Laws of the demo's report: self-contained, inert whatever was written, and true to the runs' own files."""

import json

import pytest

from demo.pass_marks import PassMark
from demo.report import main, read_timings
from demo.report_curves import chart, loss_terms
from tests.helpers.html_pages import Page, assert_only_own_style, inert
from vlgpt.errors import UserError

HARMFUL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def report(emoji_oracle, emoji_data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    (run / "evaluation").symlink_to(emoji_oracle / "evaluation")
    (run / "pretrain").mkdir()
    lines = [
        {"step": s, "loss/text": 3.0 / s, "loss/visual": 1.0 / s, "loss/text/pairs": 2.0} for s in (1, 2, 3)
    ]
    (run / "pretrain" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run / "timings.json").write_text(json.dumps({"clip": 12.0, HARMFUL: 30}))
    output = run / "report.html"
    assert main(["--run", str(run), "--output", str(output), "--data", str(emoji_data)]) == 0
    return run


@pytest.fixture(scope="module")
def text(report) -> str:
    return (report / "report.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_runs_nothing(text):
    inert(text)
    assert_only_own_style(text)


def test_whatever_was_written_is_shown_as_text(text):
    assert HARMFUL not in text and "<script" not in text
    assert HARMFUL in "".join(Page(text).words)  # a step's name and captions with tags in them


def test_every_section_and_the_attribution_are_there(text):
    words = " ".join(" ".join(Page(text).words).split())
    for heading in (
        *("Numbers", "Pictures drawn from text", "Edits", "Captions written", "Questions answered"),
        *("Learning from context", "Reconstruction", "Losses", "Time"),
        *("Noto Emoji (c) Google, Apache-2.0", "Twemoji (c) Twitter, Inc and contributors, CC-BY 4.0"),
        *("Unicode CLDR", "skin tone and gender", "no model: the oracle responder"),
    ):
        assert heading in words, heading
    assert text.count("<img") > 50
    assert text.count("<polyline") == 2  # one for each term, none for each source


def test_the_numbers_are_those_of_the_evaluation(report, text):
    written = json.loads((report / "metrics.json").read_text())
    assert written == json.loads((report / "evaluation" / "metrics.json").read_text())
    words = Page(text).words
    assert all(name in words for name in written)


def test_a_run_beside_the_demo_shows_its_values_and_is_judged_by_them(report, emoji_data, tmp_path):
    demo = json.loads((report / "metrics.json").read_text())
    for name, value in (("vqa/tone", 0.5), ("draw/real_r5", 2.0), ("vqa/gender", 1.0)):
        demo[name]["value"] = value
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "metrics.json").write_text(json.dumps(demo))
    (tmp_path / "text.json").write_text(json.dumps({"text/nll_ratio": {"value": 1.06, "n": 100}}))
    (tmp_path / "evaluation").symlink_to(report / "evaluation")
    arguments = ["--run", str(tmp_path), "--output", str(tmp_path / "report.html"), "--data", str(emoji_data)]
    assert main([*arguments, "--demo", str(tmp_path / "demo"), "--also", str(tmp_path / "text.json")]) == 0
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["text/nll_ratio"]["value"] == 1.06
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = [
        [word for word in Page(row.split("</tr>")[0]).words if word.strip()] for row in page.split("<tr>")
    ]
    rows = {first: rest for first, *rest in cells}
    assert rows["vqa/tone"][-3:] == ["0.500", ">= 0.5", "reached"]
    assert rows["vqa/gender"][-3:] == ["1.000", ">= 1", "reached"]
    assert rows["draw/real_r5"][-3:] == ["2.000", ">= 1.6", "below"]
    assert rows["caption/word_f1"][-2:] == [">= 0.45", "reached"]
    assert rows["text/nll_ratio"][-2:] == ["<= 1.05", "below"]
    assert "make demo" in Page(page).words


def test_a_report_without_an_evaluation_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"demo/jobs\.yaml"):
        main(["--run", str(tmp_path), "--output", str(tmp_path / "report.html")])


def test_a_resumed_run_counts_a_step_once_and_sources_are_left_out():
    records = [
        {"step": 1, "loss/a": 4.0},
        {"step": 2, "loss/a": 3.0},
        {"step": 2, "loss/a": 2.0, "loss/a/x": 9.0},
    ]
    assert loss_terms([*records, {"step": 3, "event": "skipped_step"}]) == {"a": [(1.0, 4.0), (2.0, 2.0)]}


def test_curves_stay_inside_their_frame_and_fall_when_losses_fall():
    drawn = chart("run", {"a": [(10, 4.0), (20, 0.5), (40, 0.01)], "b": [(10, 1.0)]})
    points = [tuple(map(float, point.split(","))) for point in drawn.lines[0].points.split()]
    assert all(drawn.left <= x <= drawn.right and drawn.top <= y <= drawn.bottom for x, y in points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # SVG counts downwards
    assert chart("empty", {}) is None
    assert chart("flat", {"a": [(1, 2.0)]}).lines[0].points


def test_timings_come_from_the_stamps_while_the_demo_is_under_way(tmp_path):
    (tmp_path / "steps").mkdir()
    for name, began, seconds in (("b", 1, 5.0), ("a", 2, 7.0)):
        stamp = {"run": str(began), "seconds": seconds}
        (tmp_path / "steps" / f"{name}.done.json").write_text(json.dumps(stamp))
    assert list(read_timings(tmp_path).items()) == [("b", 5.0), ("a", 7.0)]
    (tmp_path / "timings.json").write_text('{"c": 1}')
    assert read_timings(tmp_path) == {"c": 1.0}


def test_pass_marks_look_the_right_way():
    assert PassMark(">=", 0.5).is_met({"value": 0.5}) and not PassMark(">=", 0.5).is_met({"value": 0.49})
    assert PassMark("<=", 0.1).is_met({"value": 0.1}) and not PassMark("<=", 0.1).is_met({"value": 0.11})
    twice = PassMark(">=", 2, per_chance=True)
    assert twice.is_met({"value": 0.4, "chance": 0.2}) and not twice.is_met({"value": 0.39, "chance": 0.2})
