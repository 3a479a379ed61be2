"""Human labels of CIFAR-10. `python benchmarks/noise.py --help` lists the options."""

import sys

from bayesguard.cli import main

if __name__ == "__main__":
    main(["benchmark", "noise", *sys.argv[1:]])
