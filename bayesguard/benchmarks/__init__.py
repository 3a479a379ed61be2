"""Benchmarks that anyone can run: `bayesguard benchmark shift --data digits`."""
