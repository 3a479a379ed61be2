"""Adversarial perturbations of rising radius. `python benchmarks/adversarial.py --help` lists the options."""

import sys

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "adversarial", *sys.argv[1:]])
