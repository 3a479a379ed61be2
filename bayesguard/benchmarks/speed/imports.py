"""What `import bayesguard` adds to `import torch`, in CPU seconds of fresh interpreters."""

import subprocess
import sys

from bayesguard.benchmarks.speed.measure import Spread
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row

_CODE = "import time, torch; a = time.process_time(); import bayesguard; print(time.process_time() - a)"


def rows(settings: Settings) -> list[Row]:
    """Time the import; a first one writes the byte code."""
    seconds()
    taken = [seconds() for _ in range(1 if settings.quick else 9)]
    name = "import bayesguard after import torch"
    return [Row("import", name, Spread.of(taken), must=0.15, aim=0.05, unit="s")]


def seconds() -> float:
    """Return the CPU seconds of one import in a fresh interpreter."""
    return float(subprocess.check_output([sys.executable, "-c", _CODE], text=True))
