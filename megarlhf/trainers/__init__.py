"""The loops and the objectives."""
