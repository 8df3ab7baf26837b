"""Weights that cannot run code, whatever they were saved with."""

import argparse
import os
import pickle
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gdfq.errors import GdfqError
from gdfq.models import check_finite, load_model
from gdfq.weights import read_checkpoint


def same(model: nn.Module, state: dict) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)


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
        read_checkpoint(tmp_path / "script.pt")


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
        read_checkpoint(tmp_path / "w.pth")


def test_missing_weights_file_is_named(tmp_path, spec):
    with pytest.raises(GdfqError, match=r"no such weights file: .*absent\.pth"):
        load_model(spec, tmp_path / "absent.pth")


# --- checkpoints with more than the weights


@pytest.fixture
def sets(spec):
    """State dicts of two differently initialized models: raw weights, and what stands for their average."""
    return [load_model(spec).state_dict() for _ in range(2)]


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def trained(spec: str) -> list[str]:
    return [name for name, _ in load_model(spec).named_parameters()]


CHECKPOINTS = {
    "timm": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema},
    "torchvision": lambda raw, ema: {
        "model": raw,
        "model_ema": {"n_averaged": torch.tensor(3), **under("module.", ema)},
    },
    "ema": lambda raw, ema: {"net": under("module.", raw), "ema": ema, "optimizer": {"state": {0: {"exp_avg": 1}}}},
    "BasicSR": lambda raw, ema: {"params": raw, "params-EMA": ema},
    "camel case": lambda raw, ema: {"netG": raw, "modelEma": ema},
    "a callback's": lambda raw, ema: {
        "state_dict": under("net.", raw),
        "callbacks": {"Averaging": {"ema_state_dict": under("net.", ema)}},
    },
    "nested": lambda raw, ema: {"model": raw, "ema": {"decay": 0.9, "module": ema}},
    "one flat dict": lambda raw, ema: (
        under("online_model.", raw) | under("ema_model.", ema) | {"step": torch.tensor(1)}
    ),
    "Lightning": lambda raw, ema: {"state_dict": under("model.", raw) | under("ema.module.", ema)},
    "beside bare names": lambda raw, ema: raw | under("model_ema.", ema),
    "compiled": lambda raw, ema: {"state_dict": under("_orig_mod.net.", raw) | under("ema.net._orig_mod.", ema)},
    "names without dots": lambda raw, ema: (
        under("model.", raw)
        | {"model_ema." + name.replace(".", ""): value for name, value in ema.items()}
        | {"model_ema.decay": torch.tensor(0.9)}
    ),
    "MMEngine": lambda raw, ema: {
        "state_dict": ema,
        "ema_state_dict": {"steps": torch.tensor(1), **under("module.", raw)},
    },
    "Lightning's WeightAveraging": lambda raw, ema: {
        "state_dict": under("net.", ema),
        "current_model_state": under("net.", raw),
    },
}


@pytest.mark.parametrize("form", CHECKPOINTS)
def test_the_average_is_taken_and_said_or_what_is_asked_for(tmp_path, spec, sets, form):
    raw, ema = sets
    torch.save(CHECKPOINTS[form](raw, ema), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"several sets.*the moving average is taken.*--weights-entry") as caught:
        assert same(load_model(spec, tmp_path / "w.pth"), ema)
    assert len(caught) == 1
    names = str(caught[0].message).partition("weights, ")[2].partition(": the")[0].replace("'", "").split(", ")
    assert len(names) == 2
    with warnings.catch_warnings(action="error"):
        found = [load_model(spec, tmp_path / "w.pth", weights_entry=name) for name in names]
    assert sorted(same(model, raw) for model in found) == sorted(same(model, ema) for model in found) == [False, True]


@pytest.mark.parametrize("form", ["shadow", "shadow_params"])
def test_an_average_of_the_parameters_alone_has_the_raw_buffers(tmp_path, spec, sets, form):
    raw, ema = sets
    raw["1.running_mean"] += 1
    shadow = {name: ema[name] for name in trained(spec)}
    content = (
        {"ema": shadow}
        if form == "shadow"
        else {"ema": {"shadow_params": list(shadow.values()), "collected_params": [torch.ones(2)]}}
    )
    torch.save({"state_dict": raw, **content}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="the moving average is taken, 'ema"):
        assert same(load_model(spec, tmp_path / "w.pth"), raw | shadow)


def test_averages_of_another_model_are_not_passed_over_in_silence(tmp_path, spec, sets):
    raw, ema = sets
    del ema["0.weight"]
    torch.save({"state_dict": raw, "ema": ema}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"seems to hold averaged weights, ema\.0\.bias.*taken are 'state_dict'"):
        assert same(load_model(spec, tmp_path / "w.pth"), raw)


class Trainer:
    pass


def test_objects_beside_the_weights_are_not_read_and_no_obstacle(tmp_path, spec, sets):
    raw, _ = sets
    settings = argparse.Namespace(lr=0.1)
    torch.save({"state_dict": raw, "args": settings, "best": np.float64(0.9), "trainer": Trainer()}, tmp_path / "w.pth")
    with warnings.catch_warnings(action="error"):
        assert same(load_model(spec, tmp_path / "w.pth"), raw)
    for average in (nn.Linear(2, 2), {"shadow_params": [torch.ones(3)]}):
        torch.save({"state_dict": raw, "ema": average}, tmp_path / "w.pth")
        with pytest.warns(UserWarning, match=r"seems to hold averaged weights, ema.*taken are 'state_dict'"):
            assert same(load_model(spec, tmp_path / "w.pth"), raw)


