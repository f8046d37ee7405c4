"""How Sphinx builds these pages: sphinx-build -W docs docs/_build."""

import cuobs

project = "cuobs"
author = "The cuobs developers"
copyright = "The cuobs developers"
version = release = cuobs.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/README.rst"]
default_role = "obj"
html_theme = "furo"
html_static_path = []
autosummary_generate = True
autodoc_typehints = "none"
numpydoc_show_class_members = False
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"/plot_",
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 10**6,
}
