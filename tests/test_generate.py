"""Laws of decoding: the cache, the batch, the beams and the order of prompts never change a reply."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.helpers.tiny_unified import (
    NUM_PATCHES,
    NUM_VISUAL,
    PATCH_WIDTH,
    VISUAL_WIDTH,
    new_document_tokenizer,
    new_model,
)
from vlgpt.decoding import generator as generate_module
from vlgpt.decoding.api import DecodeSettings, Prompt, Reply
from vlgpt.decoding.beams import BeamGroup
from vlgpt.decoding.cache import RenderedPrompt, Stream
from vlgpt.decoding.generator import Generator
from vlgpt.decoding.hypothesis import Hypothesis
from vlgpt.decoding.prompts import render_all
from vlgpt.decoding.ranking import log_likelihoods
from vlgpt.decoding.stepwise import Hooks, ids_of
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.tokens import PLACEHOLDER_ID

SENTENCE = "the quick brown fox draws three blue circles beside a lazy elephant what is in picture"
WORDS = SENTENCE.split()


def make_prompts(count: int, *, seed: int = 0) -> list[Prompt]:
    """Chats and plain documents of 3 to 60 positions with 0 to 2 pictures."""
    random = np.random.default_rng(seed)
    prompts = []
    for number in range(count):
        is_chat = number % 3 != 2
        parts, images = [], []
        for turn in range(1 + int(random.integers(2)) * 2 if is_chat else 1):
            role = ("user", "assistant")[turn % 2] if is_chat else "plain"
            for _ in range(int(random.integers(0, 2))):
                parts.append(ImagePart(len(images), role))
                patches = torch.from_numpy(random.normal(size=(NUM_PATCHES, PATCH_WIDTH))).float()
                images.append(("patches", patches))
            parts.append(TextPart(" ".join(random.choice(WORDS, int(random.integers(1, 12)))), role))
        prompts.append(Prompt(Document(f"p{number}", "test", tuple(parts)), tuple(images)))
    return prompts


@pytest.fixture(scope="module")
def drawing() -> Generator:
    """A random model that likes to draw."""
    tokenizer = new_document_tokenizer()
    model = new_model(tokenizer, image_wish=4.0, max_positions=256)
    return Generator(model=model, tokenizer=tokenizer, encoder=None, decoder=None)


@pytest.fixture(scope="module")
def ending() -> Generator:
    """A random model that likes to end its replies. No padding rows: transformers would not mask them."""
    tokenizer = new_document_tokenizer(vocabulary_size=382)
    assert tokenizer.num_tokens == tokenizer.vocabulary_size
    return Generator(
        model=new_model(tokenizer, end_wish=2.5), tokenizer=tokenizer, encoder=None, decoder=None
    )


class RecomputeStream(Stream):
    """Reference: no cache, no batch; every state is a full forward over what its row has read."""

    def __init__(self, lm, prompts, *, begin_image_id, guidance=1.0, empty_prompts=()):
        self.lm, self.guidance, self.begin_image_id = lm, guidance, begin_image_id
        self.num_rows = len(prompts)
        self.read = [prompt.embed(lm) for prompt in prompts]
        self.empty = [
            prompt.embed(lm)[: len(prompt) - int(prompt.token_ids[-1] == begin_image_id)]
            for prompt in empty_prompts
        ]
        self.image = [lm.backbone.get_input_embeddings()(torch.tensor([begin_image_id])) for _ in prompts]

    def state(self, embeddings):
        return self.lm.backbone(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0, -1]

    @property
    def hidden(self):
        return torch.stack([self.state(row) for row in self.read])

    def predict_visual(self, rows):
        predicted = torch.stack([self.lm.regression_head(self.state(self.read[row])) for row in rows])
        if not self.empty:
            return predicted
        empty = torch.stack(
            [
                self.lm.regression_head(self.state(torch.cat([self.empty[row], self.image[row]])))
                for row in rows
            ]
        )
        return empty + self.guidance * (predicted - empty)

    def advance(self, inputs):
        for row, entry in enumerate(inputs):
            if entry is None:
                continue
            if isinstance(entry, int):
                new = self.lm.backbone.get_input_embeddings()(torch.tensor([entry]))
                self.image[row] = new if entry == self.begin_image_id else self.image[row][:0]
            else:
                new = self.lm.embed_visual(entry)[None]
                self.image[row] = torch.cat([self.image[row], new])
            self.read[row] = torch.cat([self.read[row], new])

    def select(self, rows):
        self.read, self.image = [self.read[r] for r in rows], [self.image[r] for r in rows]
        self.empty = [self.empty[r] for r in rows] if self.empty else []
        self.num_rows = len(rows)


def assert_same(found: Reply, wanted: Reply) -> None:
    assert found.token_ids == wanted.token_ids
    assert found.finish == wanted.finish
    assert found.parts == wanted.parts
    assert len(found.visual) == len(wanted.visual)
    for a, b in zip(found.visual, wanted.visual):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert found.log_likelihood == pytest.approx(wanted.log_likelihood, abs=1e-3)


CASES = {
    "greedy": DecodeSettings(max_new_tokens=14, max_images=2),
    "beams": DecodeSettings(max_new_tokens=14, max_images=2, num_beams=5, length_penalty=-1.0),
    "sampling": DecodeSettings(max_new_tokens=20, max_images=2, temperature=1.3, top_p=0.9, top_k=40),
    "guided": DecodeSettings(max_new_tokens=14, max_images=2, visual_guidance=3.0),
    "guided beams": DecodeSettings(max_new_tokens=10, max_images=2, num_beams=3, visual_guidance=2.0),
    "forced": DecodeSettings(images="force", max_images=2, visual_guidance=2.0),
}


@pytest.mark.parametrize("name", CASES)
def test_cached_batches_equal_full_recompute_of_single_prompts(name, drawing, monkeypatch):
    settings = CASES[name]
    prompts = make_prompts(8)
    batches = {1: [drawing.generate([p], settings)[0] for p in prompts]}
    batches[3] = [r for at in (0, 3, 6) for r in drawing.generate(prompts[at : at + 3], settings)]
    batches[8] = drawing.generate(prompts, settings)
    monkeypatch.setattr(generate_module, "Stream", RecomputeStream)
    wanted = [drawing.generate([p], settings)[0] for p in prompts]
    assert max(len(reply.visual) for reply in wanted) == 2
    for replies in batches.values():
        for found, expected in zip(replies, wanted, strict=True):
            assert_same(found, expected)


def greedy_by_hand(generator: Generator, prompt: Prompt, settings: DecodeSettings) -> tuple[list[int], list]:
    """The reply as the paper describes it, without any decoding code: one full forward per position."""
    tokenizer, lm = generator.tokenizer, generator.model.lm
    ids: list[int] = []
    visual_of: dict[int, torch.Tensor] = {}
    at = 0
    queue = iter(generator.tokenize(prompt.images).flatten(0, 1)) if prompt.images else iter(())
    for span in tokenizer.spans(prompt.document, is_prompt=True):
        for offset, token in enumerate(span.ids):
            if span.image is not None and 1 <= offset <= tokenizer.num_visual:
                visual_of[at] = next(queue)
            ids.append(token)
            at += 1
    start, images, chosen = len(ids), [], 0
    special = {tokenizer.bos_id, tokenizer.end_image_id}
    while chosen < settings.max_new_tokens:
        embeddings = lm.backbone.get_input_embeddings()(torch.tensor(ids))
        for position, value in visual_of.items():
            embeddings[position] = lm.embed_visual(value)
        hidden = lm.backbone(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0, -1]
        if images and len(images[-1]) < tokenizer.num_visual:
            images[-1].append(lm.regression_head(hidden))
            visual_of[len(ids)] = images[-1][-1]
            ids.append(PLACEHOLDER_ID)
            if len(images[-1]) == tokenizer.num_visual:
                ids.append(tokenizer.end_image_id)
            continue
        logits = lm.lm_head(hidden)[: tokenizer.num_tokens].clone()
        logits[sorted(special)] = -torch.inf
        if len(images) == settings.max_images or chosen + 1 == settings.max_new_tokens:
            logits[tokenizer.begin_image_id] = -torch.inf
        ids.append(int(logits.argmax()))
        chosen += 1
        if ids[-1] == tokenizer.begin_image_id:
            images.append([])
        if ids[-1] == tokenizer.eos_id:
            break
    return ids[start:], [torch.stack(image) for image in images]


@torch.no_grad()
def test_greedy_replies_are_what_the_definition_gives(drawing):
    settings = CASES["greedy"]
    prompts = make_prompts(6, seed=5)
    for prompt, reply in zip(prompts, drawing.generate(prompts, settings)):
        ids, images = greedy_by_hand(drawing, prompt, settings)
        assert list(reply.token_ids) == ids
        assert len(images) == len(reply.visual)
        for found, wanted in zip(reply.visual, images):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["greedy", "beams", "sampling"])
def test_replies_do_not_depend_on_batch_composition_or_order(name, drawing):
    settings = CASES[name]
    prompts = make_prompts(7, seed=3)
    wanted = drawing.generate(prompts, settings)
    order = [4, 0, 6, 2, 2, 5]
    for found, number in zip(drawing.generate([prompts[i] for i in order], settings), order):
        assert_same(found, wanted[number])


@pytest.mark.parametrize(
    "beams,penalty,minimum", [(1, 0.0, 0), (5, -1.0, 0), (5, 0.0, 4), (3, 1.0, 0), (4, 2.0, 8)]
)
def test_text_equals_transformers_generate(beams, penalty, minimum, ending):
    prompts = [p for p in make_prompts(12, seed=1) if not p.images]
    assert len(prompts) >= 3
    settings = DecodeSettings(
        max_new_tokens=12, min_new_tokens=minimum, num_beams=beams, length_penalty=penalty, images="never"
    )
    tokenizer, lm = ending.tokenizer, ending.model.lm
    special = sorted({tokenizer.bos_id, tokenizer.begin_image_id, tokenizer.end_image_id})
    replies = ending.generate(prompts, settings)
    lengths = set()
    for prompt, reply in zip(prompts, replies):
        ids = [token for span in tokenizer.spans(prompt.document, is_prompt=True) for token in span.ids]
        found = lm.language_model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=12,
            min_new_tokens=minimum or None,
            num_beams=beams,
            length_penalty=penalty,
            do_sample=False,
            suppress_tokens=[*special, *range(tokenizer.num_tokens, tokenizer.vocabulary_size)],
            pad_token_id=tokenizer.eos_id,
            use_cache=True,
        )[0, len(ids) :].tolist()
        assert list(reply.token_ids) == found
        lengths.add(len(found))
    assert len(lengths) > 1 or minimum == 8


def test_sampling_follows_the_seed_the_prompt_and_the_distribution(drawing):
    settings = DecodeSettings(max_new_tokens=1, temperature=1.0, images="never", top_k=5)
    document = make_prompts(1)[0].document
    prompts = [
        Prompt(dataclasses.replace(document, id=f"s{i}"), make_prompts(1)[0].images) for i in range(400)
    ]
    first = [reply.token_ids[0] for reply in drawing.generate(prompts, settings)]
    assert first == [reply.token_ids[0] for reply in drawing.generate(prompts, settings)]
    assert first != [r.token_ids[0] for r in drawing.generate(prompts, dataclasses.replace(settings, seed=1))]
    greedy = drawing.generate(prompts[:1], dataclasses.replace(settings, temperature=0.0, top_k=0))[0]
    tokens, counts = np.unique(first, return_counts=True)
    assert len(tokens) <= 5
    assert tokens[counts.argmax()] == greedy.token_ids[0]
    shares = {int(t): c / len(first) for t, c in zip(tokens, counts)}
    likelihoods = np.exp(
        [
            next(r for r in drawing.generate(prompts, settings) if r.token_ids[0] == t).log_likelihood
            for t in tokens
        ]
    )
    for token, likelihood in zip(tokens, likelihoods / likelihoods.sum()):
        assert shares[int(token)] == pytest.approx(likelihood, abs=0.1)


def test_stop_strings_cut_the_text_and_end_the_reply(drawing):
    settings = DecodeSettings(max_new_tokens=20, images="never")
    prompt = make_prompts(1)[0]
    whole = drawing.generate([prompt], settings)[0]
    stop = whole.text[4:7]
    assert whole.text.find(stop) > 0
    for beams in (1, 3):
        cut = drawing.generate([prompt], dataclasses.replace(settings, stop=("zzz", stop), num_beams=beams))[
            0
        ]
        if beams == 1:
            assert cut.finish == "stop"
            assert cut.text == whole.text[: whole.text.find(stop)].strip()
            assert len(cut.token_ids) < len(whole.token_ids)
        assert stop not in cut.text


@pytest.mark.parametrize("name", ["greedy", "sampling", "beams"])
def test_streamed_pieces_add_up_to_the_reply(name, drawing):
    pieces: dict[int, list[str]] = {}
    images: dict[int, list[torch.Tensor]] = {}
    prompts = make_prompts(5, seed=9)
    replies = drawing.generate(
        prompts,
        dataclasses.replace(CASES[name], stop=("zz",)),
        on_text=lambda number, piece: pieces.setdefault(number, []).append(piece),
        on_image=lambda number, visual: images.setdefault(number, []).append(visual),
    )
    for number, reply in enumerate(replies):
        assert "".join(pieces.get(number, [])) == reply.text
        assert len(images.get(number, [])) == len(reply.visual)
        assert all(torch.equal(a, b) for a, b in zip(images.get(number, []), reply.visual))


def test_a_cancelled_reply_ends_and_the_others_do_not_change(drawing):
    prompts = make_prompts(3)
    settings = DecodeSettings(max_new_tokens=10, images="never")
    wanted = drawing.generate(prompts, settings)
    asked = []

    def is_cancelled(number: int) -> bool:
        asked.append(number)
        return number == 1 and asked.count(1) == 3

    found = drawing.generate(prompts, settings, is_cancelled=is_cancelled)
    assert found[1].token_ids == wanted[1].token_ids[:3]
    assert found[1].finish == "length"
    assert_same(found[0], wanted[0])
    assert_same(found[2], wanted[2])


def test_images_follow_the_settings(drawing):
    prompts = make_prompts(8, seed=2)
    tokenizer = drawing.tokenizer
    never = drawing.generate(prompts, DecodeSettings(max_new_tokens=16, images="never"))
    assert all(not reply.visual and tokenizer.begin_image_id not in reply.token_ids for reply in never)
    for limit in (1, 2, 3):
        free = drawing.generate(prompts, DecodeSettings(max_new_tokens=24, max_images=limit))
        assert max(len(reply.visual) for reply in free) == limit
        forced = drawing.generate(prompts, DecodeSettings(images="force", max_images=limit))
        span = tokenizer.image_span(0, role="assistant", is_target=True).ids
        assert all(reply.token_ids == span * limit and reply.text == "" for reply in forced)
        assert all(reply.finish == "end" and reply.log_likelihood == 0 for reply in forced)
    for reply in free:
        assert reply.visual == () or reply.visual[0].shape == (NUM_VISUAL, VISUAL_WIDTH)
        ids = list(reply.token_ids)
        for at, token in enumerate(ids):
            if token == tokenizer.begin_image_id:
                assert ids[at : at + tokenizer.image_length] == list(span)
        assert ids.count(tokenizer.begin_image_id) == ids.count(tokenizer.end_image_id) == len(reply.visual)
        assert not {tokenizer.bos_id, *range(tokenizer.num_tokens, tokenizer.vocabulary_size)} & {
            t for t in ids if t != PLACEHOLDER_ID
        }


def test_a_beam_with_an_image_is_not_ranked_as_longer_for_its_embeddings(drawing, monkeypatch):
    """The length in a score is the number of choices: [IMG] is one, its embeddings and [/IMG] are none."""
    finished, best = [], BeamGroup.best

    def spy(group):
        finished.extend(group.finished)
        return best(group)

    monkeypatch.setattr(BeamGroup, "best", spy)
    settings = DecodeSettings(max_new_tokens=10, max_images=2, num_beams=4, length_penalty=1.0)
    drawing.generate(make_prompts(4), settings)
    assert any(beam.visual for _, beam in finished)
    for score, beam in finished:
        num_choices = len(beam.token_ids) - len(beam.visual) * (NUM_VISUAL + 1)
        assert score == pytest.approx(beam.log_likelihood / num_choices)


def test_logits_processors_get_ids_where_the_scores_are():
    """transformers' repetition penalty looks up scores at ids: on a GPU both must be there."""
    prompt = RenderedPrompt("p", torch.tensor([1, 5]), torch.zeros(2, dtype=torch.bool), None)
    writer = Hypothesis(0, 2)
    writer.token_ids.append(7)
    seen = []
    scores = torch.zeros(1, 20, device="meta")
    Hooks(process=lambda ids, scores: (seen.append(ids), scores)[1]).processed(scores, [prompt], [writer])
    assert seen[0].device == scores.device and seen[0].shape == (1, 3) and seen[0].dtype == torch.int64
    assert ids_of(prompt, writer, torch.device("cpu")).tolist() == [[1, 5, 7]]


