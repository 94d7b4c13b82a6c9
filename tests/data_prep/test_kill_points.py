"""Death before and after every single change that a build makes on disk: nothing damaged ever has a final name."""

import os
from pathlib import Path

import pytest

from data_prep.build import main
from tests.helpers.builds import assert_every_tar_is_whole, build_arguments
from tests.helpers.corpus import picture
from vlgpt.files import sha256_file
from vlgpt.shards.manifest import MANIFEST, SUCCESS, read_manifest

# Death before a change leaves the disk as death after the change before it, so one of the two is enough by default.
MOMENTS = pytest.mark.parametrize("is_after", [pytest.param(False, marks=pytest.mark.slow), True])
CALLS = ("replace", "fsync", "link", "unlink", "truncate")
DEAD = 86


def arguments(folder: Path, output: Path, *options: str) -> list[str]:
    settings = ("--name", "toy", "--shard-size", 3, "--max-bad-fraction", 0.5)
    return build_arguments("images", folder, output, *settings, *options)


def run_until(number: int, *, is_after: bool, command: list[str]) -> bool:
    """Run the build in a child that dies at its `number`-th change on disk; False when it ended before that."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _arm(number, is_after)
            code = main(command)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, DEAD)
    return code == DEAD


def _arm(number: int, is_after: bool) -> None:
    made = iter(range(1, 1_000_000))

    def deadly(call):
        def wrapped(*arguments, **options):
            is_last = next(made) == number
            if is_last and not is_after:
                os._exit(DEAD)
            try:
                return call(*arguments, **options)
            finally:
                if is_last:
                    os._exit(DEAD)

        return wrapped

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def assert_nothing_damaged(output: Path) -> None:
    assert_every_tar_is_whole(output)
    if (output / SUCCESS).exists():
        manifest = read_manifest((output / MANIFEST).read_bytes(), where="")
        assert all(sha256_file(output / f"{shard.name}.tar") == shard.sha256 for shard in manifest.shards)


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "in"
    path.mkdir()
    for number in range(7):
        (path / f"{number}.png").write_bytes(picture(number, "PNG") if number != 4 else b"damaged")
    assert main(arguments(path, tmp_path / "whole")) == 0
    return path


@MOMENTS
def test_a_build_survives_death_at_every_change_on_disk(folder, tmp_path, is_after):
    number = 0
    while True:
        number += 1
        output = tmp_path / f"out{number}"
        if not run_until(number, is_after=is_after, command=arguments(folder, output)):
            break
        assert_nothing_damaged(output)
        assert main(arguments(folder, output)) == 0
        assert content(output) == content(tmp_path / "whole"), f"died at change {number}"
    assert number > 25


@MOMENTS
def test_a_retry_survives_death_at_every_change_on_disk(folder, tmp_path, is_after):
    """The retry replaces a finished shard: an older tar never stands beside the newer report."""
    number = 0
    while True:
        number += 1
        output = tmp_path / f"out{number}"
        (folder / "4.png").write_bytes(b"damaged")
        assert main(arguments(folder, output)) == 0
        (folder / "4.png").write_bytes(picture(4, "PNG"))
        command = arguments(folder, output, "--retry-failed")
        died = run_until(number, is_after=is_after, command=command)
        assert_nothing_damaged(output)
        assert main(command) == 0
        if number == 1:
            wanted = content(output)
            assert wanted != content(tmp_path / "whole")
        assert content(output) == wanted, f"died at change {number}"
        if not died:
            break
    assert number > 8
