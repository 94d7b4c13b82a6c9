"""Laws of every benchmark: the oracle is perfect, shuffled answers score chance, official files come back."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from evaluation import benchmarks
from evaluation.core import Benchmark
from evaluation.predictions import read_jsonl
from evaluation.responders import OracleResponder, ShuffledResponder
from evaluation.run import answer, run, write_submission
from evaluation.score import read_predictions, score
from tests.helpers import official_files
from tests.helpers.official_files import ALL
from vlgpt.errors import UserError

MAXIMA = {
    "coco_caption": {"Bleu_1": 100.0, "Bleu_4": 100.0, "ROUGE_L": 100.0},
    "vqav2": {"accuracy": 100.0},
    "okvqa": {"accuracy": 100.0, "accuracy_unstemmed": 100.0},
    "gqa": {"accuracy": 100.0, "binary": 100.0, "open": 100.0, "distribution": 0.0},
    "vizwiz": {"accuracy": 100.0, "unanswerable_ap": 100.0, "unanswerable_f1": 100.0},
    "visdial": {"NDCG": 100.0},
    "coco_generation": {"FD_clip": 0.0},
    "coco_reconstruction": {"clip_similarity": 100.0},
    "flickr30k_reconstruction": {"clip_similarity": 100.0},
    "magicbrush": {"CLIP-I": 1.0, "L1": 0.0},
    "easy_vqa": {"accuracy": 100.0},
}
OPTIONS = {
    "coco_generation": {"reference": "matched", "num_samples": 6, "fd_clip": "CLIP", "clip": "CLIP"},
    "coco_reconstruction": {"clip": "CLIP"},
    "flickr30k_reconstruction": {"clip": "CLIP"},
    "magicbrush": {"clip": "CLIP"},
}


@pytest.fixture(params=ALL)
def benchmark(request, clip_folder) -> Benchmark:
    return make(request.param, clip_folder)


def make(name, clip_folder, **more) -> Benchmark:
    options = {
        key: str(clip_folder) if value == "CLIP" else value for key, value in OPTIONS.get(name, {}).items()
    }
    return benchmarks.make(name, **(options | more))


def result_of(benchmark, responder_class, data, output, **options):
    examples = benchmark.examples(data)
    path = run(benchmark, responder_class(benchmark, examples, **options), examples=examples, output=output)
    return score(benchmark, read_predictions(path, benchmark), data)


def test_the_oracle_reaches_the_maximum(benchmark, data, tmp_path):
    result, per_example = result_of(benchmark, OracleResponder, data, tmp_path)
    for name, wanted in MAXIMA[benchmark.name].items():
        assert result["metrics"][name]["value"] == pytest.approx(wanted, abs=1e-4), name
    assert result["n"] == result["num_examples"] == result["metrics"][benchmark_primary(benchmark)]["n"]
    assert set(per_example) == {example.id for example in benchmark.examples(data)}


def benchmark_primary(benchmark):
    return "FD_clip" if benchmark.name == "coco_generation" else benchmark.primary


def test_shuffled_answers_score_chance(benchmark, data, tmp_path):
    """The mean over many shuffles is the chance level that the oracle's result states."""
    examples = benchmark.examples(data)
    best, _ = result_of(benchmark, OracleResponder, data, tmp_path / "oracle")
    chance = {name: entry["chance"] for name, entry in best["metrics"].items() if "chance" in entry}
    draws: dict[str, list[float]] = {}
    for seed in range(8 if benchmark.kind in ("image", "reconstruction") else 60):
        responder = ShuffledResponder(benchmark, examples, seed=seed)
        prompts = [example.prompt for example in examples]
        records = answer(benchmark, responder, examples, prompts, benchmark.decoding, tmp_path)
        records = [{**r, "image": str(tmp_path / r["image"])} if "image" in r else r for r in records]
        predictions = {record["id"]: record for record in records}
        for name, entry in benchmark.score(examples, predictions, data).metrics.items():
            draws.setdefault(name, []).append(entry["value"])
    assert chance
    for name in chance.keys() - {"unanswerable_ap", "Bleu_2", "Bleu_3", "Bleu_4"}:
        error = np.std(draws[name]) / np.sqrt(len(draws[name]))
        tolerance = 4 * error + (0.35 * chance[name] if benchmark.name == "coco_caption" else 1e-6)
        assert np.mean(draws[name]) == pytest.approx(chance[name], abs=tolerance), name


