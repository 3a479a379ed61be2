"""Speed, beside a plain loop and other libraries. `python benchmarks/speed.py --help` lists the options."""

import sys
from pathlib import Path

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "speed", "--out", str(Path(__file__).parent / "results"), *sys.argv[1:]])
