"""What `import bayesguard` adds to `import torch`: median over fresh interpreters, with the range."""

import statistics
import subprocess
import sys

REPEATS = 9
CODE = "import time, torch; a = time.perf_counter(); {statement}; b = time.perf_counter(); print(b - a)"


def seconds(statement: str) -> list[float]:
    """Return the seconds that `statement` takes after `import torch`, in fresh interpreters."""
    command = [sys.executable, "-c", CODE.format(statement=statement)]
    return [float(subprocess.check_output(command, text=True)) for _ in range(REPEATS)]


if __name__ == "__main__":
    seconds("import bayesguard")  # writes the byte code
    taken = seconds("import bayesguard")
    print(f"import bayesguard after import torch: median {statistics.median(taken):.3f} s")
    print(f"{REPEATS} interpreters, from {min(taken):.3f} to {max(taken):.3f} s; the aim is 0.15 s at most")
