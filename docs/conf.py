"""Sphinx settings."""

import sys
from pathlib import Path

import sparing

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "Sparing"
author = "The Sparing authors"
copyright = "The Sparing authors, Apache-2.0"
release = version = sparing.__version__

extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sparing_docs"]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = "Sparing"

# A type such as bytes is also the name of several fields; which of them a link would mean is of no interest.
suppress_warnings = ["ref.python"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

apidoc_modules = [
    {
        "path": "../src/sparing",
        "destination": "api",
        "separate_modules": False,
        "module_first": True,
        "max_depth": 3,
    }
]
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shapes", "params_style")]
autodoc_default_options = {
    "ignore-module-all": True,  # a name that a package re-exports is documented once, at home
    "exclude-members": "set_score_request",  # scikit-learn's, whose text refers to its own pages
}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
