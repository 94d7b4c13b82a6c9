"""The plan against what really happens: real classes for parameters, autograd for bytes, torch's counter for FLOPs."""

import json

import pytest
import torch
from batches import pack, random_document
from tiny_unified import NUM_PATCHES, PATCH_WIDTH, new_document_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlgpt.batch import ConditionBatch
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.losses import count_targets
from vlgpt.models.multimodal_lm import LoraSettings, MultimodalLM
from vlgpt.models.unified import UnifiedModel, build_language_model
from vlgpt.planning.architecture import Architecture, image_shapes, language_shape
from vlgpt.planning.flops import Work, count
from vlgpt.planning.memory import Precision, activation_bytes
from vlgpt.planning.shapes import LANGUAGE_MODELS
from vlgpt.stages.language import LanguageStage
from vlgpt.stages.tokenizer import ImageTokenizerStage

CPU = {torch.float32: Precision(4, 4), torch.bfloat16: Precision(2, 2)}
LENGTH = 128
# Three sizes: (LM width, MLP, depth, heads, key-value heads, image parts' width, depth)
SIZES = {
    "tiny": (64, 96, 2, 4, 4, 32, 2),
    "grouped": (128, 320, 3, 8, 2, 48, 3),
    "small": (256, 688, 4, 8, 8, 96, 4),
}


def image_arguments(width, depth, visual_width, num_visual=4):
    part = {"width": width, "depth": depth, "num_heads": 4, "mlp_ratio": 4.0, "init_std": 1.0}
    shapes = {"image_tokens": 3, "image_width": 16, "text_tokens": 5, "text_width": 12}
    shapes |= {"num_patches": NUM_PATCHES, "patch_width": PATCH_WIDTH}
    return {
        **shapes,
        "num_visual": num_visual,
        "visual_width": visual_width,
        "tokenizer": part,
        "detokenizer": part,
    }


def image_parts(values, **options):
    shared = {
        "num_visual": values["num_visual"],
        "visual_width": values["visual_width"],
        **values["tokenizer"],
    }
    tokenizer = ImageTokenizer(
        num_patches=values["num_patches"], patch_width=values["patch_width"], **shared, **options
    )
    names = ("image_tokens", "image_width", "text_tokens", "text_width")
    return tokenizer, ImageDetokenizer(**{name: values[name] for name in names}, **shared, **options)


class Case:
    """A language stage of real classes and its plan, side by side."""

    def __init__(
        self, size, trained, *, dropout=0.0, attention="sdpa", visual_width=None, head="linear", frozen=()
    ):
        width, mlp, depth, heads, kv, image_width, image_depth = SIZES[size]
        self.tokenizer = new_document_tokenizer()
        config = {
            "model_type": "llama", "vocab_size": self.tokenizer.vocabulary_size, "hidden_size": width,
            "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads,
            "num_key_value_heads": kv, "tie_word_embeddings": False, "max_position_embeddings": LENGTH,
        }  # fmt: skip
        torch.manual_seed(0)
        values = image_arguments(image_width, image_depth, visual_width or width)
        lm = MultimodalLM(
            build_language_model(config, attention),
            num_tokens=self.tokenizer.num_tokens,
            num_visual=4,
            visual_width=values["visual_width"],
            head=head,
        )
        if trained == "lora":
            tokens = [self.tokenizer.begin_image_id, self.tokenizer.end_image_id]
            lm.add_lora(LoraSettings(rank=8, alpha=8.0, dropout=dropout), tokens)
        lm.freeze_parts(frozen)
        if trained == "head":
            lm.language_model.requires_grad_(False)
        image_tokenizer, detokenizer = image_parts(values)
        model = UnifiedModel(lm=lm, image_tokenizer=image_tokenizer, image_detokenizer=detokenizer)
        self.stage = LanguageStage(model=model, num_sources=2)
        self.parts = Architecture(
            *image_shapes(values), 4, values["visual_width"], None,
            lm=language_shape(config, has_image_tokens=True),
            lora_rank=8 if trained == "lora" else None, lora_dropout=dropout, head=head, frozen=frozen,
        )  # fmt: skip
        rows = [[random_document(10 * r + k, num_images=2) for k in range(3)] for r in range(4)]
        self.batch = pack(rows, self.tokenizer, length=LENGTH)
        targets = count_targets(self.batch)
        self.work = Work(4, LENGTH, len(self.batch.images), targets["text"], targets["visual"])

    def loss(self):
        terms = self.stage.train()(self.batch)
        return terms["text"].total + terms["visual"].total


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


