"""Calibration on shifted data. `python benchmarks/shift.py --help` lists the options."""

import sys

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "shift", *sys.argv[1:]])
