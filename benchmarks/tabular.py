"""Real tables under natural shift. `python benchmarks/tabular.py --help` lists the options."""

import sys

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "tabular", *sys.argv[1:]])