def test_several_averages_need_a_choice(tmp_path, spec, sets):
    raw, ema = sets
    content = {"net": raw, "ema_0.999": ema, "ema_0.9999": load_model(spec).state_dict()}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(GdfqError, match=r"'ema_0.999', 'ema_0.9999', 'net': say which"):
        load_model(spec, tmp_path / "w.pth")
    assert same(load_model(spec, tmp_path / "w.pth", weights_entry="ema_0.999"), ema)


@pytest.mark.parametrize("names", [("student", "teacher"), ("online_encoder.net", "target_encoder.net"), ("a", "ema_")])
def test_two_sets_of_which_none_is_the_average_need_a_choice(tmp_path, spec, sets, names):
    one, other = sets
    second = {"ema_" + key.replace(".", "_"): value for key, value in other.items()}
    second = second if names[1] == "ema_" else under(f"{names[1]}.", other)
    torch.save({"state_dict": under(f"{names[0]}.", one) | second}, tmp_path / "w.pth")
    with pytest.raises(GdfqError, match=f"'state_dict.{names[0]}', 'state_dict.{names[1]}': say which.*weights-entry"):
        load_model(spec, tmp_path / "w.pth")
    assert same(load_model(spec, tmp_path / "w.pth", weights_entry=names[0]), one)
    assert same(load_model(spec, tmp_path / "w.pth", weights_entry=f"state_dict.{names[1]}"), other)
    with pytest.raises(GdfqError, match=r"'nothing' names none of the sets"):
        load_model(spec, tmp_path / "w.pth", weights_entry="nothing")
    with pytest.raises(GdfqError, match=r"'state_dict' names several of the sets"):
        load_model(spec, tmp_path / "w.pth", weights_entry="state_dict")


def test_twice_the_same_is_no_choice(tmp_path, spec, sets):
    raw, _ = sets
    torch.save({"state_dict": under("backbone.", raw) | under("model.net.", raw)}, tmp_path / "w.pth")
    with warnings.catch_warnings(action="error"):
        assert same(load_model(spec, tmp_path / "w.pth"), raw)


@pytest.mark.parametrize("prefix", ["net.", "network.", "backbone.", "encoder.module.", "model._orig_mod.module.net."])
def test_any_prefix_is_understood_and_what_is_left_out_is_said(tmp_path, spec, sets, prefix):
    raw, _ = sets
    beside = {"criterion.weight": torch.ones(4), "head.bias": torch.ones(2), "n_averaged": torch.tensor(1)}
    torch.save({"state_dict": under(prefix, raw) | beside}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"left out: state_dict\.criterion\.weight, state_dict\.head\.bias$"):
        assert same(load_model(spec, tmp_path / "w.pth"), raw)


def test_a_wrapper_within_the_model_is_taken_off(tmp_path, spec, sets):
    raw, _ = sets
    save_file({name.replace(".", ".module.", 1): value for name, value in raw.items()}, tmp_path / "w.safetensors")
    assert same(load_model(spec, tmp_path / "w.safetensors"), raw)


def test_the_normalization_of_what_was_saved_is_said(tmp_path, spec, sets):
    raw, _ = sets
    beside = {"mean": torch.tensor([0.5, 0.25, 0.75]).view(1, 3, 1, 1), "std": torch.tensor([1.0])}
    torch.save(under("model.", raw) | beside, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"have to come so: mean \[0.5, 0.25, 0.75\], std \[1.0\]"):
        load_model(spec, tmp_path / "w.pth")


def test_what_training_has_put_into_the_model_is_left_out(tmp_path, spec, sets):
    raw, _ = sets
    beside = {"total_ops": torch.zeros(1), "0.total_params": torch.zeros(1), "n_averaged": torch.tensor(1)}
    save_file(raw | beside, tmp_path / "w.safetensors")
    with warnings.catch_warnings(action="error"):
        assert same(load_model(spec, tmp_path / "w.safetensors"), raw)
    beside = {"class_weights": torch.ones(4), "criterion.weight": torch.ones(4), "train_acc.tp": torch.ones(1)}
    save_file(raw | beside, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=r"left out: class_weights, criterion\.weight, train_acc\.tp"):
        assert same(load_model(spec, tmp_path / "w.safetensors"), raw)


@pytest.mark.parametrize("extra", ["4.scale", "5.weight", "mean", "shortcut.weight"])
@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_name_that_is_not_the_models_is_an_error_within_it(tmp_path, spec, sets, prefix, extra):
    torch.save({"model": under(prefix, sets[0] | {extra: torch.ones(1)})}, tmp_path / "w.pth")
    with pytest.raises(GdfqError, match=f"does not fit .*; not in the model: {extra}"):
        load_model(spec, tmp_path / "w.pth")


def test_misfits_behind_a_prefix_are_said_to_be_there(tmp_path, spec, sets):
    state = sets[0] | {"4.weight": torch.zeros(9, 8)}
    torch.save({"state_dict": under("net.", state)}, tmp_path / "w.pth")
    with pytest.raises(
        GdfqError, match=r"does not fit .*\(behind 'state_dict.net'\); shapes differ: 4.weight \(file \(9"
    ):
        load_model(spec, tmp_path / "w.pth")


def test_parts_of_a_model_in_entries_of_their_own_are_put_together(tmp_path, spec, sets):
    raw, _ = sets
    content = {"0": {name[2:]: value for name, value in raw.items() if name.startswith("0.")}}
    rest = {name: value for name, value in raw.items() if not name.startswith("0.")}
    torch.save(content | rest, tmp_path / "w.pth")
    assert same(load_model(spec, tmp_path / "w.pth"), raw)


def test_an_entry_without_a_file_is_refused(spec):
    with pytest.raises(GdfqError, match=r"'ema' names an entry of a weights file, but none is given"):
        load_model(spec, weights_entry="ema")
