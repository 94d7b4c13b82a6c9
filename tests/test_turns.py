"""Laws of chat templates: a model is spoken to in its own words, token for token, or the template is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep import index
from demo.stages import ClipStage, ClipStageSettings
from demo.tiny import train_text_tokenizer
from tests.helpers import chat_tokenizers
from tests.helpers.chat_tokenizers import make
from tests.helpers.shipped_parts import write_llama_tokenizer
from tests.helpers.tiny_unified import new_document_tokenizer, new_model
from vlgpt import hf
from vlgpt.data.assemble import Assembler, ShardLengths
from vlgpt.data.mixture import Draws
from vlgpt.data.sources import OpenSource
from vlgpt.decoding.generator import Generator
from vlgpt.decoding.prompts import empty_prompt, render
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError
from vlgpt.export import export_model
from vlgpt.models.encoders import load_clip
from vlgpt.settings import SourceSettings
from vlgpt.shards import ShardSet, ShardWriter, write_manifest
from vlgpt.shards.index import IndexBuilder
from vlgpt.tokens import DocumentTokenizer, flatten
from vlgpt.turns import SYSTEM_MESSAGE, TEMPLATES

NUM_VISUAL = 4
WORDS = [
    *(
        "the fox",
        "Draw 17 circles, please!",
        "(why?)",
        "a",
        "I",
        "5",
        "2001",
        "x = [y];",
        "\u4f60\u597d",
        "d\u00e9j\u00e0 vu",
    ),
    *(
        "one\ntwo\n\nthree",
        "* first\n* second:",
        "\U0001f642",
        "'quoted'",
        "Here's the image:",
        "-1",
        "...",
        "C++ & so on.",
    ),
]
BOTH = ["llama2", "vicuna", "chatml"]


def own(name: str) -> DocumentTokenizer:
    return DocumentTokenizer(chat_tokenizers.model(name), num_visual=NUM_VISUAL, template="own")


def dialogue(random: np.random.Generator, num_turns: int) -> list[str]:
    return [" ".join(random.choice(WORDS, int(random.integers(1, 6)))) for _ in range(num_turns)]


def document_of(texts: list[str]) -> Document:
    roles = ("user", "assistant")
    return Document("d", "test", tuple(TextPart(text, roles[n % 2]) for n, text in enumerate(texts)))  # type: ignore[arg-type]


def official(tokenizer: Any, texts: list[str], **options: Any) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def assert_speaks_as(tokenizer: DocumentTokenizer, text_tokenizer: Any) -> None:
    """Dialogues of all lengths, as documents and as prompts, are what `apply_chat_template` gives."""
    random = np.random.default_rng(3)
    for number in range(48):
        texts = dialogue(random, 1 + number % 8)
        whole = flatten(tokenizer.spans(document_of(texts)))
        assert whole.token_ids.tolist() == official(text_tokenizer, texts), texts
        if number % 2 == 0:
            prompt = flatten(tokenizer.spans(document_of(texts), is_prompt=True))
            wanted = official(text_tokenizer, texts, add_generation_prompt=True)
            assert prompt.token_ids.tolist() == wanted, texts


# --- the model's own template


@pytest.mark.parametrize("name", chat_tokenizers.MODELS)
def test_the_own_template_gives_token_for_token_what_apply_chat_template_gives(name):
    assert_speaks_as(own(name), chat_tokenizers.model(name))


@pytest.mark.parametrize("name", chat_tokenizers.MODELS)
def test_a_reply_and_what_closes_it_are_predicted_and_nothing_after_it(name):
    tokenizer = own(name)
    texts = dialogue(np.random.default_rng(1), 4)
    whole = flatten(tokenizer.spans(document_of(texts)))
    predicted = whole.token_ids[whole.is_target].tolist()
    end = list(tokenizer.reply_end_ids)
    replies = [tokenizer.encode_text(text, "assistant") for text in texts[1::2]]
    assert predicted == [*replies[0], *end, *replies[1], *end]
    if name != "ChatML in plain text":  # there nothing but text closes a reply
        assert tokenizer.reply_end_text == ""
        assert end[-1] in tokenizer.text_tokenizer.added_tokens_decoder


def test_a_default_system_message_is_there_and_the_start_token_is_not_doubled():
    tokenizer = own("SmolLM2")
    ids = flatten(tokenizer.spans(document_of(["hi"]), is_prompt=True)).token_ids.tolist()
    text = tokenizer.text_tokenizer.decode(ids)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("message", ["", 'Say "yes"\nor no, \u00e9t\u00e9.'])
def test_a_system_message_of_ones_own_takes_the_place_of_the_default_also_in_an_export(message, tmp_path):
    options = {"num_visual": NUM_VISUAL, "template": "own"}
    tokenizer = DocumentTokenizer(chat_tokenizers.model("SmolLM2"), system_message=message, **options)
    asked = [{"role": "system", "content": message}, {"role": "user", "content": "hi"}]
    wanted = chat_tokenizers.model("SmolLM2").apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False
    )
    tokenizer.save(tmp_path)
    saved = DocumentTokenizer.load(tmp_path, rendering="saved", **options)
    for given in (tokenizer, saved):
        assert flatten(given.spans(document_of(["hi"]), is_prompt=True)).token_ids.tolist() == wanted
        # a chat that brings its own message is rendered as before
        other = [{"role": "system", "content": "w3"}, *asked[1:]]
        rendered = given.text_tokenizer.apply_chat_template(other, tokenize=False)
        assert rendered == chat_tokenizers.model("SmolLM2").apply_chat_template(other, tokenize=False)


def test_a_system_message_is_refused_where_the_template_has_a_fixed_one():
    with pytest.raises(UserError, match="system_message is for template own"):
        DocumentTokenizer(
            chat_tokenizers.model("SmolLM2"), num_visual=NUM_VISUAL, template="vicuna", system_message=""
        )


GPT2 = {"kind": "gpt2", "bos": "<s>"}
REFUSED = {
    "today's date (LLaMA-3.1)": (
        {"kind": "llama3", **chat_tokenizers.LLAMA3_TOKENS, "template": chat_tokenizers.LLAMA31_CHAT},
        "it writes today's date into the chat",
    ),
    "today's date (Granite 3.1)": (
        {"kind": "gpt2", "control": chat_tokenizers.ROLES, "template": chat_tokenizers.GRANITE31},
        "it writes today's date into the chat",
    ),
    "the last reply thinks (Qwen3)": (
        {"kind": "qwen", **chat_tokenizers.CHATML, "template": chat_tokenizers.QWEN3},
        "it writes the last reply differently from the replies before it",
    ),
    "the prompt opens a thought (DeepSeek-R1)": (
        {**GPT2, "template": "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant: <think>\n' }}{% endif %}"},
        "its generation prompt is not what stands before a reply",
    ),
    "earlier turns are left out": (
        {**GPT2, "template": "{% for m in messages[-2:] %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"},
        "it leaves out, moves or rewrites what is said in turn 1 of 6",
    ),
    "what is said is rewritten": (
        {**GPT2, "template": "{% for m in messages %}{{ m.role + ': ' + m.content | upper + eos_token }}{% endfor %}"},
        "it leaves out, moves or rewrites what is said in turn 1 of 6",
    ),
    "turns are numbered": (
        {**GPT2, "template": "{% for m in messages %}{{ m.role + loop.index | string + ': ' + m.content + eos_token }}"
         "{% endfor %}"},
        "it writes later turns differently from the first",
    ),
    "a system message is wanted": (
        {**GPT2, "template": "{% if messages[0].role != 'system' %}{{ raise_exception('system comes first') }}"
         "{% endif %}"},
        r"it refuses a dialogue of 6 turns of user and assistant \(system comes first\)",
    ),
    "long chats are refused": (
        {**GPT2, "template": "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"},
        r"it refuses a dialogue of 6 turns of user and assistant \(one question only\)",
    ),
    "line breaks stick to the text before them": (
        {"kind": "qwen", "template": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"},
        "'why is that so.' makes other tokens together with what stands around it than alone",
    ),
    "nothing closes a reply": (
        {**GPT2, "template": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"},
        "nothing but white space closes a reply",
    ),
    "no template": ({**GPT2}, "the tokenizer has none of its own"),
    "no jinja": ({**GPT2, "template": "{% for m in messages %}{{ m.role"}, "it refuses a dialogue of 6 turns"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_cut_at_the_borders_of_turns_is_refused_with_the_reason(name):
    options, reason = REFUSED[name]
    with pytest.raises(UserError, match=reason) as refused:
        _ = DocumentTokenizer(make(**options), num_visual=NUM_VISUAL, template="own").turns
    assert "\n" not in str(refused.value) and "choose another one (vlgpt, " in str(refused.value)


# --- the templates that we bring


def test_a_built_in_template_serves_every_tokenizer(caplog, tmp_path):
    """Words that were merged across spaces are other tokens inside a text than alone: no reason to refuse a run."""
    write_llama_tokenizer(tmp_path)
    with pytest.raises(UserError, match="has none of its own"):
        DocumentTokenizer.load(tmp_path, num_visual=NUM_VISUAL, template="own")
    for name in TEMPLATES:
        tokenizer = DocumentTokenizer.load(tmp_path, num_visual=NUM_VISUAL, template=name)
        spans = tokenizer.spans(document_of(["w0 w1", "w2 w3"]))
        assert [span.ids for span in spans if span.role == "user"] == [
            tuple(tokenizer.encode_text("w0 w1", "first"))
        ]
        assert spans[-1].ids == tokenizer.reply_end_ids and tokenizer.reply_end_ids
        assert spans[0].ids[0] == tokenizer.bos_id
        shown = tokenizer.text_tokenizer.decode([i for span in spans for i in span.ids])
        assert "w0 w1" in shown and "w2 w3" in shown


KINDS = {
    "prefix": {"bos": "<s>", "add_bos": True},
    "gpt2": {"bos": "<s>"},
    "qwen": {"control": ("<|im_start|>", "<|im_end|>")},
    "llama3": chat_tokenizers.LLAMA3_TOKENS,
    "legacy": chat_tokenizers.LLAMA,
    "first": chat_tokenizers.LLAMA,
    "gemma": chat_tokenizers.GEMMA_TOKENS,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_saved_tokenizer_carries_the_template_and_speaks_as_in_training(kind, template, tmp_path):
    tokenizer = DocumentTokenizer(make(kind, **KINDS[kind]), num_visual=NUM_VISUAL, template=template)
    tokenizer.save(tmp_path)
    again = DocumentTokenizer.load(tmp_path, num_visual=NUM_VISUAL, template=template, rendering="saved")
    assert again.turns == tokenizer.turns
    assert again.fingerprint == tokenizer.fingerprint and again.start_ids == tokenizer.start_ids
    assert (tmp_path / "chat_template.jinja").is_file()
    assert_speaks_as(tokenizer, again.text_tokenizer)


def test_templates_read_as_their_models_were_trained():
    """FastChat's vicuna_v1.1, Meta's llama/generation.py, OpenAI's ChatML, and Table 6 of the paper."""
    system = {name: TEMPLATES[name].first for name in TEMPLATES}
    vicuna = system["vicuna"].removeprefix("{bos}{space}").removesuffix("USER: ")
    wanted = {
        "vlgpt": f"<s>{SYSTEM_MESSAGE} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
        "short": "<s>USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
        "vicuna": f"<s>{vicuna}USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
        "llama2": f"<s>[INST] <<SYS>>\n{SYSTEM_MESSAGE}\n<</SYS>>\n\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>",
        "chatml": f"<s><|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
        "<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n",
    }
    assert wanted.keys() == TEMPLATES.keys()
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, ("q1", "a1", "q2", "a2"))
    ]
    for name, text in wanted.items():
        tokenizer = DocumentTokenizer(
            make("legacy", **chat_tokenizers.LLAMA), num_visual=NUM_VISUAL, template=name
        )
        assert tokenizer.text_tokenizer.apply_chat_template(messages, tokenize=False) == text
    with pytest.raises(Exception, match="the system message is fixed"):
        tokenizer.text_tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("kind", ["prefix", "first", "legacy"])
