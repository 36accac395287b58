"""A checkpoint is found whole or not at all, whatever happens to the disk, the process or the files."""

import errno
import io
import json
import os
import random
import resource
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import mtl.checkpoint
from mtl.checkpoint import discard_after, newest_checkpoint, pack, read_checkpoint, save_checkpoint, sealed, unpack
from mtl.errors import UserError

FILES = ("state.json", "tensors.safetensors", "manifest.json")
STATE = {
    "numbers": {"step": 3, "value": 0.1 + 0.2, "none": None, "bad": float("nan"), "names": ["情感", "🙂", "\ud800"]},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.arange(4.0)}}, "betas": (0.9, 0.999)},
    "half": torch.tensor([1.5, -2.0, float("nan")], dtype=torch.bfloat16),
    "empty": [torch.zeros(0, 3), torch.tensor(True), {}, ()],
    "reserved": {"__tensor__": "0", "__items__": 1},
    "pairs": {(1, "a"): "tuple", "1": "text", 1: "number"},
}


@pytest.fixture
def no_fsync(monkeypatch):
    """Tests that save a thousand times don't wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(folder, step, state=None, *, value=None, keep_last=100, keep_best=0, environment=None):
    return save_checkpoint(
        folder,
        step,
        {"step": step} if state is None else state,
        environment=environment or {"world_size": 1},
        value=value,
        keep_last=keep_last,
        keep_best=keep_best,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(left, right):
    """Equal in type, order and every bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        bits = [tensor.flatten().view(torch.uint8) if tensor.numel() else tensor for tensor in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)


def test_round_trip_is_exact(tmp_path):
    environment = {"world_size": 2, "versions": {"torch": "2"}, "by_rank": {10: "a", 9: "b"}}
    folder = save(tmp_path, 3, STATE, environment=environment)
    loaded = read_checkpoint(folder)
    assert (loaded.path, loaded.step) == (tmp_path / "step-000003", 3)
    assert same(loaded.state, STATE)
    assert loaded.environment == {**environment, "by_rank": {"10": "a", "9": "b"}}
    assert names(tmp_path) == ["latest", "step-000003"]
    assert names(folder) == sorted(FILES)
    assert (tmp_path / "latest").read_text() == "step-000003"
    assert len({stat.S_IMODE((folder / name).stat().st_mode) for name in FILES}) == 1


def test_equal_states_make_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, 3, STATE)
    for name in FILES:
        assert (tmp_path / "a/step-000003" / name).read_bytes() == (tmp_path / "b/step-000003" / name).read_bytes()


def test_a_loaded_state_does_not_depend_on_its_file(tmp_path):
    folder = save(tmp_path, 1, {"a": torch.arange(10_000.0)})
    loaded = read_checkpoint(folder)
    os.truncate(folder / "tensors.safetensors", 0)
    assert torch.equal(loaded.state["a"], torch.arange(10_000.0))


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    flat = torch.arange(6.0)
    loaded = read_checkpoint(save(tmp_path, 1, {"a": flat[:3], "b": flat[2:], "c": flat[::2]}))
    assert loaded.state["a"].tolist() == [0, 1, 2]
    assert loaded.state["b"].tolist() == [2, 3, 4, 5]
    assert loaded.state["c"].tolist() == [0, 2, 4]


def test_only_plain_values_and_tensors(tmp_path):
    with pytest.raises(TypeError, match="set"):
        save(tmp_path, 1, {"a": {1, 2}})
    assert names(tmp_path) == []
    tensors = {}
    packed = pack(STATE, tensors)
    assert same(unpack(json.loads(json.dumps(packed)), tensors), STATE)


# Which checkpoints stay.


