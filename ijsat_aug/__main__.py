"""``python -m ijsat_aug`` is the command line."""

from .cli import app

app()
