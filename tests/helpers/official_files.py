"""Tiny data sets in the official formats of every benchmark, pictures included, written into one --data
folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlgpt import seeds

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "grey", "brown"]
IMAGE_IDS = [391895, 522418, 184613, 318219, 554625, 574769, 60623, 309022]
NUM_IMAGES = len(IMAGE_IDS)
NUM_OPTIONS = 100
ALL = [
    "coco_caption",
    "vqav2",
    "okvqa",
    "gqa",
    "vizwiz",
    "visdial",
    "coco_generation",
    "coco_reconstruction",
    "flickr30k_reconstruction",
    "magicbrush",
    "easy_vqa",
]


def picture(number: int, *, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A picture that differs for every number: blocks of addressed random colours."""
    blocks = seeds.generator("test picture", number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def save_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def caption(number: int, variant: int) -> str:
    """Five captions of a picture; those of pictures 0 .. 3 are all the same, so that CIDEr's maximum is
    known."""
    colour, other = COLOURS[number % 8], COLOURS[(number + 3) % 8]
    same = f"A {colour} dog sits beside a {other} chair near house {number}."
    return (
        same if number < 4 or variant == 0 else f"The {colour} dog and chair {variant} of the {other} house"
    )


def ten_answers(number: int) -> list[str]:
    """Eight times the main answer, two odd ones; every fourth question is unanimous."""
    colour = COLOURS[number % 4]
    return [colour] * (10 if number % 4 == 0 else 8) + ([] if number % 4 == 0 else ["It's dark!", "no idea"])


def write_coco(data: Path) -> None:
    """Karpathy's file, captions_val2014.json, and the pictures of val2014 and train2014."""
    karpathy, images, annotations = [], [], []
    for number, image_id in enumerate(IMAGE_IDS):
        subset = "val2014" if number < 6 else "train2014"
        name = f"COCO_{subset}_{image_id:012d}.jpg"
        save_picture(data / "coco" / subset / name, number)
        sentences = [
            {
                "tokens": caption(number, v).lower().rstrip(".").split(),
                "raw": caption(number, v),
                "imgid": number,
            }
            | {"sentid": 1000 + 10 * number + v}
            for v in range(5)
        ]
        split = "test" if number < 6 else "train"
        karpathy.append(
            {
                "filepath": subset,
                "sentids": [s["sentid"] for s in sentences],
                "filename": name,
                "imgid": number,
            }
            | {"split": split, "sentences": sentences, "cocoid": image_id}
        )
        if subset == "val2014":
            images.append(
                {
                    "license": 1,
                    "file_name": name,
                    "coco_url": "http://x",
                    "height": 32,
                    "width": 40,
                    "id": image_id,
                }
            )
            annotations += [
                {"image_id": image_id, "id": s["sentid"], "caption": s["raw"] + (" " if number % 2 else "")}
                for s in sentences
            ]
    write_json(data / "coco/dataset_coco.json", {"dataset": "coco", "images": karpathy})
    content = {"info": {"year": 2014}, "licenses": [], "images": images, "annotations": annotations}
    write_json(data / "coco/annotations/captions_val2014.json", content)


def write_vqa(data: Path, *, name: str, prefix: str, answer_type: str = "other") -> None:
    """Questions and annotations of VQAv2 (`prefix="v2_"`) or OK-VQA (""), splits val2014 and train2014."""
    for subset, numbers in (("val2014", range(6)), ("train2014", (6, 7))):
        questions, annotations = [], []
        for number in numbers:
            image_id = IMAGE_IDS[number]
            for k in range(2):
                question_id = image_id * 1000 + k
                answers = ten_answers(number + k)
                questions.append(
                    {
                        "image_id": image_id,
                        "question": f"What colour is thing {k}?",
                        "question_id": question_id,
                    }
                )
                annotations.append(
                    {"question_type": "what color", "answer_type": answer_type}
                    | {"multiple_choice_answer": answers[0], "image_id": image_id, "question_id": question_id}
                    | {"answers": [{"answer": a, "raw_answer": a, "answer_confidence": "yes", "answer_id": i + 1}
                                   for i, a in enumerate(answers)]}
                )  # fmt: skip
        head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
        folder = data / name
        content = {**head, "task_type": "Open-Ended", "questions": questions}
        write_json(folder / f"{prefix}OpenEnded_mscoco_{subset}_questions.json", content)
        write_json(folder / f"{prefix}mscoco_{subset}_annotations.json", {**head, "annotations": annotations})


def write_gqa(data: Path) -> None:
    """testdev_balanced_questions.json with pictures, all questions balanced, half of them yes/no."""
    questions = {}
    for number in range(8):
        is_binary = number % 2 == 0
        image = f"n{number // 2}"
        save_picture(data / "gqa/images" / f"{image}.jpg", number // 2)
        questions[f"20{number:05d}"] = {
            "imageId": image,
            "question": f"Is thing {number} red?" if is_binary else f"What is thing {number}?",
            "answer": ("yes" if number % 4 else "no") if is_binary else COLOURS[number % 3],
            "fullAnswer": "x",
            "isBalanced": True,
            "groups": {"global": None if is_binary else "colour", "local": f"{number}r"},
            "entailed": [],
            "equivalent": [],
            "types": {"structural": "verify" if is_binary else "query", "semantic": "attr", "detailed": "x"},
            "semantic": [{"operation": "select", "argument": f"thing ({number})", "dependencies": []}],
            "semanticStr": "select: thing",
        }
    write_json(data / "gqa/testdev_balanced_questions.json", questions)


def write_vizwiz(data: Path) -> None:
    """val.json and train.json; every third question of val cannot be answered."""
    for split, numbers in (("val", range(6)), ("train", (6, 7))):
        records = []
        for number in numbers:
            name = f"VizWiz_{split}_{number:08d}.jpg"
            save_picture(data / "vizwiz" / split / name, number)
            is_answerable = number % 3 != 0
            answers = ["unanswerable"] * 9 + ["dog"] if not is_answerable else ten_answers(number + 1)
            records.append(
                {"image": name, "question": f"What is this {number}?", "answerable": int(is_answerable)}
                | {"answer_type": "other" if is_answerable else "unanswerable"}
                | {"answers": [{"answer": a, "answer_confidence": "yes"} for a in answers]}
            )
        write_json(data / "vizwiz" / f"{split}.json", records)


def write_visdial(data: Path, *, num_dialogs: int = 3) -> None:
    """Three dialogs of ten rounds with 100 options, one dense round each."""
    answers = [f"answer {i}" for i in range(120)]
    dialogs, dense = [], []
    for number in range(num_dialogs):
        image_id, random = IMAGE_IDS[number], seeds.generator("visdial fixture", number)
        save_picture(data / f"visdial/VisualDialog_val2018/VisualDialog_val2018_{image_id:012d}.jpg", number)
        rounds = []
        for turn in range(10):
            options = [int(i) for i in random.permutation(120)[:NUM_OPTIONS]]
            gt = int(random.integers(NUM_OPTIONS))
            rounds.append(
                {"question": turn, "answer": options[gt], "answer_options": options, "gt_index": gt}
            )
        dialogs.append({"image_id": image_id, "caption": f"a photo of thing {number}", "dialog": rounds})
        relevance = [0.0] * NUM_OPTIONS
        for place, value in zip(random.permutation(NUM_OPTIONS)[:4], (0.2, 0.4, 0.6, 0.8)):
            relevance[int(place)] = value
        round_id = number + 3
        relevance[rounds[round_id - 1]["gt_index"]] = 1.0
        dense.append({"image_id": image_id, "round_id": round_id, "gt_relevance": relevance})
    content = {"questions": [f"is it thing {i}" for i in range(10)], "answers": answers, "dialogs": dialogs}
    write_json(data / "visdial/visdial_1.0_val.json", {"version": "1.0", "split": "val", "data": content})
    write_json(data / "visdial/visdial_1.0_val_dense_annotations.json", dense)


def write_flickr30k(data: Path) -> None:
    images = []
    for number in range(4):
        name = f"{1007129816 + number}.jpg"
        save_picture(data / "flickr30k/flickr30k-images" / name, number)
        sentence = {"tokens": ["a", "man"], "raw": "A man", "imgid": number, "sentid": 5 * number}
        images.append(
            {"filename": name, "imgid": number, "split": "test" if number < 3 else "train"}
            | {"sentids": [5 * number], "sentences": [sentence]}
        )
    write_json(data / "flickr30k/dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_magicbrush(data: Path) -> None:
    """One parquet file of the Hugging Face form; the second turn starts from the first one's target."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for image, turns in ((242679, 2), (139, 1), (77, 1)):
        for turn in range(1, turns + 1):
            source, target = (
                {"bytes": png(image + turn - 1), "path": None},
                {"bytes": png(image + turn), "path": None},
            )
            rows.append(
                {"img_id": str(image), "turn_index": turn, "source_img": source, "mask_img": source}
                | {"instruction": f"Put a cat on the seat {turn}.", "target_img": target}
            )
    (data / "magicbrush").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), data / "magicbrush/dev-00000-of-00001.parquet")


def write_easy_vqa(data: Path) -> None:
    """The package's own folder form."""
    for split, count in (("test", 6), ("train", 4)):
        questions = []
        for image in range(count):
            save_picture(data / "easy_vqa" / split / "images" / f"{image}.png", image)
            questions.append(["what color is the shape?", COLOURS[image % 3], image])
            questions.append(["is there a circle?", "yes" if image % 2 else "no", image])
        write_json(data / "easy_vqa" / split / "questions.json", questions)


def write_all(data: Path) -> None:
    """Everything."""
    write_coco(data)
    write_vqa(data, name="vqav2", prefix="v2_")
    write_vqa(data, name="okvqa", prefix="")
    write_gqa(data)
    write_vizwiz(data)
    write_visdial(data)
    write_flickr30k(data)
    write_magicbrush(data)
    write_easy_vqa(data)
