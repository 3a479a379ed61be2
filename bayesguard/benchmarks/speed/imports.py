"""What `import bayesguard` adds to `import torch`, and the first predictor to that, in CPU seconds of fresh interpreters."""

import subprocess
import sys

from bayesguard.benchmarks.speed.measure import Spread
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row

_CODE = """
import time, torch
start = time.process_time()
import bayesguard
imported = time.process_time()
bayesguard.MCDropout
print(imported - start, time.process_time() - imported)
"""


def rows(settings: Settings) -> list[Row]:
    """Time the import; a first one writes the byte code."""
    seconds()
    taken = [seconds() for _ in range(1 if settings.quick else 9)]
    package, first_use = (Spread.of(column) for column in zip(*taken, strict=True))
    name = "import bayesguard after import torch"
    return [
        Row("import", name, package, must=0.15, aim=0.05, unit="s"),
        Row("import", "first use of MCDropout after that", first_use, unit="s"),
    ]


def seconds() -> tuple[float, float]:
    """Return the CPU seconds of one import in a fresh interpreter, and of the first use of a predictor."""
    found = subprocess.check_output([sys.executable, "-c", _CODE], text=True).split()
    return float(found[0]), float(found[1])
