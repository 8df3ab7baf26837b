"""Presets say what the paper says; every value can be overridden; what is wrong is said in words."""

from pathlib import Path

import pytest

from gdfq.config import Config, parse_override, presets
from gdfq.errors import GdfqError


def test_paper_presets_hold_the_published_settings():
    cifar, imagenet = Config.load("paper-cifar"), Config.load("paper-imagenet")
    for config in (cifar, imagenet):
        assert (config.schedule.epochs, config.schedule.iterations) == (400, 200)
        assert (config.schedule.milestones, config.schedule.decay) == ((100, 200, 300), 0.1)
        assert (config.generator.learning_rate, config.generator.betas) == (1e-3, (0.5, 0.999))
        assert (config.generator.bns_weight, config.generator.latent_size) == (0.1, 100)
        assert (config.student.temperature, config.student.distillation_weight) == (20, 1)
        assert (config.student.momentum, config.student.weight_decay) == (0.9, 1e-4)
        assert (config.quantizer.target, config.schedule.reestimate_ranges) == ("paper", False)
    assert (cifar.schedule.batch_size, cifar.schedule.warmup_epochs, cifar.student.learning_rate) == (200, 4, 1e-4)
    assert (imagenet.schedule.batch_size, imagenet.schedule.warmup_epochs, imagenet.student.learning_rate) == (
        16,
        50,
        1e-6,
    )
    assert (cifar.generator.architecture, imagenet.generator.architecture) == ("embedding", "conditional")


def test_the_default_method_is_that_of_presets_that_do_not_publish_another():
    methods = {name: Config.load(name).method for name in presets()}
    published = {"paper-cifar", "paper-imagenet", "offline"}
    assert methods == {name: "gdfq" if name in published else "reconstruction" for name in presets()}
    assert Config.load().method == "reconstruction"
    assert Config.load("imagenet", {"method": "gdfq"}).schedule.warmup_epochs == 50


def test_the_example_recipe_is_a_preset_of_ones_own():
    config = Config.load(Path(__file__).parents[2] / "examples" / "cifar10_short.toml")
    assert config.schedule.epochs * config.schedule.iterations == 1500
    assert config.schedule.decay == Config.load("paper-cifar").schedule.decay
    assert config.method == "gdfq"


@pytest.mark.parametrize("name", presets())
def test_every_preset_survives_the_way_to_a_file_and_back(name, tmp_path):
    config = Config.load(name, {"quantizer.weight_bits": 3, "model.image_size": 32})
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert Config.load(tmp_path / "config.toml") == config


