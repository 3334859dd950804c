"""Data: the records that cross between phases, reading them from files, templates, and packing into micro-batches."""
