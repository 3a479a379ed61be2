"""Stored results: as one page, and as the tables of README and docs."""
