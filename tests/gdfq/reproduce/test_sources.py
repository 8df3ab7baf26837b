"""Images and weights for the tables: layouts that are known, and what is said of those that are not."""

import math
import runpy
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from gdfq.errors import GdfqError
from gdfq.reproduce import sources
from gdfq.reproduce.sources import Sources, named_paths
from gdfq.reproduce.tables import CIFAR10, CIFAR100, INCEPTION, RESNET18, SHIPPED, Cell


def make_imagenet(folder, classes, split="val"):
    """One 30 x 20 image, the same, in each class."""
    Image.new("RGB", (30, 20), (255, 0, 0)).save(folder / "red.png")
    for label in range(classes):
        (folder / split / f"n{label:08}").mkdir(parents=True)
        (folder / split / f"n{label:08}" / "red.png").hardlink_to(folder / "red.png")
    return Sources({"imagenet": folder})


def test_shipped_images_are_two_halves_that_share_nothing():
    given = Sources()
    training, test = given.training_images(SHIPPED), given.test_images(SHIPPED)
    assert (len(training), len(test)) == (5000, 5000)
    assert training.indices[-1] < test.indices[0]
    assert given.missing_images(Cell(SHIPPED, "FT", "finetune", 4)) == []


def test_cifar_folder(cifar10):
    given = Sources({"cifar10": cifar10})
    assert (len(given.test_images(CIFAR10)), len(given.training_images(CIFAR10))) == (20, 30)
    assert given.test_images(CIFAR10)[0][0].shape == (3, 32, 32)


def test_a_teacher_of_the_example_is_one_for_the_tables(cifar10, tmp_path, monkeypatch):
    script = Path(__file__).parents[3] / "examples" / "train_teacher.py"
    file = tmp_path / "teacher.safetensors"
    arguments = ["cifar10", "--data", cifar10, "--out", file, "--epochs", 1, "--batch-size", 10]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in (script, *arguments)])
    runpy.run_path(str(script), run_name="__main__")
    trained = Sources(weights={"resnet20_cifar10": file}).teacher(CIFAR10)
    assert not trained.training
    assert trained.features.init_block.bn.num_batches_tracked == 3  # of ten of the 30 images


def test_processes_download_one_after_the_other(tmp_path, monkeypatch):
    """Threads here: each opens the lock by itself."""
    at_once, most = [], []

    def load(spec, weights, **options):
        at_once.append(spec)
        most.append(len(at_once))
        time.sleep(0.05)
        at_once.pop()

    monkeypatch.setattr(sources, "load_model", load)
    monkeypatch.setattr(sources, "PYTORCHCV_CACHE", tmp_path / "models")
    threads = [threading.Thread(target=Sources().teacher, args=(CIFAR10,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_imagenet_is_prepared_as_each_network_was_trained(tmp_path):
    given = make_imagenet(tmp_path, 1000)
    for network, size in ((RESNET18, 224), (INCEPTION, 299)):
        images = given.test_images(network)
        assert len(images) == 1000
        assert images.transform.resize == math.ceil(size / 0.875)
        image, label = images[999]
        assert image.shape == (3, size, size)
        assert label == 999
        expected = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
            [0.229, 0.224, 0.225]
        )
        torch.testing.assert_close(image[:, 100, 100], expected)
    # Without train/ it is good for methods that need no images.
    assert given.missing_images(Cell(RESNET18, "ours", "gdfq", 4)) == []
    (reason,) = given.missing_images(Cell(RESNET18, "FT", "finetune", 4))
    assert "has no folder train" in reason


def test_wrong_folders_are_said_at_once(cifar10, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for network, folder, words in (
        (CIFAR10, empty, ["lacks the test images of cifar10", "test_batch"]),
        (CIFAR100, cifar10, ["lacks the test images of cifar100"]),
        (RESNET18, empty, ["has no folder val", "1000 classes", "--data imagenet="]),
    ):
        with pytest.raises(GdfqError) as error:
            Sources({network.data: folder}).check([Cell(network, "ours", "gdfq", 4)])
        assert all(word in str(error.value) for word in words), error.value


def test_another_number_of_classes_is_refused(tmp_path):
    with pytest.raises(GdfqError, match="val holds 3 classes, but resnet18 knows 1000"):
        make_imagenet(tmp_path, 3).check([Cell(RESNET18, "ours", "gdfq", 4)])


def test_images_that_were_not_given_are_asked_for():
    (reason,) = Sources().missing_images(Cell(CIFAR100, "FT", "finetune", 4))
    assert "--data cifar100=FOLDER" in reason
    assert "train and test" in reason


def test_weights_that_do_not_fit_are_said_at_once(resnet20_weights):
    with pytest.raises(GdfqError, match=r"resnet20\.safetensors does not fit pytorchcv:resnet20_cifar100"):
        Sources(weights={"resnet20_cifar100": resnet20_weights}).check([Cell(CIFAR100, "ours", "gdfq", 4)])


def test_weights_of_the_user_come_first(resnet20_weights):
    given = Sources(weights={"resnet20_cifar10": resnet20_weights})
    assert given.arguments(CIFAR10) == ("pytorchcv:resnet20_cifar10", resnet20_weights, {})
    assert given.arguments(CIFAR100) == ("pytorchcv:resnet20_cifar100", None, {"pretrained": True})
    assert given.arguments(SHIPPED) == ("gdfq.demo:teacher", None, {})
    assert given.to_download(CIFAR10) is None
    assert not given.teacher(CIFAR10).training


def test_weights_in_pytorchcvs_folder_are_not_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "PYTORCHCV_CACHE", tmp_path)
    assert "put resnet18-0896-77a56f15.pth into" in Sources().to_download(RESNET18)
    (tmp_path / "resnet18-0896-77a56f15.pth").touch()
    assert Sources().to_download(RESNET18) is None


def test_what_pytorchcv_prints_is_not_in_the_output(monkeypatch, capsys):
    def load(*_, **__):
        print("Downloading ...")

    monkeypatch.setattr(sources, "load_model", load)
    Sources().teacher(CIFAR10)
    assert capsys.readouterr() == ("", "Downloading ...\n")


def test_paths_with_names(tmp_path):
    file = tmp_path / "a=b"
    file.touch()
    assert named_paths("--data", [f"x={file}"], ["x", "y"]) == {"x": file}
    assert named_paths("--data", [str(tmp_path)], ["x", "x"]) == {"x": tmp_path}
    for items, words in (
        ([str(tmp_path)], "NAME=PATH, and NAME one of x, y"),
        (["z=."], "one of x, y"),
        (["x="], "NAME=PATH"),
        (["x=.", "x=."], "x is given twice"),
        (["x=/no/where"], "there is no /no/where"),
    ):
        with pytest.raises(GdfqError, match=words):
            named_paths("--data", items, ["x", "y"])