@pytest.mark.parametrize("template", ["vlgpt", "short", "vicuna"])
def test_a_tokenizer_that_puts_spaces_itself_is_spoken_to_as_before(template, kind):
    """The demo's tokenizer (prefix) and LLaMA's: nothing changes for runs and exports made with these templates."""
    now, before = (
        DocumentTokenizer(
            make(kind, **KINDS[kind]), num_visual=NUM_VISUAL, template=template, rendering=rendering
        )
        for rendering in ("template", "parts")
    )
    random = np.random.default_rng(5)
    for number in range(30):
        parts: list[Part] = []
        for turn in range(1 + number % 5):
            role = ("user", "assistant")[turn % 2] if number % 3 else "plain"
            parts += [TextPart(text, role) for text in dialogue(random, int(random.integers(1, 3)))]  # type: ignore[arg-type]
            parts.append(ImagePart(turn, role))  # type: ignore[arg-type]
        document = Document("d", "test", tuple(parts))
        for is_prompt in (False, True):
            found = now.spans(document, is_prompt=is_prompt)
            assert found == before.spans(document, is_prompt=is_prompt)
    assert now.fingerprint == before.fingerprint


# --- where a text begins


@pytest.mark.parametrize("kind", KINDS)
def test_plain_documents_begin_with_what_the_tokenizer_puts_before_a_text(kind):
    tokenizer = DocumentTokenizer(make(kind, **KINDS[kind]), num_visual=NUM_VISUAL)
    alone = make(kind, **KINDS[kind]).encode("a")
    bos = tokenizer.text_tokenizer.bos_token_id
    wanted = () if kind in ("gpt2", "qwen") else (bos,)
    assert tokenizer.start_ids == wanted == tuple(alone[: len(wanted)])
    spans = tokenizer.spans(Document("d", "s", (TextPart("the fox"),)))
    ids = [token for span in spans for token in span.ids]
    assert ids == [*wanted, *tokenizer.encode_text("the fox"), tokenizer.eos_id]


