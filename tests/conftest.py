"""Shared fixtures: one torch thread, nothing from the network, tiny models of the real classes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# fixtures of several folders
from tests.helpers.forks import forks  # noqa: F401
from tests.helpers.slurm_node import slurm  # noqa: F401
from tests.helpers.smollm2 import smollm2_folder  # noqa: F401

torch.set_num_threads(1)
