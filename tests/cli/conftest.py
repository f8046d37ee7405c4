"""The commands of whole models are tested where the extra ``model`` is installed."""

from extras import MODEL

if not MODEL:
    collect_ignore_glob = ["test_models_*.py", "test_view.py"]
