"""UCI regression beside published numbers. `python benchmarks/uci.py --help` lists the options."""

import sys

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "uci", *sys.argv[1:]])
