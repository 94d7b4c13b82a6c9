"""Ten minutes of storms against `vlgpt serve`: right replies to the end, flat memory."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

from tests.helpers.chat_parts import save_export
from tests.helpers.chat_storm import Outcome, cases, storm
from vlgpt.decoding.generator import Generator

SOAK_S, WARM_S, PAUSE_S = 600.0, 120.0, 1.0
MAX_GROWTH_MIB = 15.0


def resident_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found.group(1)) / 1024


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc: Linux only")
def test_ten_minutes_of_storms_leave_no_trace(tmp_path):
    torch.set_num_threads(1)
    export = save_export(tmp_path)
    known = cases(Generator.load(export), 40)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vlgpt", "serve", "--model", str(export), "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(address, process)
        outcome, memory = Outcome(), []
        start, round_number = time.monotonic(), 0
        while (elapsed := time.monotonic() - start) < SOAK_S:
            asyncio.run(storm(address, known, num_clients=50, seed=round_number, outcome=outcome))
            assert outcome.wrong == []
            memory.append((elapsed, resident_mib(process.pid)))
            round_number += 1
            time.sleep(PAUSE_S)
        early = [mib for at, mib in memory if WARM_S <= at < WARM_S + 60]
        late = [mib for at, mib in memory if at >= SOAK_S - 60]
        growth = statistics.median(late) - statistics.median(early)
        text = httpx.get(f"{address}/metrics").text
        line = f"{round_number} storms, {dict(outcome.statuses)}, {statistics.median(early):.0f} MiB after"
        sys.stderr.write(f"\n{line} {WARM_S:.0f} s, {growth:+.1f} MiB at the end\n")
        assert growth < MAX_GROWTH_MIB, memory[:: max(1, len(memory) // 20)]
        assert "vlgpt_waiting 0.0" in text
        assert set(outcome.statuses) <= {200, 400, 429}
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, -signal.SIGINT, 130)


def wait_until_up(address: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < end, "the server did not start"
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