def test_shuffled_answers_are_below_the_oracle(benchmark, data, tmp_path):
    if benchmark.name == "coco_generation":
        pytest.skip("a Frechet distance does not see which picture belongs to which caption")
    name = benchmark.primary
    best = result_of(benchmark, OracleResponder, data, tmp_path / "a")[0]["metrics"][name]["value"]
    shuffled = result_of(benchmark, ShuffledResponder, data, tmp_path / "b")[0]["metrics"][name]["value"]
    assert shuffled < best


def test_a_frechet_distance_sees_other_pictures(data, clip_folder, tmp_path):
    benchmark = make("coco_generation", clip_folder)
    examples = benchmark.examples(data)
    path = run(benchmark, OracleResponder(benchmark, examples), examples=examples, output=tmp_path)
    for file in (tmp_path / "images").iterdir():
        Image.open(file).convert("L").convert("RGB").save(file)
    result, _ = score(benchmark, read_predictions(path, benchmark), data)
    assert result["metrics"]["FD_clip"]["value"] > 1e-3


@pytest.mark.parametrize("name", ["coco_caption", "vqav2", "okvqa", "gqa", "vizwiz", "visdial"])
def test_the_official_submission_file_scores_like_our_predictions(name, data, tmp_path):
    benchmark = benchmarks.make(name)
    examples = benchmark.examples(data)
    path = run(benchmark, ShuffledResponder(benchmark, examples), examples=examples, output=tmp_path)
    ours, _ = score(benchmark, read_predictions(path, benchmark), data)
    official = benchmark.submission({record["id"]: record for record in read_jsonl(path)}, data)
    file = tmp_path / "upload.json"
    file.write_text(json.dumps(official))
    theirs, _ = score(benchmark, read_predictions(file, benchmark), data)
    assert theirs["metrics"] == ours["metrics"]


def test_submission_files_have_the_official_fields(data, tmp_path):
    fields = {
        "coco_caption": {"image_id": int, "caption": str},
        "vqav2": {"question_id": int, "answer": str},
        "gqa": {"questionId": str, "prediction": str},
        "vizwiz": {"image": str, "answer": str},
        "visdial": {"image_id": int, "round_id": int, "ranks": list},
    }
    for name, wanted in fields.items():
        benchmark = benchmarks.make(name)
        examples = benchmark.examples(data)
        path = run(benchmark, OracleResponder(benchmark, examples), examples=examples, output=tmp_path / name)
        records = benchmark.submission({record["id"]: record for record in read_jsonl(path)}, data)
        assert len(records) == len(examples)
        assert {key: type(value) for key, value in records[0].items()} == wanted


def test_visdial_uploads_ranks_of_options_not_an_argsort(data, tmp_path):
    benchmark = benchmarks.make("visdial")
    example = benchmark.examples(data)[0]
    scores = [float(value) for value in np.random.default_rng(0).permutation(100)]
    best = int(np.argmax(scores))
    (record, *_) = benchmark.submission({e.id: {"scores": scores} for e in benchmark.examples(data)}, data)
    assert record["ranks"][best] == 1 and sorted(record["ranks"]) == list(range(1, 101))
    assert record["round_id"] == example.info["round_id"] == 3
    assert record["ranks"] != [int(i) + 1 for i in np.argsort(-np.array(scores))]


def test_visdial_history_ends_before_the_question_and_holds_no_answer_to_it(data):
    benchmark = benchmarks.make("visdial", rounds="all")
    example = next(e for e in benchmark.examples(data) if e.info["round_id"] == 3)
    text = example.prompt.document.text
    assert text.startswith(
        "an image of a photo of thing 0. Based on the image, is it thing 0? Short answer: answer"
    )
    assert text.endswith("Based on the image, is it thing 2? Short answer:")
    assert text.count("Short answer: answer") == 2
    assert benchmark.candidates(example)[0].endswith(".")


def test_visdial_all_rounds_give_sparse_scores(data, tmp_path):
    result, _ = result_of(benchmarks.make("visdial", rounds="all"), OracleResponder, data, tmp_path)
    assert result["n"] == 30 and result["metrics"]["NDCG"]["n"] == 3
    assert result["metrics"]["MRR"]["value"] == 100 and result["metrics"]["mean_rank"]["value"] == 1


def test_cider_is_maximal_where_all_references_agree(data, tmp_path):
    _, per_example = result_of(benchmarks.make("coco_caption"), OracleResponder, data, tmp_path)
    assert [round(per_example[id], 6) for id in ("391895", "522418", "184613", "318219")] == [1000.0] * 4


