"""Every stored result as one page, and the tables and figures of README and docs. `python benchmarks/report.py --help` lists the options."""

import sys

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "report", *sys.argv[1:]])
