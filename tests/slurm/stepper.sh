#!/bin/bash
# A launcher of the run that test_cluster.py submits.
exec "$PYTHON" tests/slurm/stepper.py "$@"
