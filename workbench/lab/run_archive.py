"""A run as one zip file, `<id>/manifest.json` and so on: how runs travel between people.

An archive is text from somebody else: only the files that a run has are taken out of it, under their own names, and the run is checked
byte by byte before the store shows it.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from datetime import datetime
from pathlib import Path
from typing import IO

from workbench.lab.run_folder import Run, inside
from workbench.lab.run_format import FIGURE_NAME, MANIFEST_LIMIT, RUN_ID, RunError

MEMBER = re.compile(rf"({RUN_ID.pattern})/(manifest\.json|arrays\.safetensors|figures/{FIGURE_NAME.pattern})")
SPARE_BYTES = 2**28
"""Left free on the disk when a run is taken in."""


def write(run: Run, file: IO[bytes]) -> None:
    """Write the run into a binary file object."""
    moment = datetime.fromisoformat(run.created).timetuple()[:6]
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("manifest.json", "arrays.safetensors", *(f"figures/{figure}" for figure in run.figures())):
            member = zipfile.ZipInfo(f"{run.id}/{name}", date_time=moment)
            # Arrays of floats hardly shrink; the manifest is text and does.
            member.compress_type = zipfile.ZIP_STORED if name.endswith(".safetensors") else zipfile.ZIP_DEFLATED
            member.external_attr = 0o600 << 16
            source = inside(run.path, name)
            member.file_size = source.stat().st_size
            with source.open("rb") as reader, archive.open(member, "w") as writer:
                shutil.copyfileobj(reader, writer, 2**20)


def run_id(archive: zipfile.ZipFile) -> str:
    """The id of the run in an archive. RunError, naming the member, for anything but the files of one run."""
    found = {}
    for member in archive.infolist():
        match = MEMBER.fullmatch(member.filename)
        if match is None:
            raise RunError(
                f"the archive holds {member.filename[:80]!r}; expected the files of one run: <id>/manifest.json, "
                "<id>/arrays.safetensors and <id>/figures/…"
            )
        found[member.filename] = match[1]
    ids = sorted(set(found.values()))
    if len(ids) != 1:
        raise RunError(f"the archive holds {len(ids)} runs, expected one" + (f": {', '.join(ids[:5])}" if ids else ""))
    if len(found) != len(archive.infolist()):
        raise RunError("the archive holds a file twice")
    return ids[0]


def unpack(archive: zipfile.ZipFile, into: Path) -> Run:
    """Write the files of the run in an archive into the new folder `into/<id>`, and read every byte of it.

    RunError when the archive is damaged, is no run, or needs more than the free space of the disk.
    """
    folder = into / run_id(archive)
    members = archive.infolist()
    needed, free = sum(member.file_size for member in members), shutil.disk_usage(into).free
    if needed > free - SPARE_BYTES:
        raise RunError(
            f"the run takes {needed / 1e6:.0f} MB; the disk has {max(0, free - SPARE_BYTES) / 1e6:.0f} MB to spare"
        )
    (folder / "figures").mkdir(mode=0o700, parents=True)
    try:
        for member in members:
            if member.filename.endswith("/manifest.json") and member.file_size > MANIFEST_LIMIT:
                raise RunError(f"{member.filename} has {member.file_size} bytes, expected at most {MANIFEST_LIMIT}")
            with archive.open(member) as reader, (into / member.filename).open("xb") as writer:
                shutil.copyfileobj(reader, writer, 2**20)
    except (
        zipfile.BadZipFile,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:  # the last two: a method, a password
        raise RunError(f"the archive is damaged or of a kind that is not read here: {error}") from error
    run = Run(folder)
    run.verify()
    strangers = sorted(path.name for path in (folder / "figures").iterdir() if path.name not in run.figures())
    if strangers:
        raise RunError(f"the archive holds figures that the run does not name: {', '.join(strangers[:5])}")
    return run
