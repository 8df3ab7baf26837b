"""Models by name, and weights that cannot run code."""

import os
import pickle
import sys
import textwrap
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gdfq.errors import GdfqError
from gdfq.models import check_finite, load_model, parse_model_args, read_state_dict

NETWORK = """
    import torch
    from torch import nn

    CONSTANT = 3
    INSTANCE = nn.Linear(1, 1)


    def network(classes=4):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(8, classes))

    def broken():
        raise ValueError("no such width")

    def text():
        return "a network"
"""


@pytest.fixture
def network_file(tmp_path):
    path = tmp_path / "my_network.py"
    path.write_text(textwrap.dedent(NETWORK))
    return path


@pytest.fixture
def spec(network_file):
    return f"{network_file}:network"


def same(model: nn.Module, state: dict) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)


# --- where a model comes from


def test_pytorchcv_by_name():
    model = load_model("pytorchcv:resnet20_cifar10", in_channels=1)
    assert model.features.init_block.conv.weight.shape == (16, 1, 3, 3)
    assert not any(module.training for module in model.modules())


def test_file_with_a_factory(spec):
    assert load_model(spec, classes=7)[4].out_features == 7


def test_file_with_an_instance(network_file):
    assert load_model(f"{network_file}:INSTANCE").in_features == 1


def test_file_may_import_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_network.py").write_text("width = 5")
    (tmp_path / "main_network.py").write_text(
        "from torch import nn\nfrom neighbour_of_network import width\ndef make(): return nn.Linear(width, 2)"
    )
    assert load_model(f"{tmp_path / 'main_network.py'}:make").in_features == 5


def test_module_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "current_folder_network").mkdir()
    (tmp_path / "current_folder_network" / "nets.py").write_text(
        "from torch import nn\ndef make(width): return nn.Linear(width, 2)"
    )
    assert load_model("current_folder_network.nets:make", width=3).in_features == 3


def test_installed_module():
    assert isinstance(load_model("torch.nn:Linear", in_features=2, out_features=3), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "does not name a model: a model is given as pytorchcv:NAME"),
        ("pytorchcv:", "does not name a model"),
        (":resnet18", "does not name a model"),
        ("pytorchcv:resnet20_cifar11", "did you mean resnet20_cifar10"),
        ("pytorhcv:resnet18", "did you mean pytorchcv"),
        ("no_such_package.nets:make", "there is no module no_such_package.nets"),
        ("absent/file.py:make", "no such file: absent/file.py"),
        ("torch.nn:Linar", "did you mean Linear"),
        ("torch.nn:Linear", "missing 2 required positional arguments"),
    ],
)
def test_unknown_names_are_explained(spec, message):
    with pytest.raises(GdfqError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"factory .*:broken failed when called with \(\): ValueError: no such width"),
        ("text", "returned a str, not a torch.nn.Module"),
        ("CONSTANT", "is a int and takes no arguments"),
        ("netwrok", "did you mean network"),
    ],
)
def test_wrong_factories_are_explained(network_file, name, message):
    with pytest.raises(GdfqError, match=message):
        load_model(f"{network_file}:{name}")


def test_unknown_argument_is_explained(spec):
    with pytest.raises(GdfqError, match=r"called with \(clases=3\): TypeError: .*unexpected keyword argument 'clases'"):
        load_model(spec, clases=3)


@pytest.mark.parametrize(
    "code", ["import no_such_package_at_all", "raise RuntimeError('broken')", "raise SystemExit(3)", "def ("]
)
def test_file_that_cannot_be_imported(tmp_path, code):
    (tmp_path / "bad_network.py").write_text(code)
    with pytest.raises(GdfqError, match=r"running .*bad_network\.py failed: "):
        load_model(f"{tmp_path / 'bad_network.py'}:make")


def test_module_whose_own_import_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs_absent.py").write_text("import no_such_package_at_all")
    with pytest.raises(GdfqError, match=r"importing needs_absent failed: ModuleNotFoundError.*no_such_package_at_all"):
        load_model("needs_absent:make")


@pytest.fixture
def stand_in(monkeypatch):
    """Put modules with the given attributes in the place of an optional package."""

    def install(**modules):
        for name, attributes in modules.items():
            module = ModuleType(name.replace("__", "."))
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def test_timm_by_name(stand_in):
    stand_in(
        timm={
            "is_model": lambda name: name == "tiny",
            "list_models": lambda: ["tiny", "large"],
            "create_model": lambda name, width: nn.Linear(width, 2),
        }
    )
    assert load_model("timm:tiny.a1_in1k", width=3).in_features == 3
    with pytest.raises(GdfqError, match="did you mean tiny"):
        load_model("timm:tinny")


def test_torchvision_by_name(stand_in):
    asked = []

    def get_model(name, weights):
        asked.append((name, weights))
        return nn.Linear(1, 1)

    stand_in(torchvision={}, torchvision__models={"list_models": lambda: ["resnet18"], "get_model": get_model})
    load_model("torchvision:resnet18")
    load_model("torchvision:resnet18", pretrained=True)
    assert asked == [("resnet18", None), ("resnet18", "DEFAULT")]


