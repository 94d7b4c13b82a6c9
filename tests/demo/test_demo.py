"""The demo driver: README's commands are its own, it resumes, it makes anew what changed, it stops on failure."""

import re
import shlex
from pathlib import Path

import pytest

from demo import run
from tests.helpers.processes import ROOT


@pytest.fixture
def demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "ROOT", tmp_path / "run")
    return run


def plain(command):
    return re.sub(r" --master_port \d+", "", command)


def test_the_readme_shows_commands_that_the_demo_runs(demo, monkeypatch):
    monkeypatch.setattr(demo, "ROOT", Path("runs/demo"))
    monkeypatch.setattr(demo, "emoji", lambda code_points: "picture.png")
    commands = {plain(step.command) for step in demo.steps("conv")}
    block = re.search(r"<!-- demo commands.*?-->\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shown = block.group(1).strip().splitlines()
    assert len(shown) >= 6
    for command in shown:
        assert command in commands, command


@pytest.mark.parametrize("decoder", ["conv", "diffusion"])
def test_every_step_comes_after_what_it_needs_and_names_existing_files(demo, monkeypatch, decoder):
    monkeypatch.setattr(demo, "ROOT", Path("runs/demo"))
    monkeypatch.setattr(demo, "emoji", lambda code_points: "picture.png")
    steps = demo.steps(decoder)
    names = {step.name for step in steps}
    assert len(names) == len(steps)
    ports = re.findall(r"--master_port (\d+)", " ".join(step.command for step in steps))
    assert len(set(ports)) == len(ports), "runs that stand side by side need ports of their own"
    for step in steps:
        assert {*step.after, *step.spare} <= names
        for word in shlex.split(step.command):
            if word.startswith(("launchers/", "demo/", "ds_configs/", "evaluation/")):
                assert (ROOT / word).is_file(), word


def chain(demo, folder, marker="one"):
    log = folder / "log"
    first = demo.Step("first", f"sh -c 'echo first-{marker} >> {log}; mkdir -p {folder}/a'", f"{folder}/a")
    second = demo.Step(
        "second", f"sh -c 'echo second >> {log}; mkdir -p {folder}/b'", f"{folder}/b", ("first",)
    )
    return log, [first, second]


def test_a_finished_demo_does_nothing_and_a_changed_step_takes_its_followers_along(demo, tmp_path):
    log, steps = chain(demo, tmp_path)
    demo.run(steps, jobs=2)
    assert log.read_text().split() == ["first-one", "second"]
    demo.run(chain(demo, tmp_path)[1], jobs=2)
    assert log.read_text().split() == ["first-one", "second"]
    (tmp_path / "b" / "old").touch()
    demo.run(chain(demo, tmp_path, "two")[1], jobs=2)
    assert log.read_text().split() == ["first-one", "second", "first-two", "second"]
    assert not (tmp_path / "b" / "old").exists(), "what an older version left behind must go"


def test_an_interrupted_step_keeps_what_it_has_done(demo, tmp_path):
    _, steps = chain(demo, tmp_path)
    broken = demo.Step("first", "sh -c 'mkdir -p a; touch a/half; exit 3'", "a")
    with pytest.raises(SystemExit):
        demo.run([broken], jobs=1)
    again = demo.Step("first", "sh -c 'mkdir -p a; touch a/half; exit 3'", "a")
    assert (tmp_path / "a" / "half").exists()
    with pytest.raises(SystemExit):
        demo.run([again], jobs=1)
    assert (tmp_path / "a" / "half").exists()
    assert steps


def test_a_step_waits_for_those_whose_cores_it_spares_but_does_not_build_on_them(demo, tmp_path):
    log = tmp_path / "log"

    def steps(marker):
        line = f"sh -c 'echo {{0}} >> {log}; mkdir -p {tmp_path}/{{0}}'"
        first = demo.Step("first", f"{line.format('first')} {marker}", f"{tmp_path}/first")
        return [demo.Step("idle", line.format("idle"), f"{tmp_path}/idle", spare=("first",)), first]

    demo.run(steps("one"), jobs=2)
    assert log.read_text().split() == ["first", "idle"]
    demo.run(steps("two"), jobs=2)
    assert log.read_text().split() == ["first", "idle", "first"]


def test_everything_that_a_step_made_goes_when_it_must_be_made_anew(demo, tmp_path):
    def steps(marker):
        made = [tmp_path / "a", tmp_path / "b"]
        command = (
            f"sh -c 'mkdir {made[0]} {made[1]} && touch {made[1]}/{marker}'"  # fails when one is still there
        )
        return [demo.Step("both", command, " ".join(map(str, made)))]

    demo.run(steps("one"), jobs=1)
    demo.run(steps("two"), jobs=1)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["two"]