def test_both_caption_files_give_the_same_references(data):
    by_karpathy = {e.id: e.truth for e in benchmarks.make("coco_caption").examples(data)}
    by_coco = {e.id: e.truth for e in benchmarks.make("coco_caption", split="val2014").examples(data)}
    assert {id: [text.strip() for text in texts] for id, texts in by_coco.items()} == by_karpathy


def test_generation_samples_pictures_once_and_writes_the_list(data):
    benchmark = benchmarks.make("coco_generation", num_samples=4)
    examples = benchmark.examples(data)
    lines = [json.loads(line) for line in benchmark.extra_files(examples)["prompts.jsonl"].splitlines()]
    assert [line["id"] for line in lines] == [0, 1, 2, 3]
    assert len({line["image_id"] for line in lines}) == 4
    assert benchmark.examples(data) == examples
    everything = benchmarks.make("coco_generation", num_samples=99).examples(data)
    assert len({e.info["image_id"] for e in everything}) == len(everything) == 6
    assert benchmarks.make("coco_generation", num_samples=4, sample_seed=1).examples(data) != examples
    assert examples[0].prompt.document.text == f"An image of {lines[0]['caption'].strip().rstrip('.')}."


def test_a_missing_picture_is_scored_as_grey_and_counted(data, clip_folder, tmp_path):
    benchmark = make("coco_reconstruction", clip_folder)
    examples = benchmark.examples(data)
    path = run(benchmark, OracleResponder(benchmark, examples), examples=examples, output=tmp_path)
    records = read_predictions(path, benchmark)
    records[0]["image"] = None
    result, per_example = score(benchmark, records, data)
    assert result["notes"]["num_without_picture"] == 1
    assert per_example[records[0]["id"]] < 99.9 < per_example[records[1]["id"]]


def test_vizwiz_scores_given_confidences_before_texts(data, tmp_path):
    benchmark = benchmarks.make("vizwiz")
    examples = benchmark.examples(data)
    records = [
        {"id": e.id, "text": "unanswerable", "answerable": float(e.info["answerable"])} for e in examples
    ]
    result, _ = score(benchmark, records, data)
    assert result["metrics"]["unanswerable_ap"]["value"] == 100
    assert result["notes"]["unanswerable_from"] == "scores"
    hard, _ = score(benchmark, [{"id": e.id, "text": "unanswerable"} for e in examples], data)
    assert hard["metrics"]["unanswerable_ap"]["value"] == pytest.approx(100 / 3)


def test_vizwiz_asks_whether_the_answer_is_known_and_no_makes_it_unanswerable(data, tmp_path):
    """Emu's second question; its prompt is part of the protocol, its likelihoods are the answerability scores."""
    benchmark = benchmarks.make("vizwiz", second_prompt="qa_answerable")
    examples = benchmark.examples(data)
    second = benchmark.second_question(examples[0])
    assert second.candidates == ("yes.", "no.") and second.prompt.images == examples[0].prompt.images
    assert (
        second.prompt.document.text
        == "Based on the image, What is this 0, is the answer known? Short answer:"
    )

    class Doubter(OracleResponder):
        """Calls every picture red, and knows which ones it cannot answer."""

        def generate(self, prompts, decoding):
            return ["red" for _ in prompts]

    path = run(benchmark, Doubter(benchmark, examples), examples=examples, output=tmp_path)
    records = read_predictions(path, benchmark)
    result, _ = score(benchmark, records, data)
    assert (
        result["metrics"]["unanswerable_ap"]["value"] == result["metrics"]["unanswerable_f1"]["value"] == 100
    )
    assert result["breakdown"]["answer_type"]["unanswerable"]["value"] == 100
    assert result["notes"]["second_prompt"] == "qa_answerable"
    answers = {r["image"]: r["answer"] for r in benchmark.submission({r["id"]: r for r in records}, data)}
    assert {answers[e.id] for e in examples if not e.info["answerable"]} == {"unanswerable"}
    assert {answers[e.id] for e in examples if e.info["answerable"]} == {"red"}
    assert json.loads((tmp_path / "run.json").read_text())["second_prompt"]["id"] == "vlgpt/qa_answerable"
    with pytest.raises(UserError, match=r"another protocol.*second_prompt"):
        once = benchmarks.make("vizwiz")
        run(once, OracleResponder(once, examples), examples=examples, output=tmp_path)
    with pytest.raises(UserError, match="have no `answerable`"):
        score(benchmark, [{"id": e.id, "text": "red"} for e in examples], data)


