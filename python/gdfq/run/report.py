"""What a run has to say for itself: figures, the summary of what was quantized, versions; as text, JSON, picture."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gdfq.config import Config
from gdfq.evaluate import Agreement
from gdfq.fit import Fit
from gdfq.graph import Pixels, Summary
from gdfq.provenance import versions
from gdfq.run.pictures import new_figure, save_figure
from gdfq.target import target_of


@dataclass
class Report:
    """Figures of one run.

    Attributes:
        config: what the run was told.
        summary: what was quantized and what stayed float, and why.
        pixels: what the model's images were taken to be like.
        data_free: Q against P on held-out synthetic images, after the last epoch.
        fit: how well these images fit the network, and so what `data_free` is worth.
        choice: the epoch that the agreement on those images would have chosen, and its figures; None without
            training.
        float_bytes, quantized_bytes: size of the parameters before and after.
        seconds: wall time of the quantization.
        selected: `trained`, or `calibrated`: by a method without training, or by `gdfq` where plain calibration was
            better by the data-free criterion.
        iterations: `eager`, `graph`, or why they were eager though a graph was asked for (see `gdfq.train.cuda_graph`).
        top1: on real data that the user gave, percent: `float`, `quantized` and, where there is a data-free choice,
            `choice`. Nothing was chosen by it.
        images: how real images that were given were prepared, by what they were for.
        versions: of Python, torch and this package, and the device.
    """

    config: Config
    summary: Summary
    pixels: Pixels
    data_free: Agreement
    fit: Fit
    float_bytes: int
    quantized_bytes: int
    seconds: float
    choice: tuple[int, Agreement] | None = None
    selected: str = "trained"
    iterations: str = "eager"
    top1: dict[str, float] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def warnings(self) -> list[str]:
        """Why the data-free figures, or the result, may be worth nothing."""
        doubts = [self.pixels.doubt] if self.pixels.doubt else []
        return doubts + [f"the data-free figures say nothing: {problem}" for problem in self.fit.problems]

    def to_dict(self) -> dict:
        """Nested dicts, lists, numbers and text, fit for JSON."""
        result = {name: value for name, value in vars(self).items() if name not in ("config", "summary")}
        result |= {name: asdict(getattr(self, name)) for name in ("pixels", "data_free", "fit")}
        result["warnings"] = self.warnings
        if self.choice is not None:
            epoch, figures = self.choice
            result["choice"] = {"epoch": epoch, **asdict(figures)}
        return {"config": self.config.model_dump(mode="json"), **result, "summary": self.summary.to_dict()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        quantizer = self.config.quantizer
        lines = [
            f"method       {self.config.method}, W{quantizer.weight_bits}A{quantizer.activation_bits}, "
            f"target '{target_of(quantizer).name}', {self.seconds:.0f} s on {self.versions['device']}",
            str(self.summary),
            f"size         {self.float_bytes / 1e6:.2f} MB in float32, {self.quantized_bytes / 1e6:.2f} MB packed",
            f"pixels       {self.pixels}",
            f"data-free    {_figures(self.data_free)} ({self.data_free.images} held-out synthetic images)",
            f"             {self.fit}",
        ]
        if self.iterations != "eager":
            lines.insert(1, f"iterations   {self.iterations}")
        if self.selected == "calibrated" and self.config.method == "gdfq":
            lines.append("             plain calibration was better than training by this criterion, and was kept")
        if self.choice is not None:
            epoch, figures = self.choice
            lines.append(f"             the criterion would have chosen epoch {epoch}: {_figures(figures)}")
        if self.top1:
            names = {"float": "float", "quantized": "quantized", "choice": "at the criterion's choice"}
            lines.append(
                "top-1        " + ", ".join(f"{names[name]} {value:.2f}%" for name, value in self.top1.items())
            )
        lines += [f"images       for {purpose}: {prepared}" for purpose, prepared in self.images.items()]
        lines += [f"WARNING      {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _figures(figures: Agreement) -> str:
    return f"Q agrees with P on {figures.top1:.1f}%, KL {figures.kl:.4f}"


def save_picture(path: str | Path, rows: list[Tensor], names: list[str]) -> None:
    """A PNG with one row of images per class.

    Args:
        rows: per class images `(n, C, H, W)` in any range; each is stretched to its own minimum and maximum. Three
            channels and more are red, green and blue, one or two are shown as their mean.
        names: one per row.
    """
    columns = max(len(row) for row in rows)
    _, height, width = rows[0].shape[1:]
    gap = max(1, height // 16)
    mosaic = torch.ones(len(rows) * (height + gap), columns * (width + gap), 3)
    for i, row in enumerate(rows):
        for j, image in enumerate(row.cpu().float()):
            low, high = image.min(), image.max()
            pixels = ((image - low) / (high - low).clamp_min(1e-6)).permute(1, 2, 0)
            pixels = pixels.mean(2, keepdim=True) if pixels.shape[2] < 3 else pixels[..., :3]
            top, left = i * (height + gap), j * (width + gap)
            mosaic[top : top + height, left : left + width] = pixels
    inches = 1.5 + columns * 0.7  # the names take the first part
    figure = new_figure(figsize=(inches, len(rows) * 0.75))
    axis = figure.add_axes((1.5 / inches, 0.01, 0.99 - 1.5 / inches, 0.98))
    axis.imshow(mosaic.numpy())
    axis.spines[:].set_visible(False)
    axis.set_xticks([])
    axis.set_yticks([i * (height + gap) + height / 2 for i in range(len(rows))], names)
    axis.tick_params(length=0)
    save_figure(figure, path)
