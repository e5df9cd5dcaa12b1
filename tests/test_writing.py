"""Files and folders are written whole, beside their targets, and nothing is replaced that may not be."""

import os
import signal
import stat
import threading
from pathlib import Path

import pytest
from filelock import Timeout

from tokentrim import tokentrim_writing
from tokentrim.tokentrim_writing import check_target, is_decision_log, lock_of, locked, whole_file, write_whole
from tokentrim.tools.folders import check_new_folder, new_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Before the work


def test_targets_that_can_be_written(tmp_path):
    (tmp_path / "old.mp4").write_bytes(b"old")
    (tmp_path / "link.mp4").symlink_to("old.mp4")
    (tmp_path / "dangling.mp4").symlink_to("new.mp4")
    for name in ("new.mp4", "NEW.MP4", "old.mp4", "link.mp4", "dangling.mp4"):
        assert check_target("path", str(tmp_path / name), (".mp4",)) == tmp_path / name
    assert names(tmp_path) == ["dangling.mp4", "link.mp4", "old.mp4"]


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("x.gif", ValueError, "`path` must end with .mp4, but is '.*x.gif'"),
        ("x", ValueError, "`path` must end with .mp4, but is '.*x'"),
        ("folder.mp4", ValueError, "`path` must be a file, but .*folder.mp4 is a folder"),
        ("missing/x.mp4", OSError, "`path` must be in an existing folder, but .*missing does not exist"),
        ("file/x.mp4", OSError, "but .*file is not a folder"),
        ("gone.mp4", OSError, "`path` must be in an existing folder, but .*nowhere does not exist"),
        ("pipe.mp4", ValueError, "`path` must be a new or a plain file, but .*pipe.mp4 is a device, pipe"),
        ("null.mp4", ValueError, "`path` must be a new or a plain file, but .*null.mp4 is a device, pipe"),
        ("loop.mp4", ValueError, "`path` must be a new or a plain file, but .*loop.mp4 is a device, pipe, link"),
    ],
)
def test_targets_that_cannot_be_written_raise(name, error, message, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "gone.mp4").symlink_to("nowhere/x.mp4")
    (tmp_path / "null.mp4").symlink_to("/dev/null")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    before = names(tmp_path)
    with pytest.raises(error, match=message):
        check_target("path", tmp_path / name, (".mp4",))
    assert names(tmp_path) == before


@pytest.mark.parametrize("path", [None, 3, b"x.mp4", ["x.mp4"]])
def test_invalid_paths_raise(path):
    with pytest.raises(TypeError, match="--out must be a path, but is"):
        check_target("--out", path)


def test_inputs_are_never_replaced(tmp_path):
    (tmp_path / "in.json").write_text("{}")
    os.link(tmp_path / "in.json", tmp_path / "hard.json")
    (tmp_path / "soft.json").symlink_to("in.json")
    for name in ("in.json", "hard.json", "soft.json"):
        with pytest.raises(ValueError, match=f"--json must not be an input, but .*{name} is one"):
            check_target("--json", tmp_path / name, given=[tmp_path / "none", tmp_path / "in.json"])


def test_only_own_files_are_replaced(tmp_path):
    log = tmp_path / "x.jsonl"
    for content, ours in (
        ('{"chunk": 0, "severity": null}\n', True),
        ("", True),
        ('{"chu', True),  # a process was killed
        ('{"chunk": 0, "seve', True),
        ('{"prom', False),
        ('{"prompt": "a"}\n', False),
        ("[1]\n", False),
        ("text", False),
        (b"\xff\x00", False),
    ):
        log.write_bytes(content if isinstance(content, bytes) else content.encode())
        if ours:
            check_target("path", log, is_ours=is_decision_log, ours="decisions")
        else:
            with pytest.raises(ValueError, match="`path` must be a new file or decisions, but .* is something else"):
                check_target("path", log, is_ours=is_decision_log, ours="decisions")


# The work


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / ("ä" * 120 + ".txt")  # 244 bytes
    with whole_file(target) as unfinished:
        assert unfinished.parent == tmp_path and unfinished.suffix == ".txt" and unfinished.name[0] == "."
        unfinished.write_text("half")
        assert not target.exists()
        unfinished.write_text("whole")
    assert target.read_text() == "whole" and names(tmp_path) == [target.name]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_error_keeps_the_old_file_and_leaves_no_other(error, tmp_path):
    (tmp_path / "x.txt").write_text("before")
    with pytest.raises(type(error) if isinstance(error, OSError) else error) as told:
        with whole_file(tmp_path / "x.txt") as unfinished:
            unfinished.write_text("half")
            raise error
    assert (tmp_path / "x.txt").read_text() == "before" and names(tmp_path) == ["x.txt"]
    if isinstance(error, OSError):
        assert told.value.filename == str(tmp_path / "x.txt") and "unfinished" not in str(told.value)