def test_what_stands_first_is_never_predicted_and_an_empty_prompt_has_one_position():
    tokenizer = DocumentTokenizer(make("gpt2", **KINDS["gpt2"]), num_visual=NUM_VISUAL)
    for parts in ((ImagePart(0), TextPart("the fox")), (TextPart("the fox"), ImagePart(0))):
        sequence = flatten(tokenizer.spans(Document("d", "s", parts)))
        assert not sequence.is_target[0] and sequence.is_target[1:].all()
    empty = empty_prompt(Document("d", "s", (TextPart("x"),)), tokenizer=tokenizer)
    assert empty.token_ids.tolist() == [tokenizer.eos_id]
    tokenizer = own("SmolLM2")
    chat = empty_prompt(document_of(["x"]), tokenizer=tokenizer)
    assert chat.token_ids.tolist() == official(tokenizer.text_tokenizer, [""], add_generation_prompt=True)


# --- lengths and packing


def chats(random: np.random.Generator, count: int) -> list[Document]:
    """Chats with several texts and images a turn, and plain documents."""
    documents = []
    for number in range(count):
        parts: list[Part] = []
        num_images = 0
        for turn in range(int(random.integers(1, 6))):
            role = "plain" if number % 4 == 3 else ("user", "assistant")[turn % 2]
            for text in dialogue(random, int(random.integers(1, 4))):
                if random.random() < 0.4:
                    parts.append(ImagePart(num_images, role))  # type: ignore[arg-type]
                    num_images += 1
                parts.append(TextPart(text, role))  # type: ignore[arg-type]
        documents.append(Document(f"d{number}", "s", tuple(parts)))
    return documents


