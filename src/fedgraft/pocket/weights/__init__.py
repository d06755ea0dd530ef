"""The embedded family: `base` and `instruct`, two real checkpoints that ship with fedgraft."""

from pathlib import Path

folder = Path(__file__).parent
"""The directory that holds `base` and `instruct`."""
