"""Sphinx: the site is built with warnings as errors."""

import bayesguard

project = "bayesguard"
author = "The bayesguard authors"
copyright = "2026, the bayesguard authors"
release = version = bayesguard.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"bayesguard {release}"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
suppress_warnings = ["config.cache"]
