"""What ends a run, and how ranks end together: signals, dead ranks, the error that a rank names."""
