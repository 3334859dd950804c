"""Options: how they are given, checked, and what each one reaches."""
