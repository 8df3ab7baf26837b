"""Data-free quantization of CNNs: a trained network in, a low-bit network out, no data.

    result = gdfq.quantize(model)
    print(result.report)

`quantize` says what it takes, `Config` which settings there are.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

try:
    import gdfq_ext  # noqa: F401
except (ImportError, ValueError) as error:
    # Python comes here before any code of the command line's own: `gdfq`, or -m as in `python -m gdfq.demo`.
    if "GDFQ_EXT" in str(error) and Path(*sys.argv[:1]).name in ("gdfq", "-m"):
        print(f"gdfq: {error}", file=sys.stderr)
        sys.exit(2)
    raise

from gdfq.api import Result, quantize
from gdfq.config import Config, parse_override
from gdfq.deploy.export import export
from gdfq.deploy.standard import to_standard
from gdfq.errors import GdfqError
from gdfq.evaluate import evaluate
from gdfq.models import load_model
from gdfq.run.folder import load_quantized, save_quantized
from gdfq.run.training_run import Stopped

__all__ = [
    "Config",
    "GdfqError",
    "Result",
    "Stopped",
    "__version__",
    "evaluate",
    "export",
    "load_model",
    "load_quantized",
    "parse_override",
    "quantize",
    "save_quantized",
    "to_standard",
]