def test_guidance_of_one_is_no_guidance_and_more_moves_away_from_the_empty_prompt(drawing):
    prompts = make_prompts(4)
    plain = drawing.generate(prompts, DecodeSettings(images="force"))
    empty = drawing.generate(
        [
            Prompt(Document("e", "test", (TextPart("", "user"),) if p.document.is_chat else ()), ())
            for p in prompts
        ],
        DecodeSettings(images="force"),
    )
    zero = drawing.generate(prompts, DecodeSettings(images="force", visual_guidance=0.0))
    for without, unconditional, nothing in zip(plain, empty, zero):
        assert not torch.allclose(without.visual[0], unconditional.visual[0], atol=1e-3)
        torch.testing.assert_close(nothing.visual[0], unconditional.visual[0], atol=1e-5, rtol=0)
    guided = drawing.generate(prompts, DecodeSettings(images="force", visual_guidance=4.0))
    first = [reply.visual[0][0] for reply in (guided[0], plain[0], empty[0])]
    torch.testing.assert_close(first[0], first[2] + 4 * (first[1] - first[2]), atol=1e-4, rtol=0)


def test_the_conversation_goes_on_from_a_reply_as_if_it_had_been_given(drawing):
    """Reply parts and visual embeddings put into the next prompt give the state that decoding had."""
    prompt = make_prompts(1)[0]
    settings = DecodeSettings(max_new_tokens=14, max_images=2)
    reply = drawing.generate([prompt], settings)[0]
    assert reply.visual
    shifted = [
        dataclasses.replace(p, index=p.index + len(prompt.images)) if isinstance(p, ImagePart) else p
        for p in reply.parts
    ]
    document = Document("next", "test", (*prompt.document.parts, *shifted, TextPart("and now?", "user")))
    images = (*prompt.images, *(("visual", visual) for visual in reply.visual))
    assert drawing.generate([Prompt(document, images)], settings)[0].token_ids


