"""Coverage of intervals by simulation. `python benchmarks/intervals.py --help` lists the options."""

import sys
from pathlib import Path

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "intervals", "--out", str(Path(__file__).parent / "results"), *sys.argv[1:]])
