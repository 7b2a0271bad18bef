"""Runs that are killed, stopped, starved of disk or lied to, in real processes behind the command line."""