@pytest.mark.parametrize("name", ["SmolLM2", "LLaMA-2", "Mistral", "Phi-3", "Gemma", *BOTH])
def test_what_is_planned_from_the_index_is_what_is_rendered(name):
    if name in TEMPLATES:
        tokenizer = DocumentTokenizer(make("gpt2"), num_visual=NUM_VISUAL, template=name)
    else:
        tokenizer = own(name)
    documents = chats(np.random.default_rng(11), 60)
    builder = IndexBuilder(tokenizer)
    for document in documents:
        builder.add(document.id, document, [])
    index = builder.build(tar_sha256="")
    assert index.tokenizer == tokenizer.fingerprint
    lengths = ShardLengths(index, image_length=tokenizer.image_length)
    num_cut = num_whole = 0
    for length in (90, 700):
        source = SourceSettings(name="s", path="x", image_first=0.5, max_images=4)
        maker = Assembler(source, tokenizer=tokenizer, sequence_length=length)
        for number, document in enumerate(documents):
            plan = maker.plan(lengths.parts(number), Draws(number))
            if plan.rejection:
                continue
            sequence = maker.render(plan, document)
            assert len(sequence.token_ids) == plan.length <= length
            num_cut += not plan.has_end
            num_whole += plan.has_end
    assert num_whole > 20 and num_cut > 3


