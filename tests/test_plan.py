"""The plan against what really happens: real classes for parameters, autograd for bytes, torch's counter for FLOPs."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from tests.helpers import miniatures as mini
from tests.helpers.plan_case import LENGTH, SIZES, Case, image_arguments, image_parts, to_dtype
from tests.helpers.processes import HELPERS, ROOT, environment
from tests.helpers.tiny_unified import NUM_PATCHES, PATCH_WIDTH
from vlgpt.batch import ConditionBatch
from vlgpt.errors import UserError
from vlgpt.planning.costs import Work, costs_of
from vlgpt.planning.flops import FlopMeter, counting
from vlgpt.planning.memory import ZEROS, state_bytes
from vlgpt.planning.meta import configuration, parameters_of, planned_stage, published
from vlgpt.stages.tokenizer import ImageTokenizerStage


def stage_one_pair(size, frozen=(), dtype=torch.float32):
    """A stage 1 of real weights, and the same on the meta device."""
    *_, width, depth = SIZES[size]
    stages = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            tokenizer, detokenizer = image_parts(image_arguments(width, depth, 64))
            for name, part in (("tokenizer", tokenizer), ("detokenizer", detokenizer)):
                part.requires_grad_(name not in frozen)
            stage = ImageTokenizerStage(tokenizer=tokenizer, detokenizer=detokenizer)
        stages.append(stage.to(dtype).train())
    return stages


def condition_batch(rows):
    return ConditionBatch(
        documents=tuple(str(i) for i in range(rows)),
        source_ids=torch.zeros(rows, dtype=torch.int16),
        is_valid=torch.ones(rows, dtype=torch.bool),
        has_text=torch.ones(rows, dtype=torch.bool),
        patches=torch.randn(rows, NUM_PATCHES, PATCH_WIDTH),
        image_condition=torch.randn(rows, 3, 16),
        text_condition=torch.randn(rows, 5, 12),
    )


class DropoutOfGpus(TorchFunctionMode):
    """Dropout with a mask of booleans, as CUDA saves it; the CPU's is one of numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.dropout:
            return torch.native_dropout(args[0], kwargs["p"], kwargs["training"])[0]
        return func(*args, **(kwargs or {}))


def saved_bytes(stage, make_loss):
    """Bytes of every distinct storage that autograd keeps, without the parameters'."""
    own = {p.untyped_storage().data_ptr() for p in [*stage.parameters(), *stage.buffers()]}
    found = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with DropoutOfGpus(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = make_loss()
    total = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del loss
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("trained, dropout", [("all", 0.0), ("lora", 0.0), ("lora", 0.1)])
def test_planned_activations_are_within_15_percent_of_what_autograd_keeps(size, trained, dropout, dtype):
    case = Case(size, trained, dropout=dropout, dtype=dtype)
    measured = saved_bytes(case.stage, case.loss)
    # the plan's peak of the logits counts two more copies, which are freed before the backward pass
    log_probabilities = 4 * case.work.num_text_targets * case.config.vocab_size
    assert case.cost.saved + log_probabilities == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_planned_activations_of_stage_one_are_within_5_percent(size, dtype):
    stage, planned = stage_one_pair(size, dtype=dtype)
    batch = to_dtype(condition_batch(16), dtype)
    measured = saved_bytes(stage, lambda: sum(t.total for t in stage(batch).values()))
    assert costs_of(planned).of(Work(16)).saved == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "trained, options",
    [
        ("lora", {}),
        ("all", {}),
        ("head", {}),
        ("lora", {"visual_width": 40, "head": "mlp"}),
        ("lora", {"visual_width": 40, "frozen": ("token_rows", "regression_head", "input_projection")}),
        ("lora", {"frozen": ("token_rows",)}),
        ("all", {"frozen": ("embeddings", "regression_head")}),
        ("head", {"head": "mlp"}),
    ],
)
def test_planned_flops_are_within_one_percent_of_torchs_counter(size, trained, options):
    case = Case(size, trained, attention="eager", **options)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        case.loss().backward()
    planned = case.cost.model + case.scores_of_the_future(1 if trained == "head" else 3)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert_counts_equal(case)


