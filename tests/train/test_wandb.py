"""The optional mirror to Weights & Biases: the same numbers, or a clear refusal."""

import sys

import pytest

from tests.helpers.processes import ROOT
from vlgpt.config import load_run
from vlgpt.errors import UserError
from vlgpt.log import MetricsLog, read_metrics
from vlgpt.train.run import mirrors_of

CONFIG = ROOT / "demo/configs/pretrain.yaml"


def test_without_the_package_the_setting_is_refused_with_the_command_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        mirrors_of(load_run(CONFIG, [f"output_dir={tmp_path}", "wandb_project=test"]))


def test_every_number_of_the_metrics_log_reaches_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = load_run(CONFIG, [f"output_dir={tmp_path}", "wandb_project=test"])
    log = MetricsLog(tmp_path, use_tensorboard=False, mirrors=mirrors_of(settings))
    log.write(3, {"loss/text": 1.5, "event": "nothing"})
    log.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"loss/text" in content and b"1.5" in content
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss/text"] == 1.5
