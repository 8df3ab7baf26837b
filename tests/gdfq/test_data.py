"""Data sets from files that the tests write byte by byte."""

import gzip
import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from gdfq.data import CIFAR10_CLASSES, load_dataset, read_idx
from gdfq.errors import GdfqError

pytestmark = pytest.mark.filterwarnings("ignore:images are cut to 224")

RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(256, size=shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def normalised(image: np.ndarray, mean, std) -> torch.Tensor:
    """The definition, in float64: uint8 `(C, H, W)` to `(x / 255 - mean) / std`."""
    scaled = image.astype(np.float64) / 255
    return torch.from_numpy((scaled - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))).float()


# --- idx


@pytest.mark.parametrize("shape", [(5,), (2, 3), (4, 28, 28), (0, 28, 28), ()])
@pytest.mark.parametrize("compress", [False, True])
def test_idx_round_trip(tmp_path, shape, compress):
    array = pixels(*shape)
    content = idx(array)
    (tmp_path / "array").write_bytes(gzip.compress(content) if compress else content)
    tensor = read_idx(tmp_path / "array")
    assert tensor.dtype == torch.uint8
    assert tensor.shape == shape
    assert np.array_equal(tensor.numpy(), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with two zero bytes"),
        (b"PNG...", "does not begin with two zero bytes"),
        (struct.pack(">BBBBI", 0, 0, 0x0D, 1, 1) + bytes(4), "idx type 0x0d; only unsigned bytes"),
        (idx(np.zeros(9, np.uint8))[:-1], r"states the shape \[9\] but holds 8 bytes"),
        (idx(np.zeros(9, np.uint8)) + b"x", r"states the shape \[9\] but holds 10 bytes"),
        (idx(np.zeros((3, 3), np.uint8))[:7], "truncated"),
        (gzip.compress(idx(pixels(99)))[:40], "truncated or damaged"),
        (gzip.compress(idx(pixels(99)))[:-8] + bytes(8), "truncated or damaged"),
    ],
    ids=["empty", "foreign", "floats", "short", "long", "no_shape", "short_gzip", "wrong_checksum"],
)
def test_damaged_idx_is_named(tmp_path, content, message):
    (tmp_path / "array-idx").write_bytes(content)
    with pytest.raises(GdfqError, match=rf"array-idx .*{message}"):
        read_idx(tmp_path / "array-idx")


def test_missing_idx_is_named(tmp_path):
    with pytest.raises(GdfqError, match=r"no such file: .*absent"):
        read_idx(tmp_path / "absent")


# --- Fashion-MNIST


@pytest.fixture
def fashion(tmp_path):
    images, labels = pixels(6, 28, 28), np.array([0, 9, 3, 4, 1, 2], dtype=np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images[::-1]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels[::-1]))
    return tmp_path, images, labels


def test_fashion_mnist_folder(fashion):
    folder, images, labels = fashion
    dataset = load_dataset(folder)
    assert len(dataset) == 6
    assert len(dataset.classes) == 10
    assert dataset.labels.tolist() == labels.tolist()
    image, label = dataset[1]
    assert label == 9
    assert isinstance(label, int)
    torch.testing.assert_close(image, normalised(images[1][None], 0.2860, 0.3530))


def test_fashion_mnist_options(fashion):
    folder, images, _ = fashion
    dataset = load_dataset(folder, kind="fashion-mnist", split="train", mean=0.5, std=[0.25])
    torch.testing.assert_close(dataset[0][0], normalised(images[5][None], 0.5, 0.25))


def test_fashion_mnist_where_torchvision_puts_it(tmp_path, fashion):
    root = tmp_path / "root"
    (root / "FashionMNIST").mkdir(parents=True)
    os.symlink(fashion[0], root / "FashionMNIST" / "raw")
    assert len(load_dataset(root)) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t10k-labels-idx1-ubyte", idx(np.zeros(5, np.uint8)), "6 images but 5 labels"),
        ("t10k-labels-idx1-ubyte", idx(np.full(6, 10, np.uint8)), r"labels 10\.\.10; allowed: 0\.\.9"),
        ("t10k-images-idx3-ubyte.gz", idx(np.zeros(6, np.uint8)), r"shape \(6,\), not images"),
        ("t10k-images-idx3-ubyte.gz", idx(np.zeros((0, 28, 28), np.uint8)), "0 images but 6 labels"),
    ],
)
def test_fashion_mnist_that_does_not_fit_together(fashion, name, content, message):
    (fashion[0] / name).write_bytes(content)
    with pytest.raises(GdfqError, match=message):
        load_dataset(fashion[0])


