"""Programs for hardware that is not attached: topologies, HLO, FLOPs."""
