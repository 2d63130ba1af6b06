"""Prints docs/models.md."""

import sys

from tests.families.page import page

sys.stdout.write(page())
