"""Laws of demonstrations: addressed, nested, never the question's own picture, nearest last."""

import numpy as np
import pytest

from evaluation import benchmarks
from evaluation.core import Example, Prompt
from evaluation.fewshot import Demonstrator, FewShot
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError


@pytest.fixture(params=["vlgpt", "vlgpt-i"])
def easy(request, data):
    benchmark = benchmarks.make("easy_vqa", prompt_file=request.param)
    return benchmark, benchmark.examples(data), benchmark.pool(data)


def test_random_shots_depend_on_seed_and_example_only(easy):
    benchmark, examples, pool = easy
    first = [Demonstrator(benchmark, pool, FewShot(4, seed=1)).prompt(e) for e in examples]
    backwards = [Demonstrator(benchmark, pool, FewShot(4, seed=1)).prompt(e) for e in examples[::-1]]
    assert first == backwards[::-1]
    other = [Demonstrator(benchmark, pool, FewShot(4, seed=2)).prompt(e)[1] for e in examples]
    assert [ids for _, ids in first] != other
    assert len({tuple(ids) for _, ids in first}) > 1


def test_two_shots_are_the_first_of_four_and_none_repeats(easy):
    benchmark, examples, pool = easy
    for example in examples:
        two = Demonstrator(benchmark, pool, FewShot(2)).prompt(example)[1]
        four = Demonstrator(benchmark, pool, FewShot(4)).prompt(example)[1]
        assert four[:2] == two and len(set(four)) == 4


def test_the_prompt_is_demonstrations_then_the_unchanged_question(easy):
    benchmark, examples, pool = easy
    example = examples[0]
    prompt, ids = Demonstrator(benchmark, pool, FewShot(2)).prompt(example)
    parts = prompt.document.parts
    assert [type(part) for part in parts if isinstance(part, ImagePart)] == [ImagePart] * 3
    assert parts[-2:] == (ImagePart(2, parts[-1].role), example.prompt.document.parts[-1])
    by_id = {item.id: item for item in pool}
    assert prompt.images == (*(by_id[id].prompt.images[0] for id in ids), *example.prompt.images)
    for id in ids:
        assert by_id[id].truth in prompt.document.text
    assert prompt.id == example.id


def test_dagger_prompts_have_two_demonstrations_and_only_the_questions_picture(easy):
    benchmark, examples, pool = easy
    demonstrator = Demonstrator(benchmark, pool, FewShot.dagger())
    prompt, ids = demonstrator.prompt(examples[0])
    assert len(ids) == 2 and prompt.images == examples[0].prompt.images
    assert prompt.document.text.lower().count("shortest answer" if "USER" in benchmark.template.text["prompt"]
                                              else "short answer:") == 3  # fmt: skip
    assert demonstrator.manifest()["is_text_only"] is True


def test_a_demonstration_never_shows_the_questions_own_picture(data):
    benchmark = benchmarks.make("easy_vqa")
    pool = benchmark.examples(data)
    for example in pool:
        chosen = Demonstrator(benchmark, pool, FewShot(8)).choose(example)
        assert example.info["image_id"] not in {shot.info["image_id"] for shot in chosen}


def test_rices_takes_the_nearest_pictures_with_the_nearest_last(data):
    benchmark = benchmarks.make("easy_vqa")

    def at(id, colour):
        from PIL import Image

        document = Document(id, "test", (ImagePart(0), TextPart("?")))
        info = {"question": "?", "image_id": id}
        return Example(id, Prompt(document, (Image.new("RGB", (4, 4), colour),), id), "a", info)

    def features(images):
        return np.stack([np.asarray(image, np.float64)[0, 0] + 1 for image in images])

    pool = [
        at("red", (200, 0, 0)),
        at("green", (0, 200, 0)),
        at("orange", (200, 100, 0)),
        at("blue", (0, 0, 200)),
    ]
    demonstrator = Demonstrator(benchmark, pool, FewShot(2, selection="rices"), features=features)
    assert demonstrator.prompt(at("query", (250, 10, 0)))[1] == ["orange", "red"]
    assert demonstrator.prompt(at("red", (200, 0, 0)))[1][-1] == "orange"


def test_rices_without_features_and_too_small_pools_are_refused(easy):
    benchmark, _, pool = easy
    with pytest.raises(UserError, match="RICES needs image features"):
        Demonstrator(benchmark, pool, FewShot(2, selection="rices"))
    with pytest.raises(UserError, match="99 shots wanted, but easy_vqa has 8 training examples"):
        Demonstrator(benchmark, pool, FewShot(99))


def test_benchmarks_without_few_shot_form_say_so(data):
    with pytest.raises(UserError, match="visdial has no few-shot form"):
        benchmarks.make("visdial").pool(data)
