"""What every run needs and no method owns: flags, runs, data, checkpoints, networks."""
