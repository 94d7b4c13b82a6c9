"""Tar members are listed from headers alone: whole regular files, in order, up to the damage."""

import gzip
import tarfile

import pytest

from tests.helpers.tars import add, add_special
from vlgpt.shards.index import list_tar_members, read_tar_member

FILES = {"a.jpg": b"x" * 700, "../b.txt": b"", "c/d.json": b"{}" * 300}


def write(path, *, special=()):
    with tarfile.open(path, "w") as archive:
        for name, data in FILES.items():
            add(archive, name, data)
            for kind in special:
                add_special(archive, f"{name}-{kind!r}", kind)
    return path


def test_only_regular_files_are_listed_and_read_back(tmp_path):
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    tar = write(tmp_path / "a.tar", special=kinds)
    members = list_tar_members(tar)
    assert members.is_complete and members.names == tuple(FILES)
    for place, data in enumerate(FILES.values()):
        assert read_tar_member(tar, int(members.offsets[place]), int(members.sizes[place])) == data


def test_a_tar_cut_anywhere_gives_the_members_before_the_cut(tmp_path):
    tar = write(tmp_path / "a.tar")
    data, whole = tar.read_bytes(), list_tar_members(tar)
    ends = [int(offset + size) for offset, size in zip(whole.offsets, whole.sizes)]
    for cut in (*range(0, 4096, 97), *ends, *(end - 1 for end in ends if end % 512)):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        members = list_tar_members(tmp_path / "cut.tar")
        assert members.names == whole.names[: len(members.names)]
        assert len(members.names) == sum(end <= cut for end in ends), cut
        assert not members.is_complete, cut


def test_what_is_no_plain_tar_is_incomplete_and_empty(tmp_path):
    tar = write(tmp_path / "a.tar")
    for data in (b"", b"nonsense" * 200, gzip.compress(tar.read_bytes())):
        (tmp_path / "b.tar").write_bytes(data)
        members = list_tar_members(tmp_path / "b.tar")
        assert (members.names, members.is_complete) == ((), False)


def test_reading_past_the_end_is_an_error_that_names_the_tar(tmp_path):
    tar = write(tmp_path / "a.tar")
    with pytest.raises(OSError, match=r"a\.tar"):
        read_tar_member(tar, tar.stat().st_size - 3, 10)
