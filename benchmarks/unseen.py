"""Calibration on unseen kinds of shift. `python benchmarks/unseen.py --help` lists the options."""

import sys

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "unseen", *sys.argv[1:]])