def saved_bytes(stage, make_loss):
    """Bytes of every distinct storage that autograd keeps, without the parameters'."""
    own = {p.untyped_storage().data_ptr() for p in [*stage.parameters(), *stage.buffers()]}
    found = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = make_loss()
    total = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del loss
    return total


def planned_saved(parts, work, precision, *, has_checkpointing=False):
    """What the plan says stays until backward: its peak of the logits counts two more copies, freed before."""
    planned = activation_bytes(parts, work, precision=precision, has_checkpointing=has_checkpointing)
    if parts.lm is None:
        return planned["activations"]
    log_probabilities = 4 * work.num_text_targets * parts.lm.vocabulary
    return planned["activations"] + log_probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("trained, dropout", [("all", 0.0), ("lora", 0.0), ("lora", 0.1)])
def test_planned_activations_are_within_15_percent_of_what_autograd_keeps(size, trained, dropout, dtype):
    case = Case(size, trained, dropout=dropout)
    case.stage.to(dtype)
    case.batch = to_dtype(case.batch, dtype)
    measured = saved_bytes(case.stage, case.loss)
    planned = planned_saved(case.parts, case.work, CPU[dtype])
    assert planned == pytest.approx(measured, rel=0.15)


def to_dtype(batch, dtype):
    from vlgpt.batch import to_device

    return to_device(batch, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_planned_activations_of_stage_one_are_within_5_percent(size, dtype):
    *_, width, depth = SIZES[size]
    values = image_arguments(width, depth, 64)
    tokenizer, detokenizer = image_parts(values)
    stage = ImageTokenizerStage(tokenizer=tokenizer, detokenizer=detokenizer).to(dtype).train()
    batch = to_dtype(condition_batch(16), dtype)
    measured = saved_bytes(stage, lambda: sum(t.total for t in stage(batch).values()))
    parts = Architecture(*image_shapes(values), 4, 64, None)
    assert planned_saved(parts, Work(16), CPU[dtype]) == pytest.approx(measured, rel=0.05)


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
    planned = count(case.parts, case.work, has_checkpointing=False, is_frozen=trained == "head")
    assert planned.model == pytest.approx(counter.get_total_flops(), rel=0.01)
    if trained != "head":
        counts = case.parts.parameters().values()
        assert sum(n for n, _ in counts) == sum(p.numel() for p in case.stage.parameters())
        assert sum(n for _, n in counts) == sum(p.numel() for p in case.stage.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frozen", [(), ("tokenizer",), ("detokenizer",)])
def test_planned_flops_of_stage_one_are_within_one_percent(size, frozen):
    *_, width, depth = SIZES[size]
    values = image_arguments(width, depth, 64)
    tokenizer, detokenizer = image_parts(values)
    for name, part in (("tokenizer", tokenizer), ("detokenizer", detokenizer)):
        part.requires_grad_(name not in frozen)
    stage = ImageTokenizerStage(tokenizer=tokenizer, detokenizer=detokenizer).train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(t.total for t in stage(condition_batch(8)).values()).backward()
    parts = Architecture(*image_shapes(values), 4, 64, None, frozen=frozen)
    planned = count(parts, Work(8), has_checkpointing=False)
    assert planned.model == pytest.approx(counter.get_total_flops(), rel=0.01)


# ---------------------------------------------------------------------------------------------------- the paper's run


def paper_run(stage="pretrain", *overrides):
    from pathlib import Path

    from vlgpt.config import load_run

    return load_run(Path(__file__).parents[1] / f"launchers/configs/{stage}/vlgpt_7b.yaml", overrides)


@pytest.mark.parametrize("name", ["llama-7b", "qwen2.5-0.5b", "mistral-7b-v0.1"])
def test_counted_parameters_equal_those_of_the_real_classes(name):
    """Real transformers and peft classes on the meta device; four layers stand for all."""
    config = {**LANGUAGE_MODELS[name], "num_hidden_layers": 4}
    shape = language_shape(config, has_image_tokens=False)
    with torch.device("meta"):
        model = build_language_model({**config, "vocab_size": shape.vocabulary}, "eager")
        assert sum(p.numel() for p in model.parameters()) == shape.num_parameters
        lm = MultimodalLM(model, num_tokens=config["vocab_size"] + 2, num_visual=32, visual_width=4096)
        lm.add_lora(LoraSettings(rank=32), [5, 6])
    lora = sum(p.numel() for n, p in lm.named_parameters() if ".lora_" in n)
    assert lora == shape.num_lora(32)
    assert isinstance(lm.projection, torch.nn.Linear) == (shape.width != 4096)


def test_counted_parameters_of_the_image_parts_equal_those_of_the_real_classes():
    from vlgpt import settings as s

    stage = s.ImageTokenizerStage(kind="image_tokenizer")
    shapes = image_shapes(stage.model_dump() | stage.shapes.model_dump())
    with torch.device("meta"):
        modules = ImageTokenizer(num_patches=257, patch_width=1024), ImageDetokenizer()
    for module, shape in zip(modules, shapes, strict=True):
        assert sum(p.numel() for p in module.parameters()) == shape.num_parameters


def test_the_image_tower_counts_as_transformers_does():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from vlgpt.planning.shapes import IMAGE_TOWERS

    tower = IMAGE_TOWERS["vit-l-14"]
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIPVisionModel(config).parameters()) == tower.num_parameters


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


def test_a_plan_imports_no_torch_and_needs_little():
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from vlgpt.cli import main\n"
        "config = 'launchers/configs/pretrain/vlgpt_7b.yaml'\n"
        "code = main(['plan', '--config', config, '--gpus', '8', '--gpu-memory', '40GB'])\n"
        "assert code == 0 and 'torch' not in sys.modules\n"
        "status = open('/proc/self/status').read()\n"  # getrusage counts the parent's memory before exec
        "assert int(status.split('VmHWM:')[1].split()[0]) < 500_000\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "79,953,920" in done.stdout


def test_bad_input_is_one_line(capsys):
    from vlgpt.cli import main

    config = "launchers/configs/pretrain/vlgpt_7b.yaml"
    base = ["plan", "--config", config, "--gpus", "8", "--gpu-memory"]
    assert main([*base, "much"]) == 2
    assert main([*base, "40GB", "stage.language_model=nobody/unknown-9b"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and "40GB" in errors[0] and "unknown-9b" in errors[1] and "llama-7b" in errors[1]


def test_sharding_divides_states_and_checkpointing_shrinks_activations():
    from vlgpt.planning.architecture import architecture_of
    from vlgpt.planning.memory import ZEROS, state_bytes

    parts = architecture_of(paper_run())
    one, many = (state_bytes(parts, ZEROS[1], num_gpus=n, precision=Precision()) for n in (1, 32))
    assert (
        many["optimizer"] == -(-one["optimizer"] // 32)
        or abs(many["optimizer"] * 32 - one["optimizer"]) < 12 * 32
    )
    assert many["frozen"] == one["frozen"]
    work = Work(8, 512, 56, 2304, 1792)
    plain, less = (
        activation_bytes(parts, work, precision=Precision(), has_checkpointing=c)["activations"]
        for c in (False, True)
    )
    assert less < plain / 10


@pytest.mark.parametrize(
    "size, trained, precision",
    [
        pytest.param("tiny", "lora", "fp32", marks=pytest.mark.slow),
        pytest.param("grouped", "all", "bf16", marks=pytest.mark.slow),
        ("small", "lora", "bf16"),
    ],
)
def test_planned_states_are_within_two_percent_of_what_deepspeed_keeps(size, trained, precision):
    import os
    import subprocess
    import sys
    from pathlib import Path

    from vlgpt.planning.memory import ZEROS, state_bytes

    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{folder.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "plan_worker.py"), size, trained, precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.split("RESULT ")[-1])
    number = 2 if precision == "bf16" else 4
    planned = state_bytes(
        Case(size, trained).parts, ZEROS[1], num_gpus=1, precision=Precision(number, number)
    )
    for kind, found in measured.items():
        assert planned[kind] == pytest.approx(found, rel=0.02), (kind, planned[kind], found)