def test_two_texts_of_one_turn_never_run_together():
    for name, between in (("SmolLM2", "\n"), ("LLaMA-2", " ")):
        tokenizer = own(name)
        parts = (TextPart("one", "user"), TextPart("two", "user"), TextPart("three", "assistant"))
        ids = flatten(tokenizer.spans(Document("d", "s", parts))).token_ids.tolist()
        assert f"one{between}two" in tokenizer.text_tokenizer.decode(ids)


def test_a_chat_that_begins_with_a_reply_answers_an_empty_turn():
    tokenizer = own("Qwen2.5")
    spans = tokenizer.spans(Document("d", "s", (TextPart("hello", "assistant"),)))
    wanted = official(tokenizer.text_tokenizer, ["", "hello"])
    assert flatten(spans).token_ids.tolist() == wanted


def test_lengths_of_chats_belong_to_the_template_and_those_of_plain_documents_to_all():
    named = DocumentTokenizer(chat_tokenizers.model("SmolLM2"), num_visual=NUM_VISUAL, template="short")
    chat = own("SmolLM2")
    assert named.encode_text("fox", "user") != chat.encode_text("fox", "user")
    assert named.encode_text("fox") == chat.encode_text("fox")
    assert chat.fingerprint == f"{named.fingerprint}+assistant+first+user"
    assert chat.fits(named.fingerprint, has_chats=False) and named.fits(chat.fingerprint, has_chats=False)
    assert not chat.fits(named.fingerprint, has_chats=True)
    assert not chat.fits(own("Qwen2.5").fingerprint, has_chats=False)


def test_a_run_with_its_own_template_asks_for_its_lengths_and_the_command_writes_them(tmp_path):
    chat_tokenizers.model("SmolLM2").save_pretrained(tmp_path / "model")
    tokenizer = own("SmolLM2")
    random = np.random.default_rng(2)
    sources = {
        "chats": [document_of(dialogue(random, 4)) for _ in range(6)],
        "plain": [Document("p", "s", (TextPart(text),)) for text in dialogue(random, 6)],
    }
    named = DocumentTokenizer.load(tmp_path / "model", num_visual=NUM_VISUAL)
    for name, documents in sources.items():
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name, 0, tokenizer=named)
        for document in documents:
            writer.add(document, [])
        writer.close()
        write_manifest(tmp_path / name, name=name, licence="", versions={}, build={}, num_shards=1)

    def opened(name: str) -> OpenSource:
        settings = SourceSettings(name=name, path=str(tmp_path / name))
        return OpenSource(settings, shards=ShardSet.open(tmp_path / name), features={})

    opened("plain").lengths(0, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"data_prep.index .*chats --tokenizer PATH --template own"):
        opened("chats").lengths(0, tokenizer=tokenizer)
    command = [str(tmp_path / "chats"), "--tokenizer", str(tmp_path / "model"), "--template", "own"]
    assert index.main(command) == 0
    lengths = opened("chats").lengths(0, tokenizer=tokenizer)
    places = ("first", "assistant", "user", "assistant")
    texts = [part.text for part in sources["chats"][0].parts if isinstance(part, TextPart)]
    wanted = [len(tokenizer.encode_text(text, place)) for text, place in zip(texts, places)]  # type: ignore[arg-type]
    assert list(lengths.parts(0).lengths) == wanted
    assert wanted != [len(named.encode_text(text, "user")) for text in texts]