def assert_counts_equal(case):
    counts = parameters_of(case.planned).values()
    assert sum(n for n, _ in counts) == sum(p.numel() for p in case.stage.parameters())
    assert sum(n for _, n in counts) == sum(p.numel() for p in case.stage.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frozen", [(), ("tokenizer",), ("detokenizer",)])
def test_planned_flops_of_stage_one_are_within_one_percent(size, frozen):
    stage, planned = stage_one_pair(size, frozen)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(t.total for t in stage(condition_batch(8)).values()).backward()
    assert costs_of(planned).of(Work(8)).model == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("trained", ["lora", "all"])
def test_the_plan_and_mfu_count_a_step_alike(trained):
    """The hooks of training and the measurement on the meta device; rows of one document."""
    case = Case("grouped", trained)
    meter = FlopMeter(case.stage)
    with counting(meter, None):
        case.loss()
    scores_of_whole_rows = case.scores_of_the_future()
    assert meter.take() + scores_of_whole_rows == pytest.approx(case.cost.model, rel=0.01)


@pytest.mark.parametrize("frozen", [(), ("tokenizer",)])
def test_the_plan_and_mfu_count_a_step_of_stage_one_alike(frozen):
    stage, planned = stage_one_pair("small", frozen)
    meter = FlopMeter(stage)
    with counting(meter, None):
        stage(condition_batch(8))
    assert meter.take() == pytest.approx(costs_of(planned).of(Work(8)).model, rel=0.01)


# ---------------------------------------------------------------------------------------------------- the paper's run


def paper_run(stage="pretrain", *overrides):

    from vlgpt.config import load_run

    return load_run(ROOT / f"launchers/configs/{stage}/vlgpt_7b.yaml", overrides)


KINDS = (
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "smollm3",
    "granite",
    "opt",
    "phi",
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_model_with_a_config_json_is_planned_as_its_class_trains(kind, tmp_path):
    """With LoRA and with all weights: parameters exactly, FLOPs and saved bytes of the class itself nearly."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": LENGTH, "vocab_size": 400}
    if kind in ("gpt2", "gpt_neox", "opt", "phi"):
        sizes = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "head_dim")}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    AutoConfig.for_model(kind, **sizes, **special).save_pretrained(tmp_path)
    for trained in ("lora", "all"):
        case = Case("tiny", trained, config=configuration(str(tmp_path)), attention="eager")
        assert_counts_equal(case)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            case.loss().backward()
        planned = case.cost.model + case.scores_of_the_future()
        assert planned == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_model_that_cannot_be_trained_so_is_refused_when_it_is_planned(tmp_path):
    from vlgpt.planning.plan import make_plan

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 4}
    sizes["num_experts_per_tok"] = 2
    AutoConfig.for_model("qwen3_moe", **sizes).save_pretrained(tmp_path)
    run = paper_run("pretrain", f"stage.language_model={tmp_path}")
    with pytest.raises(UserError, match="LoRA adapts linear layers"):
        make_plan(run, gpus=1, gpu_memory=40 << 30)
    run = paper_run("pretrain", f"stage.language_model={tmp_path}", "stage.trained=all")
    assert make_plan(run, gpus=1, gpu_memory=40 << 30)["parameters"]["trainable"] > 0


@pytest.mark.parametrize("name", ["llama-7b", "qwen2.5-0.5b", "mistral-7b-v0.1"])
def test_models_known_by_name_need_no_folder_and_no_network(name):
    config = configuration(f"somebody/{name}")
    assert {key: config.to_dict()[key] for key in published()[name]} == published()[name]


@contextlib.contextmanager
def counted_plainly():
    """torch's counter, with attention as plain products: no torch version has formulas for all fused kernels."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_an_online_conditioner_is_counted_with_its_weights_and_its_forward_passes(tmp_path):
    """Miniatures of the decoders' classes: the plan equals what is loaded, and what that computes."""
    from vlgpt.models.conditions import load_conditioner
    from vlgpt.planning.plan import work_of

    for is_sdxl in (False, True):
        description = mini.write_diffusion(tmp_path / str(is_sdxl), is_sdxl=is_sdxl)
        loaded = load_conditioner(description, library="ip_adapter")
        conditioner = f"stage.conditioner={{path: {description}, library: ip_adapter}}"
        online, stored = (
            paper_run("tokenizer", conditioner, "stage.encoder=null", f"data.features=[{features}]")
            for features in ("patches", "patches, image_condition, text_condition")
        )
        online_stage, stored_stage = planned_stage(online), planned_stage(stored)
        towers = online_stage.parameters
        held = towers["image_conditioner"][0] + towers["text_conditioner"][0]
        assert held == sum(p.numel() for p in loaded.parameters())
        size = loaded.image_size_px
        with counted_plainly() as counter:
            loaded.image_condition(torch.zeros(1, 3, size, size))
            loaded.text_condition(["a"])
        work = work_of(online, online_stage, online.global_batch)
        difference = [stage.costs.of(work).forward for stage in (online_stage, stored_stage)]
        assert difference[0] - difference[1] == counter.get_total_flops() * online.global_batch
        assert stored_stage.parameters == online_stage.parameters


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "open_clip siglip"])
def test_an_encoder_is_counted_as_it_is_loaded(name, tmp_path):
    from vlgpt import settings as s
    from vlgpt.models.encoders import load_clip
    from vlgpt.planning.meta import conditioner_towers, image_tower

    library = "open_clip" if name.startswith("open_clip") else "transformers"
    if library == "open_clip":
        mini.write_open_clip(tmp_path / "clip", mini.OPEN_SIGLIP if "siglip" in name else mini.OPEN_CLIP)
    else:
        {"clip": mini.write_clip, "siglip": mini.write_siglip}[name](tmp_path / "clip")
    path = str(tmp_path / "clip")
    loaded = load_clip(path, library=library, has_cls=False)
    settings = s.EncoderSettings(path=path, library=library, has_cls=False)
    with counted_plainly() as counter:
        patches = loaded.patches(torch.zeros(1, 3, loaded.image_size_px, loaded.image_size_px))
    tower = image_tower(settings)
    assert (tower.num_tokens, tower.width) == patches.shape[1:]
    assert tower.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    both = conditioner_towers(settings).values()
    assert sum(t.num_parameters for t in both) == sum(p.numel() for p in loaded.parameters())


