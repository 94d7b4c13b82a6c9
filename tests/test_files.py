"""Laws of vlgpt.files: a reader finds the old content or the new one, whole."""

from __future__ import annotations

import pytest

from vlgpt.files import replacing_folder


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "runs" / "result"
    with replacing_folder(folder) as new:
        (new / "first").write_text("1")
        assert not folder.exists()
    leftover = folder.with_name(".result.partial")  # of a process that was killed
    leftover.mkdir()
    (leftover / "half").write_text("?")
    with replacing_folder(folder) as new:
        (new / "second").write_text("2")
        assert [path.name for path in folder.iterdir()] == ["first"]
    assert [path.name for path in folder.iterdir()] == ["second"]
    with pytest.raises(OSError, match="disk is full"), replacing_folder(folder) as new:
        (new / "third").write_text("3")
        raise OSError("the disk is full")
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert [path.name for path in folder.parent.iterdir()] == ["result"]
