"""Pairs of real processes under the commit protocol, killed or given damaged files; no torch, no deepspeed.

`protocol_driver.py kill FOLDER SEED COUNT` and `protocol_driver.py damage FOLDER`: JSON on stdout.
A pair is forked from this small process, so that a hundred pairs cost seconds. Each life of a pair resumes together,
goes on together and saves every second step: two dummy shards per rank, and the weights of rank 0.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
from pathlib import Path

from vlgpt import commits
from vlgpt.errors import UserError
from vlgpt.train import together

STEPS, INTERVAL, KEEP, WORLD = 10, 2, 3, 2
PATIENCE_S = 20


class Pair:
    """The two ends of a pipe as a group; a lost partner is an EOFError."""

    world_size = WORLD

    def __init__(self, rank, pipe):
        self.rank, self.pipe = rank, pipe

    def gather_objects(self, value):
        self.pipe.send_bytes(json.dumps(value).encode())
        if not self.pipe.poll(PATIENCE_S):
            raise TimeoutError("the other rank is silent")
        other = json.loads(self.pipe.recv_bytes())
        return [value, other] if self.rank == 0 else [other, value]


# ---------------------------------------------------------------------------------------------------------- the faults


class Faults:
    """Counts the places where a process can die, and kills this one at the chosen number."""

    def __init__(self, kill_at):
        self.kill_at, self.names = kill_at, []

    def __call__(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, module, function):
        real = getattr(module, function)

        def wrapped(*arguments, **options):
            self(f"before {function}")
            result = real(*arguments, **options)
            self(f"after {function}")
            return result

        setattr(module, function, wrapped)

    def install(self):
        """Every way in which the protocol changes the disk: writes in three parts, all else before and after."""
        for function in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
            self.around(os, function)
        faults, real_open = self, pathlib.Path.open

        def open_path(path, mode="r", *arguments, **options):
            file = real_open(path, mode, *arguments, **options)
            return Torn(file, faults) if "w" in mode else file

        pathlib.Path.open = open_path


class Torn:
    """A file whose every write passes three fault points: before, half way on disk, after."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults
        faults("after creating a file")

    def write(self, data):
        self.faults("before write")
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.faults("inside write")
        self.file.write(data[half:])
        self.file.flush()
        self.faults("after write")
        return len(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


# ------------------------------------------------------------------------------------------------------------ one life


def evolve(value, rank, step):
    return hashlib.sha256(f"{value} {rank} {step}".encode()).hexdigest()


def content(value, shard):
    return (f"{value} {shard}\n" * 200).encode()


def live(pair, root, report):
    """Resume, train to the end; `report` gets every step that was committed. Returns the final value."""
    found = together.newest(root, pair)
    step, value = 0, ""
    if found:
        step = found.marker["step"]
        value = (root / found.tag / f"rank_{pair.rank}_0.bin").read_bytes().split()[0].decode()
    report(f"resumed {step}")
    while step < STEPS:
        step += 1
        value = evolve(value, pair.rank, step)
        if step % INTERVAL == 0:
            save(pair, root, step, value)
            report(f"committed {step}")
    return value


def save(pair, root, step, value):
    def write(folder):
        for shard in range(2):
            with (folder / f"rank_{pair.rank}_{shard}.bin").open("wb") as file:
                file.write(content(value, shard))
        if pair.rank == 0:
            with (folder / "weights.bin").open("wb") as file:
                file.write(content(value, "weights"))

    def owned(folder):
        names = [f"rank_{pair.rank}_{shard}.bin" for shard in range(2)]
        return [folder / name for name in names + ["weights.bin"] * (pair.rank == 0)]

    together.save(pair, root, step=step, write=write, owned=owned, keep=KEEP, first_estimate=10_000)


def run_pair(root, *, victim=None, kill_at=None):
    """One life of two processes; per rank its exit code, what it reported, and the fault points it passed."""
    ends = multiprocessing.Pipe()
    children = []
    for rank in range(WORLD):
        log = root / f"log_{rank}"
        log.write_text("")
        pid = os.fork()
        if pid == 0:
            ends[1 - rank].close()
            os._exit(child(rank, ends[rank], root, log, kill_at if rank == victim else None))
        children.append((pid, log))
    for end in ends:
        end.close()
    results = []
    for pid, log in children:
        _, status = os.waitpid(pid, 0)
        lines = log.read_text().splitlines()
        results.append({"code": os.waitstatus_to_exitcode(status), "lines": lines})
    return results


def child(rank, pipe, root, log, kill_at):
    signal.alarm(3 * PATIENCE_S)  # a hang is a failure, not a hung test
    faults = Faults(kill_at)
    stream = log.open("a", buffering=1)
    try:
        faults.install()
        value = live(Pair(rank, pipe), root / "checkpoints", lambda text: stream.write(text + "\n"))
        stream.write(f"value {value}\n" + "".join(f"point {name}\n" for name in faults.names))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        stream.write("the other rank is lost\n")
        return 3
    except UserError as error:
        stream.write(f"refused {str(error).replace(str(root), '')}\n")
        return 2
    return 0


def said(result, word):
    return [line.split(" ", 1)[1] for line in result["lines"] if line.startswith(word + " ")]


# ----------------------------------------------------------------------------------------------------------- the tests


def kill(folder, seed, count):
    """`count` kills, spread over all fault points of both ranks; every pair must go on as if nothing had been."""
    straight = folder / "straight"
    straight.mkdir(parents=True)
    whole = run_pair(straight)
    wanted = [said(result, "value") for result in whole]
    points = [(rank, n, name) for rank in range(WORLD) for n, name in enumerate(said(whole[rank], "point"))]
    rng = random.Random(seed)
    chosen = rng.sample(points, min(count, len(points)))
    problems, kinds = [], {}
    for number, (victim, at, name) in enumerate(chosen):
        kinds[name] = kinds.get(name, 0) + 1
        root = folder / str(number)
        root.mkdir()
        first = run_pair(root, victim=victim, kill_at=at)
        reported = max([0, *(int(s) for r in first for s in said(r, "committed"))])
        second = run_pair(root)
        resumed = [int(step) for r in second for step in said(r, "resumed")]
        where = f"{number}: rank {victim}, point {at} ({name})"
        if first[victim]["code"] != -signal.SIGKILL or first[1 - victim]["code"] not in (0, 3):
            problems.append(f"{where}: first life ended with {[r['code'] for r in first]}")
        if len(set(resumed)) != 1 or resumed[0] < reported:
            problems.append(f"{where}: committed {reported}, resumed at {resumed}")
        if [said(r, "value") for r in second] != wanted:
            problems.append(f"{where}: the run went on differently: {second}")
        shutil.rmtree(root)
    return {"num_points": len(points), "num_kills": len(chosen), "kinds": kinds, "problems": problems}


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1 << int(7 * where)
    path.write_bytes(bytes(data))


def misdirect(folder, position):
    """The marker vouches for what is not there: more ranks, or another manifest."""
    marker = json.loads((folder / commits.MARKER).read_text())
    if position % 2:
        marker["manifests"].append("0" * 64)
    else:
        marker["manifests"][position // 2 % WORLD] = f"{position:064d}"
    (folder / commits.MARKER).write_text(json.dumps(marker))


def files(folder):
    return sorted(path for path in folder.iterdir() if path.name != commits.MARKER)


DAMAGES = {
    "missing": lambda folder, n: files(folder)[n % len(files(folder))].unlink(),
    "truncated": lambda folder, n: os.truncate(files(folder)[n % len(files(folder))], 7 * n),
    "bit flip": lambda folder, n: flip(files(folder)[n % len(files(folder))], n / 9),
    "marker cut": lambda folder, n: os.truncate(folder / commits.MARKER, 20 * n),
    "marker points nowhere": misdirect,
}


def damage(folder):
    """Five kinds x ten positions: newest, or (odd positions) the two newest, or (position 9) all commits."""
    problems, decisions = [], {}
    template = folder / "template"
    template.mkdir(parents=True)
    run_pair(template)
    tags = commits.tags(template / "checkpoints")
    for kind, inflict in DAMAGES.items():
        for position in range(10):
            root = folder / f"{kind} {position}"
            shutil.copytree(template, root)
            num_damaged = len(tags) if position == 9 else 1 + position % 2
            for tag in tags[:num_damaged]:
                inflict(root / "checkpoints" / tag, position)
            results = run_pair(root)
            told = [said(r, "resumed") + said(r, "refused") for r in results]
            is_right = told[0] == told[1] and (
                all("no checkpoint under" in text for text in told[0]) and results[0]["code"] == 2
                if num_damaged == len(tags)
                else told[0] == [str(STEPS - num_damaged * INTERVAL)]
            )
            if not is_right or len({r["code"] for r in results}) != 1:
                problems.append(f"{kind} {position}: {told}, codes {[r['code'] for r in results]}")
            decisions[told[0][0][:40]] = decisions.get(told[0][0][:40], 0) + 1
    return {"num_damages": 10 * len(DAMAGES), "decisions": decisions, "problems": problems}


def main():
    task, folder, *numbers = sys.argv[1:]
    logs = open(os.devnull, "w")  # noqa: SIM115 - warnings of a thousand lives
    with contextlib.redirect_stderr(logs):
        result = {"kill": kill, "damage": damage}[task](Path(folder), *map(int, numbers))
    result["imported"] = [name for name in ("torch", "deepspeed") if name in sys.modules]
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
