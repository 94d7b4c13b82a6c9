"""The logic of `vlgpt doctor --gpu` on CPU: device, attention and communication swapped. Never run on CUDA."""

from dataclasses import replace

import pytest
import torch

from vlgpt.doctor import gpu
from vlgpt.doctor.sample import Setting, new_batch, plan_of

SMALL = Setting(
    device="cpu",
    dtype=torch.float32,
    attention="eager",
    width=64,
    depth=2,
    mlp=128,
    num_heads=4,
    vocabulary=320,
    length=96,
    num_visual=4,
)


def test_equal_attention_passes_and_another_one_fails(monkeypatch):
    assert gpu.check_attention(SMALL).level == "ok"
    from transformers.models.llama import modeling_llama

    right = modeling_llama.eager_attention_forward

    def leaking(module, query, key, value, attention_mask, *rest, **options):
        return right(module, query, key, value, None, *rest, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", leaking)
    found = gpu.check_attention(SMALL)
    assert found.level == "error" and "sdpa" in found.fix


def test_without_flash_attn_the_checks_run_with_sdpa_against_eager(monkeypatch):
    monkeypatch.setattr(gpu, "flash_fault", lambda: "flash-attn is not installed")
    assert gpu.default_setting().attention == "sdpa" and gpu.default_setting().device == "cuda"
    found = gpu.check_attention(replace(SMALL, attention="sdpa"))
    assert found.level == "ok" and "sdpa against eager" in found.text
    monkeypatch.setattr(gpu, "flash_fault", lambda: "")
    assert gpu.default_setting().attention == "flash_attention_2"


def test_a_batch_equals_singles():
    assert gpu.check_decoder(SMALL).level == "ok"


def test_memory_is_compared_with_the_plan():
    def with_factor(factor):
        def measure(step):
            held = {}

            def keep(tensor):
                held[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                step()
            return factor * sum(tensor.untyped_storage().nbytes() for tensor in held.values())

        return measure

    assert gpu.check_memory(SMALL, measure=with_factor(1), tolerance=0.5).level == "ok"
    assert gpu.check_memory(SMALL, measure=with_factor(4), tolerance=0.5).level == "warning"


def test_speed_is_reported_and_a_slow_device_is_a_warning():
    assert "TFLOP/s" in gpu.check_speed(SMALL, num_steps=1).text
    slow = gpu.check_speed(SMALL, num_steps=1, peak_tflops=1e6)
    assert slow.level == "warning" and "MFU 0%" in slow.text


def test_the_plan_of_the_sample_is_that_of_its_batch():
    from vlgpt.models.losses import count_targets

    batch = new_batch(SMALL)
    costs, work = plan_of(SMALL)
    assert count_targets(batch) == {"text": work.num_text_targets, "visual": work.num_visual_targets}
    assert work.num_images == len(batch.images) and costs.of(work).model > 0


@pytest.mark.slow
def test_zero2_trains_and_resumes_over_gloo():
    found = gpu.check_training(replace(SMALL, attention="sdpa"), num_processes=2)
    assert found.level == "ok", found


def test_a_crashed_rank_is_an_error_and_the_other_checks_go_on(monkeypatch):
    def crash(setting):
        raise RuntimeError("CUDA error: out of memory")

    crash.__name__ = "check_memory"
    monkeypatch.setattr(gpu, "check_memory", crash)
    monkeypatch.setattr(gpu, "check_training", gpu.check_decoder)
    found = gpu.check_gpu(SMALL)
    assert [f.level for f in found].count("error") == 1
    assert any("out of memory" in f.text for f in found) and len(found) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_answer_is_one_clear_error():
    (found,) = gpu.check_gpu()
    assert found.level == "error" and "no CUDA GPU" in found.text
