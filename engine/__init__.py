"""Where work runs: sweep files, the task graph, Ray Tune, actor pools, the store, the command line."""
