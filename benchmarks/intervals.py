"""Coverage of intervals by simulation. `python benchmarks/intervals.py --help` lists the options."""

import argparse

from bayesguard.benchmarks.intervals import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="data sets of each setting")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the resamples")
    parser.add_argument("--out", default="benchmarks/results", help="folder for the results")
    options = parser.parse_args()
    run(runs=options.runs, seed=options.seed, out=options.out)
