"""Ablation tables: a folder is a table, a YAML file is a row (a base plus a delta), a run is a row with a seed."""

from .rows import Row, print_diff, print_tables, read_rows
from .run import run_table
from .table import print_table

__all__ = ["Row", "print_diff", "print_table", "print_tables", "read_rows", "run_table"]
