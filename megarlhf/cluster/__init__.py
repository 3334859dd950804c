"""Ray: placement, worker processes, the resource manager and launch. The only folder that imports ray."""

import os

# Ray reads these when it is imported: clusters open to their token alone, and no usage reports.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
