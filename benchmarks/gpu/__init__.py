"""The sections of `benchmarks.gpu_session`: all that is claimed of a GPU, measured in one process within minutes."""
