from __future__ import annotations

from pathlib import Path

import pytest

from lsast_engines.errors import UsageError
from lsast_train.training.run_files import RunFiles, require_run


def test_require_run_reports_name_and_size_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"name(.|\n)*size: found 60; expected a multiple of 8"):
        require_run(RunFiles(tmp_path, "a/b"), 60, 8, resume=False)


def test_require_run_refuses_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "gone"):
        with pytest.raises(UsageError, match=r" \(Not a directory\); expected a folder"):
            require_run(RunFiles(folder, "red"), 64, 8, resume=False)
    require_run(RunFiles(tmp_path / "new" / "deep", "red"), 64, 8, resume=False)
    assert not (tmp_path / "new").exists()