def test_fashion_mnist_lacks_a_split(fashion):
    (fashion[0] / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(GdfqError, match=r"lacks train-images.*dataset-fashion-mnist"):
        load_dataset(fashion[0], split="train")


# --- CIFAR


def python2_pickle(**entries) -> bytes:
    """A pickle as Python 2 and numpy 1.6 wrote CIFAR's: byte strings, `numpy.core`, protocol 2."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def array(value: np.ndarray) -> bytes:
        dtype = (
            b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R"  # dtype("u1", 0, 1)
            b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        )
        shape = b"(" + b"".join(number(size) for size in value.shape) + b"t"
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + number(0) + b"\x85" + string(b"b") + b"tR"
            b"(" + number(1) + shape + dtype + b"\x89" + string(value.tobytes()) + b"tb"
        )

    content = b"\x80\x02}("
    for key, value in entries.items():
        content += string(key.encode())
        if isinstance(value, np.ndarray):
            content += array(value)
        else:
            content += b"](" + b"".join(number(item) for item in value) + b"e"
    return content + b"u."


def python3_pickle(**entries) -> bytes:
    return pickle.dumps(entries, protocol=2)


@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle])
@pytest.mark.parametrize(
    ("names", "key", "classes"),
    [(["test_batch"], "labels", 10), (["cifar-100-python/test", "cifar-100-python/meta"], "fine_labels", 100)],
)
def test_cifar_python_version(tmp_path, dump, names, key, classes):
    data = pixels(4, 3072)
    labels = [3, 0, classes - 1, 1]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(dump(data=data, **{key: labels}))
    dataset = load_dataset(tmp_path)
    assert len(dataset.classes) == classes
    assert dataset.labels.tolist() == labels
    # A row is 1024 red, then 1024 green, then 1024 blue values, each row by row.
    expected = np.stack([data[2, channel * 1024 : (channel + 1) * 1024].reshape(32, 32) for channel in range(3)])
    torch.testing.assert_close(dataset[2][0], normalised(expected, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))


def test_pickle_written_for_the_test_is_what_numpy_writes():
    data = pixels(2, 3072)
    loaded = pickle.loads(python2_pickle(data=data, labels=[1, 2]), encoding="bytes")
    assert np.array_equal(loaded[b"data"], data)
    assert loaded[b"labels"] == [1, 2]


def test_cifar10_training_batches_join_in_order(tmp_path):
    parts = [pixels(2, 3072) for _ in range(5)]
    for number, part in enumerate(parts):
        (tmp_path / f"data_batch_{number + 1}").write_bytes(python2_pickle(data=part, labels=[number, number]))
    dataset = load_dataset(tmp_path, split="train", mean=0, std=1)
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert np.array_equal(dataset.images.numpy().reshape(10, 3072), np.concatenate(parts))
    with pytest.raises(GdfqError, match=r"lacks the test images of cifar10; looked for test_batch"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(("name", "classes", "before"), [("test_batch.bin", 10, 0), ("test.bin", 100, 1)])
def test_cifar_binary_version(tmp_path, name, classes, before):
    data = pixels(3, 3072)
    labels = np.array([[1], [classes - 1], [5]], dtype=np.uint8)
    coarse = np.full((3, before), 77, dtype=np.uint8)
    (tmp_path / name).write_bytes(np.concatenate([coarse, labels, data], axis=1).tobytes())
    dataset = load_dataset(tmp_path)
    assert len(dataset.classes) == classes
    assert dataset.labels.tolist() == labels.flatten().tolist()
    assert np.array_equal(dataset.images.numpy().reshape(3, 3072), data)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(GdfqError, match="truncated"):
        load_dataset(tmp_path)


class Attack:
    """Makes a folder when it is unpickled without restrictions."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_cifar_pickle_does_not_run(tmp_path):
    content = python3_pickle(data=pixels(1, 3072), labels=[1], extra=Attack(tmp_path / "ran"))
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(GdfqError, match=r"test_batch .*asks for (posix|nt)\.mkdir"):
        load_dataset(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists(), "the attack must work where nothing stops it"


@pytest.mark.parametrize(
    "code",
    [b"cbuiltins\neval\n(S'1'\ntR.", b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.", b"cnumpy\nload\n."],
    ids=["eval", "exec_by_stack", "numpy_load"],
)
def test_other_names_are_refused(tmp_path, code):
    (tmp_path / "test_batch").write_bytes(code)
    with pytest.raises(GdfqError, match="asks for"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        python2_pickle(data=pixels(2, 3072), labels=[1, 2])[:-2000],
        python2_pickle(data=pixels(2, 3071), labels=[1, 2]),
        python2_pickle(labels=[1, 2]),
        python2_pickle(data=pixels(2, 3072), labels=[1]),
        python2_pickle(data=pixels(2, 3072), labels=[1, 10]),
        python2_pickle(data=[1, 2], labels=[1, 2]),
        python3_pickle(data=np.zeros((1, 3072)), labels=[1]),
        pickle.dumps([1, 2], protocol=2),
    ],
    ids=[
        "empty",
        "header_only",
        "truncated",
        "short_rows",
        "no_data",
        "few_labels",
        "high_label",
        "list_for_data",
        "floats",
        "no_mapping",
    ],
)
def test_wrong_cifar_pickles_are_named(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(GdfqError, match=str(tmp_path)):
        load_dataset(tmp_path)


# --- JPEG archives


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path):
    """Three flat images, whose colours JPEG keeps to within a few levels."""
    colours = [(200, 30, 60), (10, 220, 90), (128, 128, 128)]
    files = [jpeg(np.full((32, 32, 3), colour, dtype=np.uint8)) for colour in colours]
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array([4, 0, 9], dtype=np.uint8),
    }
    np.savez(tmp_path / "test.npz", **arrays)
    return tmp_path, arrays, colours


def test_jpeg_archive(archive):
    folder, _, colours = archive
    for spec in (folder, folder / "test.npz"):
        dataset = load_dataset(spec)
        assert dataset.classes == CIFAR10_CLASSES
        assert dataset.labels.tolist() == [4, 0, 9]
        assert dataset.images.shape == (3, 3, 32, 32)
        for image, colour in zip(dataset.images.numpy().astype(int), colours, strict=True):
            assert np.abs(image - np.reshape(colour, (3, 1, 1))).max() <= 3


def test_jpeg_archive_with_a_hundred_classes(archive):
    folder, arrays, _ = archive
    np.savez(folder / "test.npz", **arrays | {"labels": np.array([4, 0, 99])})
    assert len(load_dataset(folder).classes) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([1, 2])}, "do not fit together"),
        ({"labels": np.array([1, 2, 100])}, r"allowed: 0\.\.99"),
        ({"offsets": np.array([0, 10, 5, 20])}, "offsets do not rise"),
        ({"offsets": np.array([0.0, 1, 2, 3])}, "do not fit together"),
        ({"jpeg": np.array([{}], dtype=object)}, "Object arrays cannot be loaded"),
    ],
)
def test_damaged_jpeg_archive_is_named(archive, change, message):
    np.savez(archive[0] / "test.npz", **archive[1] | change)
    with pytest.raises(GdfqError, match=message):
        load_dataset(archive[0])


