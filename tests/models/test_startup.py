"""Loading shares memory: processes of one machine hold one copy of a checkpoint among them."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.processes import HELPERS, environment
from tests.helpers.tiny_unified import new_document_tokenizer, new_model
from vlgpt.export import export_model
from vlgpt.models.multimodal_lm import MultimodalLM
from vlgpt.models.unified import UnifiedModel

NUM_PROCESSES, TIMEOUT_S = 4, 200


def pss_bytes(pids):
    """Proportional set sizes together: a page that n processes share counts 1/n in each."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of 500 MB in bf16, alone with a stage-1 result, and as an export."""
    root = tmp_path_factory.mktemp("startup")
    tokenizer = new_document_tokenizer()
    tiny = new_model(tokenizer)
    tiny.image_tokenizer.save(root / "stage1" / "image_tokenizer")
    tiny.image_detokenizer.save(root / "stage1" / "image_detokenizer")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=19,
        num_attention_heads=16, num_key_value_heads=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        language_model = LlamaForCausalLM(config).to(torch.bfloat16)
    language_model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in language_model.parameters():
            parameter.fill_(0.01)
    language_model.save_pretrained(root / "lm", max_shard_size="200MB")
    tokenizer.save(root / "lm")
    lm = MultimodalLM(
        language_model, num_tokens=tokenizer.num_tokens, num_visual=tokenizer.num_visual, visual_width=48
    )
    model = UnifiedModel(
        lm=lm, image_tokenizer=tiny.image_tokenizer, image_detokenizer=tiny.image_detokenizer
    )
    export_model(model, root / "export", tokenizer=tokenizer)
    return root


def wait_for(processes, word):
    for process in processes:
        while not (line := process.stdout.readline()).startswith(word):
            assert line, "a worker ended early"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["language model", "export", "stage"])
def test_four_processes_hold_a_checkpoint_once(folder, kind, capsys):
    place = "export" if kind == "export" else "lm"
    size = sum(file.stat().st_size for file in (folder / place).glob("*.safetensors"))
    assert 4.9e8 < size < 5.5e8
    command = [sys.executable, str(HELPERS / "startup_worker.py"), kind, str(folder)]
    processes = [
        subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for _ in range(NUM_PROCESSES)
    ]  # fmt: skip
    killer = threading.Timer(TIMEOUT_S, lambda: [process.kill() for process in processes])
    killer.start()
    pids = [process.pid for process in processes]
    samples, is_done = [], threading.Event()

    def sample():
        while not is_done.is_set():
            samples.append(pss_bytes(pids))
            time.sleep(0.05)

    try:
        wait_for(processes, "ready")
        before = pss_bytes(pids)
        watcher = threading.Thread(target=sample)
        watcher.start()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        wait_for(processes, "loaded")
        samples.append(pss_bytes(pids))
        is_done.set()
        watcher.join()
    finally:
        is_done.set()
        killer.cancel()
        for process in processes:
            process.kill()
            process.wait()
    ratio = (max(samples) - before) / size
    with capsys.disabled():
        sys.stdout.write(
            f"\n{kind}: {NUM_PROCESSES} processes, file {size / 1e6:.0f} MB, peak of PSS together "
            f"{(max(samples) - before) / 1e6:.0f} MB above the {before / 1e6:.0f} MB of imports: {ratio:.2f} x\n"
        )
    assert 0.9 < ratio < 1.3
