"""How fast everything is, beside the plain loop, beside other libraries, and beside what the arithmetic allows.

`bayesguard.benchmarks.speed.runner.run` runs it; `bayesguard benchmark speed` is the same on the command line.
"""
