"""Laws of the emoji benchmarks: perfect answers score the maximum, others their chance, and nothing leaks."""

import json

import numpy as np
import pytest

from demo.benchmarks.images import draw_candidates
from demo.benchmarks.text import ATTRIBUTES
from demo.pass_marks import PASS_MARKS
from evaluation import benchmarks
from evaluation.core import read_image
from evaluation.responders import OracleResponder
from evaluation.run import run
from evaluation.run_all import Models, RunAllOptions, jobs, run_job
from evaluation.score import score_folder
from tests.helpers import emoji_shards
from tests.helpers.emoji_shards import JOBS
from vlgpt.document import ImagePart
from vlgpt.errors import UserError

NAMES = {
    job.benchmark.rpartition(":")[2]: job.benchmark
    for job in jobs(JOBS, prompts="vlgpt", given={"max_shots": "8"})
}


def make(name, **options):
    return benchmarks.make(NAMES[name], **options)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory, evaluate):
    output = tmp_path_factory.mktemp("shuffled")
    assert evaluate("shuffled", output) == 0
    return json.loads((output / "metrics.json").read_text())


def scored(name, responder, *, data, clip_folder, output):
    """A benchmark's metrics with a responder of its own."""
    benchmark = make(name, judge=str(clip_folder))
    examples = benchmark.examples(data)
    run(benchmark, responder(benchmark, examples), examples=examples, output=output, batch_size=32)
    return score_folder(benchmark, output, data)["metrics"]


class Unedited(OracleResponder):
    """Hands the source picture back."""

    def draw(self, prompts, decoding):
        return [read_image(prompt.images[0]) for prompt in prompts]


class Pictureless(OracleResponder):
    """Never draws."""

    def draw(self, prompts, decoding):
        return [None for _ in prompts]


def test_the_oracle_reaches_the_maximum(emoji_oracle):
    metrics = json.loads((emoji_oracle / "evaluation" / "metrics.json").read_text())
    for name, entry in metrics.items():
        value = entry["value"]
        if "pixel_mse" in name:
            assert value == pytest.approx(0, abs=1e-6), name
        elif name.startswith(("caption/word_f1", "vqa", "draw/real_r5", "fewshot/label_k")):
            assert value == 1, name
        elif name.startswith(("edit/tone", "edit/gender", "probe")):
            assert value >= 0.9, name
    assert metrics["edit/concept_kept"]["value"] == 1
    assert metrics["fewshot/label_gain"]["value"] == 0  # perfect without examples, too
    assert metrics["caption/cider"]["value"] > 5 * metrics["caption/cider"]["chance"]


def test_every_metric_of_the_pass_marks_is_measured_with_chance_and_n(emoji_oracle):
    metrics = json.loads((emoji_oracle / "evaluation" / "metrics.json").read_text())
    assert set(PASS_MARKS) <= set(metrics)
    assert all({"value", "chance", "n"} <= set(metrics[name]) for name in PASS_MARKS)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("caption/word_f1", 0.15),
        ("caption/cider_unseen", 0.5),
        ("draw/real_r5", 0.15),
        ("edit/concept_kept", 0.15),
    ],
)
def test_perfect_answers_to_other_questions_score_at_chance(shuffled, name, tolerance):
    assert shuffled[name]["value"] == pytest.approx(shuffled[name]["chance"], abs=tolerance)


