"""Ray: placement, worker processes, the resource manager and launch. The only folder that imports ray."""