def test_jpeg_archive_names_the_image_that_fails(archive):
    damaged = archive[1]["jpeg"].copy()
    damaged[archive[1]["offsets"][1] :][:20] = 0
    np.savez(archive[0] / "test.npz", **archive[1] | {"jpeg": damaged})
    with pytest.raises(GdfqError, match=r"cannot decode image 1 of .*test\.npz"):
        load_dataset(archive[0])


def test_truncated_and_foreign_npz(archive):
    path = archive[0] / "test.npz"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(GdfqError, match=r"truncated or is no \.npz file"):
        load_dataset(path)
    np.savez(path, images=np.zeros(3))
    with pytest.raises(GdfqError, match="no JPEG archive, which holds jpeg, offsets and labels"):
        load_dataset(path)


# --- a folder of images


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name, colour in (("b_cat", (0, 255, 0)), ("a_dog", (255, 0, 0))):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), colour).save(root / name / "2.png")
        Image.new("L", (30, 40), 128).save(root / name / "1.PNG")
    (root / "a_dog" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    return root


def test_image_folder(folder):
    dataset = load_dataset(folder, resize=24, crop=16, mean=0, std=1)
    assert dataset.classes == ("a_dog", "b_cat")
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert [file.name for file in dataset.files] == ["1.PNG", "2.png"] * 2
    image, label = dataset[1]
    assert (tuple(image.shape), image.dtype, label) == ((3, 16, 16), torch.float32, 0)
    assert image[0].eq(1).all()
    assert image[1:].eq(0).all()
    torch.testing.assert_close(dataset[0][0], torch.full((3, 16, 16), 128 / 255))


def test_image_folder_defaults(folder):
    with pytest.warns(UserWarning, match="cut to 224 x 224 pixels, since neither `image_size` nor `crop`"):
        image = load_dataset(folder)[3][0]
    assert image.shape == (3, 224, 224)
    torch.testing.assert_close(
        image[:, 0, 0], torch.tensor([(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0 - 0.406) / 0.225])
    )


@pytest.mark.parametrize(("width", "height"), [(20, 12), (12, 20), (12, 12), (13, 21)])
def test_crop_is_the_centre_of_an_image_that_needs_no_resizing(tmp_path, width, height):
    (tmp_path / "only").mkdir()
    image = pixels(height, width, 3)
    Image.fromarray(image).save(tmp_path / "only" / "x.png")
    short = min(width, height)
    crop = short - 4
    given = load_dataset(tmp_path, resize=short, crop=crop, mean=0, std=1)[0][0]
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    expected = image[top : top + crop, left : left + crop].transpose(2, 0, 1) / 255
    torch.testing.assert_close(given, torch.from_numpy(expected).float())


def test_short_side_is_resized_and_proportions_are_kept(tmp_path):
    (tmp_path / "only").mkdir()
    ramp = np.tile(np.linspace(0, 255, 80, dtype=np.uint8)[None, :, None], (40, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "only" / "x.png")
    image = load_dataset(tmp_path, resize=20, crop=20, mean=0, std=1)[0][0]
    # 80x40 becomes 40x20; the centre 20 columns are the ramp's middle half.
    torch.testing.assert_close(image[0, 10], torch.linspace(0.25, 0.75, 20), atol=0.02, rtol=0)


def test_interpolation_is_used(tmp_path):
    (tmp_path / "only").mkdir()
    Image.fromarray(pixels(32, 32, 3)).save(tmp_path / "only" / "x.png")
    results = [
        load_dataset(tmp_path, resize=20, crop=20, interpolation=name)[0][0]
        for name in ("nearest", "bilinear", "bicubic")
    ]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_damaged_image_is_named(folder):
    path = folder / "b_cat" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    dataset = load_dataset(folder)
    with pytest.raises(GdfqError, match=r"cannot decode the image .*b_cat/2\.png"):
        dataset[3]


def test_splits_are_not_taken_for_classes(folder):
    root = folder.parent / "imagenet"
    (root / "train").mkdir(parents=True)
    os.symlink(folder, root / "val")
    with pytest.raises(GdfqError, match=r"holds the splits train, val; give one of them, such as .*imagenet/val"):
        load_dataset(root)


# --- as a model takes them


@pytest.mark.parametrize(
    ("size", "shape", "resize"),
    [
        (8, (8, 8), 8), (32, (32, 32), 32), (64, (64, 64), 64), (96, (96, 96), 110), (224, (224, 224), 256),
        (299, (299, 299), 342), ((24, 40), (24, 40), 24), ((100, 200), (100, 200), 114),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_prepared_for_the_models_size_and_says_so(folder, size, shape, resize, channels):
    dataset = load_dataset(folder, image_size=size, channels=channels)
    assert {dataset[index][0].shape for index in range(4)} == {(channels, *shape)}
    prepared = dataset.preparation
    assert prepared.shape == (channels, *shape)
    assert f"short side resized to {resize} (bilinear), center {shape[0]} x {shape[1]} cut" in str(prepared)
    assert str(prepared).endswith(
        "RGB, mean 0.485 0.456 0.406, std 0.229 0.224 0.225" if channels == 3 else "gray, mean 0.449, std 0.226"
    )


def test_small_images_are_taken_whole(tmp_path):
    (tmp_path / "only").mkdir()
    image = pixels(32, 32, 3)
    Image.fromarray(image).save(tmp_path / "only" / "x.png")
    given = load_dataset(tmp_path, image_size=32, channels=3, mean=0, std=1)[0][0]
    torch.testing.assert_close(given, torch.from_numpy(image.transpose(2, 0, 1) / 255).float())


def test_what_is_said_of_crop_and_resize_goes_before_the_models_size(folder):
    dataset = load_dataset(folder, image_size=32, crop=12, resize=20)
    assert (dataset[0][0].shape, dataset.transform.resize) == ((3, 12, 12), 20)
    assert load_dataset(folder, image_size=32, resize=40).transform.crop == (32, 32)


def test_an_image_of_another_shape_than_square_is_not_stretched(tmp_path):
    (tmp_path / "only").mkdir()
    ramp = np.tile(np.linspace(0, 255, 80, dtype=np.uint8)[None, :, None], (40, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "only" / "x.png")
    image = load_dataset(tmp_path, image_size=(20, 30), mean=0, std=1)[0][0]
    # 80x40 becomes 40x20; the center 30 columns are the ramp's middle three quarters.
    torch.testing.assert_close(image[0, 10], torch.linspace(0.125, 0.875, 30), atol=0.02, rtol=0)


def test_stored_images_are_fitted_and_it_is_said(fashion):
    folder, images, _ = fashion
    same = load_dataset(folder)
    assert str(same.preparation) == "1 x 28 x 28, as stored, mean 0.286, std 0.353"
    larger = load_dataset(folder, image_size=56, channels=3, mean=0, std=1)
    assert str(larger.preparation).startswith("3 x 56 x 56, resized from 28 x 28 (bilinear), gray made RGB, mean 0 0 0")
    image = larger[2][0]
    assert image.shape == (3, 56, 56)
    assert torch.equal(image[0], image[2])
    expected = Image.fromarray(images[2]).resize((56, 56), Image.Resampling.BILINEAR)
    torch.testing.assert_close(image[0], torch.from_numpy(np.array(expected) / 255).float(), atol=1.5 / 255, rtol=0)


def test_rgb_is_made_gray_as_pillow_does(tmp_path):
    data = pixels(2, 3072)
    (tmp_path / "test_batch").write_bytes(python2_pickle(data=data, labels=[0, 1]))
    dataset = load_dataset(tmp_path, channels=1)
    assert "RGB made gray, mean 0.4734, std 0.2009" in str(dataset.preparation)
    expected = Image.fromarray(data[1].reshape(3, 32, 32).transpose(1, 2, 0)).convert("L")
    found = dataset.pixels(1)[0].numpy().astype(int)
    assert np.abs(found - np.array(expected)).max() <= 1


def test_channels_that_images_cannot_have(folder, fashion):
    with pytest.raises(GdfqError, match=r"the model takes 4 channels, but image files have 1 or 3"):
        load_dataset(folder, channels=4)
    with pytest.raises(GdfqError, match=r"the model takes 2 channels, but these images have 1"):
        load_dataset(fashion[0], channels=2)


def test_images_of_16_bits_are_not_clipped_in_silence(tmp_path):
    (tmp_path / "only").mkdir()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "only" / "x.png")
    with pytest.raises(GdfqError, match=r"x.png has more than 8 bits a pixel"):
        load_dataset(tmp_path)[0]


def test_images_without_classes_are_for_calibration(folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for index in range(3):
        Image.new("RGB", (20, 20), (index, 0, 0)).save(flat / f"{index}.png")
    with pytest.raises(GdfqError, match=r"3 images lie directly in .*flat, and it has no folders of classes: to"):
        load_dataset(flat)
    images = load_dataset(flat, labeled=False, image_size=8, channels=3, mean=0, std=1)
    assert len(images) == 3
    assert images[2].shape == (3, 8, 8)
    assert images[2][0].mean() == pytest.approx(2 / 255)
    Image.new("RGB", (9, 9)).save(folder / "stray.png")
    with pytest.warns(UserWarning, match="1 images lie directly in .*and are left out"):
        assert len(load_dataset(folder)) == 4
    assert len(load_dataset(folder, labeled=False)) == 5


@pytest.mark.parametrize("size", [0, -3, 1.5, "32", (1, 2, 3), True])
def test_sizes_that_are_none(folder, size):
    with pytest.raises(GdfqError, match=r"a size in pixels is a whole number from 1, or \(height, width\); given:"):
        load_dataset(folder, image_size=size)


# --- what everyone gets wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "imagenet"}, "unknown kind of data 'imagenet'; the kinds are fashion-mnist, cifar10"),
        ({"split": "test"}, "split: no option of folder data; its options are resize, crop"),
        ({"resize": 100, "crop": 101}, "1 <= crop <= resize"),
        ({"resize": "256"}, "whole numbers"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; allowed: nearest, bilinear"),
        ({"mean": (0.5, 0.5)}, "mean needs 1 or 3 finite numbers"),
        ({"std": 0}, "std must be above 0"),
        ({"std": "large"}, "std is a number or one number per channel"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(GdfqError, match=message):
        load_dataset(folder, **options)


def test_wrong_split(fashion):
    with pytest.raises(GdfqError, match="split is test or train, not 'val'"):
        load_dataset(fashion[0], split="val")


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(GdfqError, match=r"no such folder: .*absent"):
        load_dataset(tmp_path / "absent")
    (tmp_path / "stray.txt").write_text("text")
    for spec in (tmp_path, tmp_path / "stray.txt"):
        with pytest.raises(GdfqError, match="holds no data that is known here; looked for"):
            load_dataset(spec)
    (tmp_path / "class").mkdir()
    with pytest.raises(GdfqError, match="holds no images; looked for one sub-folder per class"):
        load_dataset(tmp_path)
