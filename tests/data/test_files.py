import os
from pathlib import Path

import pytest

from memformer.data.files import file_identities, locate_files
from memformer.data.text import locate_standard_library
from memformer.errors import InputError


def located(path: str | list[str]) -> list[Path]:
    return [file.path for file in locate_files(path)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with links: to a file, to a folder elsewhere, to a file that is there already, and to itself."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "far.py").write_text("far")
    (tmp_path / "single.py").write_text("single")
    root = tmp_path / "texts"
    root.mkdir()
    (root / "a.py").write_text("a")
    (root / "again.py").symlink_to(root / "a.py")
    (root / "file.py").symlink_to(tmp_path / "single.py")
    (root / "folder").symlink_to(elsewhere)
    (root / "up").symlink_to(root)
    (root / "nowhere.py").symlink_to(root / "missing.py")
    return root


def test_links_are_followed_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbolic links are followed alike in folders, patterns and the standard library; every file is read once."""
    expected = [folder / "a.py", folder / "file.py", folder / "folder" / "deep" / "far.py"]
    assert located(str(folder)) == located(str(folder / "**" / "*.py")) == expected
    assert located([str(folder / "again.py"), str(folder), str(folder / "*.py")]) == [
        folder / "again.py",
        *expected[1:],
    ]
    monkeypatch.setattr("memformer.data.text.standard_library", lambda: folder)
    assert {file.path.resolve() for file in locate_standard_library()} == {path.resolve() for path in expected}


def test_a_path_that_cannot_be_looked_at_is_refused() -> None:
    """A path that the system refuses is an input error, not a traceback."""
    with pytest.raises(InputError, match=r"^path \(a+\) cannot be read: .*File name too long"):
        locate_files("a" * 300)


def test_pipes_have_no_identity(tmp_path: Path) -> None:
    """A pipe cannot be read twice, so a run on it is refused."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe or a device; a run needs files"):
        file_identities(locate_files(str(tmp_path / "pipe")))
