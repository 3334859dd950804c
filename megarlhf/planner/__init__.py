"""Pure arithmetic about a run, done and printed before any process starts."""
