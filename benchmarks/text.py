"""Intents of short queries, and queries out of scope. `python benchmarks/text.py --help` lists the options."""

import sys

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "text", *sys.argv[1:]])