@pytest.mark.parametrize(
    ("values", "keep_last", "keep_best", "kept"),
    [
        ({1: None, 2: None, 3: None}, 2, 0, {2, 3}),
        ({1: 0.1, 2: 0.2, 3: 0.3}, 1, 0, {3}),
        ({1: 0.1, 2: 0.2, 3: 0.3}, 1, 1, {1, 3}),
        ({1: 0.5, 2: 0.5, 3: 0.6}, 1, 1, {2, 3}),
        ({1: 0.5, 2: 0.4, 3: 0.3}, 1, 1, {3}),
        ({1: 0.5, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.4}, 1, 2, {2, 3, 5}),
        ({1: 0.5, 2: float("nan"), 3: float("-inf"), 4: None}, 1, 1, {1, 4}),
        ({1: 1, 2: 1.0, 3: None}, 1, 5, {1, 2, 3}),
        ({5: None, 10: None, 100: None, 1000: None}, 2, 0, {100, 1000}),
        ({999_998: None, 999_999: None, 1_000_000: None}, 2, 0, {999_999, 1_000_000}),
        ({1000: None, 85: None}, 1, 0, {85, 1000}),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, values, keep_last, keep_best, kept):
    for step, value in values.items():
        newest = save(tmp_path, step, value=value, keep_last=keep_last, keep_best=keep_best)
        assert read_checkpoint(newest).step == step
    assert names(tmp_path) == sorted(["latest", *(f"step-{step:06d}" for step in kept)])
    assert newest_checkpoint(tmp_path)[0].step == max(kept)


def test_a_damaged_manifest_is_not_the_best(tmp_path):
    save(tmp_path, 1, value=0.1)
    save(tmp_path, 2, value=0.2)
    (tmp_path / "step-000001" / "manifest.json").write_text('{"value": -1}')
    save(tmp_path, 3, value=0.3, keep_last=1, keep_best=1)
    assert names(tmp_path) == ["latest", "step-000002", "step-000003"]


# Damage to a file.


def damages(content, seed):
    """Names of damages and what they leave of a file's bytes (``None``: no file)."""
    yield "deleted", None
    yield "longer", content + b"\n"
    for length in sorted({0, 1, len(content) // 2, len(content) - 1}):
        yield f"cut to {length}", content[:length]
    last = 8 * len(content) - 1
    for bit in [0, last, *random.Random(seed).sample(range(last), 150)]:
        yield f"bit {bit}", flipped(content, bit)


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_never_loaded_always_named_and_the_one_before_is_taken(tmp_path, name):
    run = tmp_path / "run"
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    save(folder, 1, {**STATE, "at": 1})
    file = save(folder, 2, {**STATE, "at": 2}) / name
    content = file.read_bytes()
    for number, (damage, left) in enumerate(damages(content, seed=0)):
        file.unlink(missing_ok=True)
        if left is not None:
            file.write_bytes(left)
        with pytest.raises(UserError) as caught:
            read_checkpoint(file.parent)
        message = str(caught.value)
        assert message.startswith(f"{file} is damaged: "), damage
        assert "\n" not in message
        found, skipped = newest_checkpoint(run if number % 2 else folder)
        assert (found.step, found.state["at"], skipped) == (1, 1, [message]), damage
    file.write_bytes(content)
    assert newest_checkpoint(run)[0].state["at"] == 2


def test_every_single_bit_of_a_manifest_counts(tmp_path):
    file = save(tmp_path, 2, environment={"device": "cpu", "ratio": 0.1}, value=0.5) / "manifest.json"
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        file.write_bytes(flipped(content, bit))
        with pytest.raises(UserError) as caught:
            read_checkpoint(file.parent)
        assert str(caught.value).startswith(f"{file} is damaged: "), bit


@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b"{}", b'{"schema": 4}', b"\xff\xfe", b"[[1, 2]]"])
def test_what_is_no_manifest_is_damage(tmp_path, content):
    file = save(tmp_path, 2) / "manifest.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        read_checkpoint(file.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_damage(tmp_path, name):
    file = save(tmp_path, 2) / name
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=f"{name} is damaged: it can't be read"):
        read_checkpoint(file.parent)


@pytest.mark.parametrize("name", ["notes.txt", "state.json.bak", "folder"])
def test_a_file_too_many_is_named(tmp_path, name):
    save(tmp_path, 1)
    extra = save(tmp_path, 2) / name
    extra.mkdir() if name == "folder" else extra.touch()
    with pytest.raises(UserError, match=f"{name} is not part of the checkpoint"):
        read_checkpoint(extra.parent)
    found, [message] = newest_checkpoint(tmp_path)
    assert found.step == 1
    assert name in message


def test_damage_to_several_is_reported_newest_first(tmp_path):
    for step in (1, 2, 3):
        (save(tmp_path, step) / "state.json").unlink()
    found, skipped = newest_checkpoint(tmp_path)
    assert found is None
    assert [message.split(" is damaged")[0] for message in skipped] == [
        str(tmp_path / f"step-00000{step}" / "state.json") for step in (3, 2, 1)
    ]


