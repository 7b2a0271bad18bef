"""Imported by the server that runs are forked from: what each of them would otherwise import and work out anew."""

import contextlib
import io
import os
from pathlib import Path

from step3vl import cli, parallel, stages

from .processes import RUN

IMPORTED = (parallel, stages)

with contextlib.chdir(Path(__file__).parents[2]), contextlib.redirect_stdout(io.StringIO()):
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.suppress(SystemExit):
        cli.main(["fit", *RUN.split(), "--print_config"])  # signatures and docstrings are read once
