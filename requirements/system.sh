#!/usr/bin/env bash
# Debian's packages that the whole test run needs besides Python: Slurm for tests/slurm, shellcheck for the shell files. As
# root; where they are there it does nothing.
set -euo pipefail

missing=()
needs() { command -v "$1" > /dev/null || missing+=("$2"); }
needs slurmctld slurmctld
needs slurmd slurmd
needs sbatch slurm-client
needs munged munge
needs shellcheck shellcheck
needs ip iproute2
needs ps procps
if [ ${#missing[@]} -gt 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install -y --no-install-recommends "${missing[@]}" > /dev/null
fi
