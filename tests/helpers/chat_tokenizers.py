"""Small tokenizers of the kinds that chat models have, and the chat templates that such models were published with."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is in the picture? Draw a red circle, please!",
    "USER: ASSISTANT: [INST] <<SYS>> system user assistant model You are a helpful assistant. 1984 2001 (yes)",
    "Is it so?\nIt is.\nIs it so?\nIt is.\n",
    "- one\n- two\n\nHere's the image: f(x) = y; \u4f60\u597d\u5417 \u00e9tude d\u00e9j\u00e0 na\u00efve caf\u00e9",
]
# transformers' Qwen2Tokenizer; LLaMA 3 takes up to three digits together
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@functools.cache
def _trained(kind: str) -> str:
    """A byte-level BPE (`gpt2`, `prefix`, `qwen`, `llama3`) or one of pieces as sentencepiece makes them, as JSON."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    if kind in ("gpt2", "prefix"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
    elif kind in ("qwen", "llama3"):
        split = pre_tokenizers.Split(Regex(QWEN if kind == "qwen" else LLAMA3), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        return _pieces(kind)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS * 8, trainer)
    return tokenizer.to_str()


def _pieces(kind: str) -> str:
    """sentencepiece's BPE with bytes for what it does not know: as LLaMA 2 (`first`, `legacy`) or Gemma has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in TEXTS] * 8, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary = {**trained["vocab"]}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *(["\n", "\n\n"] if kind == "gemma" else [])]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) for merge in trained["merges"]]
    merges += [("\n", "\n")] if kind == "gemma" else []
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Tokenizer(model)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        made.normalizer = normalizers.Replace(" ", "\u2581")
    elif kind == "legacy":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(steps if kind == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
    return made.to_str()


def make(
    kind: str,
    *,
    template: str | None = None,
    bos: str | None = None,
    eos: str = "</s>",
    control: tuple[str, ...] = (),
    add_bos: bool = False,
    rstrip: bool = False,
) -> Any:
    """A tokenizer of this kind with its control tokens and chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)),
        bos_token=bos,
        eos_token=eos,
        add_bos_token=add_bos,
    )
    fast.add_tokens(
        [AddedToken(token, rstrip=rstrip, special=True) for token in control], special_tokens=True
    )
    fast.chat_template = template
    return fast


ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3_CHAT = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31_CHAT = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' "
    "+ 'Today Date: ' + date_string + '\n\n<|eot_id|>' }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + "
    "'<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    + ALTERNATE
    + "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    + ALTERNATE
    + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}"
    + ALTERNATE
    + "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
GRANITE = """{%- for message in messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>
' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""
GRANITE31 = (
    "{{- '<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nToday\\'s Date: ' + "
    "strftime_now('%B %d, %Y') + '.<|end_of_text|>\n' }}" + GRANITE
)
QWEN3 = """{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif loop.last %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

CHATML = {"eos": "<|im_end|>", "control": ("<|im_start|>",)}
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROLES = ("<|start_of_role|>", "<|end_of_role|>")
LLAMA3_TOKENS = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "control": HEADERS, "add_bos": True}
LLAMA = {"bos": "<s>", "add_bos": True}
GEMMA_TOKENS = {
    "bos": "<bos>",
    "eos": "<eos>",
    "control": ("<start_of_turn>", "<end_of_turn>"),
    "add_bos": True,
}
PHI3_TOKENS = {
    "bos": "<s>",
    "eos": "<|endoftext|>",
    "control": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}

# name: (kind of tokenizer, template, its tokens)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SmolLM2": ("gpt2", SMOLLM2, {"bos": "<|im_start|>", "eos": "<|im_end|>"}),
    "Qwen2.5": ("qwen", QWEN25, {"eos": "<|im_end|>", "control": ("<|im_start|>", "<|endoftext|>")}),
    "LLaMA-3": ("llama3", LLAMA3_CHAT, LLAMA3_TOKENS),
    "LLaMA-2": ("legacy", LLAMA2_CHAT, LLAMA),
    "LLaMA-2, newer tokenizer": ("first", LLAMA2_CHAT, LLAMA),
    "Mistral": ("legacy", MISTRAL, LLAMA),
    "Mistral, newer tokenizer": ("first", MISTRAL, LLAMA),
    "Gemma": ("gemma", GEMMA, GEMMA_TOKENS),
    "Phi-3": ("legacy", PHI3, {**PHI3_TOKENS, "rstrip": True}),
    "Zephyr": ("legacy", ZEPHYR, LLAMA),
    "Zephyr, newer tokenizer": ("first", ZEPHYR, LLAMA),
    "Granite": ("gpt2", GRANITE, {"bos": "<|end_of_text|>", "eos": "<|end_of_text|>", "control": ROLES}),
    "ChatML in plain text": ("qwen", SMOLLM2, {}),
}


def model(name: str) -> Any:
    """The tokenizer of a model in `MODELS`."""
    kind, template, tokens = MODELS[name]
    return make(kind, template=template, **tokens)