def test_published_encoders_are_known_by_name():
    """Parameters as published: ViT-L/14 and ViT-H/14 towers, the text towers of SD 1.5 and SDXL."""
    from vlgpt import settings as s
    from vlgpt.planning.meta import image_tower

    clip = s.EncoderSettings(path="openai/clip-vit-large-patch14", library="transformers")
    assert (image_tower(clip).num_parameters, image_tower(clip).flops) == (303_179_776, 162_023_964_672)
    counts = {
        ("h94/IP-Adapter", "models/image_encoder"): 630_766_080,
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "text_encoder"): 123_060_480,
        ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder_2"): 693_021_440,
    }
    for place, wanted in counts.items():
        with torch.device("meta"):
            model = AutoModel.from_config(configuration(*place))
        assert sum(p.numel() for p in model.parameters()) == wanted, place


def test_the_7b_has_the_papers_component_counts():
    from vlgpt.planning.plan import make_plan

    parameters = make_plan(paper_run(), gpus=8, nodes=4, gpu_memory=40 << 30)["parameters"]
    assert parameters["lora"] == 79_953_920
    assert parameters["regression_head"] == 4096 * 4096 + 4096
    assert 7.5e9 < parameters["total"] < 7.7e9
    assert parameters["trainable"] == 79_953_920 + 4096 * 4097 + 4 * 4096
    assert parameters["total"] == sum(c["count"] for c in parameters["components"].values())