@torch.no_grad()
def ranks_by_hand(
    generator: Generator, prompt: Prompt, candidates: list[str]
) -> list[tuple[float, int, int]]:
    tokenizer, lm = generator.tokenizer, generator.model.lm
    result = []
    for candidate in candidates:
        head = tokenizer.spans(prompt.document, is_prompt=True)
        prefix = [t for span in head for t in span.ids]
        end = [tokenizer.eos_id]
        ids = prefix + tokenizer.encode_text(candidate) + end
        is_visual = torch.zeros(1, len(ids), dtype=torch.bool)
        at = 0
        for span in head:
            if span.image is not None:
                is_visual[0, at + 1 : at + 1 + NUM_VISUAL] = True
            at += len(span.ids)
        visual = generator.tokenize(prompt.images) if prompt.images else None
        hidden = lm.backbone(
            inputs_embeds=lm.embed(torch.tensor([ids]), is_visual, visual), use_cache=False
        ).last_hidden_state[0]
        log_probs = lm.logits(hidden).log_softmax(-1)
        total = sum(float(log_probs[p - 1, ids[p]]) for p in range(len(prefix), len(ids)))
        result.append((total, len(ids) - len(prefix), len(ids)))
    return result


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rank_equals_one_full_forward_per_candidate(attention, drawing):
    random = np.random.default_rng(0)
    candidates = [" ".join(random.choice(WORDS, int(random.integers(0, 9)))) for _ in range(100)]
    candidates[3] = candidates[70] = ""
    backbone = drawing.model.lm.backbone
    before = backbone.config._attn_implementation
    backbone.config._attn_implementation = attention
    for prompt in make_prompts(3):
        by_hand = ranks_by_hand(drawing, prompt, candidates)
        sums = drawing.rank(prompt, candidates)
        np.testing.assert_allclose(sums, [total for total, _, _ in by_hand], atol=2e-4)
        np.testing.assert_allclose(
            drawing.rank(prompt, candidates, normalise="mean"), [t / n for t, n, _ in by_hand], atol=2e-4
        )
        np.testing.assert_allclose(
            drawing.rank(prompt, candidates, normalise="emu"), [t / n for t, _, n in by_hand], atol=2e-4
        )
        assert sums[3] == sums[70]
    backbone.config._attn_implementation = before


