"""Telling images of another kind from test data. `python benchmarks/ood.py --help` lists the options."""

import sys

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "ood", *sys.argv[1:]])
