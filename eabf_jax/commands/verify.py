"""`eabf verify`: compares the files of runs, checkpoints and model directories with their checksums."""

import argparse
import sys
from pathlib import Path

from eabf_jax.checksums import CHECKSUMS, Checked, check
from eabf_jax.errors import InputError
from eabf_jax.interop.native import CHECKPOINTS

EPILOG = """\
Checks every checksums.json below the directory: each checkpoint of a run, a converted model, an exported model, or one
checkpoint alone. Prints a line for each damaged or missing file and ends with status 2 if there is any.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", metavar="DIR", help="a run, a checkpoint, or a model directory")


def run(arguments: argparse.Namespace) -> None:
    """Verifies the directory, and prints what was compared.

    Raises:
      InputError: files are damaged or missing, or the directory has nothing to compare.
    """
    directory = Path(arguments.directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    checked, without = verify(directory)
    for fault in checked.faults:
        print(fault, file=sys.stderr)
    for folder in without:
        print(f"{folder}: not compared, because it has no {CHECKSUMS} (earlier releases wrote none)", file=sys.stderr)
    compared = f"{checked.files:,} files ({checked.bytes / 1e6:,.1f} MB) were compared with their checksums"
    if checked.faults:
        raise InputError(f"{directory}: {len(checked.faults):,} damaged or missing; {compared}")
    if not checked.files:
        raise InputError(f"{directory}: nothing to compare, neither a {CHECKSUMS} in it nor below it")
    print(f"{directory}: no damage; {compared}")


def verify(directory: Path) -> tuple[Checked, list[Path]]:
    """Compares all files below a directory that have checksums with them.

    Checkpoints that were set aside as damaged (`<step>.damaged`) are left out, unless the directory is one.

    Returns:
      What was found, and the folders of checkpoints that have no checksums.
    """
    faults, without, files, size = [], [], 0, 0
    below = [path.relative_to(directory) for path in sorted(directory.rglob("*"))]
    own = [directory / path for path in below if not any(part.endswith(".damaged") for part in path.parts)]
    steps = [path for path in (directory, *own) if path.parent.name == CHECKPOINTS and path.name.isdecimal()]
    for step in steps:
        items = [item for item in sorted(step.iterdir()) if item.is_dir()]
        without += [item for item in items if not (item / CHECKSUMS).is_file()]
        if step / "params" not in items:
            faults.append(f"{step / 'params'}: missing")
    for path in own:
        if path.name == CHECKSUMS and (checked := check(path.parent)) is not None:
            files, size = files + checked.files, size + checked.bytes
            faults += checked.faults
    return Checked(files, size, tuple(faults)), without
