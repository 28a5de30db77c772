"""A command as a process: its flags and streams, one line for what cannot run, what its exit code says."""
