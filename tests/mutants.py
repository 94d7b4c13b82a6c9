"""Breaks chosen lines of the product one by one, each in a copy of the source tree, and expects a test to fail.

A line is chosen because its mistake would cost a lab money: the run goes on, the loss falls, and the result is wrong.
A mutant that survives shows a law that no test states. Run it with `make mutants` (about ten minutes); `--list` shows
the mutants, `--only 3,7` runs some of them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 180
# Exit codes of pytest.
ALL_PASSED, SOME_FAILED = 0, 1


@dataclass(frozen=True)
class Mutant:
    """`old` occurs once in `file` and becomes `new`; then a test of `tests`, a pytest selection, must fail."""

    file: str
    old: str
    new: str
    tests: str
    law: str


LOSSES, BATCH, LM, LOOP = (
    "vlgpt/models/losses.py",
    "vlgpt/batch.py",
    "vlgpt/models/multimodal_lm.py",
    "vlgpt/train/loop.py",
)
LABELS = (
    "tests/test_label_laws.py::test_targets_are_exactly_the_answers_with_their_end_tokens_and_images[vlgpt]"
)

MUTANTS = [
    # --- what is predicted
    Mutant(
        LOSSES,
        "text_from=text - 1,",
        "text_from=text,",
        LABELS,
        "A token is predicted from the position before it, never from its own.",
    ),
    Mutant(
        LOSSES,
        "visual_number = is_visual.cumsum(0) - 1",
        "visual_number = is_visual.cumsum(0)",
        LABELS,
        "The k-th visual position belongs to row k of the visual embeddings.",
    ),
    Mutant(
        LOSSES,
        '"visual": int((batch.is_target & batch.is_visual).sum()),',
        '"visual": int(batch.is_visual.sum()),',
        LABELS,
        "Images that the user shows are not counted as targets.",
    ),
    Mutant(
        "vlgpt/tokens.py",
        'yield Piece("end", True, turns.end if is_reply and roles[i + 1] != role else ())',
        'yield Piece("end", False, turns.end if is_reply and roles[i + 1] != role else ())',
        LABELS,
        "The end token of every reply is a target, also of those that are not the last.",
    ),
    Mutant(
        "vlgpt/tokens.py",
        "yield Piece(role, is_reply, part=i)",
        "yield Piece(role, True, part=i)",
        LABELS,
        "What the user says is never a target.",
    ),
    Mutant(
        "vlgpt/tokens.py",
        'result = [Piece("start", False, start)]',
        'result = [Piece("start", False, () if roles else start)]',
        "tests/test_turns.py::test_plain_documents_begin_with_what_the_tokenizer_puts_before_a_text",
        "A plain document begins with BOS where the tokenizer puts one.",
    ),
    Mutant(
        "vlgpt/tokens.py",
        "return self.num_visual + 2",
        "return self.num_visual + 1",
        "tests/test_turns.py::test_what_is_planned_from_the_index_is_what_is_rendered",
        "An image takes [IMG], N embeddings and [/IMG], in the plan as in the row.",
    ),
    # --- what a batch may hold
    Mutant(
        BATCH,
        "if num_positions != num_images * self.num_visual:",
        "if num_positions > num_images * self.num_visual:",
        "tests/test_batch.py::test_visual_positions_must_be_as_many_as_embeddings",
        "A batch with more images than places is refused, not only one with fewer.",
    ),
    Mutant(
        BATCH,
        "if bool((self.is_target & is_start).any()):",
        "if bool((self.is_target & is_start)[:, 0].any()):",
        "tests/test_batch.py::test_a_target_needs_a_position_before_it_in_its_own_segment",
        "The first position of every segment is no target: the document before would have to predict it.",
    ),
    Mutant(
        BATCH,
        "(self.segment_ids[rows, columns] != self.segment_ids[rows, starts[:, 1:]]).any()",
        "(self.segment_ids[rows, columns] == 0).any()",
        "tests/test_batch.py::test_an_image_must_lie_in_one_segment",
        "An image lies in one document.",
    ),
    Mutant(
        "vlgpt/data/collate.py",
        "np.arange(end - start), loaded.source",
        "np.arange(start, end), loaded.source",
        LABELS,
        "Positions restart at 0 in every document.",
    ),
    # --- packed documents do not see each other
    Mutant(
        BATCH,
        "is_start[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]",
        "is_start[:, 1:] = segment_ids[:, 1:] < segment_ids[:, :-1]",
        "tests/models/test_attention_backends.py::"
        "test_the_varlen_function_gets_exact_bounds_and_gives_what_sdpa_gives",
        "Attention gets the bounds of every document, not only that of the padding.",
    ),
    Mutant(
        LM,
        "dropout_p=dropout, is_causal=True, scale=scale",
        "dropout_p=dropout, is_causal=False, scale=scale",
        "tests/stages/test_language.py::test_a_token_changes_no_hidden_state_before_it",
        "No position sees what comes after it.",
    ),
    Mutant(
        LM,
        "padding = torch.arange(logits.shape[-1], device=logits.device) >= self.num_tokens",
        "padding = torch.arange(logits.shape[-1], device=logits.device) > self.num_tokens",
        "tests/models/test_language_models.py::test_rows_that_pad_the_vocabulary_have_no_probability",
        "A row that only pads the vocabulary is never drawn.",
    ),
    # --- one step
    Mutant(
        LOOP,
        "undo_means = engine.world_size * len(targets)",
        "undo_means = engine.world_size",
        "tests/train/test_step_sums.py",
        "The gradient does not depend on how many micro-batches a step has.",
    ),
    Mutant(
        LOOP,
        "engine.all_sum(local.sum(0)).tolist()",
        "(local.sum(0) * engine.world_size).tolist()",
        "tests/train/test_step_sums.py",
        "Losses are divided by the targets of all ranks, however unequal these are.",
    ),
    Mutant(
        LOOP,
        "terms[name].weight * terms[name].total / max(counts[name], 1.0)",
        "terms[name].total / max(counts[name], 1.0)",
        "tests/train/test_step_sums.py",
        "Every term counts with its weight.",
    ),
    # --- the model
    Mutant(
        LM,
        "if head.weight is not table.weight:",
        "if head.weight is table.weight:",
        "tests/stages/test_language.py::test_lora_trains_the_adapter_the_head_and_two_token_rows_only",
        "With LoRA the rows of [IMG] and [/IMG] are trained in an untied LM head too.",
    ),
    Mutant(
        LM,
        "rows, tokens = layer.trainable_tokens_delta[active_adapters[0]], layer.token_indices[active_adapters[0]]",
        "rows, tokens = layer.trainable_tokens_delta[active_adapters[0]].detach(), "
        "layer.token_indices[active_adapters[0]]",
        "tests/models/test_attention_backends.py::test_token_rows_train_as_with_pefts_own_layer",
        "Trained token rows get their gradient.",
    ),
    Mutant(
        LM,
        "return projected * self.visual_scale",
        "return projected",
        "tests/models/test_language_models.py::test_images_and_words_enter_at_one_scale",
        "Visual embeddings enter at the scale of words.",
    ),
    Mutant(
        LM,
        "num_rows = self.num_tokens - NUM_IMAGE_TOKENS",
        "num_rows = self.num_tokens",
        "tests/models/test_language_models.py::test_rows_of_new_tokens_stay_out_of_the_fingerprint",
        "The fingerprint of a language model is that of its file, whatever rows a run adds.",
    ),
    Mutant(
        "vlgpt/models/standardise.py",
        "return (x * self.std + self.mean).to(x.dtype)",
        "return (x * self.std).to(x.dtype)",
        "tests/stages/test_tokenizer.py::test_statistics_standardise_and_invert_and_add_up_over_batches",
        "The inverse of a standardiser gives back what went in.",
    ),
    Mutant(
        "vlgpt/models/standardise.py",
        "return target[:, :1] + residual - residual.mean(1, keepdim=True)",
        "return target[:, :1] + residual",
        "tests/stages/test_tokenizer.py::test_the_mean_token_alone_decides_the_mean_of_a_condition",
        "Predicted residuals do not move the mean of a condition.",
    ),
    # --- the data stream
    Mutant(
        "vlgpt/data/mixture.py",
        "remainder = exact - whole + ((whole == 0) & (weights > 0))",
        "remainder = exact - whole",
        "tests/data/test_mixture.py::test_a_small_source_gets_a_slot_before_larger_ones_are_rounded_up",
        "A source of small weight gets a slot in every window.",
    ),
    Mutant(
        "vlgpt/data/mixture.py",
        "key = slot_keys(self.seed, window, len(source), attempt)",
        "key = slot_keys(self.seed, window, len(source))",
        "tests/data/test_mixture.py::test_every_draw_has_random_numbers_of_its_own",
        "A draw in place of a rejected one has random numbers of its own.",
    ),
    Mutant(
        "vlgpt/data/mixture.py",
        "return self._draw(source, self.draws_before(window + 1, redrawn), key)",
        "return self._draw(source, self.draws_before(window, redrawn), key)",
        "tests/data/test_redraws.py::test_every_document_is_offered_once_per_epoch_though_many_are_rejected",
        "Every document is offered once per epoch, also where documents are rejected.",
    ),
    Mutant(
        "vlgpt/data/packing.py",
        "free = length + (fitting & -fitting).bit_length() - 1",
        "free = length + fitting.bit_length() - 1",
        "tests/data/test_packing.py::test_a_sequence_goes_into_the_fullest_row_with_room",
        "A sequence goes into the fullest row with room; other rules waste positions.",
    ),
    Mutant(
        "vlgpt/data/loader.py",
        "self.position = self._delivered.popleft()",
        "self.position = self._delivered.pop()",
        "tests/data/test_loader.py::test_the_state_counts_what_was_consumed_not_what_was_fetched",
        "A checkpoint holds the position that was trained on, not the one that was prefetched.",
    ),
    Mutant(
        "vlgpt/data/stream.py",
        "at = advance(at, world_size, maker)",
        "at = advance(at, 1, maker)",
        "tests/data/test_loader.py::test_ranks_share_the_stream_without_overlap",
        "No two ranks train on the same row.",
    ),
    Mutant(
        "vlgpt/data/workers.py",
        "self._poisoned.add(place)",
        "pass",
        "tests/data/test_robustness.py::test_a_worker_killed_by_a_sample_is_replaced_and_the_sample_put_aside",
        "A sample that killed its worker is never read again.",
    ),
    # --- commits and files
    Mutant(
        "vlgpt/train/together.py",
        """    _all_or_none(group, folder, lambda: commits.write_manifest(folder, group.rank, owned(folder)))
    marker = {"step": step, **(facts or {})}
    _all_or_none(group, folder, lambda: _seal(group, folder, marker))
    on_rank_0(group, lambda: _prune(root, keep))