def test_a_file_extends_a_preset(tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "imagenet"\n[schedule]\nepochs = 7\n')
    config = Config.load(tmp_path / "mine.toml")
    assert (config.schedule.epochs, config.schedule.batch_size) == (7, 16)


def numbers(preset, overrides=None, effort="default"):
    config = Config.load(preset, overrides, effort)
    own = config.reconstruction
    return config.inversion.images, own.iterations + own.finetune_iterations


@pytest.mark.parametrize("preset", ["cifar", "imagenet", "demo"])
def test_an_effort_changes_the_preset_and_overrides_change_the_effort(preset):
    default = numbers(preset)
    assert numbers(preset, {}, "default") == default
    fast, best = numbers(preset, {}, "fast"), numbers(preset, {}, "best")
    assert all(less < value < more for less, value, more in zip(fast, default, best, strict=True))
    assert numbers(preset, {"inversion.images": 77}, "fast") == (77, fast[1])
    config = Config.load(preset, effort="fast")
    assert config.schedule == Config.load(preset).schedule
    assert "effort" not in config.to_toml()


def test_a_file_inherits_efforts_and_adds_its_own(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'extends = "cifar"\n[inversion]\nimages = 300\n'
        "[effort.fast.reconstruction]\niterations = 7\n[effort.slow.inversion]\nimages = 400\n"
    )
    assert numbers(tmp_path / "mine.toml")[0] == 300
    assert numbers(tmp_path / "mine.toml", effort="fast") == (numbers("cifar", effort="fast")[0], 7)
    assert numbers(tmp_path / "mine.toml", effort="slow")[0] == 400
    (tmp_path / "own.toml").write_text("[effort.fast.inversion]\nimages = 3\n")
    assert numbers(tmp_path / "own.toml", {"method": "reconstruction"}, "fast")[0] == 3


@pytest.mark.parametrize(
    ("preset", "overrides", "effort", "words"),
    [
        (
            "cifar",
            {},
            "fastest",
            "'cifar' has no effort 'fastest' for the method 'reconstruction'; it has: default, fast",
        ),
        ("paper-cifar", {}, "fast", "'paper-cifar' has no effort 'fast' for the method 'gdfq'; it has: default"),
        ("offline", {}, "best", "'offline' has no effort 'best' for the method 'gdfq'; it has: default"),
        ("cifar", {"method": "gdfq"}, "fast", "'cifar' has no effort 'fast' for the method 'gdfq'; it has: default"),
        (None, {}, "fast", "has no effort 'fast'"),
        ("cifar", {"inversion.images": 1}, "fast", "setting 'inversion.images' = 1"),
        ("cifar", {"effort.fast.inversion.images": 3}, "fast", "unknown setting 'effort'"),
    ],
)
def test_efforts_that_are_not_there(preset, overrides, effort, words):
    with pytest.raises(GdfqError) as error:
        Config.load(preset, overrides, effort)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "effort", "words"),
    [
        ("[effort.fast.inversion]\nimages = 1", "fast", "setting 'inversion.images' = 1"),
        ("[effort.fast.inversion]\npictures = 9", "fast", "unknown setting 'inversion.pictures'; there are: images"),
        ("effort = 3", "default", "'effort' holds tables"),
        ("[effort]\nfast = 3", "fast", "'effort' holds tables"),
        ("[effort.default.inversion]\nimages = 9", "default", "effort 'default' is a preset as it is"),
    ],
)
def test_efforts_that_are_written_wrong(text, effort, words, tmp_path):
    (tmp_path / "mine.toml").write_text(text)
    (tmp_path / "child.toml").write_text(f'extends = "{tmp_path / "mine.toml"}"')
    for name in ("mine.toml", "child.toml"):
        with pytest.raises(GdfqError) as error:
            Config.load(tmp_path / name, None, effort)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"quantizer.weight_bits": 9}, ["quantizer.weight_bits", "9", "less than or equal to 8"]),
        ({"quantizer.activation_bits": 1}, ["quantizer.activation_bits", "1", "greater than or equal to 2"]),
        ({"quantizer.weight_bits": "four"}, ["quantizer.weight_bits", "four", "integer"]),
        ({"quantizer.target": "nowhere"}, ["quantizer.target", "nowhere", "onnx, int4-symmetric, paper"]),
        ({"schedule.epoch": 3}, ["schedule.epoch", "epochs"]),
        ({"shedule.epochs": 3}, ["shedule", "schedule"]),
        ({"method": "dfqq"}, ["'method'", "'dfqq'", "finetune, gdfq"]),
        ({"method": "gdfq", "method.name": "dfq"}, ["method.name", "not a section"]),
        ({"student.learning_rate": float("nan")}, ["student.learning_rate", "finite"]),
    ],
)
def test_wrong_settings_are_named(overrides, words):
    with pytest.raises(GdfqError) as error:
        Config.load("cifar", overrides)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_all_wrong_settings_come_in_one_message():
    with pytest.raises(GdfqError) as error:
        Config.load("cifar", {"quantizer.weight_bits": 9, "schedule.epochs": 0})
    assert len(str(error.value).splitlines()) == 2


def test_unknown_preset_and_broken_file(tmp_path):
    with pytest.raises(GdfqError, match=r"neither a preset \(cifar, .*\) nor a TOML file"):
        Config.load("cifr")
    (tmp_path / "broken.toml").write_text("[schedule\n")
    with pytest.raises(GdfqError, match=r"not valid TOML"):
        Config.load(tmp_path / "broken.toml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b=3", 3), ("a.b = 1e-3", 1e-3), ("a.b=[1, 2]", [1, 2]), ("a.b=paper", "paper"), ("a.b=true", True)],
)
def test_overrides_on_the_command_line_are_toml(text, value):
    assert parse_override(text) == ("a.b", value)


def test_an_override_without_a_value_is_refused():
    with pytest.raises(GdfqError, match=r"section\.key=value"):
        parse_override("schedule.epochs")