def first_schema(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    old = {"schema": 1, "step": manifest["step"], "files": manifest["files"], "versions": {"torch": "2"}}
    return json.dumps(old, indent=2).encode()


def later_schema(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    return sealed({**manifest, "schema": 5})


@pytest.mark.parametrize(("written_by", "schema"), [(first_schema, 1), (later_schema, 5)])
def test_another_version_is_not_damage(tmp_path, written_by, schema):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (folder / "manifest.json").write_bytes(written_by(folder))
    with pytest.raises(UserError, match=f"was written by another version of mtl: it has schema {schema}") as raised:
        newest_checkpoint(tmp_path)  # going on from step 1 would end with the deletion of step 2
    assert "damaged" not in str(raised.value)


# Names, links, folders.


def test_only_names_of_checkpoints_count_and_latest_does_not(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])
    assert newest_checkpoint(tmp_path) == (None, [])
    (tmp_path / "checkpoints").mkdir()
    assert newest_checkpoint(tmp_path) == (None, [])
    folder = tmp_path / "checkpoints"
    save(folder, 999_999)
    whole = save(folder, 1_000_000)
    for name in (
        "step-1000001.tmp",
        "step-2",
        "step-01000001",
        "step-1000001x",
        "best",
        "step-",
        "step-\uff11000001",
    ):
        shutil.copytree(whole, folder / name)
    (folder / "latest").write_text("step-999999")
    found, skipped = newest_checkpoint(tmp_path)
    assert (found.step, found.path, skipped) == (1_000_000, folder / "step-1000000", [])


def test_what_is_no_folder_is_told(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no checkpoint there\. Give a run folder"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "step-000001").touch()
    found, [message] = newest_checkpoint(tmp_path)
    assert found is None
    assert "step-000001: no checkpoint there" in message


def test_a_renamed_folder_is_told(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-000009")
    found, [message] = newest_checkpoint(tmp_path)
    assert found.step == 1
    assert "step-000009/manifest.json is that of step 2" in message


def test_links_are_followed_but_what_they_name_is_not_deleted(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "checkpoints"
    elsewhere.mkdir()
    folder.mkdir()
    (folder / "step-000002").symlink_to(save(elsewhere, 2))
    (folder / "step-000003").symlink_to(elsewhere / "gone")
    (folder / "step-000009.tmp").symlink_to(elsewhere)
    found, skipped = newest_checkpoint(folder)
    assert found.step == 2
    assert len(skipped) == 1
    save(folder, 2, {"again": True})
    assert newest_checkpoint(folder)[0].state == {"again": True}
    save(folder, 3)
    save(folder, 4, keep_last=1)
    assert names(folder) == ["latest", "step-000004"]
    assert read_checkpoint(elsewhere / "step-000002").state == {"step": 2}


def test_what_lies_beyond_a_resumed_step_is_discarded(tmp_path):
    discard_after(tmp_path / "nowhere", 3)
    for step in (1, 2, 3, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "step-000003" / "state.json").unlink()
    (tmp_path / "step-000002.tmp").mkdir()
    (tmp_path / "latest.tmp").touch()
    (tmp_path / "step-000002").rename(tmp_path / "step-000002.old")
    for mine in ("mine.tmp", "step-2.old", "step-000009-mine.tmp"):
        (tmp_path / mine).touch()
    found, _ = newest_checkpoint(tmp_path)
    discard_after(tmp_path, 2)
    assert found.step == 1_000_000
    assert names(tmp_path) == ["latest", "mine.tmp", "step-000001", "step-000002", "step-000009-mine.tmp", "step-2.old"]
    assert read_checkpoint(tmp_path / "step-000002").step == 2


def test_the_folder_is_made_but_not_its_parents(tmp_path):
    save(tmp_path / "checkpoints", 1)
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "gone" / "checkpoints", 1)
    assert names(tmp_path) == ["checkpoints"]


# Trouble while a checkpoint is written.


class Killed(BaseException):
    """The process is gone: nothing that it would do from now on happens."""


class Disk:
    """Counts what a save does to the disk; from call number ``at`` on, or at it alone, it goes wrong.

    Args:
        at: The call that goes wrong first.
        error: What is raised.
        when: ``before`` or ``after`` the call has had its effect. A write is half done before.
        alone: Whether the calls after it work.
        reading_and_deleting: Whether calls that only read or delete go wrong too.
    """

    CALLS = ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "chmod")
    WRITING = ("write", "fsync", "mkdir", "rename", "replace", "chmod")

    def __init__(self, at=10**9, error=None, when="before", *, alone=False, reading_and_deleting=True):
        self.at, self.error, self.when, self.alone = at, error, when, alone
        self.counted = (*self.CALLS, "write") if reading_and_deleting else self.WRITING
        self.log = []
        self.synced = set()

    @contextmanager
    def broken(self, monkeypatch, folder):
        """For the block; afterwards what was written since and not synced is lost if the process was killed."""
        self.synced = {fingerprint(path) for path in folder.rglob("*")}
        real = {name: getattr(os, name) for name in self.CALLS}
        with monkeypatch.context() as patch:
            for name, function in real.items():
                patch.setattr(os, name, self.wrapped(name, function))
            patch.setattr(os, "fsync", self.wrapped("fsync", self.sync))
            patch.setattr(io, "open", self.wrapped("open", io.open))
            patch.setattr(Path, "write_bytes", self.wrapped("write", Path.write_bytes, torn_write))
            patch.setattr(
                mtl.checkpoint,
                "save_file",
                self.wrapped("write", mtl.checkpoint.save_file, lambda tensors, path: torn_write(path, b"half" * 9)),
            )
            try:
                yield
            finally:
                patch.undo()
                if self.error is Killed:
                    for path in folder.rglob("*"):
                        if path.is_file() and not path.is_symlink() and fingerprint(path) not in self.synced:
                            os.truncate(path, path.stat().st_size // 2)

    def sync(self, descriptor):
        self.synced.add(fingerprint(descriptor))
        self.log[-1] = ("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

    def wrapped(self, name, function, torn=None):
        def call(*args, **kwargs):
            if name not in self.counted:
                return function(*args, **kwargs)
            number = len(self.log)
            self.log.append((name, *map(str, args)))
            wrong = number == self.at or (number > self.at and not self.alone)
            if wrong and self.when == "before":
                if torn and number == self.at:
                    torn(*args)
                raise self.error
            try:
                result = function(*args, **kwargs)
            except OSError:
                if wrong:
                    raise self.error from None
                raise
            if wrong:
                if name == "open":
                    os.close(result) if isinstance(result, int) else result.close()
                raise self.error
            return result

        return call


def torn_write(path, content):
    descriptor = REAL_OPEN(path, os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, content[: len(content) // 2])
    os.close(descriptor)


REAL_OPEN = os.open


def fingerprint(path):
    status = os.lstat(path) if isinstance(path, Path) else os.fstat(path)
    return status.st_ino, status.st_mtime_ns


OLD, NEW = {"which": "old", "tensor": torch.arange(3.0)}, {"which": "new", "tensor": torch.arange(5.0)}


def nothing(folder):
    """Before a run's first checkpoint."""


def two(folder):
    """The usual case: one of them is deleted in the end."""
    save(folder, 1, OLD)
    save(folder, 2, OLD)


def same_step(folder):
    """A step is saved for the second time."""
    save(folder, 1, OLD)
    save(folder, 3, OLD)


def after_a_crash(folder):
    """What crashes left: the first half of a second save at a step, an unfinished folder, a half-deleted one."""
    two(folder)
    (folder / "step-000002").rename(folder / "step-000002.old")
    for name in ("step-000003.tmp", "step-000000.tmp"):
        (folder / name).mkdir()
        (folder / name / "state.json").touch()
    (folder / "latest.tmp").touch()


def after_a_crash_at_this_step(folder):
    """What crashes left: both folders of the step that is saved now."""
    same_step(folder)
    shutil.copytree(folder / "step-000003", folder / "step-000003.old")


SCENES = [nothing, two, same_step, after_a_crash, after_a_crash_at_this_step]


@pytest.fixture
def scene(request, tmp_path, no_fsync):
    """Makes the folder of a scene again and again; saving step 3 with ``NEW`` is what goes wrong in it."""
    original = tmp_path / "original"
    original.mkdir()
    request.param(original)

    def make(number):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder, symlinks=True)
        return folder

    return make


def save_new(folder):
    return save(folder, 3, NEW, keep_last=2)


def count_calls(monkeypatch, folder, **options):
    disk = Disk(**options)
    with disk.broken(monkeypatch, folder):
        save_new(folder)
    return len(disk.log)


def check_old_or_new(folder, before):
    """The new state whole, or nothing but the old one; returns which."""
    found, skipped = newest_checkpoint(folder)
    assert skipped == []
    if found is not None and same(found.state, NEW):
        assert found.step == 3
        return "new"
    assert (found.step, same(found.state, OLD)) == (before.step, True) if before else found is None
    return "old"


def whole_steps(folder):
    """The steps that can be loaded."""
    return {
        read_checkpoint(path).step
        for path in folder.iterdir()
        if path.name.startswith("step-") and ".tmp" not in path.name
    }


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("scene", SCENES, indirect=True)
def test_killed_at_any_moment_the_old_or_the_new_state_is_found(monkeypatch, scene, when):
    total = count_calls(monkeypatch, scene("counted"))
    assert total > 20
    before, _ = newest_checkpoint(scene("before"))
    steps = whole_steps(scene("steps"))
    outcomes = []
    for number in range(total):
        folder = scene(number)
        with pytest.raises(Killed), Disk(number, Killed, when).broken(monkeypatch, folder):
            save_new(folder)
        outcomes.append(check_old_or_new(folder, before))
        if outcomes[-1] == "old":
            assert whole_steps(folder) == steps, number
        save(folder, 4, OLD, keep_last=2)
        left = whole_steps(folder)
        assert names(folder) == ["latest", *(f"step-{step:06d}" for step in sorted(left))], number
        assert max(left) == 4, number
        assert len(left) == (min(2, 1 + len(steps | ({3} if outcomes[-1] == "new" else set())))), number
    assert outcomes == sorted(outcomes, reverse=True)
    assert set(outcomes) == {"old", "new"}


@pytest.mark.parametrize("alone", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("scene", SCENES, indirect=True)
def test_a_full_disk_at_any_moment_loses_nothing(monkeypatch, scene, code, alone):
    total = count_calls(monkeypatch, scene("counted"), reading_and_deleting=False)
    before, _ = newest_checkpoint(scene("before"))
    steps = whole_steps(scene("steps"))
    error = OSError(code, os.strerror(code))
    for number in range(total):
        folder = scene(number)
        disk = Disk(number, error, alone=alone, reading_and_deleting=False)
        try:
            with disk.broken(monkeypatch, folder):
                save_new(folder)
        except OSError as caught:
            assert caught is error
        else:
            assert number == 0  # the folder need not be made
            assert check_old_or_new(folder, before) == "new"
        if check_old_or_new(folder, before) == "old":
            assert whole_steps(folder) == steps, number
        if alone:
            assert not list(folder.glob("*.tmp")), number
        save_new(folder)
        assert not [*folder.glob("*.tmp"), *folder.glob("*.old")], number
        assert same(newest_checkpoint(folder)[0].state, NEW), number


def test_a_file_that_outgrows_a_real_limit_is_an_os_error(tmp_path):
    save(tmp_path, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match=r"tensors\.safetensors: .*File too large"):
            save(tmp_path, 2, {"a": torch.zeros(10_000)})
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path, 2, {"a": ["text"] * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert names(tmp_path) == ["latest", "step-000001"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("step", [2, 3])
def test_nothing_is_deleted_when_the_disk_gives_back_something_else(tmp_path, monkeypatch, name, step):
    """A bit flips between memory and disk: the checkpoint is refused by its writer."""
    for old in (1, 2):
        save(tmp_path, old, OLD)
    real = mtl.checkpoint.sync

    def sync(path):
        real(path)
        if path.name == name and path.parent.suffix == ".tmp":
            path.write_bytes(flipped(path.read_bytes(), 300))

    monkeypatch.setattr(mtl.checkpoint, "sync", sync)
    with pytest.raises(OSError, match=f"doesn't read back .*{name} is damaged") as caught:
        save(tmp_path, step, NEW, keep_last=1)
    assert caught.value.errno == errno.EIO
    assert names(tmp_path) == ["latest", "step-000001", "step-000002"]
    assert all(same(read_checkpoint(tmp_path / f"step-00000{old}").state, OLD) for old in (1, 2))


def test_files_are_synced_before_the_rename_and_every_rename_before_the_next_step(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    same_step(folder)
    disk = Disk()
    with disk.broken(monkeypatch, folder):
        save(folder, 3, NEW, keep_last=1)
    log = [call for call in disk.log if call[0] in ("fsync", "replace", "rename")]
    first_rename = next(number for number, call in enumerate(log) if call[0] != "fsync")
    temporary = folder / "step-000003.tmp"
    assert {path for _, path in log[:first_rename]} >= {str(temporary), *(str(temporary / name) for name in FILES)}
    renames = [number for number, call in enumerate(log) if call[0] != "fsync"]
    assert [Path(log[number][1]).name for number in renames] == [
        "step-000003",
        "step-000003.tmp",
        "latest.tmp",
        "step-000003.old",
        "step-000001",
    ]
    assert all(log[number + 1] == ("fsync", str(folder)) for number in renames)