""",
        """    _all_or_none(group, folder, lambda: commits.write_manifest(folder, group.rank, owned(folder)))
    marker = {"step": step, **(facts or {})}
    _seal(group, folder, marker)
    on_rank_0(group, lambda: _prune(root, keep))
""",
        "tests/train/test_commit.py::test_a_rank_that_cannot_write_leaves_no_commit_on_any",
        "When a rank fails at any point of a save, all ranks say so and nothing of the commit is left.",
    ),
    Mutant(
        "vlgpt/train/together.py",
        "failures = [text for text in group.gather_objects(failure) if text]",
        "failures = [text for text in group.gather_objects(failure)[:1] if text]",
        "tests/train/test_commit.py::test_a_rank_that_cannot_write_leaves_no_commit_on_any",
        "A save that fails on any rank fails on all, not only one that fails on rank 0.",
    ),
    Mutant(
        "vlgpt/commits.py",
        'if sha256_file(path) != record["sha256"]:',
        "if False:",
        "tests/train/test_commit.py::test_a_damaged_checkpoint_is_passed_over_and_named",
        "A changed byte in a checkpoint is found, also when its size is right.",
    ),
    Mutant(
        "vlgpt/commits.py",
        "if tag not in committed[:keep] and tag < committed[0]:",
        "if tag not in committed[:keep]:",
        "tests/train/test_commit.py::test_pruning_keeps_the_newest_good_ones_and_never_the_last",
        "Pruning leaves a folder alone that other ranks may be writing now.",
    ),
    Mutant(
        "vlgpt/files.py",
        """        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:""",
        """        _fsync(temporary)
        path.write_bytes(temporary.read_bytes())
        temporary.unlink()
    except BaseException:""",
        "tests/train/test_commit.py::test_a_small_file_is_either_old_or_new_whatever_fails_in_between",
        "A small file is whole, old or new, at any moment.",
    ),
    Mutant(
        "vlgpt/shards/writer.py",
        """        write_atomic(self.folder / f"{self.name}.idx", index.save_bytes())
        write_atomic(self.folder / f"{self.name}.json", report.model_dump_json(indent=1))
        os.replace(self._partial, final)