@pytest.mark.parametrize("stage, gpus, nodes", [("tokenizer", 8, 1), ("pretrain", 8, 4), ("finetune", 4, 1)])
def test_the_papers_stages_fit_its_gpus(stage, gpus, nodes):
    from vlgpt.planning.plan import make_plan
    from vlgpt.planning.table import to_text

    run = paper_run(stage)
    plan = make_plan(run, gpus=gpus, nodes=nodes, gpu_memory=40 << 30)
    assert plan["recommended"] is not None
    assert plan["recommended"]["micro_batch"] >= run.micro_batch
    run.accumulation(gpus * nodes)
    assert "Take ds_configs/" in to_text(plan)
    tiny = make_plan(run, gpus=gpus, nodes=nodes, gpu_memory=1 << 30)
    assert tiny["recommended"] is None and "Nothing fits" in to_text(tiny)


def test_total_is_a_key_of_parameters_only(capsys):
    from vlgpt.cli import main

    config = "launchers/configs/pretrain/vlgpt_13b.yaml"
    assert (
        main(["plan", "--config", config, "--gpus", "8", "--gpu-memory", "80GB", "--nodes", "4", "--json"])
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert 13e9 < plan["parameters"]["total"] < 15e9

    def keys(value):
        if isinstance(value, dict):
            return list(value) + [k for v in value.values() for k in keys(v)]
        return [k for v in value for k in keys(v)] if isinstance(value, list) else []

    assert keys(plan).count("total") == keys(plan).count("lora") == 1
    assert all(type(c["count"]) is int for c in plan["parameters"]["components"].values())


@pytest.mark.slow
def test_a_plan_of_a_7b_reads_no_weights_and_needs_little_memory():
    code = (
        "from vlgpt.cli import main\n"
        "config = 'launchers/configs/pretrain/vlgpt_7b.yaml'\n"
        "assert main(['plan', '--config', config, '--gpus', '8', '--gpu-memory', '40GB']) == 0\n"
        "status = open('/proc/self/status').read()\n"  # getrusage counts the parent's memory before exec
        "assert int(status.split('VmHWM:')[1].split()[0]) < 2_000_000\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "79,953,920" in done.stdout


def test_bad_input_is_one_line(capsys, tmp_path):
    from vlgpt.cli import main

    config = "launchers/configs/pretrain/vlgpt_7b.yaml"
    base = ["plan", "--config", config, "--gpus", "8", "--gpu-memory"]
    assert main([*base, "much"]) == 2
    assert main([*base, "40GB", "stage.language_model=nobody/unknown-9b"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and "40GB" in errors[0]
    assert "nobody/unknown-9b" in errors[1] and "hf download nobody/unknown-9b config.json" in errors[1]
    (tmp_path / "config.json").write_text('{"model_type": "of_tomorrow"}')
    assert main([*base, "40GB", f"stage.language_model={tmp_path}"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert f"{tmp_path}/config.json" in error and "of_tomorrow" in error


def test_sharding_divides_states_and_checkpointing_shrinks_activations():
    planned = planned_stage(paper_run())
    one, many = (state_bytes(planned.parameters, ZEROS[1], num_gpus=n, number_bytes=2) for n in (1, 32))
    assert (
        many["optimizer"] == -(-one["optimizer"] // 32)
        or abs(many["optimizer"] * 32 - one["optimizer"]) < 12 * 32
    )
    assert many["frozen"] == one["frozen"]
    cost = planned.costs.of(Work(8, 56, 2304, 1792))
    assert cost.checkpointed < cost.saved / 10


@pytest.mark.parametrize(
    "size, trained, precision",
    [
        pytest.param("tiny", "lora", "fp32", marks=pytest.mark.slow),
        pytest.param("grouped", "all", "bf16", marks=pytest.mark.slow),
        ("small", "lora", "bf16"),
    ],
)
def test_planned_states_are_within_two_percent_of_what_deepspeed_keeps(size, trained, precision):
    command = [sys.executable, HELPERS / "plan_worker.py", size, trained, precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.split("RESULT ")[-1])
    number = 2 if precision == "bf16" else 4
    parameters = parameters_of(Case(size, trained).planned)
    planned = state_bytes(parameters, ZEROS[1], num_gpus=1, number_bytes=number)
    for kind, found in measured.items():
        assert planned[kind] == pytest.approx(found, rel=0.02), (kind, planned[kind], found)
