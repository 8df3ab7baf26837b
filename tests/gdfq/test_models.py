"""Models by name."""

import sys
from types import ModuleType

import pytest
from torch import nn

from gdfq.errors import GdfqError
from gdfq.models import load_model, parse_model_args

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


@pytest.mark.parametrize(
    "items", [["a"], ["=1"], ["a b=1"], ["a=1", "a=2"], ["weights=x"], ["weights_entry=x"], ["spec=x"]]
)
def test_wrong_arguments_are_refused(items):
    with pytest.raises(GdfqError):
        parse_model_args(items)
