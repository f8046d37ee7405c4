"""Check that a wheel and an sdist hold every file of cuobs and cuobs_cli, and a wheel no others."""

import sys
import tarfile
import zipfile
from pathlib import Path

FOLDERS = {"cuobs": "cuobs", "cli": "cuobs_cli"}
KINDS = {".py", ".cu", ".cuh", ".typed"}


def expected(wheel):
    """The files of the packages, by the names that an archive gives them."""
    for folder, package in FOLDERS.items():
        for path in Path(folder).rglob("*"):
            if path.suffix in KINDS:
                name = path.relative_to(folder).as_posix()
                yield f"{package if wheel else folder}/{name}"


for archive in sys.argv[1:]:
    wheel = archive.endswith(".whl")
    if wheel:
        names = set(zipfile.ZipFile(archive).namelist())
        top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith("-info")}
        if top != {"cuobs", "cuobs_cli"}:
            sys.exit(f"{archive}: found the top-level names {sorted(top)}, expected cuobs's two")
    else:
        # An sdist has one folder above everything.
        names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    wanted = set(expected(wheel))
    if missing := wanted - names:
        sys.exit(f"{archive}: {sorted(missing)} are missing")
    print(f"{Path(archive).name}: {len(names)} files, the {len(wanted)} of the packages among them")