""",
        """        os.replace(self._partial, final)
        write_atomic(self.folder / f"{self.name}.idx", index.save_bytes())
        write_atomic(self.folder / f"{self.name}.json", report.model_dump_json(indent=1))
""",
        "tests/shards/test_shards.py::test_a_tar_gets_its_name_after_its_index_and_its_report",
        "A tar under its final name has a valid index and report beside it.",
    ),
    Mutant(
        "vlgpt/shards/index.py",
        "text_start=_starts(num_texts),",
        "text_start=_starts(self.num_parts),",
        "tests/shards/test_shards.py::test_index_columns_describe_every_part_and_member",
        "A feature row per text is counted by texts, not by parts.",
    ),
    Mutant(
        "data_prep/duplicates.py",
        "leaving = np.flatnonzero((highest == CONTAMINATED) | (lowest > 0))",
        "leaving = np.flatnonzero(lowest > 0)",
        "tests/data_prep/test_dedup.py::test_a_document_leaves_only_when_all_its_pictures_are_duplicates",
        "One image of an evaluation set is enough for a document to leave.",
    ),
    # --- export and decoding
    Mutant(
        "vlgpt/models/weights.py",
        "return sum(deltas, tensor.detach().float()).to(tensor.dtype)",
        "return sum((delta.to(tensor.dtype) for delta in deltas), tensor.detach())",
        "tests/test_export.py::test_adapters_are_merged_with_one_rounding",
        "Merging an adapter into 16-bit weights rounds once.",
    ),
    Mutant(
        "vlgpt/decoding/cache.py",
        "positions = self.is_seen.sum(1, keepdim=True)",
        "positions = self.is_seen.sum(1, keepdim=True) * 0 + self.num_slots",
        "tests/test_generate.py::test_cached_batches_equal_full_recompute_of_single_prompts",
        "A cached row of a batch is what a full recompute of its prompt alone gives.",
    ),
    Mutant(
        "vlgpt/decoding/beams.py",
        "return beam.log_likelihood / beam.num_chosen**self.rules.settings.length_penalty",
        "return beam.log_likelihood / len(beam.token_ids) ** self.rules.settings.length_penalty",
        "tests/test_generate.py::test_a_beam_with_an_image_is_not_ranked_as_longer_for_its_embeddings",
        "In the length of a beam an image counts as one choice.",
    ),
    # --- metrics
    Mutant(
        "evaluation/metrics/captions.py",
        "np.minimum(ours, theirs) * theirs",
        "ours * theirs",
        "tests/evaluation/test_metrics_captions.py::test_scores_of_odd_captions_equal_pycocoevalcap",
        "CIDEr-D gains nothing from a repeated word.",
    ),
    Mutant(
        "evaluation/metrics/captions.py",
        "best = np.lexsort((lengths, distance, own_image))",
        "best = np.lexsort((-lengths, distance, own_image))",
        "tests/evaluation/test_metrics_captions.py::test_scores_of_real_captions_equal_pycocoevalcap",
        "BLEU takes the shorter of two references that are equally near in length.",
    ),
    Mutant(
        "evaluation/metrics/vqa.py",
        "with_one_out = num_matches * min(1.0, max(num_matches - 1, 0) / 3)",
        "with_one_out = num_matches * min(1.0, num_matches / 3)",
        "tests/evaluation/test_metrics_vqa.py::test_percentages_known_by_heart",
        "VQA accuracy leaves every annotator out in turn.",
    ),
    Mutant(
        "evaluation/metrics/fid.py",
        "np.cov(rows, rowvar=False)",
        "np.cov(rows, rowvar=False, bias=True)",
        "tests/evaluation/test_metrics_fid.py::test_distance_equals_the_published_implementations",
        "FID takes the unbiased covariance.",
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: the test that failed, or the problem (`is_killed` is False)."""

    is_killed: bool
    text: str
    seconds: float


