"""What share of the sequences every source of a configuration gives: rejected documents left out, and replaced.

    OMP_NUM_THREADS=1 python benchmarks/mixture.py [--config launchers/configs/pretrain/vlgpt_7b.yaml] [--windows 20]

The sources are the configuration's, their documents are made up: captions as long as LAION's, pages of MMC4 with 2 to
15 images, and pages of OBELICS of which six in ten have one image. Prints the realised shares of both laws, how often a
source is drawn for a sequence, and the time to plan a window of 4,096.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo.tiny import train_text_tokenizer
from vlgpt.config import load_run
from vlgpt.data.assemble import Assembler, ShardLengths
from vlgpt.data.mixture import Mixture, Redrawn, SourceOrder, base_weights
from vlgpt.data.packing import Packer
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.seeds import generator
from vlgpt.settings import DataSettings, SourceSettings
from vlgpt.shards.index import IndexBuilder
from vlgpt.tokens import DocumentTokenizer

NUM_DOCUMENTS = 5000


class LeavingOut(Mixture):
    """The law before: nothing takes the place of a rejected document."""

    def redraw(self, *arguments: object, **options: object) -> None:  # type: ignore[override]
        """No draws: rejected slots stay empty."""
        return


def document(source: SourceSettings, number: int) -> Document:
    """A caption pair, or a page for sources whose windows begin anywhere."""
    rng = generator(source.name, number)
    parts: list[Part] = [ImagePart(0)]
    if source.start == "beginning":
        parts.append(TextPart("a " * int(np.clip(rng.lognormal(2.9, 0.6), 3, 300))))
    else:
        is_single = source.keep_single_image < 1 and rng.random() < 0.6
        for image in range(1 if is_single else int(rng.integers(2, 16))):
            parts += [ImagePart(image)] if image else []
            parts += [TextPart("a " * int(rng.integers(8, 45))) for _ in range(int(rng.integers(1, 7)))]
    return Document(str(number), source.name, tuple(parts))


def make_packer(
    settings: DataSettings, law: type[Mixture], lengths: list[ShardLengths], tokenizer: DocumentTokenizer
) -> Packer:
    """The real packer of these sources over one shard each."""
    orders = [
        SourceOrder(source.name, seed=0, counts=np.array([NUM_DOCUMENTS]), shuffle_shards=1)
        for source in settings.sources
    ]
    weights = base_weights(settings, [NUM_DOCUMENTS] * len(orders))
    length = settings.sequence_length
    return Packer(
        law(orders, seed=0, weights=weights),
        seed=0,
        assemblers=[
            Assembler(source, tokenizer=tokenizer, sequence_length=length) for source in settings.sources
        ],
        lengths=lambda source, shard: lengths[source],
        packing=settings.packing,
        sequence_length=length,
    )


def main() -> None:
    """Command line: prints each source's wanted share and its share under both laws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="launchers/configs/pretrain/vlgpt_7b.yaml")
    parser.add_argument("--windows", type=int, default=20)
    arguments = parser.parse_args()
    settings = load_run(Path(arguments.config)).data
    tokenizer = DocumentTokenizer(train_text_tokenizer(["a a a"]), num_visual=32, template="short")
    lengths = []
    for source in settings.sources:
        builder = IndexBuilder(tokenizer)
        for number in range(NUM_DOCUMENTS):
            builder.add(str(number), document(source, number), [])
        lengths.append(ShardLengths(builder.build(tar_sha256=""), image_length=tokenizer.image_length))
    wanted = base_weights(settings, [NUM_DOCUMENTS] * len(lengths))
    shares, planning_ms, rejected = [], [], Counter[int]()
    for law in (LeavingOut, Mixture):
        packer = make_packer(settings, law, lengths, tokenizer)
        accepted, rejected = np.zeros(len(wanted)), Counter()
        redrawn: Redrawn = ()
        for window in range(arguments.windows):
            plan = packer.window(window, redrawn)
            redrawn = plan.redrawn
            accepted += np.bincount(plan.slots.source[plan.length > 0], minlength=len(wanted))
            for (s, _), number in plan.rejected.items():
                rejected[s] += number
        shares.append(accepted / accepted.sum())
        planning_ms.append(float(np.median(packer.planned_ms)))
    print(f"{'':20s} {'wanted':>8s} {'left out':>9s} {'replaced':>9s} {'draws per sequence':>19s}")
    for s, source in enumerate(settings.sources):
        draws = 1 + rejected[s] / accepted[s]
        print(f"{source.name:20s} {wanted[s]:8.4f} {shares[0][s]:9.4f} {shares[1][s]:9.4f} {draws:19.2f}")
    print(f"{'ms to plan a window':29s} {planning_ms[0]:9.1f} {planning_ms[1]:9.1f}")


if __name__ == "__main__":
    main()
