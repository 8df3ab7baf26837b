"""All settings, with their defaults, bounds and sources; read from TOML presets, overridable one by one.

    config = Config.load("imagenet", {"quantizer.weight_bits": 3})

A preset or file may begin with `extends = "NAME"`, and have tables `[effort.NAME.SECTION]`: what is different where
less or more time is taken. The names of the paper's symbols stand in the descriptions.
"""

import functools
import json
import math
import operator
import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    create_model,
    model_validator,
)

from gdfq.errors import GdfqError
from gdfq.registry import ALL, CHECKS, SECTIONS

DEFAULT_EFFORT = "default"


class Section(BaseModel):
    """A section of the settings; frozen, and with no others than those that it names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _number_or_numbers(value: Any) -> Any:
    numbers = value if isinstance(value, list | tuple) and value else [value]
    if value == "auto":
        return value
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError('it is a number, a list of one for each channel, or "auto"')
    return tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)


def _above_zero(value: Any) -> Any:
    if value != "auto" and min(value if isinstance(value, tuple) else (value,)) <= 0:
        raise ValueError("a standard deviation is above 0")
    return value


PerChannel = Annotated[float | tuple[float, ...] | Literal["auto"], BeforeValidator(_number_or_numbers)]


class ModelConfig(Section):
    """What the model takes and gives. Everything is inferred from the model where that is possible."""

    image_size: int | tuple[int, int] | None = Field(None, description="height and width of the input, pixels")
    channels: int | None = Field(None, ge=1, description="channels of the input")
    input_mean: PerChannel = Field(
        "auto",
        description="of each channel of the images as the model takes them (0 where pixels are standardized), a number "
        "or one for each; auto: inferred from the network (see `gdfq.graph.scale`)",
    )
    input_std: Annotated[PerChannel, AfterValidator(_above_zero)] = Field(
        "auto", description="as input_mean; 1 where pixels are standardized"
    )
    num_classes: int | None = Field(None, ge=2, description="length of the logits; given, it is checked")


Bits = Annotated[int, Field(ge=2, le=8)]


def _bits_or_float(value: Any) -> Any:
    if value == "float" or (type(value) is int and 2 <= value <= 8):
        return value
    raise ValueError('bits are a number from 2 to 8, or "float"')


BitsOrFloat = Annotated[int | Literal["float"], PlainValidator(_bits_or_float)]


class LayerBits(Section):
    """Bits of one layer: of its weight and of its input. A number or "float" alone stands for both."""

    weights: BitsOrFloat
    activations: BitsOrFloat

    @model_validator(mode="before")
    @classmethod
    def _both(cls, value: Any) -> Any:
        return {"weights": value, "activations": value} if isinstance(value, int | str) else value


def _read_file(value: Any) -> Any:
    return _toml(Path(value)) if isinstance(value, str) and value.endswith(".toml") else value


class QuantizerConfig(Section):
    """What is quantized, to how many bits, and how."""

    weight_bits: Bits = Field(4, description="bits of every weight, per output channel")
    activation_bits: Bits = Field(
        4, description="bits of activations, per tensor; see also the target's `unweighted_bits` (`gdfq targets`)"
    )
    input_bits: Bits = Field(8, description="bits of the input image (images come in 8 bits), where it is quantized")
    layers: dict[str, LayerBits] = Field(
        {},
        description="bits of single layers by name, * and ? standing for anything, or <first> and <last>: a number, "
        '"float", or both kinds apart as {weights = 8, activations = 4}; the last pattern that fits counts. An '
        "activation that several layers read takes the most bits that one of them wants",
    )
    target: Annotated[str | dict[str, Any], BeforeValidator(_read_file)] = Field(
        "onnx",
        description="what the quantized network is to run on: a name (`gdfq targets` lists them), or a table of your "
        "own, or the TOML file that holds it, with what differs from the one that its key `extends` names",
    )
    observer: Literal["moving_average", "learned_step"] = Field(
        "moving_average", description="where activation ranges come from: seen and then fixed, or trained along (LSQ)"
    )
    straight_through: Literal["identity", "clipped"] = Field(
        "identity", description="gradient of the quantizer where the value was clipped: passed on, or zero"
    )

    @property
    def fewest_bits(self) -> int:
        """Of all weights and activations, single layers' included."""
        of_layers = [number for bits in self.layers.values() for number in (bits.weights, bits.activations)]
        return min(self.weight_bits, self.activation_bits, *(number for number in of_layers if number != "float"))


