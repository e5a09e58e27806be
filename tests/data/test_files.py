import glob
import os
from pathlib import Path

import pytest

from memformer.data.files import file_identities, is_named_by, locate_files
from memformer.data.sources import SourceConfig
from memformer.data.text import locate_standard_library
from memformer.errors import InputError
from memformer.training.config import DataConfig
from memformer.training.run_inputs import UnchangedInputs


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


def test_a_link_that_leads_nowhere_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file would be missing without a word, as on a disk that is not mounted; the standard library is as it is."""
    (folder / "sub").mkdir()
    (folder / "sub" / "nowhere.py").symlink_to("missing.py")
    (folder / ".hidden.py").symlink_to("missing.py")
    for path in (folder, folder / "**" / "*.py", folder / "*" / "nowhere.py"):
        with pytest.raises(
            InputError, match=r"^path: .*/sub/nowhere\.py is a symbolic link to missing\.py, which does"
        ):
            locate_files(str(path))
    assert len(located(str(folder / "*.py"))) == 2
    monkeypatch.setattr("memformer.data.text.standard_library", lambda: folder)
    assert len(locate_standard_library()) == 3


def test_a_path_that_cannot_be_looked_at_is_refused() -> None:
    """A path that the system refuses is an input error, not a traceback."""
    with pytest.raises(InputError, match=r"^path \(a+\) cannot be read: .*File name too long"):
        locate_files("a" * 300)


def test_pipes_have_no_identity(tmp_path: Path) -> None:
    """A pipe cannot be read twice, so a run on it is refused."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe or a device; a run needs files"):
        file_identities(locate_files(str(tmp_path / "pipe")))
    source = SourceConfig(path=str(tmp_path / "pipe"))
    with pytest.raises(InputError, match="pipe is a pipe or a device; a run needs files"):
        UnchangedInputs(DataConfig(train=source))  # before it is read, which would use it up


@pytest.mark.parametrize(
    "pattern", ["**/*.txt", "*/**/b.txt", "**", "sub/*", "[as]*", "**/deep/*.txt", "*.txt", ".*/*"]
)
def test_a_pattern_matches_what_glob_matches(tmp_path: Path, pattern: str) -> None:
    for name in ("a.txt", "b.md", "sub/b.txt", "sub/deep/c.txt", "sub/.hidden/d.txt", ".secret/e.txt", "sub/.f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = glob.glob(str(tmp_path / pattern), recursive=True)  # noqa: PTH207  Path.glob also matches hidden names
    assert located(str(tmp_path / pattern)) == sorted(path for path in map(Path, expected) if path.is_file())
    for path in tmp_path.rglob("*"):
        assert is_named_by(str(tmp_path / pattern), path.resolve()) == (path in map(Path, expected)) or path.is_dir()
    assert not is_named_by(str(tmp_path / pattern), tmp_path.parent / "a.txt")


def test_a_pattern_ends_where_links_lead_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for name in ("one", "two", "three"):
        (tmp_path / name).symlink_to(tmp_path)
    assert located(str(tmp_path / "**" / "*.txt")) == [tmp_path / "a.txt"]


def test_a_pattern_names_the_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    iterdir = Path.iterdir

    def refused(path: Path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    for pattern in ("**/*.txt", "*/*.txt"):
        with pytest.raises(InputError, match="closed: Permission denied"):
            locate_files(str(tmp_path / pattern))