def test_ranking_a_greedy_reply_gives_its_own_likelihood(ending):
    prompts = make_prompts(6, seed=4)
    replies = ending.generate(prompts, DecodeSettings(max_new_tokens=20, images="never"))
    rendered = render_all(prompts, tokenizer=ending.tokenizer, read_images=ending.tokenize)
    for prompt, reply in zip(rendered, replies):
        found = log_likelihoods(ending.model.lm, prompt, [reply.token_ids, reply.token_ids[:1]])
        assert float(found[0]) == pytest.approx(reply.log_likelihood, abs=1e-3)


def test_a_full_context_ends_a_reply_and_an_image_is_never_cut(drawing):
    room = drawing.max_length
    text = " ".join(WORDS[i % len(WORDS)] for i in range(400))
    ids = drawing.tokenizer.encode_text(text)
    lengths = set()
    for size in range(room - 12, room - 1):
        prompt = Prompt(Document("long", "test", (TextPart(drawing.tokenizer.decode(ids[: size - 1])),)))
        reply = drawing.generate([prompt], DecodeSettings(max_new_tokens=40, max_images=9))[0]
        sequence = drawing.tokenizer.spans(prompt.document, is_prompt=True)
        total = sum(len(span.ids) for span in sequence) + len(reply.token_ids)
        assert total <= room
        assert reply.token_ids.count(drawing.tokenizer.begin_image_id) == len(reply.visual)
        lengths.add(len(reply.token_ids))
    assert len(lengths) > 3
    too_long = Prompt(Document("long", "test", (TextPart(drawing.tokenizer.decode(ids[: room + 5])),)))
    with pytest.raises(UserError, match="positions"):
        drawing.generate([too_long], DecodeSettings())


