"""The commands: mst-train, mst-plan, mst-preflight, mst-export and mst-scale, a module for each."""
