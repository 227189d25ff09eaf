"""How the documentation is built: `python -m sphinx -W --keep-going -b html docs docs/_build/html`, without a network."""

import sys
from importlib.metadata import version as _version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "jaxprune"
author = "The jaxprune authors"
copyright = "The jaxprune authors, Apache 2.0"
version = release = _version("jaxprune")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
    "public_names",
]
source_suffix = {".md": "myst-nb"}
exclude_patterns = ["_build"]
nitpicky = True  # a link that leads nowhere is a warning, and the check has warnings as errors
nitpick_ignore_regex = [("py:.*", r"(?!jaxprune\b).*")]  # what other libraries name is not looked up over the network

napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]  # a list, as that of arguments
autodoc_typehints = "none"  # the docstrings say shapes and dtypes
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "public"  # of docstrings: a name in single backticks is a link where it is public
maximum_signature_line_length = 88
add_function_parentheses = False
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # a notebook is run again when its code has changed
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "jaxprune"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "use_download_button": True,
    "navbar_persistent": [],  # the search stands in the sidebar
}
