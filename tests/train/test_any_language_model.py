"""Real transformers classes live their whole life: 1 -> 2 -> 1 ranks, result, export from a commit, reload, a reply."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.helpers.processes import HELPERS, ROOT
from tests.helpers.small_data import chat, page, write_dataset, write_feature
from tests.helpers.tiny_unified import NUM_PATCHES, PATCH_WIDTH, new_document_tokenizer, new_model
from vlgpt import hf
from vlgpt.decoding.api import DecodeSettings, Prompt
from vlgpt.decoding.generator import Generator
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.stages.language import export_run
from vlgpt.tokens import DocumentTokenizer

pytestmark = pytest.mark.timeout(900)  # the fixture lives all lives, on machines that may be busy
TOKENIZER = new_document_tokenizer()
BASE = {
    "vocab_size": TOKENIZER.num_tokens + 3,  # more rows than tokens, as many published models have
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
TIED, UNTIED, HEADS_OF_8 = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"head_dim": 8}
CLASSES = {  # name -> (transformers' type, how its configuration differs)
    "llama": ("llama", UNTIED),
    "llama-tied": ("llama", TIED),
    "qwen2-tied": ("qwen2", TIED),
    "qwen3": ("qwen3", {**UNTIED, **HEADS_OF_8}),
    "mistral": ("mistral", {**UNTIED, **HEADS_OF_8, "sliding_window": 16}),
    "gemma2": ("gemma2", {**TIED, **HEADS_OF_8, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**TIED, **HEADS_OF_8, "sliding_window": 16}),
    "smollm3": ("smollm3", TIED),
    "phi3": ("phi3", UNTIED),
    "olmo2": ("olmo2", UNTIED),
    "granite": ("granite", {**TIED, "logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "gpt2": ("gpt2", {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}),
    "gpt-neox": ("gpt_neox", UNTIED),
    "opt": (
        "opt",
        {"dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 16},
    ),  # another width enters than goes on
    "phi": ("phi", {}),  # a head with biases
    "moe": (
        "qwen3_moe",
        {**HEADS_OF_8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "mamba": ("mamba", {"max_position_embeddings": None}),
    "bloom": ("bloom", {"max_position_embeddings": None}),
}
REFUSED = {  # by design, before the first step, with these words
    ("moe", "lora"): "experts",
    ("mamba", "lora"): "max_position_embeddings",
    ("mamba", "all"): "max_position_embeddings",
    ("bloom", "lora"): "max_position_embeddings",
    ("bloom", "all"): "max_position_embeddings",
}
STRAIGHT = (
    "llama",
    "llama-tied",
    "mistral",
    "gemma2",
    "gpt2",
    "moe",
)  # also run without a stop, and compared
MATRIX = [(name, trained) for name in CLASSES for trained in ("lora", "all")]
STEPS = 3


def write_parts(root, *, tokenizer=TOKENIZER, classes=CLASSES):
    """Data with cached patches, stage-1 parts, and a folder of every language model."""
    documents = [page(n) if n % 2 else chat(n) for n in range(24)]
    write_dataset(root / "data", documents, shard_sizes=(12, 12), tokenizer=tokenizer)
    write_feature(root / "data", "patches", shape=(NUM_PATCHES, PATCH_WIDTH))
    image_parts = new_model(TOKENIZER)
    image_parts.image_tokenizer.save(root / "stage1" / "image_tokenizer")
    image_parts.image_detokenizer.save(root / "stage1" / "image_detokenizer")
    for name, (kind, more) in dict(classes).items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**BASE, **more})
        AutoModelForCausalLM.from_config(config).save_pretrained(root / "models" / name)
    TOKENIZER.text_tokenizer.save_pretrained(root / "tokenizer")


def run_of(root, name, trained, *, kind):
    return {
        "name": f"{name} {trained}",
        "output_dir": str(root / kind / f"{name}-{trained}"),
        "stage": {
            "kind": "language",
            "language_model": str(root / "models" / name),
            "image_tokenizer": str(root / "stage1"),
            "text_tokenizer": str(root / "tokenizer"),
            "template": "short",
            "trained": trained,
            "lora": {"rank": 2, "alpha": 2.0, "dropout": 0.0},
        },
        "data": {
            "sources": [{"name": "a", "path": str(root / "data")}],
            "sequence_length": 64,
            "features": ["patches"],
            "num_workers": 0,
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "eps": 1e-3},
        "steps": STEPS,
        "global_batch": 4,
        "micro_batch": 2,
        "precision": "fp32",
        "log_interval_steps": 1,
    }


def tuned_run(root):
    """Stage 3 in bf16, which goes on from the adapter of a run in fp32."""
    values = run_of(root, "llama-tied", "lora", kind="straight")
    stage = {**values["stage"], "init_from": values["output_dir"]}
    return {**values, "output_dir": str(root / "broken" / "tuned"), "stage": stage, "precision": "bf16"}


def run_lives(forks, folder, stop_after, *, world_size):
    command, log = [HELPERS / "life_worker.py", folder, stop_after], folder / "log"
    codes = forks.run(command, folder=ROOT, log=log, num_ranks=world_size)
    assert codes == [0] * world_size, log.read_text()[-6000:]


@pytest.fixture(scope="module")
def lives(forks, tmp_path_factory):
    """What every run did in each phase, and the root of all folders."""
    root = tmp_path_factory.mktemp("lives")
    write_parts(root)
    found = {}
    for kind, phases in (("straight", ((1, STEPS),)), ("broken", ((1, 1), (2, 2), (1, STEPS)))):
        chosen = [(n, t) for n, t in MATRIX if kind == "broken" or n in STRAIGHT]
        runs = {f"{n}-{t}": run_of(root, n, t, kind=kind) for n, t in chosen}
        if kind == "broken":
            runs["tuned"] = tuned_run(root)
        (root / kind).mkdir()
        (root / kind / "runs.json").write_text(json.dumps(runs))
        for world_size, stop_after in phases:
            run_lives(forks, root / kind, stop_after, world_size=world_size)
            path = root / kind / f"result_{world_size}_{stop_after}_0.json"
            found[kind, stop_after] = json.loads(path.read_text())
    return root, found


@pytest.mark.parametrize(("name", "trained"), MATRIX)
def test_it_trains_resumes_at_any_number_of_ranks_exports_and_replies(lives, name, trained):
    root, found = lives
    run = f"{name}-{trained}"
    phases = [found["broken", stop][run] for stop in (1, 2, STEPS)]
    crashes = [phase["crashed"] for phase in phases if "crashed" in phase]
    assert not crashes, crashes[0]
    if (name, trained) in REFUSED:
        assert all(REFUSED[name, trained] in phase["refused"] for phase in phases)
        assert all("\n" not in phase["refused"] for phase in phases)
        return
    assert not [phase["refused"] for phase in phases if "refused" in phase]
    assert [(phase["resumed_at"], phase["step"]) for phase in phases] == [(0, 1), (1, 2), (2, STEPS)]
    if name in STRAIGHT:
        same_losses(found["straight", STEPS][run]["losses"], phases[-1]["losses"])
        same_weights(root, run)
    folder = root / "broken" / run
    from_commit = root / "exports" / run
    export_run(folder, from_commit)
    a_reply_is_the_same(folder / "result", from_commit)


def same_losses(straight, broken):
    assert len(broken) == STEPS and broken == pytest.approx(straight, rel=1e-4)


def same_weights(root, run):
    """A run of 1, 2 and 1 ranks ends where a run of one rank ends."""
    straight, broken = (torch.load(root / kind / run / "final.pt") for kind in ("straight", "broken"))
    assert straight.keys() == broken.keys()
    for name, value in straight.items():
        torch.testing.assert_close(
            broken[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def a_reply_is_the_same(result, from_commit, *, dtype=torch.float32, tolerance=1e-5):
    """The run's result, the export of its last commit, and transformers' own loader hold the same model."""
    document = Document("q", "test", (ImagePart(0, "user"), TextPart("what is this?", "user")))
    patches = torch.randn(NUM_PATCHES, PATCH_WIDTH, generator=torch.Generator().manual_seed(1))
    settings = DecodeSettings(max_new_tokens=4, images="force")
    replies, logits = [], []
    for folder in (result, from_commit):
        generator = Generator.load(folder, dtype=dtype)
        (reply,) = generator.generate([Prompt(document, (("patches", patches),))], settings)
        replies.append(reply)
        assert len(reply.visual) == 1
        ids = torch.arange(100, 108)[None]
        lm = generator.model.lm
        logits.append(lm.logits(lm.backbone(ids).last_hidden_state)[..., : lm.num_tokens])
        logits.append(AutoModel.from_pretrained(folder)(input_ids=ids).logits[..., : lm.num_tokens])
    assert hf and replies[0].token_ids == replies[1].token_ids
    for other in logits[1:]:
        assert float((other - logits[0]).float().norm() / logits[0].float().norm()) < tolerance


def test_stage_3_starts_from_the_fp32_masters_of_stage_2_also_in_bf16(lives):
    root, found = lives
    first = found["broken", 1]["tuned"]
    assert first.get("is_start"), first
    assert [found["broken", stop]["tuned"]["resumed_at"] for stop in (1, 2, STEPS)] == [0, 1, 2]
    export_run(root / "broken" / "tuned", root / "exports" / "tuned")
    ids = torch.arange(8)[None]
    logits = [
        AutoModel.from_pretrained(folder)(input_ids=ids).logits
        for folder in (root / "broken" / "tuned" / "result", root / "exports" / "tuned")
    ]
    assert logits[0].dtype == torch.bfloat16
    torch.testing.assert_close(logits[0], logits[1], atol=0.05, rtol=0.05)
    for name in ("image_tokenizer", "image_detokenizer"):  # not rounded to the run's precision
        stored = load_file(root / "stage1" / name / "model.safetensors")
        kept = load_file(root / "broken" / "tuned" / "result" / "model.safetensors")
        assert all(torch.equal(kept[f"{name}.{key}"], value) for key, value in stored.items())


def test_smollm2_lives_as_its_miniatures_do(forks, smollm2_folder, tmp_path):
    """A pre-trained model, whose logits start near those of text that it knows, trained as the paper trains LLaMA."""
    values = run_of(tmp_path, "llama", "lora", kind="broken")
    tokenizer = DocumentTokenizer.load(smollm2_folder, num_visual=4, template="short")
    write_parts(tmp_path, tokenizer=tokenizer, classes=())
    stage = {
        "language_model": str(smollm2_folder),
        "text_tokenizer": None,
        "lora": {"rank": 32, "dropout": 0.0},
    }
    run = {**values, "stage": {**values["stage"], **stage}, "precision": "bf16", "steps": 2}
    (tmp_path / "runs.json").write_text(json.dumps({"smollm2": run}))
    results = []
    for world_size in (1, 2):
        run_lives(forks, tmp_path, world_size, world_size=world_size)
        results.append(
            json.loads((tmp_path / f"result_{world_size}_{world_size}_0.json").read_text())["smollm2"]
        )
    assert [(r.get("resumed_at"), r.get("step")) for r in results] == [(0, 1), (1, 2)], results
    assert all(loss < 8 for loss in results[-1]["losses"]), "a random model of 49,152 tokens starts at 10.8"
    folder = Path(run["output_dir"])
    export_run(folder, tmp_path / "export")
    a_reply_is_the_same(folder / "result", tmp_path / "export", dtype=torch.bfloat16, tolerance=0.02)