def test_the_demos_clip_reads_texts_without_a_start_token(tmp_path):
    """Its language model's tokenizer puts one before a text."""
    tokenizer = train_text_tokenizer(chat_tokenizers.TEXTS, vocabulary_size=300)
    tokenizer.save_pretrained(tmp_path / "text")
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    stage = ClipStage.build(
        ClipStageSettings(
            kind="demo.stages:ClipStage",
            text_tokenizer=str(tmp_path / "text"),
            width=32,
            image_depth=1,
            text_depth=1,
        )
    )
    wanted = [*tokenizer.encode("the fox", add_special_tokens=False), tokenizer.eos_token_id]
    assert stage.text_ids(("the fox",))[0, : len(wanted)].tolist() == wanted
    stage.save(tmp_path / "clip")
    read = load_clip(str(tmp_path / "clip"), library="open_clip", layer=-1)._text_ids(["the fox"])
    assert torch.equal(read, stage.text_ids(("the fox",)))


# --- exports


@pytest.mark.parametrize("template", ["own", *TEMPLATES])
def test_an_export_is_spoken_to_as_the_model_was_trained_by_everybody(template, tmp_path):
    tokenizer = new_document_tokenizer(template="short")
    text_tokenizer = tokenizer.text_tokenizer
    text_tokenizer.chat_template = chat_tokenizers.SMOLLM2
    tokenizer = DocumentTokenizer(text_tokenizer, num_visual=NUM_VISUAL, template=template)
    export_model(new_model(tokenizer), tmp_path, tokenizer=tokenizer)
    assert_speaks_as(tokenizer, hf.AutoProcessor.from_pretrained(tmp_path).tokenizer)
    loaded = [
        Generator.load(tmp_path).tokenizer,
        hf.AutoProcessor.from_pretrained(tmp_path).documents,
        hf.AutoModel.from_pretrained(tmp_path).tokenizer,
    ]
    for found in loaded:
        assert (found.turns, found.start_ids, found.fingerprint, found.template_name) == (
            tokenizer.turns,
            tokenizer.start_ids,
            tokenizer.fingerprint,
            template,
        )
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    ends = [ends] if isinstance(ends, int) else ends
    control = tokenizer.reply_end_ids[-1:] if not tokenizer.reply_end_text else ()
    assert sorted(ends) == sorted({tokenizer.eos_id, *control})


def make_old(folder: Path) -> None:
    """As exports were before they carried their chat template."""
    for name in ("config.json", "processor_config.json"):
        record = json.loads((folder / name).read_text())
        del record["rendering"]
        (folder / name).write_text(json.dumps(record))
    (folder / "chat_template.jinja").unlink()


def test_an_export_without_a_template_is_spoken_to_as_it_was_trained(tmp_path):
    """Every string on its own, the start token before all, a space before every text."""
    tokenizer = DocumentTokenizer(
        make("gpt2", bos="<s>", control=("<|im_start|>", "<|im_end|>")),
        num_visual=NUM_VISUAL,
        template="chatml",
    )
    export_model(new_model(tokenizer), tmp_path, tokenizer=tokenizer)
    make_old(tmp_path)
    text = f"<s><|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|><|im_start|>user\n q1<|im_end|><|im_start|>assistant\n"
    text += " a1<|im_end|><|im_start|>user\n q2<|im_end|><|im_start|>assistant\n"
    document = document_of(["q1", "a1", "q2"])
    for found in (Generator.load(tmp_path).tokenizer, hf.AutoProcessor.from_pretrained(tmp_path).documents):
        ids = render(document, tokenizer=found, visual=None, address="").token_ids.tolist()
        assert found.text_tokenizer.decode(ids) == text
        plain = flatten(found.spans(Document("d", "s", (TextPart("x"),)))).token_ids
        assert plain[0] == found.text_tokenizer.bos_token_id
    again = tmp_path / "again"
    export_model(Generator.load(tmp_path).model, again, tokenizer=Generator.load(tmp_path).tokenizer)
    assert Generator.load(again).tokenizer.turns == Generator.load(tmp_path).tokenizer.turns