def copy_tree(target: Path) -> None:
    """The files that git knows, as they are now."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in names.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, selections: Sequence[str], *, timeout_s: float) -> tuple[int | None, str]:
    """pytest in a copy of the tree: -> its exit code (None after the time limit) and its output."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(tree),
        # A restored file may have the size and the second of its mutant: bytecode would outlive it.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    options = ("-q", "-x", "-p", "no:cacheprovider", "--durations=0")
    command = [sys.executable, "-m", "pytest", *options, *selections]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def try_mutant(tree: Path, mutant: Mutant) -> Outcome:
    """Break one line in the copy, run its tests, restore the line."""
    path = tree / mutant.file
    original = path.read_text(encoding="utf-8")
    if (count := original.count(mutant.old)) != 1:
        return Outcome(False, f"the text to be broken occurs {count} times", 0.0)
    started_s = time.monotonic()
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, output = run_tests(tree, [mutant.tests], timeout_s=TIMEOUT_S)
    finally:
        path.write_text(original, encoding="utf-8")
    seconds = time.monotonic() - started_s
    if code == ALL_PASSED:
        return Outcome(False, "SURVIVED", seconds)
    if code is None:
        return Outcome(False, f"no answer after {TIMEOUT_S} s", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(\w+)", output, re.MULTILINE)
    if code != SOME_FAILED or failed is None:
        return Outcome(False, f"the tests cannot run (exit code {code}): {output.strip()[-300:]}", seconds)
    return Outcome(True, failed[1], seconds)


def main() -> int:
    """-> 1 when a mutant survives, or when its tests fail without it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="show the mutants and their laws")
    parser.add_argument("--only", default="", metavar="N,M", help="numbers of the mutants to run")
    options = parser.parse_args()
    numbers = [int(text) for text in options.only.split(",") if text] or range(1, len(MUTANTS) + 1)
    chosen = [(number, MUTANTS[number - 1]) for number in numbers]
    if options.list:
        for number, mutant in chosen:
            print(f"{number:2}  {mutant.file:32}  {mutant.law}")
        return 0
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        # A test that fails anyway would kill every mutant.
        selections = sorted({mutant.tests for _, mutant in chosen})
        code, output = run_tests(tree, selections, timeout_s=TIMEOUT_S * len(selections))
        if code != ALL_PASSED:
            print(f"the tests fail without any mutant:\n{output[-3000:]}")
            return 1
        for number, mutant in chosen:
            outcome = try_mutant(tree, mutant)
            survivors += not outcome.is_killed
            print(f"{number:2}  {mutant.file:32}  {outcome.seconds:5.1f} s  {outcome.text}", flush=True)
            if not outcome.is_killed:
                print(f"    {mutant.law}\n    {mutant.tests}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} not killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
