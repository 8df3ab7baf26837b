"""Files are whole or absent, and what cannot be read is said in one line."""

import os
import resource
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdfq.errors import GdfqError
from gdfq.run.files import load_tensors, save_tensors, write_atomically, write_text


@pytest.fixture
def small_disk():
    """No file may grow beyond 4 KiB, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_text_replaces_the_old_file_and_makes_the_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "report.txt"
    write_text(path, "one")
    write_text(path, "zwei ü")
    assert path.read_bytes() == "zwei ü".encode()
    assert os.listdir(path.parent) == ["report.txt"]


def test_new_files_follow_the_umask(tmp_path):
    write_text(tmp_path / "a", "text")
    (tmp_path / "b").write_text("text")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, small_disk):
    path = tmp_path / "weights.safetensors"
    path.write_text("old")
    with pytest.raises(GdfqError, match=r"cannot write .*weights\.safetensors: File too large"):
        save_tensors(path, {"x": torch.zeros(10_000)})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_no_space_left_is_named(tmp_path, monkeypatch):
    def no_space(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(GdfqError, match="No space left on device"):
        write_text(tmp_path / "report.txt", "text")
    assert os.listdir(tmp_path) == []


def test_interruption_leaves_nothing(tmp_path):
    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "report.txt", interrupted)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GdfqError, match=r"cannot write .*report\.txt"):
        write_text(tmp_path / "file" / "report.txt", "text")


def test_tensors_round_trip_in_every_form(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "base": base,
        "shared": base,
        "view": base[:, 1:, ::2],
        "transposed": base.transpose(0, 2),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "half": torch.randn(5).bfloat16(),
    }
    path = tmp_path / "tensors.safetensors"
    save_tensors(path, tensors, {"bits": "4"})
    loaded, metadata = load_tensors(path)
    assert metadata == {"bits": "4"}
    by_the_library = load_file(path)
    assert loaded.keys() == tensors.keys() == by_the_library.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(by_the_library[name], tensor), name


def test_a_file_without_metadata_has_none(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert load_tensors(tmp_path / "x.safetensors")[1] == {}


@pytest.mark.parametrize("keep", [0, 3, 8, 20, -1])
def test_truncated_files_are_named(tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    save_tensors(path, {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(GdfqError, match=r"cut\.safetensors is truncated or is not a safetensors file"):
        load_tensors(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(GdfqError, match=r"no such file: .*absent"):
        load_tensors(tmp_path / "absent.safetensors")