class ImagesConfig(Section):
    """What Q is trained on, where the method makes images."""

    source: str | None = Field(
        None,
        description="generator: GDFQ's; qimera: with superposed labels; inverted: a bank, optimized; zeroq: ZeroQ's; "
        "gaussian: noise; default: generator, or of methods that take a bank, inverted",
    )
    file: str | None = Field(
        None,
        description="a bank that an earlier run has made, images.safetensors in its folder: taken, and none is made",
    )
    bank: int = Field(
        512,
        ge=2,
        description="images that methods which take a bank draw from a generator that was trained for "
        "schedule.warmup_epochs, or of noise; banks that are optimized have a number of their own",
    )
    transforms: dict[str, dict[str, Any]] = Field(
        {}, description="what images go through, by name and with its settings, as low_pass = {cutoff = 80.0}"
    )


class GeneratorConfig(Section):
    """G: its architecture (see `gdfq.images.networks`), optimizer (Adam) and loss CE + beta * BNS (Eq. 4, 5)."""

    architecture: Literal["embedding", "conditional"] = Field(
        "embedding", description="embedding: the paper's for CIFAR; conditional: the paper's for ImageNet"
    )
    latent_size: int = Field(100, ge=1, description="length of the noise z")
    batch_norm_eps: float = Field(
        0.8, gt=0, description="eps of the BNs after a convolution (0.8 in the released code)"
    )
    learn_scale: bool = Field(
        True,
        description="mean and standard deviation of each channel of the images are trained along, from what pixels are "
        "taken to have; or stay as they are",
    )
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = Field((0.5, 0.999), description="of Adam")
    cross_entropy_weight: float = Field(1.0, ge=0, description="weight of the classification loss, Eq. 4")
    bns_weight: float = Field(0.1, ge=0, description="beta: weight of the BNS loss, Eq. 5")
    bns_reduction: Literal["mean", "sum"] = Field(
        "mean", description="mean over channels and layers (released code), or the sum of squared norms (paper)"
    )
    terms: dict[str, float] = Field({}, description="further terms of the loss by name, and their weights")
    stop_accuracy: float | None = Field(
        None,
        ge=0,
        le=100,
        description="eta: G is trained no more after an epoch whose end finds the teacher classifying more than this "
        "percentage of held-out images as their label; without it, G is trained to the end",
    )