def test_a_link_stays_a_link_and_modes_stay(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "x.txt").write_text("before")
    (tmp_path / "disk" / "x.txt").chmod(0o640)
    (tmp_path / "x.txt").symlink_to("disk/x.txt")
    write_whole(tmp_path / "x.txt", "after")
    assert (tmp_path / "x.txt").is_symlink() and (tmp_path / "disk" / "x.txt").read_text() == "after"
    assert stat.S_IMODE((tmp_path / "disk" / "x.txt").stat().st_mode) == 0o640
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new.txt", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o640


def test_writers_of_one_file_do_not_mix(tmp_path):
    ready = threading.Barrier(4)

    def write(letter):
        with whole_file(tmp_path / "x.txt") as unfinished, unfinished.open("w") as file:
            for _ in range(10):
                ready.wait(10)
                file.write(letter * 1000)
                file.flush()

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x.txt").read_text() in {letter * 10_000 for letter in "abcd"} and names(tmp_path) == ["x.txt"]


def test_files_of_killed_processes_are_removed_after_a_day(tmp_path):
    old, new = tmp_path / ".x.00000000.unfinished.txt", tmp_path / ".x.11111111.unfinished.txt"
    other = tmp_path / ".xy.00000000.unfinished.txt"
    for path in (old, new, other):
        path.touch()
        if path != new:
            os.utime(path, (0, 0))
    write_whole(tmp_path / "x.txt", "")
    assert names(tmp_path) == sorted([new.name, other.name, "x.txt"])


# Folders


@pytest.mark.parametrize("kind", ["new", "deep", "empty", "link", "dangling", "here", "swept"])
def test_folder_appears_whole_in_any_case(kind, tmp_path, monkeypatch):
    out = tmp_path / {"deep": "a/b/out", "here": "out"}.get(kind, "out")
    if kind in ("empty", "here", "swept"):
        out.mkdir()
    if kind in ("link", "dangling"):
        out.symlink_to("disk")
    if kind == "link":
        (tmp_path / "disk").mkdir()
    if kind == "swept":
        (out / ".unfinished" / "part").mkdir(parents=True)
    if kind == "here":
        monkeypatch.chdir(out)
        out = Path(".")
    inode = out.stat().st_ino if out.exists() else None
    check_new_folder(out)
    with new_folder(out) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text("w")
        (folder / "model_index.json").write_text("{}")
        assert not (out / "model_index.json").exists()
    assert names(out) == ["model_index.json", "part"] and (out / "part" / "weights").read_text() == "w"
    assert inode in (None, out.stat().st_ino)  # a mount point could not be replaced
    assert not list(tmp_path.rglob(".*"))
    with pytest.raises(ValueError, match="`out` must be a new or an empty folder"):
        check_new_folder(out)


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_no_folder(exists, tmp_path):
    if exists:
        (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError):
        with new_folder(tmp_path / "out") as folder:
            (folder / "part").touch()
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["out"] * exists


def test_file_at_the_place_of_a_folder_raises(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match="`out` must be a new or an empty folder"):
            check_new_folder(out)


# Locks


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path / "run"):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    for once in (True, False):
        with pytest.raises(Timeout), locked(tmp_path / "run", once=once):
            pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path / "run"):
        assert lock_of(tmp_path / "run").exists()
    assert not list(tmp_path.iterdir())


def test_one_process_may_share_its_lock(tmp_path):
    with locked(tmp_path / "run", once=False):
        with locked(tmp_path / "run", once=False):
            pass
        assert lock_of(tmp_path / "run").exists()
    assert not list(tmp_path.iterdir())


def test_mount_points_of_containers_are_known(tmp_path, monkeypatch):
    (tmp_path / "a b").touch()
    assert not tokentrim_writing.is_mount_point(tmp_path / "a b")
    read = Path.read_text
    line = "1 2 0:3 / {} rw - ext4 /dev/sda rw\n".format(str(tmp_path / "a b").replace(" ", r"\040"))
    monkeypatch.setattr(Path, "read_text", lambda path, **_: line if "mountinfo" in str(path) else read(path))
    assert tokentrim_writing.is_mount_point(tmp_path / "a b")
    with pytest.raises(ValueError, match="mount point"):
        check_target("path", tmp_path / "a b")