def test_shuffled_pictures_are_no_nearer_to_the_real_ones(shuffled):
    assert shuffled["draw/pixel_mse_ratio"]["value"] == pytest.approx(1, abs=0.15)
    assert shuffled["reconstruction/clip_similarity"]["value"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_hold_neither_replies_nor_the_picture_that_is_wanted(emoji_data, name):
    for example in make(name).examples(emoji_data):
        document = example.prompt.document
        assert all(part.role != "assistant" for part in document.parts)
        assert not document.info
        if name in ("EmojiDraw", "EmojiEdit"):
            assert example.truth not in example.prompt.images
            assert document.num_images == (name == "EmojiEdit")


def test_ids_are_unique_and_every_limit_is_kept(emoji_data):
    for name in NAMES:
        ids = [example.id for example in make(name, limit=5).examples(emoji_data)]
        assert len(ids) == len(set(ids))
        everything = [example.id for example in make(name, limit=0).examples(emoji_data)]
        assert name == "EmojiLabelPages" or set(ids) < set(everything)


def test_label_pages_show_training_pictures_with_one_kind_of_word(emoji_data):
    examples = make("EmojiLabelPages").examples(emoji_data)
    assert {e.info["shots"] for e in examples} == {0, 2, 4}
    pages = {(e.id.partition("/")[2], e.info["shots"]): e.info for e in examples}
    for (query, shots), info in pages.items():
        assert info["shown"] == pages[query, 4]["shown"][:shots]
        assert info["picture"] not in info["shown"]
    for example in examples:
        pictures = [part for part in example.prompt.document.parts if isinstance(part, ImagePart)]
        assert len(pictures) == example.info["shots"] + 1
        assert example.prompt.document.parts[-1] == pictures[-1]


def test_pages_of_eight_begin_with_those_of_four_and_random_labels_change_words_only(emoji_data):
    def pages(**options):
        found = make("EmojiLabelPages", **options).examples(emoji_data)
        return {e.id: e for e in found}

    few, many = pages(), pages(max_shots=8)
    random = pages(max_shots=8, has_random_labels=True)
    assert few.items() <= many.items() and {e.info["shots"] for e in many.values()} == {0, 2, 4, 8}
    assert set(random) == {id for id, e in many.items() if e.info["shots"]}
    words = {attribute: set() for attribute in ATTRIBUTES}
    for example in many.values():
        words[example.info["attribute"]] |= {*example.info["words"], example.truth}
    num_right = num_shown = 0
    for id, example in random.items():
        assert example.info["shown"] == many[id].info["shown"] and example.truth == many[id].truth
        assert example.prompt.images == many[id].prompt.images
        assert set(example.info["words"]) <= words[example.info["attribute"]]
        num_right += sum(a == b for a, b in zip(example.info["words"], many[id].info["words"]))
        num_shown += example.info["shots"]
    assert num_right < 0.6 * num_shown


def test_more_pictures_a_page_bring_pages_with_random_labels_along():
    def names(**given):
        return [
            job.name for job in jobs(JOBS, prompts="vlgpt", given={"judge": "j", **given}) if not job.missing
        ]

    assert names(max_shots="8") == [*names(), "label_pages_random"]


def test_handing_the_source_back_scores_the_chance_of_an_edit(emoji_data, clip_folder, tmp_path):
    metrics = scored("EmojiEdit", Unedited, data=emoji_data, clip_folder=clip_folder, output=tmp_path)
    for family in ("tone", "gender"):
        entry = metrics[f"edit/{family}_accuracy"]
        assert entry["value"] == entry["chance"] < 0.1
    assert metrics["edit/concept_kept"]["value"] == metrics["edit/concept_kept_unedited"]["value"]
    assert metrics["edit/tone_and_concept"]["value"] < 0.1


def test_missing_pictures_count_as_misses(emoji_data, clip_folder, tmp_path):
    metrics = scored("EmojiDraw", Pictureless, data=emoji_data, clip_folder=clip_folder, output=tmp_path)
    assert metrics["draw/real_r5"]["value"] <= metrics["draw/real_r5"]["chance"] + 0.05
    assert metrics["draw/pixel_mse_ratio"]["value"] == pytest.approx(1, abs=0.1)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["notes"]["num_without_picture"] == results["n"]


def test_a_judge_that_tells_nothing_apart_gives_no_score(clip_folder, tmp_path):
    one = emoji_shards.drawing(0, "man", "dark", "noto")
    people = [d for d in emoji_shards.catalogue() if d.info["split"] == "unseen" and d.info["gender"]]
    alike = [emoji_shards.Drawing(d.info, one.data) for d in people]
    chats = emoji_shards.held_out(alike, alike)
    for folder, records in (("unseen", chats), ("seen", []), ("combination", [])):
        emoji_shards.write_folder(tmp_path / f"instructions-{folder}", records)
    emoji_shards.write_folder(tmp_path / "pairs-train", chats[:1])
    metrics = scored(
        "EmojiDraw", OracleResponder, data=tmp_path, clip_folder=clip_folder, output=tmp_path / "out"
    )
    assert metrics["draw/real_r5"]["value"] == 0


def test_candidates_hold_the_truth_once_and_never_the_source():
    ids = [str(number) for number in range(200)]
    truth, others = draw_candidates(ids, "7", without="9")
    assert ids[truth] == "7"
    assert len(others) == len(set(others)) == 149
    assert not {"7", "9"} & {ids[row] for row in others}
    assert list(others) == list(draw_candidates(ids, "7", without="9")[1])


def test_a_real_model_runs_all_jobs_and_a_second_run_changes_nothing(evaluate, export, tmp_path):
    flags = ["--other-model", f"pretrained={export}", "--limit", "12", "--batch-size", "4"]
    assert evaluate(export, tmp_path, *flags) == 0
    first = (tmp_path / "metrics.json").read_bytes()
    answers = {path: path.read_bytes() for path in tmp_path.glob("*/predictions.jsonl")}
    assert len(answers) == 8
    assert evaluate(export, tmp_path, *flags) == 0
    assert (tmp_path / "metrics.json").read_bytes() == first
    assert all(path.read_bytes() == content for path, content in answers.items())
    assert np.isfinite([entry["value"] for entry in json.loads(first).values()]).all()


def test_two_processes_give_what_one_gives(evaluate, export, tmp_path):
    flags = ["--other-model", f"pretrained={export}", "--limit", "7", "--batch-size", "4"]
    assert evaluate(export, tmp_path / "one", *flags) == 0
    for rank in (1, 0):
        assert evaluate(export, tmp_path / "two", *flags, "--num-processes", "2", "--rank", str(rank)) == 0
        assert (tmp_path / "two/metrics.json").is_file() == (rank == 0)
    for path in tmp_path.glob("one/*/predictions.jsonl"):
        assert (tmp_path / "two" / path.parent.name / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "two/metrics.json").read_bytes() == (tmp_path / "one/metrics.json").read_bytes()


def test_without_the_pretrained_export_label_pages_are_left_out_with_the_reason(evaluate, export, tmp_path):
    assert evaluate(export, tmp_path, "--limit", "2") == 0
    summary = json.loads((tmp_path / "results.json").read_text())
    assert "--other-model pretrained=EXPORT" in summary["skipped"]["label_pages"]
    assert {"caption", "vqa", "draw", "edit", "reconstruction"} <= set(summary["results"])
    assert (tmp_path / "report.html").read_text().count("<img") > 10


def test_models_that_sample_draw_three_pictures_of_each_caption(emoji_data, export, tmp_path, monkeypatch):
    (job,) = (job for job in jobs(JOBS, prompts="vlgpt", given={"judge": "j"}) if job.name == "draw")
    options = RunAllOptions(model=str(export), data=emoji_data, output=tmp_path)
    models = Models(options)
    made = []
    monkeypatch.setattr(benchmarks, "make", lambda name, **options: made.append(options) or _Stop.now())
    for decoder_is, head_is, num in ((True, True, None), (False, True, 3), (True, False, 3)):
        generator = models.load("").generator
        monkeypatch.setattr(type(generator.decoder), "is_deterministic", decoder_is)
        monkeypatch.setattr(type(generator.model.lm.regression_head), "is_deterministic", head_is)
        with pytest.raises(_Stop):
            run_job(job, models, options)
        assert made[-1].get("image_seeds") == num


class _Stop(Exception):
    @classmethod
    def now(cls):
        raise cls


def test_each_picture_of_a_caption_has_its_own_random_numbers(emoji_data):
    one, three = (make("EmojiDraw", image_seeds=n).examples(emoji_data) for n in (1, 3))
    assert len(three) == 3 * len(one)
    assert len({e.prompt.id for e in three}) == len(three)


def test_missing_folders_are_named_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(UserError, match=r"demo\.source:EmojiSource --kind instructions --split unseen"):
        make("EmojiVqa").examples(tmp_path)
    with pytest.raises(UserError, match=r"CLIP folder .* not found"):
        make("EmojiDraw", judge=str(tmp_path / "nowhere")).load_judge()
