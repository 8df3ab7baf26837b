"""What Q says when it leaves for a place that may have no `gdfq`."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.errors import GdfqError

_WAYS = "gdfq.to_standard(model) gives plain PyTorch operators, gdfq.export an ONNX file"


class Leaving(nn.Module):
    """Called with the images ahead of everything else. Saved, traced or exported, the model is right wherever `gdfq` is
    imported, and a warning says so; for what cannot work an error does."""

    _is_impure = True  # its call has no result that anyone reads, and stays in the graph

    def forward(self, x: Tensor) -> None:
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if torch.onnx.is_in_onnx_export():
            unknown = (
                "torch.onnx.export does not know the operators of a quantized model: gdfq.export writes it to ONNX"
            )
            if is_traced:
                raise GdfqError(unknown)
            warnings.warn(unknown, stacklevel=2)  # this exporter catches errors, tries another way, and fails later
        elif is_traced or torch.compiler.is_exporting():
            warnings.warn(f"the traced model needs `import gdfq` wherever it is loaded: {_WAYS}", stacklevel=2)

    def __reduce__(self) -> Any:
        warnings.warn(
            f"the pickled model needs gdfq, and `weights_only=False`, wherever it is loaded: {_WAYS}; "
            "gdfq.save_quantized keeps a model for gdfq.load_quantized",
            stacklevel=2,
        )
        return Leaving, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Leaving":
        return Leaving()