class StudentConfig(Section):
    """Q: its optimizer and loss CE + gamma * T^2 * KL (Eq. 7 to 10)."""

    optimizer: str = Field("sgd", description="sgd: with Nesterov's momentum; ait: gradient inundation")
    learning_rate: float = Field(1e-4, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    cross_entropy_weight: float = Field(1.0, ge=0)
    distillation_weight: float = Field(1.0, ge=0, description="gamma")
    temperature: float = Field(20.0, gt=0, description="T")
    kd_reduction: Literal["mean", "batchmean"] = Field(
        "mean", description="KL divided by batch and classes (released code), or by the batch"
    )
    terms: dict[str, float] = Field({}, description="further terms of the loss by name, and their weights")
    fixed_bns: bool = Field(True, description="keep the teacher's BN statistics in Q; its gamma and beta are trained")


class ScheduleConfig(Section):
    """Algorithm 1: how long, in which order."""

    epochs: int = Field(400, ge=1)
    iterations: int = Field(200, ge=1, description="per epoch; one iteration = a step of G and a step of Q")
    batch_size: int = Field(200, ge=2)
    warmup_epochs: int = Field(4, ge=1, description="G alone is trained")
    generator_epochs: int | None = Field(
        None, ge=1, description="epochs in which G is trained, after which Q goes on with it as it is; without it, all"
    )
    range_epochs: int = Field(4, ge=1, description="first epochs, in which the activation ranges are observed")
    reestimate_ranges: bool = Field(True, description="observe the ranges again, with the trained G, when warm-up ends")
    range_batches: int = Field(50, ge=1, description="batches that a re-estimation or calibration looks at")
    compare_with_calibration: bool = Field(
        True,
        description="from 6 bits on in all layers, keep calibration where it is better on held-out synthetic images",
    )
    milestones: tuple[int, ...] = Field(
        (100, 200, 300), description="epochs at which both learning rates are multiplied"
    )
    decay: float = Field(0.1, gt=0, le=1)

    @property
    def range_images(self) -> int:
        """How many images a re-estimation or calibration looks at."""
        return self.range_batches * self.batch_size


class CalibrationConfig(Section):
    """Images that the baselines calibrate on where no real ones are given."""

    images: str = Field(
        "gaussian",
        description="a source, as images.source has them; of one with a generator, that was trained for "
        "schedule.warmup_epochs",
    )
    count: int | None = Field(
        None,
        ge=1,
        description="how many images, real ones too (of a bank: all); default: schedule.range_batches of "
        "schedule.batch_size",
    )


class RunConfig(Section):
    """Where and how a run is carried out."""

    seed: int = 0
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    workers: int | None = Field(
        None, ge=0, description="processes that decode image files ahead; default: one for each CPU, at most 8"
    )
    channels_last: bool = Field(True, description="memory format of the images and convolution weights")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="of the convolutions and linear layers of all three networks in training (tf32 on a GPU only); "
        "statistics, quantizers and losses stay float32, and so does every figure that is reported",
    )
    cuda_graph: bool | Literal["auto"] = Field(
        "auto", description="each phase's iteration is captured as a CUDA graph and replayed; auto: on a GPU"
    )
    checkpointing: bool = Field(False, description="activations of P and G are computed again in backward, not kept")
    compile: bool = Field(False, description="torch.compile the forward passes and losses of both steps")
    log_every: int = Field(20, ge=1, description="iterations between two entries of the log")
    checkpoint_every: int = Field(200, ge=1, description="iterations between two checkpoints")
    held_out_images: int = Field(
        512, ge=2, description="synthetic images behind the data-free figures (of a bank: a part)"
    )


