"""The loops and, one short file each, the objectives."""
