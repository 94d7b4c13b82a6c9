"""The one real language model that a package registry has: it speaks, and it is whole or absent."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.smollm2 import smollm2
from vlgpt.errors import UserError


def test_smollm2_is_a_trained_chat_model(smollm2_folder):
    """A wrong weight layout or tokenizer would not know the capital of France."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    reply = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.eos_token_id


def test_without_a_registry_one_line_says_so_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip cannot get") as caught:
        smollm2(tmp_path / "cache" / "model")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".model.lock"]


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "model").mkdir()
    assert smollm2(tmp_path / "model") == tmp_path / "model"
