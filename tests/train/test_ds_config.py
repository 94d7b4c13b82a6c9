"""DeepSpeed's configuration: one fact in one place, and nothing that deepspeed would ignore in silence."""

import pytest

from tests.helpers.processes import ROOT
from vlgpt.config import load_run
from vlgpt.errors import UserError
from vlgpt.train.ds_config import lint, lint_zero, merge_config, read_config

SETTINGS = load_run(ROOT / "demo/configs/pretrain.yaml", ["precision=bf16", "global_batch=32"])


def merged(config, *, world_size=2):
    return merge_config(SETTINGS, config, world_size=world_size, source="ds.json")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_file_we_ship_is_clean(path):
    assert lint(merged(read_config(path)), source=path.name) == []


def test_what_surprises_is_always_written_out():
    found = merged({"zero_optimization": {"stage": 2}})
    assert found["train_batch_size"] == 32 and found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == SETTINGS.optimizer.gradient_clipping
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": True}


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"gradient_clipping": 0.5}, "sets gradient_clipping = 0.5, the run's YAML means 1.0"),
        ({"optimizer": {"type": "Adam"}}, "sets 'optimizer': optimisation and precision"),
        ({"checkpoint": {"load_universal": True}}, "commits and elastic resume"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "set zero_force_ds_cpu_optimizer to false",
        ),
    ],
)
def test_contradictions_and_misspellings_are_refused(config, reason):
    with pytest.raises(UserError, match=reason.replace("(", r"\(")):
        lint(merged(config), source="ds.json")


def test_a_misspelt_zero_key_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="did you mean reduce_bucket_size"):
        lint_zero(
            {"zero_optimization": {"reduce_buket_size": 1}}, ["stage", "reduce_bucket_size"], source="ds"
        )


def test_what_has_no_effect_or_costs_much_is_named():
    zero = {"stage": 2, "stage3_max_live_parameters": 1, "zero_quantized_gradients": True}
    warnings = lint(merged({"zero_optimization": zero, "wall_clock_breakdown": True}), source="ds.json")
    assert len(warnings) == 3
    for word in (
        "stage3_max_live_parameters has no effect",
        "zero_quantized_gradients",
        "wall_clock_breakdown",
    ):
        assert any(word in warning for warning in warnings)