@pytest.mark.parametrize("package", ["timm", "torchvision", "pytorchcv"])
def test_absent_package_says_how_to_install_it(package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if isinstance(finder, type)])
    with pytest.raises(GdfqError, match=f"{package} is not installed; install it with: pip install {package}"):
        load_model(f"{package}:resnet18")


def test_package_that_does_not_import_gives_its_reason(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(GdfqError, match="timm is installed but does not import here: RuntimeError: operator torchv"):
        load_model("timm:resnet18")


# --- arguments


def test_arguments_are_literals_or_text():
    assert parse_model_args(["a=1", "b=(28, 28)", "c=None", "d=relu", "e='1'", "f=false", "g=a=b", "h="]) == {
        "a": 1,
        "b": (28, 28),
        "c": None,
        "d": "relu",
        "e": "1",
        "f": False,
        "g": "a=b",
        "h": "",
    }


@pytest.mark.parametrize("items", [["a"], ["=1"], ["a b=1"], ["a=1", "a=2"], ["weights=x"], ["spec=x"]])
def test_wrong_arguments_are_refused(items):
    with pytest.raises(GdfqError):
        parse_model_args(items)


# --- weights


@pytest.mark.parametrize("form", ["safetensors", "pth", "old_pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("entry", [None, "state_dict", "model"])
def test_weights_in_their_usual_forms(tmp_path, spec, form, prefix, entry):
    original = load_model(spec)
    content = {prefix + name: value for name, value in original.state_dict().items()}
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(content, path)
    else:
        content = OrderedDict(content)
        content = content if entry is None else {"epoch": 3, entry: content, "optimizer": {"state": {}}}
        torch.save(content, path, _use_new_zipfile_serialization=form == "pth")
    assert same(load_model(spec, path), original.state_dict())


def test_names_of_the_model_itself_are_kept(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.ModuleDict({'module': nn.Linear(2, 2)})"
    )
    spec = f"{tmp_path / 'net.py'}:make"
    original = load_model(spec)
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    assert same(load_model(spec, tmp_path / "w.safetensors"), original.state_dict())


def test_num_batches_tracked_may_be_missing(tmp_path, spec):
    state = {name: value for name, value in load_model(spec).state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "w.safetensors")
    assert same(load_model(spec, tmp_path / "w.safetensors"), state)


def test_half_precision_weights_fill_a_float_model(tmp_path, spec):
    state = {name: value.half() for name, value in load_model(spec).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    model = load_model(spec, tmp_path / "w.safetensors")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, state["0.weight"].float())


def test_misfits_are_listed_with_their_names(tmp_path, spec):
    state = load_model(spec).state_dict()
    del state["0.bias"]
    state["4.weight"] = torch.zeros(9, 8)
    state |= {f"extra{number}": torch.zeros(1) for number in range(9)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(GdfqError) as caught:
        load_model(spec, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "missing: 0.bias;" in message
    assert "not in the model: extra0, extra1, extra2, extra3, extra4 and 4 more" in message
    assert "shapes differ: 4.weight (file (9, 8), model (4, 8))" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_not_finite_weights_are_named(tmp_path, spec, name, value):
    state = load_model(spec).state_dict()
    state[name].flatten()[-1] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(GdfqError, match=f"NaN or Inf in {name};"):
        load_model(spec, tmp_path / "w.safetensors")


def test_finite_model_passes(spec):
    check_finite(load_model(spec))


class Attack:
    """Makes a folder when it is unpickled without restrictions."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_weights_file_does_not_run(tmp_path, spec, zipped):
    torch.save({"state_dict": Attack(tmp_path / "ran")}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(GdfqError, match=r"more than tensors \(\S*mkdir\).*torch.save\(model.state_dict\(\), FILE\)"):
        load_model(spec, tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_bare_pickle_does_not_run(tmp_path, spec):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(GdfqError, match=r"w\.pkl"):
        load_model(spec, tmp_path / "w.pkl")
    assert not (tmp_path / "ran").exists()


def test_whole_pickled_model_says_how_to_convert(tmp_path, spec):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(GdfqError, match=r"Linear.*torch\.save\(model\.state_dict\(\), FILE\)"):
        load_model(spec, tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_says_how_to_convert(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "script.pt")
    with pytest.raises(GdfqError, match="TorchScript archive"):
        read_state_dict(tmp_path / "script.pt")


@pytest.mark.parametrize("form", ["safetensors", "pth", "old_pth"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_truncated_weights_are_named(tmp_path, spec, form, share):
    path = tmp_path / f"w.{form}"
    state = load_model(spec).state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "pth")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(GdfqError, match=r"w\..* is truncated"):
        load_model(spec, path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}])
def test_file_without_a_state_dict_is_named(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(GdfqError, match="holds no state dict"):
        read_state_dict(tmp_path / "w.pth")


def test_missing_weights_file_is_named(tmp_path, spec):
    with pytest.raises(GdfqError, match=r"no such weights file: .*absent\.pth"):
        load_model(spec, tmp_path / "absent.pth")
