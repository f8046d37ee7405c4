"""Check what a wheel and an sdist hold: the kernels, and cuobs and cuobs_cli alone."""

import sys
import tarfile
import zipfile
from pathlib import Path

expected = {str(path) for path in Path("cuobs").rglob("*.cu*")}
for archive in sys.argv[1:]:
    if archive.endswith(".whl"):
        names = set(zipfile.ZipFile(archive).namelist())
        top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith("-info")}
        if top != {"cuobs", "cuobs_cli"}:
            sys.exit(f"{archive}: found the top-level names {sorted(top)}, expected cuobs's two")
        cli = "cuobs_cli/__init__.py"
    else:
        # An sdist has one folder above everything.
        names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
        cli = "cli/__init__.py"
    if missing := expected - names:
        sys.exit(f"{archive}: {sorted(missing)} are missing")
    if cli not in names:
        sys.exit(f"{archive}: the command line is missing")
    print(f"{Path(archive).name}: {len(names)} files, {len(expected)} kernel sources among them")