@pytest.mark.parametrize("responder", [OracleResponder, ShuffledResponder])
def test_fakes_answer_the_second_question_too(responder, data, tmp_path):
    benchmark = benchmarks.make("vizwiz", second_prompt="qa_answerable")
    result, _ = result_of(benchmark, responder, data, tmp_path)
    plain, _ = result_of(benchmarks.make("vizwiz"), responder, data, tmp_path / "plain")
    assert result["metrics"] == plain["metrics"]
    assert result["notes"]["unanswerable_from"] == "scores"


def test_a_split_without_public_answers_cannot_be_scored_but_submitted(data, tmp_path):
    folder = tmp_path / "data/vqav2"
    folder.mkdir(parents=True)
    source = json.loads((data / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    (folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps(source))
    benchmark = benchmarks.make("vqav2", split="test-dev2015")
    examples = benchmark.examples(tmp_path / "data")
    records = [{"id": e.id, "text": "A red one."} for e in examples]
    assert "test2015/COCO_test2015_" in str(examples[0].prompt.images[0])
    with pytest.raises(UserError, match=r"no public answers.*submission\.json"):
        score(benchmark, records, tmp_path / "data")
    upload = benchmark.submission({r["id"]: r for r in records}, tmp_path / "data")
    assert upload[0] == {"question_id": int(examples[0].id), "answer": "red one"}


def test_magicbrush_turns_start_from_the_true_previous_picture(data):
    examples = {e.id: e for e in benchmarks.make("magicbrush").examples(data)}
    assert list(examples) == ["139-1", "242679-1", "242679-2", "77-1"]
    assert examples["242679-2"].prompt.images[0] == examples["242679-1"].truth
    assert examples["242679-1"].prompt.document.parts[-1].text == "Put a cat on the seat 1."


def test_lavis_captions_are_read_where_karpathys_file_is_missing(data, tmp_path):
    records = [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["A dog.", "One dog"]}]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/coco_karpathy_test.json").write_text(json.dumps(records))
    (example,) = benchmarks.make("coco_caption").examples(tmp_path)
    assert example.id == "391895" and example.truth == ["A dog.", "One dog"]


def test_an_unknown_benchmark_or_option_is_named():
    with pytest.raises(UserError, match="benchmark 'vqa' is unknown; valid: coco_caption"):
        benchmarks.make("vqa")
    with pytest.raises(UserError, match=r"has no option stemm; valid: .*stem"):
        benchmarks.make("okvqa", stemm="none")
    with pytest.raises(UserError, match="num_samples is 'many'"):
        benchmarks.make("coco_generation", num_samples="many")


def percent(benchmark, prediction, answers):
    return 100 * benchmark.scorer(answers)(prediction)


def test_okvqa_stems_the_prediction_and_reports_the_plain_formula_beside_it(data):
    benchmark = benchmarks.make("okvqa")
    answers = ["surf"] * 8 + ["cow", "dog"]
    assert percent(benchmark, "surfing", answers) == 100.0
    assert percent(benchmarks.make("okvqa", stem="none"), "surfing", answers) == 0.0
    examples = benchmark.examples(data)
    result, _ = score(benchmark, [{"id": e.id, "text": f"{e.truth[0]}s"} for e in examples], data)
    assert result["metrics"]["accuracy"]["value"] > result["metrics"]["accuracy_unstemmed"]["value"] == 0
    assert result["notes"]["stem"] == "porter" and result["notes"]["mode"] == "official_2016"


def test_each_vqa_benchmark_uses_its_own_official_formula():
    unanimous, mixed = ["Yes"] * 10, ["yes."] * 9 + ["no"]
    assert percent(benchmarks.make("vqav2"), "yes", unanimous) == 0.0
    assert percent(benchmarks.make("vqav2", mode="always"), "yes", unanimous) == 100.0
    assert percent(benchmarks.make("vqav2"), "yes", mixed) == 100.0
    assert percent(benchmarks.make("vizwiz"), "yes", mixed) == 0.0
    assert percent(
        benchmarks.make("vqav2"), "no", ["no"] * 3 + ["a", "b", "c", "d", "e", "f", "g"]
    ) == pytest.approx(90)


def test_l1_is_the_mean_difference_on_a_scale_of_one_at_the_targets_size():
    from evaluation.benchmarks.magicbrush import l1_distance

    black, grey = Image.new("RGB", (8, 8)), Image.new("RGB", (16, 4), (51, 51, 51))
    assert l1_distance(black, grey) == pytest.approx(0.2)
    assert l1_distance(grey, black) == pytest.approx(0.2)


def test_magicbrush_names_the_text_behind_clip_t(data, clip_folder, tmp_path):
    benchmark = make("magicbrush", clip_folder)
    examples = benchmark.examples(data)
    path = run(benchmark, OracleResponder(benchmark, examples), examples=examples, output=tmp_path / "out")
    records = read_predictions(path, benchmark)
    first, _ = score(benchmark, records, data)
    assert first["notes"]["clip_t_text"] == "instruction"
    folder = tmp_path / "data/magicbrush"
    shutil.copytree(data / "magicbrush", folder)
    described = {}
    for example in examples:
        image, turn = example.info["image_id"], example.info["turn"]
        described.setdefault(image, {})[f"{image}-output{turn}.png"] = f"a red dog {turn}"
    (folder / "global_descriptions.json").write_text(json.dumps(described))
    second, _ = score(benchmark, records, tmp_path / "data")
    assert second["notes"]["clip_t_text"] == "global description"
    assert second["metrics"]["CLIP-T"]["value"] != first["metrics"]["CLIP-T"]["value"]


def test_no_benchmark_is_left_out_of_the_laws_of_oracle_and_shuffled_answers():
    assert set(ALL) == set(benchmarks.REGISTRY)


def test_every_registered_benchmark_has_a_class_that_says_what_it_is():
    for name in benchmarks.REGISTRY:
        cls = benchmarks.benchmark_class(name)
        assert issubclass(cls, Benchmark) and cls.name == name and cls.__doc__ and cls.primary


def test_a_test_dev_upload_holds_all_of_test2015(data, tmp_path):
    folder = tmp_path / "vqav2"
    folder.mkdir()
    content = json.loads((data / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    (folder / "v2_OpenEnded_mscoco_test2015_questions.json").write_text(json.dumps(content))
    few = {**content, "questions": content["questions"][2:5]}
    (folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps(few))
    benchmark = benchmarks.make("vqav2", split="test-dev2015")
    predictions = {e.id: {"id": e.id, "text": "red"} for e in benchmark.examples(tmp_path)}
    upload = benchmark.submission(predictions, tmp_path)
    assert [r["question_id"] for r in upload] == [q["question_id"] for q in content["questions"]]
    assert [r["answer"] for r in upload] == ["", "", "red", "red", "red"] + [""] * 7
    predictions.popitem()
    with pytest.raises(UserError, match="1 questions have no answer"):
        benchmark.submission(predictions, tmp_path)


def test_the_visdial_test_split_asks_the_open_round_only(data, tmp_path):
    content = json.loads((data / "visdial/visdial_1.0_val.json").read_text())
    content["split"] = "test"
    for number, dialog in enumerate(content["data"]["dialogs"]):
        dialog["dialog"] = dialog["dialog"][: 4 + number]
        for key in ("answer", "gt_index"):
            del dialog["dialog"][-1][key]
    official_files.write_json(tmp_path / "visdial/visdial_1.0_test.json", content)
    benchmark = benchmarks.make("visdial", split="test")
    examples = benchmark.examples(tmp_path)
    assert [e.info["round_id"] for e in examples] == [4, 5, 6]
    assert "VisualDialog_test2018/VisualDialog_test2018_" in str(examples[0].prompt.images[0])
    records = [{"id": e.id, "scores": list(range(100))} for e in examples]
    with pytest.raises(UserError, match="no public answers"):
        score(benchmark, records, tmp_path)
    assert [r["round_id"] for r in benchmark.submission({r["id"]: r for r in records}, tmp_path)] == [4, 5, 6]


def test_a_written_submission_file_was_read_back_and_checked(data, tmp_path):
    benchmark = benchmarks.make("visdial")
    examples = benchmark.examples(data)
    path = run(benchmark, OracleResponder(benchmark, examples), examples=examples, output=tmp_path)
    upload = write_submission(benchmark, path, data)
    theirs, _ = score(benchmark, read_predictions(upload, benchmark), data)
    assert theirs["metrics"]["NDCG"]["value"] == pytest.approx(100)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises((KeyError, UserError)):
        write_submission(benchmark, path, data)
