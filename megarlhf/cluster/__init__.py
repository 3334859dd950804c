"""Worker processes, the resource manager and launch. The only folder that imports ray, or makes workers without it."""

import os

# Ray reads these when it is imported: clusters open to their token alone, no usage reports, and workers that compute at
# the driver's priority (Ray would make them the most patient processes of the machine).
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
