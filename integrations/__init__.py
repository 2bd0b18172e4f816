"""One room a framework; each imports its framework only when it is itself imported."""