def test_long_chats_are_trimmed_at_turn_borders_with_their_images(drawing, caplog):
    parts, images = [], []
    for turn in range(20):
        parts += [ImagePart(turn, "user"), TextPart(f"question {turn} about the picture", "user")]
        parts += [TextPart(f"answer {turn}", "assistant")]
        images.append(("visual", torch.full((NUM_VISUAL, VISUAL_WIDTH), float(turn))))
    parts.append(TextPart("and in the end?", "user"))
    prompt = Prompt(Document("chat", "test", tuple(parts)), tuple(images))
    settings = DecodeSettings(max_new_tokens=32)
    with caplog.at_level("WARNING", "vlgpt"):
        trimmed = drawing.trim(prompt, settings)
    assert "exchanges" in caplog.text
    kept = len(trimmed.images)
    assert 0 < kept < 20
    assert [float(image[1][0, 0]) for image in trimmed.images] == list(range(20 - kept, 20))
    assert trimmed.document.parts[0] == ImagePart(0, "user")
    assert trimmed.document.parts[1].text == f"question {20 - kept} about the picture"
    drawing.generate([trimmed], settings)
    assert drawing.trim(trimmed, settings) == trimmed


def test_bad_requests_say_what_is_wrong(drawing):
    for wrong in (
        {"max_new_tokens": 0},
        {"min_new_tokens": 99},
        {"num_beams": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"images": "always"},
        {"num_beams": 2, "temperature": 1.0},
        {"stop": "abc"},
        {"max_images": 0},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            DecodeSettings(**wrong)
    document = Document("d", "test", (ImagePart(0), TextPart("x")))
    with pytest.raises(UserError, match="1 image parts, but 0"):
        Prompt(document)
    with pytest.raises(UserError, match="encoder"):
        drawing.generate([Prompt(document, (b"xx",))], DecodeSettings())
    with pytest.raises(UserError, match="shape"):
        drawing.generate([Prompt(document, (("visual", torch.zeros(3, 3)),))], DecodeSettings())
    with pytest.raises(UserError, match="picture decoder"):
        drawing.draw(torch.zeros(1, NUM_VISUAL, VISUAL_WIDTH), seeds=[(0,)])
    assert drawing.generate([], DecodeSettings()) == []
    assert drawing.rank(Prompt(Document("d", "t", (TextPart("x"),))), []).shape == (0,)


def test_the_coldest_temperatures_are_greedy(drawing):
    greedy = DecodeSettings(max_new_tokens=6, images="never")
    cold = dataclasses.replace(greedy, temperature=1e-40)
    prompts = make_prompts(3)
    replies = [drawing.generate(prompts, settings) for settings in (greedy, cold)]
    assert [r.token_ids for r in replies[0]] == [r.token_ids for r in replies[1]]