class Config(Section):
    """Everything that decides a run. See the sections for each value; methods may have sections of their own."""

    method: str = Field("reconstruction", description="how the model is quantized")
    model: ModelConfig = ModelConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    images: ImagesConfig = ImagesConfig()
    generator: GeneratorConfig = GeneratorConfig()
    student: StudentConfig = StudentConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    run: RunConfig = RunConfig()

    @property
    def calibration_images(self) -> int:
        """How many images a method without training calibrates on."""
        return self.calibration.count or self.schedule.range_images

    if TYPE_CHECKING:  # sections that others have added

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def load(
        cls, preset: str | Path | None = None, overrides: dict[str, Any] | None = None, effort: str = DEFAULT_EFFORT
    ) -> "Config":
        """Read a preset by name (see `presets()`) or a TOML file by path, then apply `{"section.key": value}`.

        Args:
            effort: `default`, the preset as it is, or an effort of it, as `fast` and `best`; made for its method alone.

        Raises:
            GdfqError: unknown preset, effort or key, unreadable file, value out of range; all of them in one message.
        """
        tree = _read(preset) if preset is not None else {}
        efforts = {DEFAULT_EFFORT: {}} | _take_efforts(tree, overrides or {})
        if effort not in efforts:
            method = (overrides or {}).get("method", _method(tree))
            raise GdfqError(
                f"preset '{preset}' has no effort '{effort}' for the method '{method}'; it has: {', '.join(efforts)}"
            )
        tree = _merge(tree, efforts[effort])
        for key, value in (overrides or {}).items():
            *path, leaf = key.split(".")
            section = tree
            for name in path:
                section = section.setdefault(name, {})
                if not isinstance(section, dict):
                    raise GdfqError(f"setting '{key}': '{name}' is a value, not a section")
            section[leaf] = value
        try:
            config = _with_all_sections().model_validate(tree)
        except ValidationError as error:
            raise GdfqError(explained(error, _with_all_sections())) from None
        _check_names(config)
        for check in CHECKS:
            check(config)
        return config

    def to_toml(self) -> str:
        """The whole configuration; `Config.load(path)` reads it back."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _with_all_sections() -> type[Config]:
    """`Config` with the sections that others have added: one class, since settings of two are never equal."""
    return _with_sections(tuple(SECTIONS.items()))


@functools.cache
def _with_sections(sections: tuple[tuple[str, type[Section]], ...]) -> type[Config]:
    return create_model("Config", __base__=Config, **{name: (kind, kind()) for name, kind in sections})


def _check_names(config: Config) -> None:
    for registry in ALL:
        for setting in registry.settings:
            unknown = registry.unknown(operator.attrgetter(setting)(config))
            if unknown:
                raise GdfqError(
                    f"setting '{setting}': there is no {' and no '.join(map(repr, unknown))}; there are: "
                    + (", ".join(registry) or "none")
                )


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _preset_folder().iterdir() if file.name.endswith(".toml"))


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value` as the command line gives it; the value is TOML or, where that fails, a plain string."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise GdfqError(f"setting '{text}' is not of the form section.key=value, for example schedule.epochs=10")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _preset_folder() -> Traversable:
    return resources.files("gdfq.presets")


def _read(preset: str | Path) -> dict[str, Any]:
    name = str(preset)
    if name in presets():
        file = _preset_folder().joinpath(f"{name}.toml")
    elif Path(preset).is_file():
        file = Path(preset)
    else:
        raise GdfqError(f"'{name}' is neither a preset ({', '.join(presets())}) nor a TOML file")
    tree = _toml(file)
    name = tree.pop("extends", None)
    if not name:
        return tree
    base = _read(name)
    return _merge(base | {"effort": _take_efforts(base, tree)}, tree)


def _take_efforts(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of a preset, which has none any more; none where `changes` take another method than it was made for."""
    efforts = tree.pop("effort", {})
    if not isinstance(efforts, dict) or not all(isinstance(changed, dict) for changed in efforts.values()):
        raise GdfqError("'effort' holds tables of settings by name, as [effort.fast.inversion]")
    if DEFAULT_EFFORT in efforts:
        raise GdfqError(f"effort '{DEFAULT_EFFORT}' is a preset as it is: give [effort.{DEFAULT_EFFORT}] another name")
    return efforts if changes.get("method", _method(tree)) == _method(tree) else {}


def _method(tree: dict[str, Any]) -> str:
    return tree.get("method", Config.model_fields["method"].default)


def _toml(file: Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise GdfqError(f"{file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GdfqError(f"{file} is not valid TOML: {error}") from None


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _merge(base[k], v) for k, v in change.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **change, **nested}


def explained(error: ValidationError, section: type[Section], prefix: str = "") -> str:
    """What is wrong with the settings of a section, a line each; `prefix`: what stands before their names."""
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"] if isinstance(part, str) and part not in ("int", "tuple")]
        name = prefix + ".".join(path)
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown setting '{name}'; there {_known(section, problem['loc'][:-1])}")
        else:
            lines.append(f"setting '{name}' = {json.dumps(problem['input'], default=str)}: {problem['msg'].lower()}")
    return "\n".join(dict.fromkeys(lines))


def _known(section: Any, path: tuple) -> str:
    for name in path:
        fields = getattr(section, "model_fields", None)  # none: a dict of sections
        section = get_args(section)[-1] if fields is None else fields[name].annotation
    return "are: " + ", ".join(section.model_fields)
