"""Before and during training: do all processes agree on who they are, what they run, and what they hold?"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store

from vlgpt.errors import UserError

POLL_S = 0.1


def join_ranks(facts: Mapping[str, object], *, timeout_s: float) -> tuple[Store, int, int]:
    """Meet the other processes at MASTER_ADDR:MASTER_PORT and compare `facts`: -> store, rank, world size.

    A rank that finds a contradiction tells the others at once; only late processes are waited for, `timeout_s`. Raises
    UserError for a rank outside the world, a rank taken twice, or facts that differ, naming them.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks run from 0 to {world_size - 1}"
        )
    store = _open_store(rank, world_size, timeout_s)
    mine = {"world_size": world_size, **{key: _digest(value) for key, value in facts.items()}}
    refusal = ""
    if store.add(f"taken/{rank}", 1) > 1:
        refusal = f"rank {rank} is taken twice: two processes were started with RANK={rank}"
    if not refusal:
        store.set(f"facts/{rank}", json.dumps(mine))
        refusal = _compare(store, rank, mine, timeout_s)
    if refusal:
        store.set("refused", refusal)
        # Rank 0 hosts the store: it stays a moment, so that the others can read the reason.
        if rank == 0:
            time.sleep(10 * POLL_S)
        raise UserError(refusal)
    return store, rank, world_size


def _open_store(rank: int, world_size: int, timeout_s: float) -> Store:
    """The rendezvous store; under torchrun its agent already hosts one at this address."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size=None,
            is_master=rank == 0 and not is_agents,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank} cannot meet the others at {address} ({reason}): is the port taken by another run or by a "
            "second rank 0, or is the host of rank 0 not reachable?"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"vlgpt/{attempt}", store)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _compare(store: Store, rank: int, mine: dict[str, Any], timeout_s: float) -> str:
    """Wait until every rank of this world is there; -> a contradiction, or ""."""
    started_s = time.monotonic()
    missing = set(range(mine["world_size"]))
    while missing:
        if store.check(["refused"]):
            return str(store.get("refused").decode())
        for other in sorted(missing):
            if not store.check([f"facts/{other}"]):
                continue
            theirs = json.loads(store.get(f"facts/{other}"))
            different = [key for key in mine if theirs.get(key) != mine[key]]
            if different:
                values = (
                    f" ({theirs['world_size']} and {mine['world_size']})" if "world_size" in different else ""
                )
                return f"ranks {other} and {rank} differ in {', '.join(different)}{values}: start all with the same"
            missing.discard(other)
        if time.monotonic() - started_s > timeout_s:
            return f"ranks {sorted(missing)[:8]} did not come within {timeout_s:g} s"
        time.sleep(POLL_S)
    return ""


def replica_digest(module: nn.Module) -> str:
    """A digest of all parameters and buffers as they are in memory; replicas of one model have the same."""
    sums = []
    # Sums of integers, not of floats: one pass on the device, and any flipped bit changes its sum.
    for _, tensor in [*module.named_parameters(), *module.named_buffers()]:
        data = tensor.detach().contiguous().view(-1)
        size = data.element_size()
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        sums.append(data.view(words).sum(dtype=torch.int64))
    if not sums:
        return ""
    values = torch.stack([value.cpu() for value in sums]).tolist()
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def disagreement(values: Sequence[object]) -> str:
    """Which ranks hold another value than most; "" when all agree. Values are JSON-like."""
    keys = [json.dumps(value, sort_keys=True) for value in values]
    usual = max(set(keys), key=keys.count)
    odd = [rank for rank, key in enumerate(keys) if key != usual]
    return f"ranks {odd} differ from the other {len(keys) - len(odd)}" if odd else ""
