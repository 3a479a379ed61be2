"""The benchmarks' data: image sets, regression sets, and where their original files come from."""
